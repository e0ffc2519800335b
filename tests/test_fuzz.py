"""Mutated real files of each format, and a folder of hostile ones: every file ends in a state, none ends the run."""

import json
import os
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import encoded, save
from PIL import Image

from dinosearch.images import BadImage, Fit
from dinosearch.images.workers import DecodePool

FIT = Fit(image_size=32)
STATES = {"ok", "truncated", "corrupt", "too-large", "unsupported", "unreadable"}
FORMATS = {
    "JPEG": {"quality": 90},
    "JPEG progressive": {"progressive": True},
    "PNG": {},
    "WEBP": {},
    "GIF": {},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "TIFF in JPEG": {"compression": "jpeg"},
    "PPM": {},
    "AVIF": {},
    "HEIF": {},
}


def state_of(pool: DecodePool, data: bytes) -> str:
    try:
        with pool.take(data) as file:
            picture, n_frames = file.decode_and_count()
            for frame in range(1, min(n_frames, 4)):
                file.decode_frame(frame)
    except BadImage as bad:
        return bad.status if bad.reason and "\n" not in bad.reason else f"{bad.status} without a line"
    assert picture.pixels.shape == (32, 32, 3)
    return "ok"


def mutations(data: bytes, n: int, random: np.random.Generator):
    """Damaged copies: bytes changed, mostly in the headers; cut off; parts left out, doubled and zeroed."""
    for _ in range(n):
        mutated = bytearray(data)
        kind = random.integers(5)
        start, length = random.integers(0, len(data)), random.integers(1, 64)
        if kind == 0:
            for at in random.integers(0, min(len(data), 300), 4):
                mutated[at] = random.integers(256)
        elif kind == 1:
            for at in random.integers(0, len(data), 8):
                mutated[at] ^= 1 << random.integers(8)
        elif kind == 2:
            del mutated[start:]
        elif kind == 3:
            mutated[start:start] = mutated[start : start + length]
        else:
            mutated[start : start + length] = bytes(length)
        yield bytes(mutated)


def fuzz(form: str, n: int, seed: int) -> None:
    if form == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    photo = Image.radial_gradient("L").resize((60, 44)).convert("RGB")
    frames = {"append_images": [photo.rotate(90)], "save_all": True} if form in ("GIF", "TIFF", "WEBP", "AVIF") else {}
    data = encoded(photo, form.split()[0], **FORMATS[form], **frames)
    random = np.random.default_rng(seed)
    with DecodePool(FIT, workers=2, max_pixels=5_000_000, seconds=5) as pool, ThreadPoolExecutor(2) as threads:
        states = set(threads.map(lambda mutated: state_of(pool, mutated), mutations(data, n, random)))
        assert states <= STATES
        assert len(states) > 1  # else nothing was damaged, or everything
        assert state_of(pool, data) == "ok"


@pytest.mark.parametrize("form", FORMATS)
def test_every_mutated_file_ends_in_a_state(form):
    fuzz(form, 60, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_every_one_of_many_mutated_files_ends_in_a_state(form):
    fuzz(form, 3000, seed=1)


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a kilobyte that announces many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(bytes(10_000)))


@pytest.fixture
def hostile_folder(tmp_path, photos):
    """Good files of all kinds in good/, bad ones beside them, and what is no file at all."""
    root, photo = tmp_path / "hostile", photos[0].resize((120, 80))
    good = root / "good"
    save(Image.new("RGB", (1, 1), "red"), good / "dot.png")
    save(Image.new("RGB", (3000, 2), "blue"), good / "line.png")
    save(photo.convert("CMYK"), good / "cmyk.jpg")
    save(Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)), good / "deep.png")
    save(photo.quantize(16), good / "palette.png")
    save(photo.convert("RGBA").rotate(30), good / "alpha.png")
    photo.save(good / "pages.tif", save_all=True, append_images=[photo.rotate(90), photo.rotate(180)])
    photo.save(good / "animated.gif", save_all=True, append_images=[photo.rotate(90)])
    save(photo, good / "new\nline \x1b[31m.jpg")
    (root / os.fsdecode(b"good/\xff\xfe.jpg")).write_bytes(encoded(photo.rotate(45), "JPEG"))
    jpeg, png = encoded(photo, "JPEG"), encoded(photo, "PNG")
    bad = {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "empty.jpg": b"",
        "text.jpg": b"I am a text\n",
        "half header.jpg": jpeg[:10],
        "half header.png": png[:20],
        "bomb.png": png_bomb(60_000, 60_000),
        "postscript.png": encoded(photo, "EPS"),
    }
    for name, data in bad.items():
        (root / name).write_bytes(data)
    os.mkfifo(root / "pipe.jpg")
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "round").symlink_to(root)
    (root / "dangling.jpg").symlink_to("nothing.jpg")
    save(photo.rotate(10), root / "folder.jpg" / "inside.jpg")
    return root, bad


def dinosearch(*arguments: object, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dinosearch", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_a_hostile_folder_is_indexed_as_far_as_it_is_good(tmp_path, hostile_folder, tiny_model):
    root, bad = hostile_folder
    done = dinosearch("index", root, "--model", tiny_model.path, "--json", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    summary = json.loads(done.stdout)
    n_good = len(list((root / "good").iterdir())) + 1
    assert (summary["new"], summary["images"], summary["failed"]) == (n_good, n_good, len(bad))
    listed = [json.loads(line) for line in dinosearch("failures", "--json", cwd=tmp_path).stdout.splitlines()]
    states = {row["path"].rpartition("/")[2]: row["status"] for row in listed}
    assert states == {
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "empty.jpg": "corrupt",
        "text.jpg": "corrupt",
        "half header.jpg": "truncated",
        "half header.png": "truncated",
        "bomb.png": "too-large",
        "postscript.png": "unsupported",
    }
    assert all(row["reason"] for row in listed)
    again = dinosearch("index", root, "--model", tiny_model.path, "--json", cwd=tmp_path)
    assert again.returncode == 3
    summary = json.loads(again.stdout)
    assert (summary["unchanged"], summary["failed"], summary["embedded"]) == (n_good, len(bad), 0)


def test_all_pages_are_images_of_their_own(tmp_path, hostile_folder, tiny_model):
    root, _ = hostile_folder
    arguments = ("index", root / "good", "--all-pages", "--model", tiny_model.path, "--json")
    first = json.loads(dinosearch(*arguments, cwd=tmp_path).stdout)
    n_files = len(list((root / "good").iterdir()))
    assert (first["new"], first["failed"]) == (n_files, 0)
    assert first["embedded"] == n_files + 3
    again = json.loads(dinosearch(*arguments, cwd=tmp_path).stdout)
    assert (again["unchanged"], again["embedded"]) == (n_files, 0)
