"""`dinosearch train` as a user runs it, in its own process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dinosearch.cli import app
from dinosearch.pretrain.checkpoint import last_checkpoint

REPOSITORY = Path(__file__).parent.parent
TINY = [
    *("--image-size", "16", "--patch-size", "4", "--batch-size", "8", "--out-dim", "32", "--local-crops", "2"),
    *("--set", 'arch_kwargs={"embed_dim": 32, "depth": 2, "num_heads": 2}'),
    *("--set", "head_hidden_dim=64", "--set", "head_bottleneck_dim=32"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with 40 small digits."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("work")
    (folder / "digits").mkdir()
    for i, digit in enumerate(load_digits().images[:40]):
        Image.fromarray((digit * 15.9).astype(np.uint8)).resize((20, 20)).save(folder / "digits" / f"{i}.png")
    return folder


def arguments(*words: str) -> list[str]:
    return [sys.executable, "-m", "dinosearch", "train", "digits", *words, "--json"]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DINOSEARCH")}
    return kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def train(*words: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(arguments(*words), cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def recipe_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "model.json").read_text())["trained"]["recipe"]


@pytest.mark.slow
def test_a_recipe_is_set_by_name_and_taken_from_another_model(work: Path) -> None:
    told = train(*TINY, "--set", "center_momentum=0.95", "--steps", "0", "--name", "first", cwd=work)
    assert "center momentum" in told.stderr
    first = recipe_of(work / "models" / "first")
    assert first["center_momentum"] == 0.95
    train("--config", "models/first/model.json", "--steps", "0", "--name", "second", cwd=work)
    assert recipe_of(work / "models" / "second") == first
    train("--config", "models/first/model.json", "--lr", "0.5", "--steps", "0", "--name", "third", cwd=work)
    assert recipe_of(work / "models" / "third") == first | {"lr": 0.5}


@pytest.mark.slow
def test_a_run_is_logged_where_asked_and_its_card_tells_reasons(work: Path) -> None:
    pytest.importorskip("tensorboard")
    train(*TINY, "--steps", "3", "--name", "logged", "--log", "tensorboard", cwd=work)
    assert list((work / "models/logged/training/tensorboard").glob("events.*"))
    assert "| | | why |" in (work / "models/logged/README.md").read_text()
    train("--steps", "3", "--name", "other", "--log", "paper", cwd=work, code=2)


@pytest.mark.slow
def test_a_start_that_nothing_improved_on_is_told(work: Path) -> None:
    train(*TINY, "--steps", "0", "--name", "start", cwd=work)
    words = arguments("--from", "start", "--steps", "2", "--name", "same", "--out-dim", "32", "--local-crops", "2")
    never = ("--batch-size", "8", "--local-size", "8", "--set", "freeze_backbone=1")
    done = subprocess.run([*words[:-1], *never], cwd=work, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing learnt improved on the start" in done.stderr.replace("\n", " ")
    assert "features of step 0: recall@1" in done.stdout
    listed = [sys.executable, "-m", "dinosearch", "models"]
    told = subprocess.run(listed, cwd=work, env=environment() | {"COLUMNS": "300"}, capture_output=True, text=True)
    assert "recall_at_1" in told.stdout


@pytest.mark.parametrize("words", [("--lr", "nan"), ("--lr", "-1"), ("--cache-size", "nan"), ("--lr", "inf")])
def test_numbers_that_are_none_are_wrong_usage(
    work: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, str]
) -> None:
    monkeypatch.chdir(work)
    before = sorted(work.glob("models/*"))
    told = CliRunner().invoke(app, ["train", "digits", *TINY, *words, "--steps", "2"])
    assert told.exit_code == 2
    assert words[0].lstrip("-").replace("-", "_") in told.output.replace("-", "_")
    assert sorted(work.glob("models/*")) == before


def test_an_unknown_setting_is_wrong_usage(work: Path) -> None:
    told = train("--set", "centre_momentum=0.9", "--steps", "0", cwd=work, code=2)
    assert "Did you mean center_momentum" in told.stderr


def test_a_run_killed_in_mid_epoch_resumes_to_the_same_bits(work: Path) -> None:
    settings = [*TINY, "--steps", "200", "--seed", "7"]
    train(*settings, "--name", "whole", cwd=work)
    folder = work / "models" / "killed" / "training"
    with subprocess.Popen(
        arguments(*settings, "--name", "killed", "--checkpoint-every", "0.2"),
        cwd=work,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while len(list(folder.glob("checkpoint-*"))) < 2:
            assert process.poll() is None, "ended too early"
            time.sleep(0.01)
        process.kill()
    kept = last_checkpoint(folder)
    assert kept is not None
    assert kept.facts["report"] is None
    assert len(list(folder.glob("checkpoint-*"))) == 2
    told = train("--name", "killed", "--resume", cwd=work)
    assert json.loads(told.stdout)["resumed_from_step"] == kept.facts["step"] > 0
    whole, resumed = (last_checkpoint(work / "models" / name / "training") for name in ("whole", "killed"))
    assert whole is not None
    assert resumed is not None
    expected, found = whole.tensors(), resumed.tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    weights = [(work / "models" / name / "weights.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if json.loads(line)["step"] % 50 == 0] == [50, 100, 150, 200]

    again = train("--name", "killed", "--resume", cwd=work)
    assert json.loads(again.stdout) == json.loads(told.stdout)
    assert "nothing to resume" in again.stderr


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(work: Path) -> None:
    train(*TINY, "--steps", "60", "--checkpoint-every", "0.001", "--name", "damaged", cwd=work)
    folder = work / "models" / "damaged" / "training"
    before, newest = sorted(folder.glob("checkpoint-*"))
    whole = (work / "models" / "damaged" / "weights.safetensors").read_bytes()
    newest.write_bytes(newest.read_bytes()[:1000])
    told = train("--name", "damaged", "--resume", cwd=work)
    assert "trying the one before it" in told.stderr
    assert f"at step {int(before.stem.split('-')[1])} of 60" in told.stderr
    assert (work / "models" / "damaged" / "weights.safetensors").read_bytes() == whole


def test_strict_stops_with_exit_1_and_says_what_to_do(work: Path) -> None:
    told = train(*TINY, "--steps", "60", "--lr", "1e30", "--strict", "--name", "strict", cwd=work, code=1)
    assert "leave --strict out" in told.stderr
    assert not (work / "models" / "strict" / "model.json").exists()
