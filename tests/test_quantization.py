"""The int8 form: measured against fp32, refused where it strays, made once, used without nncf afterwards."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dinosearch.encoder import open_encoder, quantization
from dinosearch.errors import DinosearchError
from dinosearch.vit.folder import ModelFolder


@pytest.fixture
def model(tmp_path, tiny_model) -> ModelFolder:
    """A copy of the tiny model, with its converted form in the cache and no int8 form."""
    open_encoder(tiny_model, device="cpu")
    shutil.copytree(tiny_model.path, tmp_path / "tiny")
    return replace(tiny_model, path=tmp_path / "tiny")


@pytest.fixture
def copying(monkeypatch):
    """In place of nncf: the converted form is the int8 form, and so agrees with fp32. Counts how often."""
    calls = []

    def copy(form: Path, squares: np.ndarray, into: Path) -> None:
        calls.append(squares)
        for name in ("vit.xml", "vit.bin"):
            shutil.copyfile(form / name, into / name)

    monkeypatch.setattr(quantization, "_quantize", copy)
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _name: object())
    return calls


def squares(n: int) -> np.ndarray:
    """Coarse colour fields under some noise, uint8 [n, 32, 32, 3]: smooth as pictures are."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 200, (n, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return (coarse + random.integers(0, 50, (n, 32, 32, 3))).astype(np.uint8)


def never(_n: int) -> np.ndarray:
    raise AssertionError("no sample is needed")


def int8_path(model: ModelFolder) -> Path:
    return model.cache_path / f"openvino-int8-{model.fingerprint}"


def test_nncf_makes_a_form_whose_cosine_is_measured_on_images_it_has_not_seen(model, monkeypatch, capfd, tmp_path):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(quantization, "LEAST_COSINE", 0.9)
    notes = []
    found = open_encoder(model, device="cpu", precision="int8", sample=squares, note=notes.append)
    assert found.engine.startswith("OpenVINO int8, ")
    assert capfd.readouterr() == ("", "")
    assert not list((tmp_path / "home").rglob("*telemetry*"))
    measured = json.loads((int8_path(model) / "measured.json").read_text())
    held_out = squares(quantization.N_SAMPLE)[1::2]
    reference = open_encoder(model, device="cpu", precision="fp32").encode(held_out)
    vectors = found.encode(held_out)
    assert measured["images"] == len(held_out)
    assert measured["cosine"] == pytest.approx((vectors * reference).sum(1).mean(), abs=1e-5)
    assert 0.9 < measured["cosine"] < 0.999999
    assert f"{measured['cosine']:.4f}" in notes[-1]
    assert (vectors != open_encoder(model, device="cpu").encode(held_out)).any()
    assert "i8" in (int8_path(model) / "vit.xml").read_text()


def test_the_quantising_process_loads_no_telemetry(model, tmp_path):
    np.save(tmp_path / "squares.npy", squares(4))
    (tmp_path / "int8").mkdir()
    form = model.cache_path / f"openvino-{model.fingerprint}"
    code = f"""
import sys
from dinosearch.encoder import quantizeprocess
quantizeprocess.main({str(form)!r}, {str(tmp_path / "squares.npy")!r}, {str(tmp_path / "int8")!r})
from nncf.telemetry.wrapper import telemetry
assert sys.modules["openvino_telemetry"] is None
assert type(telemetry).__name__ == "MagicMock"
"""
    environment = os.environ | {"HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, stdout=subprocess.DEVNULL)
    assert (tmp_path / "int8/vit.bin").is_file()


@pytest.mark.usefixtures("copying")
def test_a_form_below_the_threshold_is_refused_now_and_later(model, monkeypatch):
    monkeypatch.setattr(quantization, "LEAST_COSINE", 1.1)
    for sample in (squares, never):
        notes = []
        found = open_encoder(model, device="cpu", precision="int8", sample=sample, note=notes.append)
        assert "int8" not in found.engine
        assert "int8 is refused for tiny" in notes[-1]
        assert notes[-1].endswith("on 128 images, and 1.1 is asked; going on in the usual precision")
        assert found.encode(squares(3)).shape == (3, 32)
    notes = []
    assert "int8" not in open_encoder(model, device="cpu", precision="int8", note=notes.append).engine
    assert notes == []


def test_a_form_is_made_once_and_used_without_nncf(model, monkeypatch, copying):
    open_encoder(model, device="cpu", precision="int8", sample=squares)
    [seen] = copying
    assert (seen == squares(quantization.N_SAMPLE)[::2]).all()
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _name: None)
    for sample in (never, None):
        assert "int8" in open_encoder(model, device="cpu", precision="int8", sample=sample).engine


def test_without_nncf_the_message_names_the_extra(model, monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DinosearchError, match=r"pip install 'dinosearch\[int8\]'"):
        open_encoder(model, device="cpu", precision="int8", sample=never)
    assert "int8" not in open_encoder(model, device="cpu", precision="int8").engine


def test_a_form_that_could_not_be_finished_leaves_nothing(model, monkeypatch):
    before = sorted(model.cache_path.iterdir())
    failing = subprocess.CompletedProcess([], 1, stderr=b"Traceback\nValueError: no such layer\n")
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: failing)
    notes = []
    found = open_encoder(model, device="cpu", precision="int8", sample=squares, note=notes.append)
    assert "int8" not in found.engine
    assert notes[-1] == (
        "nncf could not make an int8 form (ValueError: no such layer); going on in the usual precision"
    )
    assert sorted(model.cache_path.iterdir()) == before


def test_few_images_make_no_form(model, copying):
    notes = []
    found = open_encoder(model, device="cpu", precision="int8", sample=lambda _n: squares(63), note=notes.append)
    assert "int8" not in found.engine
    assert "63 new images are too few" in notes[-1]
    assert not copying


@pytest.mark.parametrize("name", ["vit.bin", "measured.json"])
def test_a_damaged_form_is_made_again_or_passed_over(model, copying, name):
    for _ in range(2):
        open_encoder(model, device="cpu", precision="int8", sample=squares)
        for blob in int8_path(model).glob("*.blob"):
            blob.unlink()
        damaged = int8_path(model) / name
        damaged.write_bytes(damaged.read_bytes()[:10])
    assert len(copying) == 2
    assert "int8" not in open_encoder(model, device="cpu", precision="int8").engine
    assert not int8_path(model).exists()


def test_another_device_computes_in_its_usual_precision(model):
    notes = []
    found = open_encoder(model, device="torch-cpu", precision="int8", sample=never, note=notes.append)
    assert found.engine == "torch fp32 on cpu"
    assert notes == ["int8 is for processors, through OpenVINO; torch-cpu computes in its usual precision"]
