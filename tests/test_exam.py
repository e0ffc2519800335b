"""Labels beside a run: k-NN accuracy of a backbone, from a CSV or from folders."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from indexing import never
from PIL import Image, ImageFile
from typer.testing import CliRunner

from dinosearch.cli import app
from dinosearch.errors import DinosearchError, UsageError
from dinosearch.images.source import ScanOptions
from dinosearch.pretrain.config import TrainConfig
from dinosearch.pretrain.train import train
from dinosearch.query.exam import Exam, open_exam
from dinosearch.query.probe import knn_accuracy, knn_vote
from dinosearch.vit.folder import ModelFacts, ModelFolder, create_vit, open_model


def vectors_of(model: ModelFolder, paths: list[Path]) -> np.ndarray:
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.mean, model.std))
    pixels = [np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)) for path in paths]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        return torch.nn.functional.normalize(model.load_vit()((images - mean) / std), dim=1).numpy()


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """20 dark and 20 bright pictures in two folders."""
    random = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "images" / ("bright" if i % 2 else "dark")
        folder.mkdir(parents=True, exist_ok=True)
        low = 150 if i % 2 else 0
        Image.fromarray(random.integers(low, low + 100, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return tmp_path / "images"


def test_accuracy_is_the_vote_on_the_split_that_the_labels_name(tiny_model: ModelFolder, squares: Path) -> None:
    paths = sorted(squares.rglob("*.png"))
    labels = [path.parent.name for path in paths]
    split = ["test" if i % 3 == 0 else "train" for i in range(40)]
    vectors = vectors_of(tiny_model, paths)
    classes, parts = np.array([label == "dark" for label in labels]), np.array(split)
    train_rows, test_rows = parts == "train", parts == "test"
    k = min(20, np.bincount(classes[train_rows]).min())
    guess = knn_vote(vectors[train_rows], classes[train_rows], vectors[test_rows], k=int(k))
    expected = float((guess == classes[test_rows]).mean())
    exam = Exam(paths, labels, split=split)
    for _ in range(2):
        assert exam(tiny_model.load_vit(), tiny_model) == (pytest.approx(expected), test_rows.sum())


def test_folders_and_the_same_labels_in_a_table_agree(tiny_model: ModelFolder, squares: Path) -> None:
    table = squares.parent / "labels.csv"
    lines = [f"{path.relative_to(squares)},{path.parent.name}" for path in sorted(squares.rglob("*.png"))]
    table.write_text("path,label\n" + "\n".join([*lines, "gone.png,dark"]) + "\n")
    said: list[str] = []
    by_table = open_exam(str(table), [squares], note=said.append)
    by_folder = open_exam("folders", [squares])
    vit = tiny_model.load_vit()
    assert by_table(vit, tiny_model) == by_folder(vit, tiny_model)
    assert any("1 lines" in line for line in said)


def test_files_that_cannot_be_read_are_left_out(tiny_model: ModelFolder, squares: Path) -> None:
    (squares / "dark" / "99.png").write_bytes(b"no image")
    accuracy, n_asked = open_exam("folders", [squares])(tiny_model.load_vit(), tiny_model)
    assert 0 <= accuracy <= 1
    assert n_asked == 8, "a fifth of 20 in each of two folders; the bad one is in none"


def test_images_that_training_passes_over_are_no_class(tiny_model: ModelFolder, squares: Path) -> None:
    vit = tiny_model.load_vit()
    before = open_exam("folders", [squares])(vit, tiny_model)
    for folder in ("unsorted", ".hidden"):
        (squares / folder).mkdir()
        for path in sorted((squares / "dark").iterdir()):
            (squares / folder / path.name).write_bytes(path.read_bytes())
    options = ScanOptions(exclude=("unsorted/",))
    assert open_exam("folders", [squares], options=options)(vit, tiny_model) == before
    _, n_asked = open_exam("folders", [squares], options=replace(options, include_hidden=True))(vit, tiny_model)
    assert n_asked == 12, "a fifth of 20 in each of three folders"


def test_the_command_asks_about_the_images_that_it_trains_on(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (squares / "bright").rename(squares / "unsorted")
    monkeypatch.chdir(tmp_path)
    words = ["train", "images", "--labels", "folders", "--exclude", "unsorted/", "--steps", "0"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 1
    assert "Label images of two classes" in " ".join(told.output.split())


def test_no_picture_is_decoded_in_the_process_that_trains(
    tiny_model: ModelFolder, squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exam = open_exam("folders", [squares])
    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    _, n_asked = exam(tiny_model.load_vit(), tiny_model)
    assert n_asked == 8
    assert not [thread for thread in threading.enumerate() if thread.name == "decoding watchdog"], "the pool is closed"


def test_labels_that_say_nothing_are_refused(squares: Path) -> None:
    with pytest.raises(UsageError, match="subfolders"):
        open_exam("folders", [squares / "dark"])
    with pytest.raises(DinosearchError, match="cannot read"):
        open_exam(str(squares / "none.csv"), [squares])
    with pytest.raises(DinosearchError, match="Label images of two classes"):
        knn_accuracy(np.eye(4, dtype=np.float32), ["a"] * 4)


def test_labels_that_leave_nothing_to_ask_are_refused_before_training(squares: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (squares / "dark").rename(tmp_path / "one" / "dark")
    with pytest.raises(DinosearchError, match="Label images of two classes"):
        open_exam("folders", [tmp_path / "one"])
    labels = tmp_path / "labels.csv"
    labels.write_text("path,label\none/dark/00.png,a\none/dark/02.png,b\n")
    with pytest.raises(DinosearchError, match="test"):
        open_exam(str(labels), [tmp_path / "one"])


def test_a_split_whose_test_images_lie_elsewhere_is_done_without(tiny_model: ModelFolder, squares: Path) -> None:
    rows = [f"images/{path.relative_to(squares)},{path.parent.name},train" for path in sorted(squares.rglob("*.png"))]
    table = squares.parent / "labels.csv"
    table.write_text("path,label,split\n" + "\n".join([*rows, "test/a.png,dark,test"]) + "\n")
    said: list[str] = []
    exam = open_exam(str(table), [squares], note=said.append)
    vit = tiny_model.load_vit()
    assert exam(vit, tiny_model) == open_exam("folders", [squares])(vit, tiny_model)
    assert any("a fifth of each class is asked about" in line for line in said)


def test_a_run_reports_accuracy_by_labels_and_learns_nothing_from_them(squares: Path, tmp_path: Path) -> None:
    small = {
        "image_size": 16,
        "patch_size": 8,
        "batch_size": 8,
        "out_dim": 16,
        "local_crops": 0,
        "arch_kwargs": {"embed_dim": 32, "depth": 1, "num_heads": 1},
    }
    reports = []
    for name, exam in (("with", open_exam("folders", [squares])), ("without", None)):
        config = TrainConfig((squares,), tmp_path, name=name, steps=3, device="cpu", overrides=small, evaluate=exam)
        *_, last = train(config)
        reports.append(last.report)
    assert reports[0] is not None
    assert reports[1] is not None
    assert reports[0].fingerprint == reports[1].fingerprint
    assert reports[1].knn_top1 is None
    model = open_model(tmp_path / "with")
    expected, _ = open_exam("folders", [squares])(model.load_vit(), model)
    assert reports[0].knn_top1 == pytest.approx(expected, abs=0.15)  # bf16 on the way, float32 here
    assert model.trained["quality"]["step"] == 3
    with pytest.raises(UsageError, match="--labels"):
        list(train(TrainConfig((squares,), tmp_path, name="c", device="cpu", select="labels")))


def test_a_model_of_one_channel_is_asked_about_one(tiny_model: ModelFolder, squares: Path) -> None:
    kwargs = tiny_model.arch_kwargs | {"in_chans": 1}
    facts = ModelFacts(arch=tiny_model.arch, arch_kwargs=kwargs, image_size=32, mean=(0.5,), std=(0.2,))
    accuracy, _ = open_exam("folders", [squares])(create_vit(facts).eval(), facts)
    assert 0.5 < accuracy <= 1.0
