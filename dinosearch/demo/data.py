"""Labelled images for the demo, from the first source that has some, laid out as a user's folder would be."""

import csv
import gzip
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dinosearch.errors import DinosearchError
from dinosearch.images import find_images
from dinosearch.vit.folder import Note, first_line

N_TRAIN = 20_000
N_TEST = 5_000
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
_IDX_FILES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class DemoImages:
    """What was laid out below the demo's folder."""

    source: str
    """For people: which images, and where they came from."""
    train_folder: Path
    """Images to train on; their labels serve the probes alone."""
    test_folder: Path
    """Images held out."""
    labels_path: Path
    """CSV with path, label and split, paths relative to the CSV."""


@dataclass(frozen=True)
class _Labelled:
    """One image of a source: a file to link to, or pixels [h, w] uint8 to write."""

    label: str
    split: str
    file: Path | None = None
    pixels: np.ndarray | None = None


def lay_out(folder: Path, *, data: Path | None, note: Note) -> DemoImages:
    """Put images/train, images/test and labels.csv into `folder`, which is made or emptied of an earlier demo's.

    data: a folder to use, with images in one subfolder per class or with Fashion-MNIST's IDX files; None tries the
    sources in turn. Raises DinosearchError if `data` is neither.
    """
    source, items = _given(data) if data is not None else _first_source(note)
    images = folder / "images"
    if images.exists():
        shutil.rmtree(images)
    counts = {"train": 0, "test": 0}
    rows = []
    for split in counts:
        (images / split).mkdir(parents=True)
    for item in items:
        number = counts[item.split]
        if number >= {"train": N_TRAIN, "test": N_TEST}[item.split]:
            continue
        counts[item.split] += 1
        path = images / item.split / f"{number:05}{item.file.suffix.lower() if item.file else '.png'}"
        _put(item, path)
        rows.append((path.relative_to(folder).as_posix(), item.label, item.split))
    if min(counts.values()) < 2 or len({label for _, label, _ in rows}) < 2:
        raise DinosearchError(f"{source} has too few images: the demo needs two classes or more, with several each")
    labels_path = folder / "labels.csv"
    with labels_path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        writer.writerows(rows)
    return DemoImages(source, images / "train", images / "test", labels_path)


def _put(item: _Labelled, path: Path) -> None:
    if item.pixels is not None:
        Image.fromarray(item.pixels).save(path, compress_level=1)
        return
    assert item.file is not None
    try:
        os.link(item.file, path)
    except OSError:  # another file system, or one without links
        shutil.copyfile(item.file, path)


def _given(data: Path) -> tuple[str, Iterator[_Labelled]]:
    if all(_idx_path(data, kind, part).is_file() for kind in ("images", "labels") for part in _IDX_FILES):
        return f"Fashion-MNIST from {data}", _read_idx(data)
    found = find_images(data).images
    labels = [Path(image.path).parts[0] if len(Path(image.path).parts) > 1 else None for image in found]
    if len(set(labels) - {None}) < 2:
        raise DinosearchError(
            f"{data} has no images in one subfolder per class, and no Fashion-MNIST. "
            "Lay it out as CLASS/IMAGE.jpg, or leave --data out"
        )
    files = [_Labelled(label, "", data / image.path) for label, image in zip(labels, found, strict=True) if label]
    return f"images of {data}", _hold_out(files)


def _hold_out(files: list[_Labelled]) -> Iterator[_Labelled]:
    """Shuffled; every fifth image of a class is for testing."""
    seen: dict[str, int] = {}
    for i in np.random.default_rng(0).permutation(len(files)):
        item = files[i]
        seen[item.label] = seen.get(item.label, 0) + 1
        yield _Labelled(item.label, "test" if seen[item.label] % 5 == 0 else "train", item.file, item.pixels)


def _first_source(note: Note) -> tuple[str, Iterator[_Labelled]]:
    if _idx_path(DEBIAN_FOLDER, "images", "train").is_file():
        return f"Fashion-MNIST, Debian's package {DEBIAN_PACKAGE}", _read_idx(DEBIAN_FOLDER)
    kept = Path(tempfile.mkdtemp(prefix="dinosearch-demo-"))
    sources: tuple[tuple[str, Callable[[Path], Path]], ...] = (
        ("downloaded through torchvision", _through_torchvision),
        (f"Debian's package {DEBIAN_PACKAGE}, unpacked", _through_apt),
    )
    try:
        for name, fetch in sources:
            try:
                folder = fetch(kept)
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                note(f"Fashion-MNIST, {name}: not to be had here ({first_line(error)})")
                continue
            return f"Fashion-MNIST, {name}", iter(list(_read_idx(folder)))
    finally:
        shutil.rmtree(kept, ignore_errors=True)
    note("no Fashion-MNIST: the demo goes on with scikit-learn's 1,797 digits of 8×8 pixels, which teach a ViT little")
    return "scikit-learn's digits", _digits()


def _through_torchvision(folder: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    FashionMNIST(str(folder), download=True)
    return folder / "FashionMNIST" / "raw"


def _through_apt(folder: Path) -> Path:
    """Fetch and unpack Debian's package without being root; with package lists of our own if the system has none."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise OSError("this is no Debian machine")
    own = folder / "apt"
    for part in ("lists/partial", "cache/archives/partial"):
        (own / part).mkdir(parents=True)
    own_lists = ["-o", f"Dir::State::Lists={own / 'lists'}", "-o", f"Dir::Cache={own / 'cache'}"]
    download = ["apt-get", "-q", *own_lists[2:], "download", DEBIAN_PACKAGE]
    if _run(download, folder) != 0:
        if _run(["apt-get", "-q", *own_lists, "update"], folder) != 0:
            raise OSError("apt-get update failed")
        if _run(["apt-get", "-q", *own_lists, "download", DEBIAN_PACKAGE], folder) != 0:
            raise OSError(f"apt-get download {DEBIAN_PACKAGE} failed")
    package = next(folder.glob(f"{DEBIAN_PACKAGE}*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "unpacked")], check=True, timeout=120)
    return folder / "unpacked" / DEBIAN_FOLDER.relative_to("/")


def _run(command: list[str], folder: Path) -> int:
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=180, check=False)
    return done.returncode


def _idx_path(folder: Path, kind: str, part: str) -> Path:
    """images or labels, of train or test; gzipped if it lies there so."""
    name = f"{_IDX_FILES[part]}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    return folder / name if (folder / name).is_file() else folder / f"{name}.gz"


def _read_idx(folder: Path) -> Iterator[_Labelled]:
    for part in _IDX_FILES:
        pixels = _read_array(_idx_path(folder, "images", part))
        labels = _read_array(_idx_path(folder, "labels", part))
        for image, label in zip(pixels, labels, strict=True):
            yield _Labelled(FASHION_CLASSES[label], part, pixels=image)


def _read_array(path: Path) -> np.ndarray:
    """The IDX format of yann.lecun.com/exdb/mnist: two zero bytes, type 8 (uint8), rank, then sizes, big-endian."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data[:3] != b"\x00\x00\x08":
        raise DinosearchError(f"{path} is not an IDX file of bytes. Fetch it again, or leave --data out")
    rank = data[3]
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def _digits() -> Iterator[_Labelled]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)
    items = [_Labelled(str(label), "", pixels=image) for image, label in zip(pixels, digits.target, strict=True)]
    return _hold_out(items)
