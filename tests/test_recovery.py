"""Runs that are made to go wrong: the alarm, the way back, and what is learnt in the end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dinosearch.pretrain.course as course_module
from dinosearch.errors import DinosearchError
from dinosearch.pretrain.alarm import Alarm, Watch
from dinosearch.pretrain.checkpoint import last_checkpoint
from dinosearch.pretrain.config import TrainConfig
from dinosearch.pretrain.course import TrainReport
from dinosearch.pretrain.plan import Plan
from dinosearch.pretrain.recipe import momentum_for
from dinosearch.pretrain.train import train
from dinosearch.vit.folder import open_model

N = 200
STEPS = 200
SMALL: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "local_size": 8,
    "arch_kwargs": {"embed_dim": 64, "depth": 2, "num_heads": 2},
    "batch_size": 32,
    "out_dim": 256,
    "head_hidden_dim": 128,
    "head_bottleneck_dim": 64,
    "local_crops": 2,
}
PROVOKED: list[tuple[dict[str, float], str]] = [
    ({"teacher_temperature": 0.2, "warmup_teacher_temperature": 0.2}, "teacher temperature 0.2 → 0.04"),
    ({"center_momentum": 0.999}, "center momentum 0.999 → 0.9"),
    ({"lr": 0.1}, "lr 0.1 → "),
]
"""The published ways into a collapse (table 8 of arXiv 2104.14294), and a hundred times the learning rate."""
SLOW_CENTER = PROVOKED[1][0]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("recovery") / "digits"
    folder.mkdir()
    for i, digit in enumerate(load_digits().images[:N]):
        Image.fromarray((digit * 15.9).astype(np.uint8)).resize((16, 16)).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture(autouse=True)
def _often_and_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(course_module, "LOOK_EVERY", 10)
    monkeypatch.setattr(course_module, "MEASURE_EVERY", 20)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def run(images: Path, models: Path, **settings: Any) -> TrainReport:
    overrides = SMALL | settings.pop("overrides", {})
    stop = settings.pop("stop", lambda: False)
    *_, last = train(
        TrainConfig(images=(images,), models=models, device="cpu", overrides=overrides, **settings), stop=stop
    )
    assert last.report is not None
    return last.report


def accuracy(images: Path, model: Path) -> float:
    """Share of the digits whose nearest neighbour is the same digit."""
    from sklearn.datasets import load_digits

    opened = open_model(model)
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(images.iterdir())])
    inputs = (torch.tensor(pixels / 255, dtype=torch.float32)[:, None] - torch.tensor(opened.mean)[:, None, None]) / (
        torch.tensor(opened.std)[:, None, None]
    )
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(opened.load_vit()(inputs), dim=1)
    nearest = (vectors @ vectors.T).fill_diagonal_(-1).argmax(dim=1).numpy()
    labels = load_digits().target[:N]
    return float((labels[nearest] == labels).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "changed"), PROVOKED)
def test_a_provoked_collapse_alarms_and_is_left_behind(
    images: Path, tmp_path: Path, overrides: dict[str, float], changed: str
) -> None:
    run(images, tmp_path, name="untrained", steps=0)
    report = run(images, tmp_path, name="provoked", steps=STEPS, overrides=overrides)
    alarms = report.health["alarms"]
    assert alarms
    assert alarms[0]["kind"] in ("collapse", "divergence")
    assert changed in alarms[0]["changed"]
    assert all(alarm["back_to_step"] < alarm["step"] for alarm in alarms)
    assert report.steps == STEPS
    assert report.health["teacher_kl"] > 0.02
    assert accuracy(images, tmp_path / "provoked") > accuracy(images, tmp_path / "untrained")
    lines = metrics(tmp_path / "provoked")
    assert [line["alarm"] for line in lines if "alarm" in line] == alarms
    assert open_model(tmp_path / "provoked").trained["health"]["alarms"] == alarms


def test_strict_stops_at_the_alarm_and_keeps_the_sound_state(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DinosearchError, match="leave --strict out") as raised:
        run(images, tmp_path, name="a", steps=100, overrides=SLOW_CENTER, strict=True)
    assert raised.value.exit_code == 1
    assert not (tmp_path / "a" / "weights.safetensors").exists()
    kept = last_checkpoint(tmp_path / "a" / "training")
    assert kept is not None
    assert kept.facts["step"] < 100
    assert all(torch.isfinite(tensor).all() for tensor in kept.tensors().values())


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [25, 55])
def test_a_run_stopped_around_an_alarm_ends_like_one_that_was_not(images: Path, tmp_path: Path, stop_at: int) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > stop_at

    run(images, tmp_path, name="whole", steps=70, overrides=SLOW_CENTER)
    half = run(images, tmp_path, name="half", steps=70, overrides=SLOW_CENTER, stop=stop)
    assert half.stopped
    resumed = run(images, tmp_path, name="half", overrides=SLOW_CENTER, resume=True)
    assert resumed.health["alarms"]
    assert open_model(tmp_path / "half").fingerprint == open_model(tmp_path / "whole").fingerprint
    whole, other = (last_checkpoint(tmp_path / name / "training") for name in ("whole", "half"))
    assert whole is not None
    assert other is not None
    assert whole.facts["guard"] == other.facts["guard"]
    assert whole.facts["losses"] == other.facts["losses"]
    expected, found = whole.tensors(), other.tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    looks = [
        {
            line["step"]: line["loss"]
            for line in metrics(tmp_path / name)
            if line.get("step", 1) % 10 == 0 and "loss" in line
        }
        for name in ("whole", "half")
    ]
    assert looks[0] == looks[1]


def test_a_resumed_time_budget_keeps_the_momentum_that_an_alarm_chose(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapt(self: Plan, step: int, *, seconds_per_step: float) -> None:  # noqa: ARG001 - the clock is not asked
        self.total_steps = 40

    alarms = iter([Alarm("collapse", "said the test")])
    monkeypatch.setattr(Plan, "adapt", adapt)
    monkeypatch.setattr(Watch, "judge", lambda *_, **__: next(alarms, None))
    planned, _ = momentum_for(40)
    asked = iter(range(25))
    half = run(images, tmp_path, name="a", minutes=1, stop=lambda: next(asked, None) is None)
    assert (half.stopped, len(half.health["alarms"])) == (True, 1)
    assert open_model(tmp_path / "a").trained["recipe"]["teacher_momentum"] == (1 + planned) / 2
    whole = run(images, tmp_path, name="a", resume=True)
    assert (whole.stopped, whole.steps) == (False, 40)
    assert open_model(tmp_path / "a").trained["recipe"]["teacher_momentum"] == (1 + planned) / 2


@pytest.mark.parametrize("steps", [15, 20])
def test_no_number_is_left_behind_too_and_never_reaches_a_file(images: Path, tmp_path: Path, steps: int) -> None:
    report = run(images, tmp_path, name="a", steps=steps, overrides={"lr": 1e30}, checkpoint_every=0.0)
    assert [alarm["kind"] for alarm in report.health["alarms"]] == ["nan"]
    assert report.loss is not None
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "a" / "weights.safetensors").values())
    assert all(line.get("loss", 0) is None or line.get("loss", 0) < 10 for line in metrics(tmp_path / "a"))


def test_a_run_stopped_amid_infinities_keeps_the_last_sound_state(images: Path, tmp_path: Path) -> None:
    poisoned: list[int] = []
    config = TrainConfig(
        images=(images,), models=tmp_path, name="a", device="cpu", steps=2000, overrides=SMALL, checkpoint_every=0.0
    )
    for progress in train(config, stop=lambda: bool(poisoned)):
        if progress.phase == "training" and progress.done > 12 and progress.teacher is not None:
            with torch.no_grad():
                next(progress.teacher.parameters()).fill_(torch.nan)
            poisoned.append(progress.done)
    assert progress.report is not None
    assert progress.report.stopped
    assert progress.report.steps == poisoned[0] // 10 * 10
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "a" / "weights.safetensors").values())
    kept = last_checkpoint(tmp_path / "a" / "training")
    assert kept is not None
    assert kept.facts["step"] == progress.report.steps


def metrics(model: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (model / "training" / "metrics.jsonl").read_text().splitlines()]
