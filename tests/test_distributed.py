"""Several processes learn what one would: on the CPU, through gloo, as torchrun starts them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dinosearch.vit.folder import ModelFacts, create_vit

REPOSITORY = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
TRAIN = [
    *("-m", "dinosearch", "train", "digits", "--batch-size", "8", "--out-dim", "32", "--local-crops", "2"),
    *("--image-size", "16", "--patch-size", "4", "--json"),
    *("--set", 'arch_kwargs={"embed_dim": 32, "depth": 2, "num_heads": 2}'),
    *("--set", "head_hidden_dim=64", "--set", "head_bottleneck_dim=32"),
]
pytestmark = pytest.mark.slow


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working folder with 24 small digits."""
    from sklearn.datasets import load_digits

    (tmp_path / "digits").mkdir()
    for i, digit in enumerate(load_digits().images[:24]):
        Image.fromarray((digit * 15.9).astype(np.uint8)).resize((20, 20)).save(tmp_path / "digits" / f"{i}.png")
    return tmp_path


def torchrun(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, *words], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("method", ["dino", "distill"])
def test_two_processes_learn_what_one_learns_from_the_whole_batch(tmp_path: Path, method: str) -> None:
    worker = str(REPOSITORY / "tests" / "team_worker.py")
    subprocess.run([sys.executable, worker, "one", method], cwd=tmp_path, env=ENVIRONMENT, check=True)
    done = torchrun(worker, "two", method, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            two[name], tensor, rtol=1e-4, atol=5e-5, msg=lambda told, name=name: f"{name} {told}"
        )


def test_a_team_prints_once_and_resumes_to_the_same_bits(work: Path) -> None:
    done = torchrun(*TRAIN, "--steps", "60", "--name", "a", "--checkpoint-every", "0.1", cwd=work)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 60
    assert "on 2 processes with 1 CPU thread" in done.stderr
    assert done.stderr.count("forecast:") == 1
    weights = (work / "models" / "a" / "weights.safetensors").read_bytes()
    before, newest = sorted((work / "models" / "a" / "training").glob("checkpoint-*"))
    newest.unlink()
    again = torchrun(*TRAIN, "--name", "a", "--resume", cwd=work)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["resumed_from_step"] == int(before.stem.split("-")[1])
    assert (work / "models" / "a" / "weights.safetensors").read_bytes() == weights


def test_a_release_is_imported_once(work: Path) -> None:
    facts = ModelFacts("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2}, 16)
    torch.save(
        create_vit(replace(facts, arch_kwargs=facts.arch_kwargs | {"num_heads": 1})).state_dict(), work / "a.pth"
    )
    words = (
        "--batch-size",
        "8",
        "--out-dim",
        "32",
        "--local-crops",
        "2",
        "--local-size",
        "8",
        "--labels",
        "labels.csv",
    )
    (work / "labels.csv").write_text("path,label\n" + "".join(f"digits/{i}.png,{i % 2}\n" for i in range(25)))
    start = ("-m", "dinosearch", "train", "digits", "--from", "a.pth", "--steps", "2", "--name", "new", *words)
    done = torchrun(*start, cwd=work)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (work / "models").iterdir()) == ["a", "new"]
    assert done.stderr.count("1 lines of labels.csv name no image") == 1


def test_a_batch_that_cannot_be_cut_evenly_is_wrong_usage(work: Path) -> None:
    done = torchrun(*TRAIN, "--batch-size", "7", "--steps", "2", cwd=work)
    assert done.returncode != 0
    assert "Try --batch-size 6" in done.stderr, "less, since there may be no more images"


@pytest.mark.parametrize(
    ("only_in_one", "told"),
    [
        ("bank.squares_of = less", r"process 0 of this run can read \S+/digits/7\.png and process 1 cannot"),
        ("train.images_digest = len", "process 1 of this run finds other images than process 0"),
    ],
)
def test_processes_that_see_other_images_end_with_a_line(work: Path, only_in_one: str, told: str) -> None:
    (work / "worker.py").write_text(
        f"""import os
from dinosearch.cli import main
from dinosearch.images import BadImage
from dinosearch.pretrain import bank, train

squares_of = bank.squares_of


def less(images, pool):
    for image, picture in squares_of(images, pool):
        yield image, BadImage("unreadable", "gone") if image.shown_path().endswith("/7.png") else picture


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        {only_in_one}
    main()
"""
    )
    done = torchrun("worker.py", *TRAIN[2:], "--steps", "4", cwd=work)
    assert done.returncode != 0
    assert re.search(rf"error: {told}\. Give all of them the same files", done.stderr)
    assert not list(work.glob("models/*/weights.safetensors"))


def test_the_others_end_when_one_process_dies(work: Path) -> None:
    with subprocess.Popen(
        [*TORCHRUN, *TRAIN, "--steps", "100000", "--name", "a", "--checkpoint-every", "0.1"],
        cwd=work,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as team:
        while not list(work.glob("models/a/training/checkpoint-*")):
            assert team.poll() is None, "ended too early"
            time.sleep(0.05)
        members = Path(f"/proc/{team.pid}/task/{team.pid}/children").read_text().split()
        os.kill(int(members[-1]), signal.SIGKILL)
        assert team.wait(timeout=60) != 0
    assert not [pid for pid in members if _runs(pid)]


def _runs(pid: str) -> bool:
    try:
        return "dinosearch" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
