"""Whole runs on a few small images: what they learn from, leave behind, refuse, and how they go on."""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dinosearch.pretrain.device as device_module
import dinosearch.pretrain.plan as plan_module
import dinosearch.pretrain.recipe as recipe_module
import dinosearch.pretrain.train as train_module
from dinosearch.errors import DinosearchError, Interrupted, ModelLocked, UsageError
from dinosearch.images.source import ScanOptions
from dinosearch.pretrain.bank import ImageBank, batch_indices
from dinosearch.pretrain.checkpoint import Checkpoint, last_checkpoint, save_checkpoint
from dinosearch.pretrain.config import TrainConfig
from dinosearch.pretrain.course import Evaluate, Progress, TrainReport
from dinosearch.pretrain.distributed import ALONE
from dinosearch.pretrain.hold import held_run
from dinosearch.pretrain.recipe import FITS
from dinosearch.pretrain.train import train
from dinosearch.vit.folder import list_models, open_model
from dinosearch.vit.resolve import resolve_model

QUICK: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "batch_size": 8,
    "out_dim": 32,
    "head_hidden_dim": 64,
    "head_bottleneck_dim": 32,
    "local_crops": 2,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 digits of 8×8, enlarged to 20×20."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("train") / "digits"
    folder.mkdir()
    for i, digit in enumerate(load_digits().images[:20]):
        Image.fromarray((digit * 15.9).astype(np.uint8)).resize((20, 20)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def run(images: Path, models: Path, **settings: Any) -> tuple[TrainReport, list[Progress]]:
    overrides = QUICK | settings.pop("overrides", {})
    stop = settings.pop("stop", lambda: False)
    note = settings.pop("note", lambda _: None)
    config = TrainConfig(images=(images,), models=models, device="cpu", overrides=overrides, **settings)
    items = list(train(config, note=note, stop=stop))
    assert items[-1].report is not None
    return items[-1].report, items


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def stops_after(n_asked: int) -> Callable[[], bool]:
    asked = iter(range(n_asked))
    return lambda: next(asked, None) is None


def checkpoint_of(folder: Path) -> Checkpoint:
    found = last_checkpoint(folder / "training")
    assert found is not None
    return found


def test_a_run_leaves_a_model_that_says_how_it_was_made(images: Path, tmp_path: Path) -> None:
    report, items = run(images, tmp_path, steps=6)
    model = open_model(tmp_path / "digits")
    model.verify()
    assert (report.model, report.fingerprint) == (str(model.path), model.fingerprint)
    assert (report.steps, report.images, report.resumed_from_step, report.knn_top1) == (6, 20, None, None)
    assert report.epochs == pytest.approx(6 * 8 / 20)
    assert report.images_per_second is not None
    assert report.images_per_second > 0
    assert set(report.health) >= {"teacher_entropy", "feature_std", "rank"}
    assert model.trained["steps"] == 6
    assert model.trained["recipe"]["batch_size"] == 8
    assert {item.phase for item in items} >= {"reading", "done"}
    lines = [json.loads(line) for line in (model.path / "training" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6
    assert lines[-1]["loss"] == pytest.approx(report.loss)
    assert {"step": 6} | {name: lines[-1][name] for name in ("recall_at_1", "embedding_rank")} == report.quality
    assert model.trained["quality"] == report.quality
    assert model.load_vit()(torch.zeros(1, 3, 16, 16)).shape == (1, model.dim)
    assert "](curves.png)" in (model.path / "README.md").read_text()
    assert Image.open(model.path / "curves.png").format == "PNG"


def test_zero_steps_save_the_initial_weights(images: Path, tmp_path: Path) -> None:
    untrained, items = run(images, tmp_path, name="start", steps=0)
    assert (untrained.steps, untrained.loss, len(items)) == (0, None, 1)
    report, _ = run(images, tmp_path, name="end", steps=3)
    assert report.fingerprint != untrained.fingerprint
    assert open_model(tmp_path / "start").trained["method"] == "none"
    assert "untrained" in (tmp_path / "start" / "README.md").read_text()


def test_how_images_meet_the_square_is_the_models_own_and_in_its_fingerprint(images: Path, tmp_path: Path) -> None:
    usual, _ = run(images, tmp_path, steps=0)
    made = {fit: run(images, tmp_path, name=fit, steps=0, overrides={"fit": fit})[0] for fit in FITS}
    assert [open_model(tmp_path / fit).fit for fit in FITS] == [*FITS]
    assert made["crop"].fingerprint == usual.fingerprint
    assert len({report.fingerprint for report in made.values()}) == 3
    with pytest.raises(UsageError, match="--fit 'stretch' is none of crop, pad, squash"):
        run(images, tmp_path, steps=0, overrides={"fit": "stretch"})


@pytest.mark.slow
def test_training_makes_neighbours_agree_more(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder = tmp_path / "digits"
    folder.mkdir()
    for i in range(600):
        Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).save(folder / f"{i:03}.png")
    small = {"image_size": 8, "patch_size": 2, "local_size": 4, "batch_size": 64, "out_dim": 256}
    accuracy = {}
    for name, steps in (("start", 0), ("end", 200)):
        run(folder, tmp_path / "models", name=name, steps=steps, overrides=small)
        model = open_model(tmp_path / "models" / name)
        pixels = torch.tensor(digits.images[:600] / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
        inputs = (pixels - torch.tensor(model.mean)[:, None, None]) / torch.tensor(model.std)[:, None, None]
        with torch.no_grad():
            vectors = torch.nn.functional.normalize(model.load_vit()(inputs), dim=1)
        nearest = (vectors @ vectors.T).fill_diagonal_(-1).argmax(dim=1).numpy()
        accuracy[name] = (digits.target[nearest] == digits.target[:600]).mean()
    assert accuracy["end"] > accuracy["start"] + 0.05


def test_any_number_is_a_seed(images: Path, tmp_path: Path) -> None:
    report, _ = run(images, tmp_path, steps=2, seed=20_261_127_123_456_789)
    assert report.steps == 2


def test_equal_seeds_give_equal_models_and_others_do_not(images: Path, tmp_path: Path) -> None:
    first, _ = run(images, tmp_path, name="a", steps=5, seed=3)
    second, _ = run(images, tmp_path, name="b", steps=5, seed=3)
    third, _ = run(images, tmp_path, name="c", steps=5, seed=4)
    assert first.fingerprint == second.fingerprint != third.fingerprint
    assert first.loss == second.loss


def test_a_stopped_run_resumes_to_the_same_tensors_bit_for_bit(images: Path, tmp_path: Path) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 7

    small = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    drop = {"overrides": {"arch": "vit_tiny_patch16_224", "arch_kwargs": small}}  # with stochastic depth
    whole, _ = run(images, tmp_path, name="whole", steps=12, **drop)
    half, _ = run(images, tmp_path, name="half", steps=12, stop=stop, **drop)
    assert half.stopped
    assert half.steps < 12
    resumed, _ = run(images, tmp_path, name="half", resume=True, **drop)
    assert (resumed.steps, resumed.resumed_from_step) == (12, half.steps)
    assert not resumed.stopped
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed.fingerprint == whole.fingerprint
    kept = [checkpoint_of(tmp_path / name).tensors() for name in ("whole", "half")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_dinov2_trains_resumes_to_the_same_tensors_and_exports_a_plain_vit(images: Path, tmp_path: Path) -> None:
    import timm

    settings: dict[str, Any] = {
        "overrides": {
            "method": "dinov2",
            "head_hidden_dim": 32,
            "head_bottleneck_dim": 16,
            "arch": "vit_tiny_patch16_224",
            "arch_kwargs": {"embed_dim": 32, "depth": 2, "num_heads": 2, "reg_tokens": 4},
        }
    }
    whole, _ = run(images, tmp_path, name="whole", steps=6, **settings)
    half, _ = run(images, tmp_path, name="half", steps=6, stop=stops_after(4), **settings)
    assert half.stopped
    assert whole.health["rank"] > 0
    resumed, _ = run(images, tmp_path, name="half", resume=True, **settings)
    assert resumed.resumed_from_step == half.steps < 6
    kept = [checkpoint_of(tmp_path / name).tensors() for name in ("whole", "half")]
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert {"student.mask_token.weight", "student.patch_head.prototypes.weight_v", "objective.ibot_loss.center"} <= set(
        kept[0]
    )
    assert kept[0]["objective.ibot_loss.center"].any()
    model = open_model(tmp_path / "whole")
    assert model.trained["method"] == "dinov2"
    loaded = timm.create_model(
        model.arch, num_classes=0, checkpoint_path=str(model.weights_path), **model.arch_kwargs
    ).eval()
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(pixels), model.load_vit()(pixels))
    with pytest.raises(UsageError, match="begun with --method dinov2, not dino"):
        run(images, tmp_path, name="half", resume=True, overrides=settings["overrides"] | {"method": "dino"})


def test_a_finished_run_is_not_trained_again(images: Path, tmp_path: Path) -> None:
    first, _ = run(images, tmp_path, name="a", steps=4)
    again, items = run(images, tmp_path, name="a", resume=True)
    assert again == first
    assert len(items) == 1


def test_resume_refuses_other_settings_and_other_images(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, name="a", steps=6, stop=stops_after(4))
    run(images, tmp_path, name="a", resume=True)  # forgets nothing of what was asked for
    with pytest.raises(UsageError, match=r"begun with --steps 6, not 5"):
        run(images, tmp_path, name="a", steps=5, resume=True)
    with pytest.raises(UsageError, match=r"begun without --epochs, not with 2"):
        run(images, tmp_path, name="a", epochs=2, resume=True)
    with pytest.raises(UsageError, match=r"begun with --batch-size 8, not 10"):
        run(images, tmp_path, name="a", resume=True, overrides={"batch_size": 10})
    with pytest.raises(UsageError, match=r"begun without --set koleo_weight, not with 0.2"):
        run(images, tmp_path, name="a", resume=True, overrides={"koleo_weight": 0.2})
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(images.iterdir())[:12]:
        (fewer / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DinosearchError, match="the images are not those"):
        run(fewer, tmp_path, name="a", resume=True)


@pytest.mark.parametrize(("readable_at_first", "told"), [(True, "Restore it"), (False, "Make it unreadable again")])
def test_resume_refuses_other_readable_images(
    images: Path, tmp_path: Path, *, readable_at_first: bool, told: str
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    whole = (folder / "3.png").read_bytes()
    contents = [whole, bytes(len(whole))][:: 1 if readable_at_first else -1]  # of one size
    (folder / "3.png").write_bytes(contents[0])
    run(folder, tmp_path, name="a", steps=6, stop=stops_after(4))
    before = checkpoint_of(tmp_path / "a").path.read_bytes()
    (folder / "3.png").write_bytes(contents[1])
    with pytest.raises(DinosearchError, match=rf"images/3\.png.*{told}, or start over with --overwrite --name a"):
        run(folder, tmp_path, name="a", resume=True)
    assert checkpoint_of(tmp_path / "a").path.read_bytes() == before
    (folder / "3.png").write_bytes(contents[0])
    resumed, _ = run(folder, tmp_path, name="a", resume=True)
    unbroken, _ = run(folder, tmp_path, name="b", steps=6)
    assert resumed.fingerprint == unbroken.fingerprint


def test_a_checkpoint_from_before_readable_images_and_torch_were_told_is_gone_on_from(
    images: Path, tmp_path: Path
) -> None:
    run(images, tmp_path, name="a", steps=6, stop=stops_after(4))
    now = checkpoint_of(tmp_path / "a")
    facts = {name: value for name, value in now.facts.items() if name not in ("unreadable", "planned_momentum")}
    earlier = facts | {"computed_on": "1 CPU thread"}
    save_checkpoint(now.path.parent, step=facts["step"], tensors=now.tensors(), facts=earlier)
    said: list[str] = []
    report, _ = run(images, tmp_path, name="a", resume=True, note=said.append)
    assert report.steps == 6
    assert not [line for line in said if "not bit-equal" in line]
    assert checkpoint_of(tmp_path / "a").facts["unreadable"] == []


def test_resume_without_a_checkpoint_starts_over_and_says_so(images: Path, tmp_path: Path) -> None:
    said: list[str] = []
    report, _ = run(images, tmp_path, name="new", steps=3, resume=True, note=said.append)
    assert report.steps == 3
    assert any("starting over" in line for line in said)


def test_a_small_folder_with_a_bad_file_is_trained_on_without_it(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    whole = (folder / "0.png").read_bytes()
    (folder / "bad.png").write_bytes(whole[: len(whole) // 2])
    unasked = {name: value for name, value in QUICK.items() if name != "batch_size"}

    def learnt(name: str, **given: Any) -> tuple[TrainReport, int]:
        config = TrainConfig(
            images=(folder,), models=tmp_path, name=name, device="cpu", steps=3, overrides=unasked | given
        )
        report = list(train(config))[-1].report
        assert report is not None
        return report, open_model(tmp_path / name).trained["recipe"]["batch_size"]

    report, batch_size = learnt("a")
    assert (report.images, report.steps, batch_size) == (20, 3, 20)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| batch size | 20 | all the images that can be read |" in card
    with pytest.raises(UsageError, match="only 20 images can be read: choose --batch-size 20 or less"):
        learnt("c", batch_size=21)


def test_labels_whose_images_cannot_be_read_cost_the_accuracy_alone(images: Path, tmp_path: Path) -> None:
    def fails(_backbone: torch.nn.Module, _facts: object) -> tuple[float, int]:
        raise DinosearchError("none of the labelled images can be read")

    said: list[str] = []
    report, _ = run(images, tmp_path, steps=3, name="a", evaluate=fails, note=said.append)
    assert (report.steps, report.knn_top1) == (3, None)
    assert [line for line in said if "no accuracy is reported from here on: none of the labelled" in line]


def test_a_model_without_a_checkpoint_is_not_resumed_over(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, name="a", steps=0)
    before = weights(tmp_path / "a")
    with pytest.raises(UsageError, match=r"holds a model and no checkpoint.*--overwrite"):
        run(images, tmp_path, name="a", steps=3, resume=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "a").items())


def test_resume_without_a_name_finds_the_last_run_on_these_images(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, name="other-name", steps=6, stop=stops_after(4))
    elsewhere = tmp_path / "elsewhere" / "digits"
    elsewhere.mkdir(parents=True)
    for path in images.iterdir():
        (elsewhere / path.name).write_bytes(path.read_bytes())
    run(elsewhere, tmp_path, steps=2)
    resumed, _ = run(images, tmp_path, resume=True)
    assert (Path(resumed.model).name, resumed.steps) == ("other-name", 6)
    killed = tmp_path / "digits-2" / "training"  # before its first checkpoint
    killed.mkdir(parents=True)
    killed.joinpath("sources.json").write_text(json.dumps([str(images)]))
    (tmp_path / "other-name" / "training" / "sources.json").unlink()  # as runs of before had none
    said: list[str] = []
    again, _ = run(images, tmp_path, steps=2, resume=True, note=said.append)
    assert (Path(again.model).name, again.resumed_from_step) == ("digits-2", None)
    assert any("starting over" in line for line in said)


def test_a_resumed_run_has_the_seed_it_began_with_and_chooses_alike(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, name="a", steps=6, seed=3, stop=stops_after(4))
    with pytest.raises(UsageError, match="begun with --seed 3, not 0"):
        run(images, tmp_path, name="a", seed=0, resume=True)
    with pytest.raises(UsageError, match="begun with --select quality: leave --select out"):
        run(images, tmp_path, name="a", select="labels", evaluate=lambda _, __: (0.5, 10), resume=True)
    assert run(images, tmp_path, name="a", resume=True)[0].steps == 6
    asked = iter([False, False, True])
    labelled: dict[str, Any] = {"select": "labels", "evaluate": lambda _, __: (0.5, 10)}
    run(images, tmp_path, name="b", steps=6, stop=lambda: next(asked, True), **labelled)
    with pytest.raises(UsageError, match="begun with --select labels: give it, and --labels, again"):
        run(images, tmp_path, name="b", resume=True)
    run(images, tmp_path, name="b", resume=True, **labelled)


def test_a_resumed_run_asks_by_the_labels_it_began_with(images: Path, tmp_path: Path) -> None:
    opened: list[tuple[str, ScanOptions]] = []

    def examine(labels: str, options: ScanOptions) -> Evaluate:
        opened.append((labels, options))
        return lambda _backbone, _facts: (0.5, 10)

    table = tmp_path / "labels.csv"
    table.touch()
    labelled: dict[str, Any] = {"labels": str(table), "select": "labels", "examine": examine}
    few = ScanOptions(exclude=("1*",))
    begun = {"exclude": few.exclude, "evaluate": examine(str(table), few)}
    run(images, tmp_path, name="a", steps=6, stop=stops_after(4), **labelled, **begun)
    assert run(images, tmp_path, name="a", resume=True, stop=stops_after(2), **labelled)[0].stopped
    report, _ = run(images, tmp_path, name="a", resume=True, examine=examine)
    assert (report.steps, report.knn_top1) == (6, 0.5)
    assert opened == [(str(table), few)] * 3, "the images that it began with count"


def test_a_report_says_how_long_steps_waited_for_images(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = ImageBank.take

    def slow(self: ImageBank, indices: np.ndarray) -> Any:
        time.sleep(0.2)
        return take(self, indices)

    quick, _ = run(images, tmp_path, steps=8, name="quick")
    monkeypatch.setattr(ImageBank, "take", slow)
    waiting, _ = run(images, tmp_path, steps=8, name="waiting")
    assert 0 <= quick.health["data_wait"] < waiting.health["data_wait"] < 1


def test_a_short_time_budget_quickens_the_teacher(images: Path, tmp_path: Path) -> None:
    said: list[str] = []
    report, _ = run(images, tmp_path, minutes=0.05, note=said.append)
    trained = open_model(Path(report.model)).trained
    momentum = trained["recipe"]["teacher_momentum"]
    assert 0.9 <= momentum < 0.99
    assert any(f"teacher momentum {momentum:.4g} in so short a run" in line for line in said)
    assert "half-life" in trained["reasons"]["teacher momentum"]
    assert "half-life is 69" not in trained["reasons"]["teacher momentum"]
    asked, _ = run(images, tmp_path, minutes=0.05, overrides={"teacher_momentum": 0.95})
    assert open_model(Path(asked.model)).trained["recipe"]["teacher_momentum"] == 0.95


def test_a_forecast_from_a_busy_moment_is_put_right(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapt(self: plan_module.Plan, step: int, *, seconds_per_step: float) -> None:  # noqa: ARG001 - the clock is not asked
        self.total_steps = 30 if step else 20

    monkeypatch.setattr(plan_module.Plan, "adapt", adapt)
    monkeypatch.setattr(recipe_module, "HALF_LIFE", 0.5)
    said: list[str] = []
    report, _ = run(images, tmp_path, minutes=1, note=said.append)
    trained = open_model(Path(report.model)).trained
    assert any("teacher momentum 0.9307 in so short a run" in line for line in said)
    assert said.count("teacher momentum 0.9538: the teacher's half-life is 15 of 30 steps") == 1
    assert (report.steps, trained["recipe"]["teacher_momentum"]) == (30, 0.9538)
    assert "of 30 steps" in trained["reasons"]["teacher momentum"]


def test_names_are_numbered_and_never_taken(images: Path, tmp_path: Path) -> None:
    for expected in ("digits", "digits-2", "digits-3"):
        report, _ = run(images, tmp_path, steps=0)
        assert Path(report.model).name == expected
    before = weights(tmp_path / "digits")
    with pytest.raises(UsageError, match="exists"):
        run(images, tmp_path, name="digits", steps=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "digits").items())
    report, _ = run(images, tmp_path, name="digits", steps=3, overwrite=True)
    assert report.steps == 3
    assert len(list_models(tmp_path)) == 3


def test_a_time_budget_ends_in_time_with_a_finished_schedule(images: Path, tmp_path: Path) -> None:
    report, items = run(images, tmp_path, minutes=0.1)
    assert report.steps > 3
    assert items[-1].done == items[-1].total == report.steps
    lines = (tmp_path / "digits" / "training" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["lr"] < 0.2 * 1e-3


def test_a_time_budget_stopped_at_once_resumes_to_an_end(images: Path, tmp_path: Path) -> None:
    asked = iter([False, False, True])  # before reading ends, before the first step, after it
    half, _ = run(images, tmp_path, name="a", minutes=0.05, stop=lambda: next(asked))
    assert (half.stopped, half.steps) == (True, 1)
    resumed, items = run(images, tmp_path, name="a", resume=True)
    assert not resumed.stopped
    assert resumed.steps == items[-1].total < 100_000


def test_a_slow_spell_is_forgotten_when_it_ends() -> None:
    plan = plan_module.Plan(plan_module.UNBOUNDED, time.monotonic() + 100)
    plan.adapt(10, seconds_per_step=10)
    assert plan.total_steps == pytest.approx(20, abs=1)
    plan.adapt(11, seconds_per_step=0.1)
    assert plan.total_steps == pytest.approx(1011, abs=10)
    plan.adapt(1000, seconds_per_step=10)  # the schedules are nearly done: no jump any more
    assert plan.total_steps == pytest.approx(1011, abs=10)


def test_stopping_before_the_first_step_leaves_nothing(images: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(images, tmp_path, name="a", steps=5, stop=lambda: True)
    assert not (tmp_path / "a").exists()


def test_a_model_is_replaced_once_there_is_something_in_its_place(images: Path, tmp_path: Path) -> None:
    before, _ = run(images, tmp_path, steps=2)
    dark = tmp_path / "dark"
    dark.mkdir()
    for i in range(3):
        (dark / f"{i}.png").write_bytes(b"\x89PNG no image")
    shutil.copy(images / "0.png", dark)
    ends: list[tuple[Path, dict[str, Any]]] = [(images, {"stop": lambda: True}), (dark, {"name": "digits"})]
    for source, settings in ends:
        with pytest.raises(DinosearchError):
            run(source, tmp_path, steps=3, overwrite=True, **settings)
        assert open_model(tmp_path / "digits").fingerprint == before.fingerprint
        assert [path.name for path in tmp_path.iterdir() if path.name not in ("dark", "digits")] == []
    half, _ = run(images, tmp_path, steps=4, overwrite=True, overrides={"lr": 0.01}, stop=stops_after(2))
    assert half.model == before.model
    assert half.fingerprint != before.fingerprint
    assert not (tmp_path / "digits" / "training" / "replaced").exists()


def test_a_model_stays_until_there_is_a_new_one(images: Path, tmp_path: Path) -> None:
    before, _ = run(images, tmp_path, name="a", steps=2)
    folder = tmp_path / "a"

    def fails_after_a_checkpoint() -> bool:
        [model] = list_models(tmp_path)  # as another command does meanwhile
        assert (model.name, model.fingerprint) == ("a", before.fingerprint)
        if any((folder / "training").glob("checkpoint-*")):
            raise RuntimeError
        return False

    for settings in ({"overwrite": True}, {"overwrite": True}, {"resume": True}):  # the second gives up the first
        with pytest.raises(RuntimeError):
            run(images, tmp_path, name="a", steps=5, checkpoint_every=0.0, stop=fails_after_a_checkpoint, **settings)
        [model] = list_models(tmp_path)
        assert resolve_model("a", models=tmp_path).fingerprint == model.fingerprint == before.fingerprint
        own = [path for path in folder.rglob("checkpoint-*") if not path.is_relative_to(model.path)]
        assert {path.parent for path in own} == {folder / "training"}
    after, _ = run(images, tmp_path, name="a", steps=5, resume=True)
    assert [model.fingerprint for model in list_models(tmp_path)] == [after.fingerprint] != [before.fingerprint]
    assert not (folder / "training" / "replaced").exists()


def test_a_run_that_came_to_nothing_leaves_its_name_free(images: Path, tmp_path: Path) -> None:
    models, dark = tmp_path / "models", tmp_path / "dark"
    dark.mkdir()
    for i in range(10):
        (dark / f"{i}.png").write_bytes((images / f"{i}.png").read_bytes()[: 40 if i < 4 else None])
    for settings in ({}, {}, {"name": "dark"}):
        with pytest.raises(DinosearchError, match="only 6 images can be read: choose --batch-size 6 or less"):
            run(dark, models, steps=1, **settings)
        assert [path.name for path in models.iterdir()] == ["dark"]
        assert (models / "dark" / "training" / "failed.jsonl").exists()
    report, _ = run(images, models, name="dark", steps=1)
    assert Path(report.model) == models / "dark"
    (models / "notes").mkdir()
    for name in ("notes/a.txt", "file"):
        (models / name).write_text("somebody's")
        with pytest.raises(UsageError, match="exists"):
            run(images, models, name=name.split("/")[0], steps=1)


@pytest.mark.parametrize("steps", [0, 1])
def test_where_nothing_can_be_written_one_line_says_so(images: Path, tmp_path: Path, steps: int) -> None:
    (tmp_path / "models").write_text("no folder")
    with pytest.raises(DinosearchError, match=r"models/digits cannot be written .* set DINOSEARCH_MODELS"):
        run(images, tmp_path / "models", steps=steps)
    assert (tmp_path / "models").read_text() == "no folder"


def test_epochs_are_counted_by_images(images: Path, tmp_path: Path) -> None:
    report, _ = run(images, tmp_path, epochs=4)  # 20 images in batches of 8
    assert (report.steps, report.epochs) == (10, 4.0)


def test_what_a_killed_run_was_to_replace_is_not_lost(images: Path, tmp_path: Path) -> None:
    before, _ = run(images, tmp_path, name="a", steps=2)
    folder = tmp_path / "a"
    for _ in range(2):  # as a kill before the first checkpoint leaves it
        with held_run(folder, resumed=False, replace=True):
            copy = shutil.copytree(folder, tmp_path / "killed")
        shutil.rmtree(folder)
        copy.rename(folder)
    with pytest.raises(Interrupted):
        run(images, tmp_path, name="a", steps=5, stop=lambda: True, resume=True)
    assert open_model(folder).fingerprint == before.fingerprint
    shutil.copytree(folder, tmp_path / ".a-replaced")  # as a kill between two renames leaves it
    for there in (folder / "model.json", folder / "training" / "metrics.jsonl"):  # with a model in its place, and not
        with pytest.raises(Interrupted):
            run(images, tmp_path, name="a", steps=5, stop=lambda: True, overwrite=True)
        assert open_model(folder).fingerprint == before.fingerprint
        shutil.copytree(folder, tmp_path / ".a-replaced")
        there.unlink()
        for path in (folder / "training").glob("checkpoint-*"):
            path.unlink()
    with pytest.raises(Interrupted):
        run(images, tmp_path, name="a", steps=5, stop=lambda: True, overwrite=True)
    assert open_model(folder).fingerprint == before.fingerprint


def test_a_folder_has_one_run_at_a_time(images: Path, tmp_path: Path) -> None:
    running = train(TrainConfig(images=(images,), models=tmp_path, steps=6, overrides=QUICK))
    assert next(item for item in running if item.phase == "training")
    for settings in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ModelLocked, match=f"digits is being trained by process {os.getpid()} on"):
            run(tmp_path / "nowhere", tmp_path, steps=6, name="digits", **settings)  # told before images are looked for
    assert list(running)[-1].report is not None
    with pytest.raises(ModelLocked, match="meanwhile"), held_run(tmp_path / "digits", resumed=False, replace=False):
        pass


@pytest.mark.parametrize(
    "wrong", [{"steps": -1}, {"minutes": 0.0}, {"steps": 3, "epochs": 1.0}, {"name": "a/b"}, {"name": ".a"}]
)
def test_settings_that_make_no_sense_are_refused(images: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        run(images, tmp_path, **wrong)


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DinosearchError, match="no images"):
        run(tmp_path / "none", tmp_path / "models", steps=1)


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    first = np.concatenate([batch_indices(step, n=30, batch_size=10, seed=1) for step in range(3)])
    second = np.concatenate([batch_indices(step, n=30, batch_size=10, seed=1) for step in range(3, 6)])
    assert sorted(first) == sorted(second) == list(range(30))
    assert list(first) != list(second)


def test_the_default_length_is_epochs_or_minutes(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "LEAST_STEPS", 7)
    monkeypatch.setattr(plan_module, "DEFAULT_EPOCHS", 2)
    report, _ = run(images, tmp_path)
    assert report.steps == 7


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(images: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    run(images, tmp_path, name="a", steps=6, stop=stops_after(3))
    before = sorted((tmp_path / "a" / "training").glob("checkpoint-*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    weights_bytes = (tmp_path / "a" / "weights.safetensors").stat().st_size
    said: list[str] = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (weights_bytes + 50_000, limits[1]))  # fits the model, no checkpoint
    try:
        report, _ = run(images, tmp_path, name="a", resume=True, checkpoint_every=0.0, note=said.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert report.steps == 6
    assert any("no checkpoint at step 6" in line and "the one before stays" in line for line in said)
    others = [tmp_path / "a" / "training" / name for name in ("metrics.jsonl", "sources.json", "lock")]
    assert sorted((tmp_path / "a" / "training").iterdir()) == sorted([*before, *others])
    again, _ = run(images, tmp_path, name="a", resume=True)
    assert again.fingerprint == report.fingerprint


def test_a_log_on_a_full_disk_is_given_up_and_not_the_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, _line: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            raise AssertionError("it was given up")

    monkeypatch.setattr(train_module, "open_logs", lambda *_, **__: [Full()])
    said: list[str] = []
    report, _ = run(images, tmp_path, steps=60, note=said.append)
    assert report.steps == 60
    assert [line for line in said if "ends here" in line] == [
        "a log of --log ends here ([Errno 28] No space left on device); training goes on"
    ]


def test_another_number_of_threads_is_told(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, name="a", steps=6, stop=stops_after(3))
    said: list[str] = []
    torch.set_num_threads(2)
    run(images, tmp_path, name="a", resume=True, note=said.append)
    [told] = [line for line in said if "not bit-equal" in line]
    assert re.search(rf"begun on 1 CPU thread, torch {re.escape(torch.__version__)} in \w+, not on 2 CPU threads", told)


@pytest.mark.parametrize(("bf16", "numbers"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_is_described_by_what_decides_about_bits(
    monkeypatch: pytest.MonkeyPatch, *, bf16: bool, numbers: str
) -> None:
    monkeypatch.setattr(device_module, "has_bf16", lambda _device: bf16)
    monkeypatch.setattr(torch, "__version__", "9.8.7")
    assert device_module.describe_machine(torch.device("cpu"), ALONE) == f"1 CPU thread, torch 9.8.7 in {numbers}"


def test_a_flipped_bit_in_a_checkpoint_is_noticed(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, name="a", steps=5, checkpoint_every=0.0)
    before, newest = sorted((tmp_path / "a" / "training").glob("checkpoint-*"))
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.write_bytes(data)
    said: list[str] = []
    found = last_checkpoint(tmp_path / "a" / "training", note=said.append)
    assert found is not None
    assert found.path == before
    assert "damaged" in said[0]


def test_a_time_budget_goes_on_with_what_was_left() -> None:
    plan = plan_module.Plan(1000, time.monotonic() + 30, most_steps=2000)
    facts = json.loads(json.dumps(plan.facts()))
    again = plan_module.plan_from_facts(facts)
    assert again.deadline is not None
    assert again.deadline - time.monotonic() == pytest.approx(30, abs=1)
    assert (again.total_steps, again.most_steps) == (1000, 2000)
    fixed = plan_module.plan_from_facts(plan_module.Plan(7, None).facts())
    assert (fixed.total_steps, fixed.deadline) == (7, None)
