"""The bank of decoded images: what is in it, what is left out, and where it lives."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dinosearch.pretrain.bank as bank_module
from dinosearch.errors import DinosearchError
from dinosearch.images import Fit, decode
from dinosearch.pretrain.bank import ImageBank, survey_images


def paths_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.*"))


def filled(paths: list[Path], folder: Path, *, side: int = 24, grey: bool = False) -> ImageBank:
    bank = ImageBank(paths, side=side, grey=grey, folder=folder)
    assert list(bank.read())[-1] == len(paths)
    return bank


def grey_pngs(folder: Path, n: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(random.integers(0, 255, (28, 28), dtype=np.uint8)).save(folder / f"{i}.png")
    return paths_of(folder)


def test_every_image_is_the_squeezed_square_that_decode_gives(jpeg_folder: Path, tmp_path: Path) -> None:
    paths = paths_of(jpeg_folder)
    bank = filled(paths, tmp_path)
    assert bank.pixels.shape == (24, 3, 24, 24)
    for path, pixels, aspect in zip(paths, bank.pixels, bank.aspect, strict=True):
        picture = decode(path.read_bytes(), Fit(24, mode="squash"))
        assert np.array_equal(pixels, picture.pixels.transpose(2, 0, 1))
        assert aspect == pytest.approx(picture.width / picture.height)


def test_grey_images_take_one_channel_until_colour_comes(tmp_path: Path, photos: list[Image.Image]) -> None:
    paths = grey_pngs(tmp_path / "grey", 5)
    assert survey_images(paths).grey
    bank = filled(paths, tmp_path, side=28, grey=True)
    assert bank.pixels.shape == (5, 1, 28, 28)
    photos[0].resize((28, 28)).save(tmp_path / "grey" / "photo.png")
    mixed = filled(paths_of(tmp_path / "grey"), tmp_path, side=28, grey=True)
    assert mixed.pixels.shape == (6, 3, 28, 28)
    assert np.array_equal(mixed.pixels[:5, 2], bank.pixels[:, 0])


def test_bad_files_are_listed_and_left_out(tmp_path: Path) -> None:
    grey_pngs(tmp_path, 3)
    (tmp_path / "1a.png").write_bytes(b"no image")
    bank = filled(paths_of(tmp_path), tmp_path, grey=True)
    assert len(bank) == 3
    assert [path.name for path, _ in bank.failed] == ["1a.png"]


def test_without_two_images_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    grey_pngs(tmp_path, 1)
    with pytest.raises(DinosearchError, match="training needs two"):
        filled(paths_of(tmp_path), tmp_path)
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(DinosearchError, match="none of 1 files"):
        survey_images(paths_of(tmp_path))


def test_a_large_bank_is_a_mapped_file_that_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = grey_pngs(tmp_path / "images", 4)
    in_memory = filled(paths, tmp_path / "training", side=28)
    monkeypatch.setattr(bank_module, "memory_bytes", lambda: 1000)
    mapped = filled(paths, tmp_path / "training", side=28)
    assert isinstance(mapped.pixels, np.memmap)
    assert np.array_equal(mapped.pixels, in_memory.pixels)
    assert list((tmp_path / "training").iterdir()) == []


def test_a_bank_too_large_for_the_disk_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "memory_bytes", lambda: 1000)
    with pytest.raises(DinosearchError, match="smaller --image-size"):
        ImageBank([tmp_path / "x.png"] * 10_000_000, side=4096, grey=False, folder=tmp_path)
