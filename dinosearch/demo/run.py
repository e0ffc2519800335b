"""The demo: what the four commands do, one after the other, and a comparison with doing nothing.

Raw pixels and an untrained ViT say what the training itself was worth.
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinosearch.demo.data import DemoImages, lay_out
from dinosearch.errors import DinosearchError, Interrupted
from dinosearch.vit.folder import ModelFolder, Note, open_model

if TYPE_CHECKING:
    from dinosearch.query.probe import ProbeReport
    from dinosearch.query.search import Match

MINUTES = 4.0
"""Of training, so that the whole demo stays below six minutes on two cores."""
SHOWN_QUERIES = 10
SHOWN_MATCHES = 8
ShowProgress = Callable[[str, int, int, str], None]
"""Stage, done, total, details."""


@dataclass(frozen=True)
class Scores:
    """Accuracy on the held-out images, 0..1."""

    knn: float
    linear: float | None = None


@dataclass(frozen=True)
class Shown:
    """A query and its matches, with labels."""

    path: Path
    label: str
    matches: list[tuple["Match", str]]


@dataclass(frozen=True)
class DemoReport:
    """What `report.json` holds, and what the sheet and the page show."""

    data: str
    pixels: Scores
    untrained: Scores
    trained: Scores
    commands: list[str]
    seconds: float
    n_train: int
    n_test: int
    knn_k: int
    folder: Path
    shown: list[Shown]

    @property
    def sentence(self) -> str:
        """What a few minutes did, and did not do."""
        gain = 100 * (self.trained.knn - self.untrained.knn)
        against = "also ahead of" if self.trained.knn > self.pixels.knn else "still behind"
        return (
            f"Minutes of training without labels moved k-NN accuracy by {gain:+.1f} points from an untrained ViT, "
            f"{against} comparing raw pixels ({self.pixels.knn:.1%}), which is hard to beat on small centred images: "
            "train for longer (--minutes 60) before you judge DINO by this."
        )

    def facts(self) -> dict[str, Any]:
        """As `report.json` keeps it."""
        return {
            "data": self.data,
            "untrained": asdict(self.untrained),
            "trained": asdict(self.trained),
            "pixels": {"knn": self.pixels.knn},
            "commands": self.commands,
            "seconds": self.seconds,
            "n_train": self.n_train,
            "n_test": self.n_test,
            "k": self.knn_k,
        }


def run_demo(
    folder: Path,
    *,
    data: Path | None = None,
    minutes: float = MINUTES,
    device: str = "auto",
    note: Note,
    progress: ShowProgress,
    stop: Callable[[], bool] = lambda: False,
) -> DemoReport:
    """Train, index, query and probe in `folder`, and write report.json, matches.png and report.html there.

    Raises DinosearchError when `folder` holds something else than an earlier demo.
    """
    from dinosearch.demo.report import write_page, write_sheet

    began = time.monotonic()
    _claim(folder)
    progress("images", 0, 0, "laying out")
    images = lay_out(folder, data=data, note=note)
    note(f"images: {images.source}")
    demo = _Demo(folder, images, device=device, note=note, progress=progress, stop=stop)
    untrained = demo.probe(demo.index(demo.train("untrained", steps=0), "untrained"))
    model = demo.train("images", minutes=minutes)
    index_path = demo.index(model, "images")
    trained = demo.probe(index_path)
    pixels = demo.pixels()
    shown = demo.shown(model, index_path)
    report = DemoReport(
        data=images.source,
        pixels=pixels,
        untrained=Scores(untrained.knn.top1, untrained.linear.top1),
        trained=Scores(trained.knn.top1, trained.linear.top1),
        commands=[
            f"dinosearch train ./images/train --minutes {minutes:g} --name images",
            "dinosearch index ./images --name images",
            f"dinosearch query {shown[0].path.relative_to(folder.resolve()).as_posix()} --top {SHOWN_MATCHES}",
            "dinosearch probe --labels labels.csv",
        ],
        seconds=round(time.monotonic() - began, 1),
        n_train=trained.n_train,
        n_test=trained.n_test,
        knn_k=trained.knn.k,
        folder=folder,
        shown=shown,
    )
    (folder / "report.json").write_text(json.dumps(report.facts(), indent=2) + "\n", encoding="utf-8")
    write_sheet(report, folder / "matches.png")
    write_page(report, folder / "report.html")
    return report


def _claim(folder: Path) -> None:
    """Make the folder; an earlier demo's models and indexes go, anything else is left alone."""
    marker = folder / ".dinosearch-demo"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise DinosearchError(f"{folder} exists and is no earlier demo. Move it, or run the demo in another folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for made in ("models", "indexes"):
        shutil.rmtree(folder / made, ignore_errors=True)


class _Demo:
    """The steps, which share a folder and a face."""

    def __init__(
        self,
        folder: Path,
        images: DemoImages,
        *,
        device: str,
        note: Note,
        progress: ShowProgress,
        stop: Callable[[], bool],
    ) -> None:
        self.folder = folder
        self.images = images
        self.device = device
        self.note = note
        self.progress = progress
        self.stop = stop

    def _show(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Where the demo is. Raises Interrupted once somebody has asked to stop."""
        if self.stop():
            raise Interrupted(f"stopped at {stage}: the demo starts over when it is run again")
        self.progress(stage, done, total, "")

    def train(self, name: str, *, steps: int | None = None, minutes: float | None = None) -> ModelFolder:
        from dinosearch.pretrain.config import TrainConfig
        from dinosearch.pretrain.train import train

        config = TrainConfig(
            images=(self.images.train_folder,),
            models=self.folder / "models",
            name=name,
            steps=steps,
            minutes=minutes,
            device=self.device,
        )
        for item in train(config, note=self.note if minutes else lambda _: None, stop=self.stop):
            if item.phase != "done":
                loss = "" if item.loss is None else f"loss {item.loss:.3f}  "
                rate = "" if not item.images_per_second else f"{item.images_per_second:.0f} images/s"
                self.progress(item.phase, item.done, item.total, loss + rate)
            elif item.report is not None and item.report.stopped:
                raise Interrupted(f"stopped in training; {item.report.model} holds what was learnt")
        return open_model(self.folder / "models" / name)

    def index(self, model: ModelFolder, name: str) -> Path:
        from dinosearch.encoder import Encoder, open_encoder
        from dinosearch.index.embed import EncoderPlan
        from dinosearch.index.sync import sync_index

        def start(plan: EncoderPlan) -> Encoder:
            return open_encoder(model, device=self.device, planned_images=plan.images, note=self.note)

        path = self.folder / "indexes" / name
        sync = sync_index(
            [self.folder / "images"],
            index_path=path,
            model=model,
            encoder_for=start,
            allow_deletions=True,
            prune=False,
            note=self.note,
        )
        with closing(sync):
            for item in sync:
                self._show(f"{item.stage} ({name})", item.done, item.total)
        return path

    def probe(self, index_path: Path) -> "ProbeReport":
        from dinosearch.index.contents import read_vectors
        from dinosearch.query.labels import load_labels
        from dinosearch.query.probe import probe

        self._show(f"probe ({index_path.name})")
        files, vectors = read_vectors(index_path)
        known = load_labels(self.images.labels_path, files)
        return probe(vectors[known.rows], known.labels, split=known.splits, note=self.note)

    def pixels(self) -> Scores:
        """k-NN accuracy of the pixels themselves, with the same vote: what no training at all gives."""
        from dinosearch.query.probe import MAX_K, knn_vote

        self._show("raw pixels")
        rows = _read_labels(self.images.labels_path)
        names = sorted({label for _, label, _ in rows})
        vectors = {}
        classes = {}
        for split in ("train", "test"):
            part = [(self.folder / path, label) for path, label, found in rows if found == split]
            kept, vectors[split] = _pixel_vectors([path for path, _ in part])
            classes[split] = np.array([names.index(part[row][1]) for row in kept])
        k = max(1, min(MAX_K, int(np.bincount(classes["train"]).min())))
        votes = knn_vote(vectors["train"], classes["train"], vectors["test"], k=k)
        return Scores(float((votes == classes["test"]).mean()))

    def shown(self, model: ModelFolder, index_path: Path) -> list[Shown]:
        """Matches of one held-out image per class, without the image itself."""
        from dinosearch.encoder import open_encoder
        from dinosearch.index.contents import read_vectors
        from dinosearch.query.search import open_index, query_images

        self._show("queries")
        rows = _read_labels(self.images.labels_path)
        labels = {(self.folder / path).resolve(): label for path, label, _ in rows}
        readable = {Path(file.path) for file in read_vectors(index_path)[0]}
        first: dict[str, Path] = {}
        for path, label, split in rows:
            if split == "test" and (found := (self.folder / path).resolve()) in readable:
                first.setdefault(label, found)
        queries = [first[label] for label in sorted(first)][:SHOWN_QUERIES]
        shown = []
        with open_index(index_path) as index:
            encoder = open_encoder(model, device=self.device)
            answers = query_images(index, encoder, queries, top=SHOWN_MATCHES + 1)
            for query, answer in zip(queries, answers, strict=True):
                others = [match for match in answer.matches if match.path != query][:SHOWN_MATCHES]
                shown.append(Shown(query, labels[query], [(match, labels[Path(match.path)]) for match in others]))
        return shown


def _read_labels(path: Path) -> list[tuple[str, str, str]]:
    import csv

    with path.open(newline="", encoding="utf-8") as file:
        return [(row["path"], row["label"], row["split"]) for row in csv.DictReader(file)]


def _pixel_vectors(paths: list[Path]) -> tuple[list[int], np.ndarray]:
    """Positions of the images that can be read, and unit float32 [n, 3 × 28 × 28]: they in small squares, squeezed."""
    from dinosearch.images import BadImage, Fit, decode, in_threads, read_bytes

    fit = Fit(28, "squash")

    def squeezed(path: Path) -> np.ndarray | None:
        try:
            return decode(read_bytes(path), fit).pixels
        except BadImage:
            return None

    squares = list(in_threads(squeezed, paths))
    kept = [i for i, pixels in enumerate(squares) if pixels is not None]
    flat = np.stack([pixels for pixels in squares if pixels is not None]).reshape(len(kept), -1).astype(np.float32)
    return kept, flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
