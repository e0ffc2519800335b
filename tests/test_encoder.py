"""Encoding: every engine gives the vectors of plain timm in float32, in order, whatever the batch."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dinosearch.encoder import Encoder, cache, conversion, convertprocess, encoder, open_encoder
from dinosearch.encoder.openvino_engine import OpenVINOEngine
from dinosearch.encoder.torch_engine import TorchEngine
from dinosearch.errors import DinosearchError, ModelMismatch, UsageError
from dinosearch.images import Fit, decode
from dinosearch.vit.folder import ModelFacts, ModelFolder, create_vit, save_model


def ignore(_line: str) -> None:
    pass


def squares(n: int, side: int = 32) -> np.ndarray:
    """Noise, ramps and flat colours, uint8 [n, side, side, 3]."""
    random = np.random.default_rng(n)
    pixels = random.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    pixels[1::3] = np.linspace(0, 255, side, dtype=np.uint8)[:, None, None] // random.integers(1, 4, (1, 3))
    pixels[2::3] = random.integers(0, 256, (len(pixels[2::3]), 1, 1, 3))
    return pixels


def reference(model: ModelFolder, pixels: np.ndarray) -> np.ndarray:
    """Plain timm, float32, normalised by the book."""
    scaled = torch.from_numpy(pixels.astype(np.float32) / 255).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    with torch.inference_mode():
        vectors = model.load_vit()((scaled - mean) / std)
    return torch.nn.functional.normalize(vectors, dim=1).numpy()


@pytest.fixture
def writable_model(tmp_path, tiny_model) -> ModelFolder:
    """A copy of the tiny model, not converted yet."""
    shutil.copytree(tiny_model.path, tmp_path / "tiny", ignore=shutil.ignore_patterns("cache"))
    return replace(tiny_model, path=tmp_path / "tiny")


def opened(model: ModelFolder, engine: str) -> Encoder:
    if engine == "torch bf16":
        options = {"device": "torch-cpu", "planned_images": None, "precision": "bf16"}
        return Encoder(model, TorchEngine(model, note=ignore, **options))
    return open_encoder(model, device=engine)


@pytest.mark.parametrize("engine", ["cpu", "torch-cpu", "torch bf16"])
def test_vectors_are_those_of_timm(tiny_model, jpeg_folder, engine):
    found = opened(tiny_model, engine)
    photos = [decode(path.read_bytes(), found.fit).pixels for path in sorted(jpeg_folder.rglob("*.jpg"))]
    pixels = np.concatenate([squares(30), photos])
    vectors = found.encode(pixels)
    assert vectors.shape == (len(pixels), 32)
    assert vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    assert (vectors * reference(tiny_model, pixels)).sum(1).min() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize(
    "facts",
    [
        ModelFacts("vit_small_patch16_224", {"depth": 2}, 224),
        ModelFacts("vit_small_patch16_224", {"depth": 2}, 224, pooling="avg", mean=(0.5,) * 3, std=(0.5,) * 3),
        ModelFacts("vit_small_patch14_reg4_dinov2", {"depth": 2, "img_size": 98}, 98),
        ModelFacts("vit_small_patch16_dinov3", {"depth": 2}, 96),
    ],
    ids=lambda facts: f"{facts.arch}-{facts.pooling}",
)
def test_other_vision_transformers_convert(tmp_path, facts):
    torch.manual_seed(0)
    model = save_model(tmp_path / "m", create_vit(facts), facts, trained={})
    pixels = squares(6, facts.image_size)
    assert (open_encoder(model, device="cpu").encode(pixels) * reference(model, pixels)).sum(1).min() > 0.999


@pytest.mark.parametrize("engine", ["cpu", "torch-cpu"])
def test_any_number_of_images_gives_the_same_vectors(tiny_model, engine):
    found = opened(tiny_model, engine)
    pixels = squares(150)
    whole = found.encode(pixels)
    assert found.encode(pixels[:0]).shape == (0, 32)
    for n in (1, 2, 63, 64, 65, 129):
        assert (found.encode(pixels[:n]) * whole[:n]).sum(1).min() > 0.9999


def test_a_vector_is_the_same_bits_whatever_the_batch_it_was_in(tiny_model):
    found = open_encoder(tiny_model, device="cpu")
    pixels = squares(40)
    whole = found.encode(pixels)
    order = np.random.default_rng(0).permutation(40)
    for batch in (1, 3, 8, 32):
        found._engine.batch = batch
        assert (found.encode(pixels[order]) == whole[order]).all()
    few = open_encoder(tiny_model, device="cpu", planned_images=1)
    assert (few.encode(pixels) == whole).all()


def test_a_stream_keeps_order_and_reads_no_further_than_it_must(tiny_model):
    found = open_encoder(tiny_model, device="cpu")
    engine = found._engine
    engine.batch = 4
    pixels = squares(103)
    whole = found.encode(pixels)
    read, done, furthest = 0, 0, 0

    def pictures():
        nonlocal read
        for i, one in enumerate(pixels):
            read += 1
            yield f"key {i}", one

    for keys, vectors in found.stream(pictures()):
        furthest = max(furthest, read - done)
        assert keys == [f"key {i}" for i in range(done, done + len(keys))]
        assert (vectors * whole[done : done + len(keys)]).sum(1).min() > 0.9999
        done += len(keys)
    assert done == 103
    assert furthest <= 4 * (engine.in_flight + 1)


def test_a_stream_left_early_or_broken_leaves_the_encoder_usable(tiny_model):
    found = open_encoder(tiny_model, device="cpu")
    pixels = squares(200)
    stream = found.stream(enumerate(pixels))
    first = next(stream)[1]
    stream.close()

    def broken():
        yield 0, pixels[0]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(found.stream(broken()))
    assert (found.encode(pixels[: len(first)]) * first).sum(1).min() > 0.9999


def test_several_threads_may_share_an_encoder(tiny_model):
    found = open_encoder(tiny_model, device="cpu")
    pixels = squares(100)
    whole = found.encode(pixels)
    wrong = []

    def compare():
        for _ in range(5):
            if (found.encode(pixels) * whole).sum(1).min() < 0.9999:
                wrong.append(1)

    threads = [threading.Thread(target=compare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_encoder_describes_itself(tiny_model):
    found = open_encoder(tiny_model, device="cpu", planned_images=1)
    assert (found.fingerprint, found.dim, found.fit) == (tiny_model.fingerprint, 32, Fit(32))
    assert found.engine.startswith("OpenVINO ")
    assert opened(tiny_model, "torch-cpu").engine == "torch fp32 on cpu"


def test_few_planned_images_are_for_the_processor_whatever_the_gpu(tiny_model, monkeypatch):
    monkeypatch.setattr(encoder, "_driver_sees_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert encoder._best_device(1) == "cpu"
    assert encoder._best_device(None) == "cuda"
    assert isinstance(open_encoder(tiny_model, planned_images=1)._engine, OpenVINOEngine)


def test_a_driver_without_torch_for_it_means_the_processor(monkeypatch):
    monkeypatch.setattr(encoder, "_driver_sees_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert encoder._best_device(None) == "cpu"


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", ""])
def test_an_unknown_device_is_a_usage_error(tiny_model, device):
    with pytest.raises(UsageError, match="Choose auto"):
        open_encoder(tiny_model, device=device)


def test_an_absent_device_says_what_to_use(tiny_model):
    with pytest.raises(DinosearchError, match="--device cpu"):
        open_encoder(tiny_model, device="cuda:99")


def test_without_openvino_torch_takes_over(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    notes = []
    found = open_encoder(tiny_model, device="cpu", note=notes.append)
    assert found.engine == "torch fp32 on cpu"
    assert "OpenVINO cannot be imported" in notes[0]


def test_a_converted_model_needs_no_torch_and_leaves_the_home_alone(tiny_model, tmp_path):
    open_encoder(tiny_model, device="cpu")
    code = f"""
import sys, numpy as np
from pathlib import Path
from dinosearch.encoder import open_encoder
from dinosearch.vit.folder import open_model
encoder = open_encoder(open_model(Path({str(tiny_model.path)!r})), planned_images=1)
assert encoder.encode(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 32)
print([name for name in ("torch", "timm", "openvino_telemetry", "openvino.tools.ovc") if sys.modules.get(name)])
"""
    assert in_subprocess(code, home=tmp_path) == "[]\n"
    assert not list(tmp_path.iterdir())


def test_converting_leaves_no_torch_behind_and_the_home_alone_and_makes_the_same_form(
    writable_model, tiny_model, tmp_path
):
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
import sys
from pathlib import Path
from dinosearch.encoder import open_encoder
from dinosearch.vit.folder import open_model
open_encoder(open_model(Path({str(writable_model.path)!r})), device="cpu")
print([name for name in ("torch", "timm", "openvino.tools.ovc") if sys.modules.get(name)])
"""
    assert in_subprocess(code, home=home) == "[]\n"
    assert not [path for path in home.rglob("*") if "intel" in path.name.lower() or "openvino" in path.name.lower()]
    open_encoder(tiny_model, device="cpu")  # in this process, which has loaded torch
    name = f"openvino-{tiny_model.fingerprint}/vit.bin"
    assert (writable_model.cache_path / name).read_bytes() == (tiny_model.cache_path / name).read_bytes()


@pytest.mark.parametrize(
    ("code", "said", "message"),
    [
        (conversion.EXPLAINED, b"timm has no architecture 'x'\n", r"^timm has no architecture 'x'$"),
        (
            1,
            b"Traceback\nRuntimeError: no such node\n",
            r"tiny could not be converted .*\(RuntimeError: no such node\)",
        ),
        (-9, b"", r"killed \(SIGKILL\), as systems do that lack memory"),
    ],
)
def test_a_conversion_that_failed_in_its_process_says_why(writable_model, monkeypatch, code, said, message):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, stderr=said))
    with pytest.raises(DinosearchError, match=message):
        conversion._convert_apart(writable_model, writable_model.cache_path)


def test_the_process_that_converts_explains_what_it_cannot(writable_model, monkeypatch, capsys):
    described = writable_model.path / "model.json"
    described.write_text(described.read_text().replace("vit_tiny_patch16_224", "vit_of_tomorrow"))
    monkeypatch.setattr(convertprocess.signal, "signal", lambda *_: None)  # that of the tests is to stay interruptible
    with pytest.raises(SystemExit) as ended:
        convertprocess.main(str(writable_model.path), str(writable_model.path))
    assert ended.value.code == conversion.EXPLAINED
    assert capsys.readouterr().err.startswith("timm has no architecture 'vit_of_tomorrow'")


def in_subprocess(code: str, *, home: Path) -> str:
    environment = os.environ | {"HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_conversion_happens_once_and_says_so(writable_model):
    notes = []
    open_encoder(writable_model, device="cpu", note=notes.append)
    open_encoder(writable_model, device="cpu", note=notes.append)
    assert len(notes) == 1
    assert "once" in notes[0]
    assert [path.name for path in writable_model.cache_path.iterdir()] == [f"openvino-{writable_model.fingerprint}"]


def test_a_models_folder_that_cannot_be_written_uses_the_temporary_one(writable_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    writable_model.cache_path.write_text("a file in the way, which stops even the root user")
    monkeypatch.setattr(cache.os, "access", lambda _path, _mode: False)
    notes = []
    first = open_encoder(writable_model, device="cpu", note=notes.append).encode(squares(3))
    assert "cannot be written" in notes[1]
    again = open_encoder(writable_model, device="cpu", note=notes.append).encode(squares(3))
    assert len(notes) == 2
    assert (first == again).all()


def full(monkeypatch, *folders: Path) -> None:
    """Let disks look full where these folders lie."""
    usage = shutil.disk_usage

    def usage_of(path: Path):
        return usage(path)._replace(free=0) if any(Path(path).is_relative_to(each) for each in folders) else usage(path)

    monkeypatch.setattr(cache.shutil, "disk_usage", usage_of)


def test_a_form_that_the_models_disk_has_no_room_for_is_kept_in_the_temporary_folder(
    writable_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    full(monkeypatch, writable_model.path)
    notes = []
    first = open_encoder(writable_model, device="cpu", note=notes.append).encode(squares(3))
    assert "cannot be written (No space left on device)" in notes[1]
    assert not list(writable_model.cache_path.iterdir())
    again = open_encoder(writable_model, device="cpu", note=notes.append).encode(squares(3))
    assert len(notes) == 2
    assert (first == again).all()


def test_a_form_that_can_be_kept_nowhere_is_one_line(writable_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    full(monkeypatch, tmp_path)
    with pytest.raises(DinosearchError, match=r"neither in .*\(No space left .* nor .*Free some space") as caught:
        open_encoder(writable_model, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_temporary_folder_of_another_user_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"dinosearch-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    assert cache._own_temporary_path() not in (tmp_path / "elsewhere", tmp_path / f"dinosearch-{os.getuid()}")


@pytest.mark.parametrize("name", ["vit.bin", "vit.xml", "*.blob"])
def test_a_damaged_converted_form_is_made_again(writable_model, name):
    found = open_encoder(writable_model, device="cpu").encode(squares(3))
    (path,) = writable_model.cache_path.glob(f"*/{name}")
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if name != "*.blob":
        for blob in writable_model.cache_path.glob("*/*.blob"):
            blob.unlink()
    assert (open_encoder(writable_model, device="cpu").encode(squares(3)) * found).sum(1).min() > 0.9999


@pytest.mark.parametrize("device", ["cpu", "torch-cpu"])
def test_replaced_weights_are_not_embedded_under_the_old_fingerprint(writable_model, tmp_path, device):
    torch.manual_seed(1)
    other = save_model(tmp_path / "other", create_vit(writable_model.facts()), writable_model.facts(), trained={})
    shutil.copy(other.weights_path, writable_model.weights_path)
    with pytest.raises(ModelMismatch):
        open_encoder(writable_model, device=device)


@pytest.mark.parametrize("engine", ["cpu", "torch-cpu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_precision_that_is_asked_for_is_used_and_named(tiny_model, engine, precision):
    found = open_encoder(tiny_model, device=engine, precision=precision)
    pixels = squares(12)
    least = {"fp32": 0.999999, "bf16": 0.999}[precision]
    assert (found.encode(pixels) * reference(tiny_model, pixels)).sum(1).min() > least
    assert precision in found.engine or "OpenVINO fp32" in found.engine  # of a processor without bf16


def test_an_unknown_precision_is_a_usage_error(tiny_model):
    with pytest.raises(UsageError, match="Choose auto, fp32, bf16 or int8"):
        open_encoder(tiny_model, precision="int4")


def test_where_memory_is_short_batches_are_halved_and_vectors_stay(tiny_model: ModelFolder) -> None:
    said: list[str] = []
    engine = TorchEngine(tiny_model, device="torch-cpu", planned_images=None, note=said.append)
    embed, most = engine._embed, 2

    def short(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > most:
            raise torch.OutOfMemoryError
        return embed(pixels)

    engine._embed = short
    engine.batch = 8
    pixels = squares(11)
    vectors = Encoder(tiny_model, engine).encode(pixels)
    assert np.allclose(vectors, reference(tiny_model, pixels), atol=1e-5)
    assert engine.batch == 2
    assert [line.rpartition(" ")[2] for line in said] == ["4", "2"]
    most = 0
    with pytest.raises(DinosearchError, match=r"too little memory for this model.*--device cpu"):
        Encoder(tiny_model, engine).encode(pixels)
