"""`dinosearch train` as a user runs it, in its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
TINY = [
    *("--image-size", "16", "--patch-size", "4", "--batch-size", "8", "--out-dim", "32", "--local-crops", "2"),
    *("--set", 'arch_kwargs={"embed_dim": 32, "depth": 2, "num_heads": 2}'),
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


def test_a_recipe_is_set_by_name_and_taken_from_another_model(work: Path) -> None:
    told = train(*TINY, "--set", "center_momentum=0.95", "--steps", "0", "--name", "first", cwd=work)
    assert "center momentum" in told.stderr
    first = recipe_of(work / "models" / "first")
    assert first["center_momentum"] == 0.95
    train("--config", "models/first/model.json", "--steps", "0", "--name", "second", cwd=work)
    assert recipe_of(work / "models" / "second") == first
    train("--config", "models/first/model.json", "--lr", "0.5", "--steps", "0", "--name", "third", cwd=work)
    assert recipe_of(work / "models" / "third") == first | {"lr": 0.5}


def test_an_unknown_setting_is_wrong_usage(work: Path) -> None:
    told = train("--set", "centre_momentum=0.9", "--steps", "0", cwd=work, code=2)
    assert "Did you mean center_momentum" in told.stderr
