"""The demo on a few images: the sources, the files it writes, and what it refuses."""

import csv
import gzip
import json
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dinosearch.demo.data as data_module
from dinosearch.demo.data import FASHION_CLASSES, lay_out
from dinosearch.demo.run import run_demo
from dinosearch.errors import DinosearchError, Interrupted


def quiet(*_: object) -> None:
    pass


def write_idx(folder: Path, *, n_train: int, n_test: int) -> None:
    """Files in the layout of Fashion-MNIST: image i is all i, its label i mod 10."""
    folder.mkdir(parents=True)
    for part, n in (("train", n_train), ("t10k", n_test)):
        pixels = np.repeat(np.arange(n, dtype=np.uint8), 28 * 28).tobytes()
        labels = (np.arange(n) % 10).astype(np.uint8).tobytes()
        images_header, labels_header = struct.pack(">4I", 0x803, n, 28, 28), struct.pack(">2I", 0x801, n)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images_header + pixels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels_header + labels)


def rows_of(labels: Path) -> list[dict[str, str]]:
    with labels.open(newline="") as file:
        return list(csv.DictReader(file))


def class_folders(root: Path, *, per_class: int = 15) -> Path:
    """Two classes that anyone can tell apart, in subfolders."""
    random = np.random.default_rng(0)
    for channel, label in enumerate(("red", "green")):
        (root / label).mkdir(parents=True)
        for i in range(per_class):
            pixels = random.integers(0, 60, (20, 20, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(root / label / f"{i}.jpg")
    return root


def test_idx_files_become_images_with_their_labels(tmp_path: Path) -> None:
    write_idx(tmp_path / "idx", n_train=30, n_test=12)
    images = lay_out(tmp_path / "demo", data=tmp_path / "idx", note=quiet)
    rows = rows_of(images.labels_path)
    assert [row["split"] for row in rows] == ["train"] * 30 + ["test"] * 12
    assert rows[13]["label"] == FASHION_CLASSES[3]
    assert (np.asarray(Image.open(tmp_path / "demo" / rows[13]["path"])) == 13).all()


def test_class_folders_are_split_with_every_class_on_both_sides(tmp_path: Path) -> None:
    images = lay_out(tmp_path / "demo", data=class_folders(tmp_path / "given"), note=quiet)
    rows = rows_of(images.labels_path)
    assert len(rows) == 30
    assert {(row["label"], row["split"]) for row in rows} == {
        (label, split) for label in ("red", "green") for split in ("train", "test")
    }


def test_a_folder_without_classes_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    with pytest.raises(DinosearchError, match=r"CLASS/IMAGE\.jpg"):
        lay_out(tmp_path / "demo", data=tmp_path / "flat", note=quiet)


def test_without_any_source_digits_take_over_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(_folder: Path) -> Path:
        raise OSError("no network")

    monkeypatch.setattr(data_module, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setattr(data_module, "_through_torchvision", out_of_reach)
    monkeypatch.setattr(data_module, "_through_apt", out_of_reach)
    said: list[str] = []
    images = lay_out(tmp_path / "demo", data=None, note=said.append)
    assert "digits" in images.source
    assert any("digits" in line for line in said)
    assert len(rows_of(images.labels_path)) == 1797


def test_debians_installed_package_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "debian", n_train=20, n_test=10)
    monkeypatch.setattr(data_module, "DEBIAN_FOLDER", tmp_path / "debian")
    assert "Debian" in lay_out(tmp_path / "demo", data=None, note=quiet).source


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("mine")
    with pytest.raises(DinosearchError, match="no earlier demo"):
        run_demo(tmp_path / "demo", note=quiet, progress=quiet)
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["thesis.txt"]


class Remote(HTMLParser):
    """Collects what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.n_images = 0
        self.elsewhere: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href"):
                self.n_images += tag == "img"
                if not (value or "").startswith("data:"):
                    self.elsewhere.append(f"{tag} {value}")


def test_the_whole_demo_on_two_plain_classes(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "given", per_class=40)
    for i in range(0, 40, 4):  # in either part of the split
        (data / "red" / f"{i}-bad.jpg").write_bytes((data / "red" / f"{i}.jpg").read_bytes()[:300])
    demo = tmp_path / "demo"
    report = run_demo(demo, data=data, minutes=0.05, note=quiet, progress=quiet)
    facts = json.loads((demo / "report.json").read_text())
    assert facts == report.facts()
    assert facts["trained"]["knn"] == 1.0
    assert facts["pixels"]["knn"] == 1.0
    assert {"knn", "linear"} == facts["untrained"].keys() == facts["trained"].keys()
    assert [command.split()[1] for command in facts["commands"]] == ["train", "index", "query", "probe"]
    page = Remote()
    page.feed((demo / "report.html").read_text())
    assert page.elsewhere == []
    assert page.n_images == sum(1 + len(shown.matches) for shown in report.shown)
    with Image.open(demo / "matches.png") as sheet:
        assert sheet.width > 500
    for shown in report.shown:
        scores = [match.score for match, _ in shown.matches]
        assert scores == sorted(scores, reverse=True)
        assert shown.path not in [match.path for match, _ in shown.matches]
        assert all(label == shown.label for _, label in shown.matches[:3])


def test_a_demo_stops_where_it_is_asked_to(tmp_path: Path) -> None:
    stages: list[str] = []
    with pytest.raises(Interrupted, match=r"stopped at .*untrained"):
        run_demo(
            tmp_path / "demo",
            data=class_folders(tmp_path / "given"),
            note=quiet,
            progress=lambda stage, *_: stages.append(stage),
            stop=lambda: any("(untrained)" in stage for stage in stages),
        )
    assert not (tmp_path / "demo" / "report.json").exists()


@pytest.mark.slow
def test_a_demo_is_made_again_over_itself(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "given", per_class=40)
    for _ in range(2):
        report = run_demo(tmp_path / "demo", data=data, minutes=0.05, note=quiet, progress=quiet)
        assert json.loads((tmp_path / "demo/report.json").read_text()) == report.facts()
