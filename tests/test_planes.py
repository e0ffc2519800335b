"""Images of any number of channels: from the file's bands or pages to a trained model, its index and back."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinosearch.images import BadImage, Fit, decode

REPOSITORY = Path(__file__).parent.parent


def planes(n: int, *, seed: int = 0, bits: int = 8, side: int = 16) -> np.ndarray:
    """[n, side, side] smooth random patterns."""
    small = np.random.default_rng(seed).integers(0, 256, (n, 4, 4)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(plane).resize((side, side))) for plane in small]
    return np.stack(large).astype(np.uint16) * 257 if bits == 16 else np.stack(large)


def paged(values: np.ndarray) -> bytes:
    first, *rest = [Image.fromarray(plane) for plane in values]
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=rest)
    return buffer.getvalue()


@pytest.mark.parametrize("n", [2, 4, 5])
@pytest.mark.parametrize("bits", [8, 16])
def test_pages_are_channels(n: int, bits: int) -> None:
    picture = decode(paged(planes(n, bits=bits)), Fit(16, channels=n))
    assert np.array_equal(picture.pixels, planes(n).transpose(1, 2, 0))
    assert (picture.width, picture.height) == (16, 16)


def test_bands_are_channels_and_transparency_is_one() -> None:
    rgba = planes(4).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(rgba, "RGBA").save(buffer, "PNG")
    assert np.array_equal(decode(buffer.getvalue(), Fit(16, channels=4)).pixels, rgba)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("bits", [8, 16])
def test_samples_that_pillow_does_not_know_are_read_too(contiguous: bool, bits: int) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = planes(5, bits=bits)
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        values.transpose(1, 2, 0) if contiguous else values,
        photometric="minisblack",
        planarconfig="contig" if contiguous else "separate",
    )
    assert np.array_equal(decode(buffer.getvalue(), Fit(16, channels=5)).pixels, planes(5).transpose(1, 2, 0))


def test_one_channel_is_brightness(photos: list[Image.Image]) -> None:
    buffer = io.BytesIO()
    photos[0].resize((16, 16)).save(buffer, "PNG")
    picture = decode(buffer.getvalue(), Fit(16, channels=1))
    assert np.array_equal(picture.pixels[..., 0], np.asarray(photos[0].resize((16, 16)).convert("L")))


def test_another_number_of_channels_is_told() -> None:
    with pytest.raises(BadImage, match="2 channels, and the model takes 5"):
        decode(paged(planes(2)), Fit(16, channels=5))
    with pytest.raises(BadImage):
        decode(paged(planes(5))[:700], Fit(16, channels=5))


@pytest.mark.slow
def test_five_channels_are_learnt_indexed_and_found(tmp_path: Path) -> None:
    """Through the real command line, from a zip; both engines give the same vectors."""
    import zipfile

    from dinosearch.encoder import open_encoder
    from dinosearch.vit.folder import open_model

    (tmp_path / "cells").mkdir()
    with zipfile.ZipFile(tmp_path / "cells.zip", "w") as archive:
        for i in range(10):
            data = paged(planes(5, seed=i, bits=16))
            (tmp_path / "cells" / f"{i}.tif").write_bytes(data)
            archive.writestr(f"{i}.tif", data)
        archive.writestr("hostile.tif", b"II*\0" + b"\xff" * 50)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DINOSEARCH")}

    def dinosearch(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dinosearch", *words, "--json"],
            cwd=tmp_path,
            env=kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        if words[0] == "train":
            assert "cache: 11 images at 16 px, 0.0 MB in memory" in done.stderr
        return done.stdout

    tiny = ["--channels", "5", "--batch-size", "4", "--out-dim", "16", "--local-crops", "1"]
    tiny += ["--set", 'arch_kwargs={"embed_dim": 32, "depth": 1, "num_heads": 2}']
    dinosearch("train", "cells.zip", *tiny, "--steps", "3")
    model = open_model(tmp_path / "models" / "cells")
    assert model.channels == 5
    assert model.trained["failed"] == 1
    [failed] = (model.path / "training" / "failed.jsonl").read_text().splitlines()
    assert json.loads(failed)["path"].endswith("cells.zip/hostile.tif")
    assert model.mean == pytest.approx(np.mean([planes(5, seed=i) for i in range(10)], axis=(0, 2, 3)) / 255, abs=0.01)
    dinosearch("index", "cells")
    [match] = json.loads(dinosearch("query", "cells/3.tif", "--top", "1"))["matches"]
    assert match["path"] == "cells/3.tif"
    assert match["score"] >= 0.9999
    squares = np.stack([planes(5, seed=i).transpose(1, 2, 0) for i in range(4)])
    cpu, torch_cpu = (
        open_encoder(model, device=device, precision="fp32").encode(squares) for device in ("cpu", "torch-cpu")
    )
    assert (cpu * torch_cpu).sum(axis=1).min() >= 0.999
