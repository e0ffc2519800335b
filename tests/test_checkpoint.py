"""Checkpoints on disk: whole, damaged, of the format before and of a later one."""

import json
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import save_file

from dinosearch.errors import DinosearchError
from dinosearch.pretrain import checkpoint as checkpoint_module
from dinosearch.pretrain.checkpoint import last_checkpoint, save_checkpoint

TENSORS = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
NAMES_AND_BYTES = b"a" + TENSORS["a"].numpy().tobytes() + b"b" + bytes.fromhex("803f" * 4)
DIGEST_OF_TENSORS = blake3(NAMES_AND_BYTES).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds checkpoints of steps 4 and 5."""
    for step in (4, 5):
        save_checkpoint(tmp_path, step=step, tensors=TENSORS, facts={"step": step, "losses": [0.5]})
    return tmp_path


def newest(folder: Path) -> Path:
    return folder / "checkpoint-000000005.safetensors"


def test_the_newest_is_read(folder: Path) -> None:
    found = last_checkpoint(folder)
    assert found is not None
    assert (found.path, found.facts["step"], found.facts["losses"]) == (newest(folder), 5, [0.5])
    assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("whole", "damaged"),
    [
        (rb"\"step\": 5", rb"\"step\": 4"),  # "4" and "5" differ by a bit
        (rb"\"format\": 2", rb"\"format\": 3"),
        (rb"\"format\": 2", rb"\"gormat\": 2"),
        (rb"\"losses\": [0.5]", rb"\"losses\": [0.4]"),
        (b"\x80\x3f", b"\x81\x3f"),
    ],
)
def test_a_flipped_bit_is_noticed_wherever_it_is(folder: Path, whole: bytes, damaged: bytes) -> None:
    data = newest(folder).read_bytes()
    assert whole in data
    newest(folder).write_bytes(data.replace(whole, damaged, 1))
    said: list[str] = []
    found = last_checkpoint(folder, note=said.append)
    assert found is not None
    assert found.facts["step"] == 4
    assert "damaged; trying the one before it" in said[0]


def test_the_format_before_is_read(folder: Path) -> None:
    save_file(TENSORS, newest(folder), {"facts": '{"step": 7}', "digest": DIGEST_OF_TENSORS})
    found = last_checkpoint(folder)
    assert found is not None
    assert found.facts == {"step": 7}


def test_damage_to_the_format_before_is_noticed(folder: Path) -> None:
    other = TENSORS | {"a": torch.arange(1.0, 4.0)}
    save_file(other, newest(folder), {"facts": '{"step": 7}', "digest": DIGEST_OF_TENSORS})
    found = last_checkpoint(folder)
    assert found is not None
    assert found.facts["step"] == 4


def test_a_later_format_is_refused_and_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(checkpoint_module, "FORMAT", 9)
        save_checkpoint(folder, step=5, tensors=TENSORS, facts={"step": 5})
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DinosearchError, match=r"newer dinosearch \(checkpoint format 9\)"):
        last_checkpoint(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_digest_is_of_the_facts_and_then_the_tensors(folder: Path) -> None:
    with safe_open(newest(folder), framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["facts"]) == {"format": 2, "step": 5, "losses": [0.5]}
    assert metadata["digest"] == blake3(metadata["facts"].encode() + NAMES_AND_BYTES).hexdigest()
