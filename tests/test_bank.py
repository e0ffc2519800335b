"""The bank of decoded images: what is in it, what is left out, and where it lives."""

import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dinosearch.pretrain.bank as bank_module
from dinosearch.errors import DinosearchError
from dinosearch.images import Fit, decode
from dinosearch.images.source import ScanOptions
from dinosearch.images.workers import DecodePool
from dinosearch.pretrain.bank import ImageBank, survey_images
from dinosearch.pretrain.distributed import Team
from dinosearch.pretrain.gather import TrainingImage, decode_pool, gather_images, images_digest


@pytest.fixture(autouse=True)
def pool() -> Iterator[DecodePool]:
    with decode_pool() as pool:
        yield pool


def images_of(*sources: Path) -> list[TrainingImage]:
    return gather_images([str(source) for source in sources], ScanOptions(), note=lambda _: None)


def filled(
    images: list[TrainingImage],
    folder: Path,
    pool: DecodePool,
    *,
    side: int = 24,
    grey: bool = False,
    limit: int | None = None,
) -> ImageBank:
    bank = ImageBank(images, pool, side=side, grey=grey, folder=folder, limit=limit)
    assert list(bank.read())[-1] == len(images)
    return bank


def grey_pngs(folder: Path, n: int) -> Path:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(random.integers(0, 255, (28, 28), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


def zipped(folder: Path, into: Path) -> Path:
    with zipfile.ZipFile(into, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    return into


def tarred(folder: Path, into: Path) -> Path:
    """In another order than that of the names."""
    with tarfile.open(into, "w:gz" if into.name.endswith("gz") else "w") as archive:
        for path in sorted(folder.iterdir(), reverse=True):
            archive.add(path, path.name)
    return into


def test_every_image_is_the_squeezed_square_that_decode_gives(
    jpeg_folder: Path, tmp_path: Path, pool: DecodePool
) -> None:
    images = images_of(jpeg_folder)
    bank = filled(images, tmp_path, pool)
    assert bank.pixels.shape == (24, 3, 24, 24)
    for image, pixels, aspect in zip(images, bank.pixels, bank.aspect, strict=True):
        picture = decode(Path(image.shown_path()).read_bytes(), Fit(24, mode="squash"))
        assert np.array_equal(pixels, picture.pixels.transpose(2, 0, 1))
        assert aspect == pytest.approx(picture.width / picture.height)


def test_grey_images_take_one_channel_until_colour_comes(
    tmp_path: Path, photos: list[Image.Image], pool: DecodePool
) -> None:
    folder = grey_pngs(tmp_path / "grey", 5)
    images = images_of(folder)
    assert survey_images(images, pool).grey
    bank = ImageBank(images, pool, side=28, grey=True, folder=tmp_path)
    assert str(bank) == "5 images at 28 px, 0.0 MB in memory"
    photos[0].resize((28, 28)).save(folder / "photo.png")
    with decode_pool() as another:
        mixed = filled(images_of(folder), tmp_path, another, side=28, grey=True)
    list(bank.read())
    assert bank.pixels.shape == (5, 1, 28, 28)
    assert mixed.pixels.shape == (6, 3, 28, 28)
    assert np.array_equal(mixed.pixels[:5, 2], bank.pixels[:, 0])


def test_bad_files_are_listed_and_left_out(tmp_path: Path, pool: DecodePool) -> None:
    grey_pngs(tmp_path, 3)
    (tmp_path / "1a.png").write_bytes(b"no image")
    bank = filled(images_of(tmp_path), tmp_path, pool, grey=True)
    assert len(bank) == 3
    assert bank.unreadable == [3]
    bank.write_failed(tmp_path / "failed.jsonl")
    [line] = (tmp_path / "failed.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "path": str(tmp_path / "1a.png"),
        "status": "corrupt",
        "reason": "not an image of any known format",
    }


def test_without_two_images_there_is_nothing_to_train_on(tmp_path: Path, pool: DecodePool) -> None:
    grey_pngs(tmp_path, 1)
    with pytest.raises(DinosearchError, match="training needs two"):
        filled(images_of(tmp_path), tmp_path, pool)
    (tmp_path / "00.png").write_bytes(b"")
    with pytest.raises(DinosearchError, match=r"none of 1 files.*empty file"):
        survey_images(images_of(tmp_path), pool)


def test_a_large_bank_is_a_mapped_file_that_leaves_nothing(
    tmp_path: Path, pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = images_of(grey_pngs(tmp_path / "images", 4))
    monkeypatch.setattr(bank_module, "memory_bytes", lambda: 1000)
    mapped = filled(images, tmp_path / "training", pool, side=28)
    assert isinstance(mapped.pixels, np.memmap)
    assert list((tmp_path / "training").iterdir()) == []
    for image, pixels in zip(images, mapped.pixels, strict=True):
        assert np.array_equal(pixels[0], np.asarray(Image.open(image.shown_path())))


@pytest.mark.parametrize("grey", [True, False])
def test_what_there_is_no_room_for_is_decoded_again_to_the_same_pixels(
    tmp_path: Path, photos: list[Image.Image], pool: DecodePool, grey: bool
) -> None:
    folder = grey_pngs(tmp_path / "images", 11)
    photos[0].resize((28, 28)).save(folder / "09a.png")  # colour comes late: room for fewer than before
    images = images_of(folder)
    bank = filled(images, tmp_path, pool, side=28, grey=grey, limit=5 * 3 * 28 * 28)
    assert len(bank.pixels) == 5
    chosen = np.array([0, 3, 4, 7, 8, 11])
    bank.expect(np.array([1, 3]))  # a step that is not taken in the end
    bank.expect(chosen)
    pixels, aspect = bank.take(chosen)
    for number, square in zip(chosen, pixels, strict=True):
        wanted = decode(Path(images[number].shown_path()).read_bytes(), Fit(28, mode="squash"))
        assert np.array_equal(square, wanted.pixels.transpose(2, 0, 1))
    assert np.array_equal(aspect, np.ones(6))
    assert "the other 7 are decoded again" in str(bank)


def test_a_file_that_is_gone_when_its_turn_comes_is_told(tmp_path: Path, pool: DecodePool) -> None:
    folder = grey_pngs(tmp_path / "images", 3)
    bank = filled(images_of(folder), tmp_path, pool, side=28, grey=True, limit=0)
    (folder / "01.png").unlink()
    with pytest.raises(DinosearchError, match=r"01.png could be read when the run began"):
        bank.take(np.array([1, 2]))


def test_archives_give_the_squares_that_their_files_would(tmp_path: Path, pool: DecodePool) -> None:
    folder = grey_pngs(tmp_path / "images", 4)
    archives = [zipped(folder, tmp_path / "a.zip"), tarred(folder, tmp_path / "b.tar")]
    images = images_of(folder, *archives, tarred(folder, tmp_path / "c.tar.gz"))
    assert len(images) == 16
    bank = filled(images, tmp_path, pool, side=28, grey=True, limit=6 * 28 * 28)
    pixels, _ = bank.take(np.arange(16))
    wanted = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
    assert np.array_equal(pixels[:12, 0], np.stack(wanted * 3))
    assert np.array_equal(pixels[12:, 0], np.stack(wanted[::-1]))  # streamed, in the order of the archive


def test_a_compressed_tar_must_fit(tmp_path: Path, pool: DecodePool) -> None:
    images = images_of(tarred(grey_pngs(tmp_path / "images", 4), tmp_path / "c.tgz"))
    with pytest.raises(DinosearchError, match="larger --cache-size"):
        ImageBank(images, pool, side=28, grey=True, folder=tmp_path, limit=3 * 28 * 28)


def test_images_are_gathered_once_and_known_again_by_member_and_size(tmp_path: Path) -> None:
    folder = grey_pngs(tmp_path / "images", 3)
    (tmp_path / "list.txt").write_text("images/00.png\nimages/02.png\n")
    both = images_of(folder, tmp_path / "list.txt")
    assert [Path(image.shown_path()).name for image in both] == ["00.png", "01.png", "02.png"]
    packed = images_of(zipped(folder, tmp_path / "a.zip"))
    digest = images_digest(packed)
    assert digest == images_digest(packed) != images_digest(both)
    (folder / "01.png").rename(folder / "01b.png")
    assert images_digest(images_of(zipped(folder, tmp_path / "a.zip"))) != digest


def test_the_banks_of_a_team_share_what_the_machine_has(
    jpeg_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, square = images_of(jpeg_folder), 3 * 24 * 24

    def bank(rank: int, *, limit: int | None = None) -> ImageBank:
        with decode_pool(n_beside=2) as pool:
            found = ImageBank(images, pool, side=24, grey=False, folder=tmp_path, limit=limit, team=Team(rank, 2, 2))
            list(found.read())
        return found

    assert len(bank(1, limit=8 * square).pixels) == 4
    monkeypatch.setattr(bank_module, "memory_bytes", lambda: 2 * len(images) * square)  # for one, of which 0.4 is used
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **how: path.suffix == ".u8" or unlink(path, **how))
    one, other = bank(0), bank(1)
    assert isinstance(one.pixels, np.memmap)
    assert len(list(tmp_path.glob("*.u8"))) == 2, "each has its own file"
    assert np.array_equal(one.pixels, other.pixels)
