"""The Python API: build an index, open one, ask it. Composes what the commands compose; shows nothing.

    import dinosearch

    index = dinosearch.build_index("./catalog")
    for match in index.search("cat.jpg", top=10):
        print(f"{match.score:.4f}", match.path)

Paths, names and defaults mean what they mean on the command line, `DINOSEARCH_MODELS` and `DINOSEARCH_INDEXES`
included.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dinosearch.errors import DinosearchError, ModelMismatch, UsageError
from dinosearch.images.sources import open_sources
from dinosearch.index.contents import Failure, IndexedFile, IndexInfo, failures, index_info
from dinosearch.index.locate import index_for, indexes_path, resolve_index
from dinosearch.index.survey import GivenOptions, Shard
from dinosearch.index.sync import SyncProgress, SyncSummary, sync_index
from dinosearch.query.search import Match, image_vectors
from dinosearch.query.search import open_index as open_for_search
from dinosearch.vit.folder import find_by_fingerprint, models_path
from dinosearch.vit.resolve import resolve_model

if TYPE_CHECKING:
    from dinosearch.encoder import Encoder
    from dinosearch.index.embed import EncoderPlan

PathLike = str | os.PathLike[str]
Note = Callable[[str], None]


def build_index(
    images: PathLike | Iterable[PathLike],
    *,
    name: str | None = None,
    model: str | None = None,
    image_size: int | None = None,
    device: str = "auto",
    precision: str | None = None,
    exclude: Sequence[str] | None = None,
    include_hidden: bool | None = None,
    all_pages: bool | None = None,
    shard: str | None = None,
    recall: float | None = None,
    max_memory: int | None = None,
    verify: bool = False,
    prune: bool = False,
    allow_deletions: bool = False,
    progress: Callable[[SyncProgress], None] = lambda _: None,
    note: Note = lambda _: None,
) -> Index:
    """Embed images into an index, or bring it up to date, and open it; what `dinosearch index` does.

    images: folders, archives, lists, tables, globs, URLs. model: a name in models/, a folder, `timm:NAME` or a
    released file; the newest in models/ without. image_size: side of the square that released weights see, in pixels.
    precision: auto, fp32, bf16 or int8 (for processors; needs the extra int8). It and the options of a source are as
    remembered where None.
    shard: "1/4" takes only the first of four parts, for `merge`.
    recall: share of the 10 nearest that a large index must find, 0.5 to 1; 0.95 without.
    max_memory: bytes, at most so many are used; a model is converted for the processor, once, in a process beside that.
    verify: read unchanged files too, to find altered ones.
    prune: forget the vectors that no file needs any more.
    progress is called now and then; `index.summary` tells what was done. Images that cannot be read do not raise:
    `index.failures()` lists them.
    Raises DinosearchError, whose message says what to do; whatever ends it early, what was embedded is saved.
    """
    specs = [images] if isinstance(images, str | os.PathLike) else images
    sources = open_sources(os.fspath(spec) for spec in specs)
    if not sources:
        raise UsageError("no images given. Name a folder, files, an archive, a list or a table")
    index_path = index_for(sources, name=name, indexes=indexes_path(), shard=shard, note=note)
    vit = resolve_model(model, models=models_path(), note=note, image_size=image_size)

    def start_encoder(plan: EncoderPlan) -> Encoder:
        from dinosearch.encoder import open_encoder

        return open_encoder(
            vit, device=device, planned_images=plan.images, precision=plan.precision, sample=plan.sample, note=note
        )

    options = GivenOptions(None if exclude is None else tuple(exclude), include_hidden, all_pages)
    summary = None
    sync = sync_index(
        sources,
        index_path=index_path,
        model=vit,
        encoder_for=start_encoder,
        options=options,
        shard=Shard.parse(shard) if shard else None,
        recall=recall,
        max_memory=max_memory,
        verify=verify,
        prune=prune,
        allow_deletions=allow_deletions,
        precision=precision,
        note=note,
    )
    with closing(sync):
        for step in sync:
            progress(step)
            summary = step.summary
    index = Index(index_path, device=device, summary=summary, note=note)
    if index.fingerprint == vit.fingerprint:  # else the earlier model answers still
        index._model_spec = str(vit.path)  # `model` without its image_size may be another one
    return index


def open_index(
    index: PathLike | None = None, *, model: str | None = None, device: str = "auto", note: Note = lambda _: None
) -> Index:
    """Open an index by name or folder; the newest one without.

    model says where the index's own model lies, if not in models/; it is loaded when first needed.
    Raises IndexNotFound, or IndexUnusable when it is damaged or of a newer format.
    """
    spec = None if index is None else os.fspath(index)
    return Index(resolve_index(spec, indexes=indexes_path(), note=note), model=model, device=device, note=note)


class Index:
    """An index open for reading, in one thread at a time. Close it, or use it as a context manager.

    What a writer commits meanwhile is seen by the next search.
    """

    def __init__(
        self,
        path: Path,
        *,
        model: str | None = None,
        device: str = "auto",
        summary: SyncSummary | None = None,
        note: Note = lambda _: None,
    ) -> None:
        self.path = path
        """Its folder."""
        self.summary = summary
        """What `build_index` did; None when only opened."""
        self._opened = open_for_search(path, note=note)
        self._model_spec = model
        self._device = device
        self._note = note
        self._encoder: Encoder | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def fingerprint(self) -> str:
        """Of the model whose vectors it holds."""
        return self._opened.fingerprint

    def search(self, query: PathLike | np.ndarray, *, top: int = 10, where: Sequence[str] = ()) -> list[Match]:
        """The `top` images most like a query, best first.

        query: an image file (photos.zip/a.jpg and URLs too), or a vector float [dim] such as `embed` gives.
        where: conditions on the columns that tables gave, and path, width, height: "price<=20", "brand=acme".
        Raises DinosearchError for a query that cannot be read, ModelMismatch without the index's model.
        """
        return self.search_many([query], top=top, where=where)[0]

    def search_many(
        self, queries: Sequence[PathLike | np.ndarray] | np.ndarray, *, top: int = 10, where: Sequence[str] = ()
    ) -> list[list[Match]]:
        """As `search`, for many queries at once, which is faster; vectors may come as one array [n, dim]."""
        if isinstance(queries, np.ndarray):
            vectors = _unit(queries)
        else:
            vectors = np.empty((len(queries), self._opened.dim), np.float32)
            files = [(i, os.fspath(query)) for i, query in enumerate(queries) if not isinstance(query, np.ndarray)]
            given = [i for i, query in enumerate(queries) if isinstance(query, np.ndarray)]
            if given:
                vectors[given] = _unit(np.stack([np.asarray(queries[i]) for i in given]))
            if files:
                vectors[[i for i, _ in files]] = self.embed([path for _, path in files])
        return self._opened.search(vectors, top=top, where=where)

    def embed(self, images: Iterable[PathLike]) -> np.ndarray:
        """Unit vectors float32 [n, dim] of image files by the index's model. Raises DinosearchError for a bad one."""
        paths = [os.fspath(image) for image in images]
        vectors, bad = image_vectors(self._open_encoder(), paths)
        if bad:
            number, reason = next(iter(bad.items()))
            raise DinosearchError(f"{paths[number]}: {reason}")
        return vectors

    def vectors(self) -> np.ndarray:
        """The index's vectors [n, dim], read-only and straight from its files: nothing is copied or read in advance.

        float32 of unit length, or float16 where the index is so large that exact vectors lie in a file of their own.
        `files()` says which row is whose. Newer ones may lie beside the files, up to 2 % above 50,000, below that only
        those of a run that was cut short: then all are copied, as float32 of unit length.
        """
        return self._opened.matrix()

    def files(self) -> list[IndexedFile]:
        """The images that can be searched, by source and path, each with the row of its vector in `vectors()`."""
        return self._opened.files()

    def info(self) -> IndexInfo:
        """Its figures, as `dinosearch info` shows them."""
        return index_info(self.path)

    def failures(self) -> list[Failure]:
        """Files without a vector, and why."""
        return list(failures(self.path))

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Files that can be searched."""
        return self.info().images

    def __repr__(self) -> str:
        return f"<dinosearch index {self.name!r} in {self.path}>"

    def _open_encoder(self) -> Encoder:
        if self._encoder is None:
            from dinosearch.encoder import open_encoder

            if self._model_spec is None:
                vit = find_by_fingerprint(self.fingerprint, models=models_path())
            else:
                vit = resolve_model(self._model_spec, models=models_path(), note=self._note)
            if vit is None or vit.fingerprint != self.fingerprint:
                raise ModelMismatch(
                    f"the model that made {self.path} (fingerprint {self.fingerprint}) is not "
                    f"{self._model_spec or f'in {models_path()}/'}. Put it back, or say where it lies with model=…"
                )
            self._encoder = open_encoder(vit, device=self._device, precision=self._opened.precision, note=self._note)
        return self._encoder


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
