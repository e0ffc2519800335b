"""Nearest-neighbour search side by side on the same vectors: ours, plain FAISS, hnswlib and usearch, as one table.

    python benchmarks/embeddings.py million.npy --images photos drawings --idx fashion-mnist
    python benchmarks/search.py million.npy --cache built --systems exact chosen hnswlib

--queries vectors, evenly spaced, are taken out and asked for; the others are searched. Every system is built once into
--cache (`--build` builds and stops) and then opened in a process of its own. Graphs and `chosen` are compared at the
same recall: the least ef of a graph that reaches --recall on half of the queries; for ours what `index` tuned itself
to, with a margin for other queries. Recall is counted on the other half. Single queries go one by one, on one thread
and on all; batched ones all at once. Memory is what the process has for itself (RssAnon) beyond what it had before it
opened the index; pages of mapped files, which the system may take back, are not in it. `exact` and `flat` are timed on
fewer queries. Of hnswlib and usearch, what is not installed is left out.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from dinosearch.images.machine import n_cores
from dinosearch.index.catalog import Catalog, Generation
from dinosearch.index.exact import nearest
from dinosearch.index.generation import open_generation, write_generation
from dinosearch.index.reader import unit
from dinosearch.index.vectors import Vectors

SYSTEMS = ("exact", "chosen", "flat", "faiss-hnsw", "hnswlib", "usearch")
PACKAGES = ("hnswlib", "usearch")  # systems that dinosearch does not install
K = 10
EFS = (*range(10, 32), 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 768)
FEW = 50  # single queries of systems that look at every vector
BLOCK = 16384
Search = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, help=".npy, float16 [n, dim]")
    parser.add_argument("--cache", type=Path, required=True, help="folder for built indexes")
    parser.add_argument("--n", type=int, default=1_000_000, help="vectors to search")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--m", type=int, default=16, help="links of a node in hnswlib and usearch; FAISS has 32")
    parser.add_argument("--ef-construction", type=int, default=200)
    parser.add_argument("--build", action="store_true", help="build what is missing and stop")
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)

    data = Data(options.vectors, options.n, options.queries)
    if options.one:
        print(json.dumps(measured(options.one, data, options)))
        return
    options.systems = installed(options.systems)
    for name in options.systems:
        if not record_path(options.cache, name).exists():
            print(f"building {name}", file=sys.stderr, flush=True)
            began = time.monotonic()
            BUILD[name](data, options)
            facts = {"build_s": round(time.monotonic() - began, 1), "n": data.n}
            record_path(options.cache, name).write_text(json.dumps(facts))
    if options.build:
        return
    truth_of(data, options.cache)
    command = [sys.executable, *sys.argv, "--one"]
    rows = [json.loads(subprocess.run([*command, name], stdout=-1, check=True).stdout) for name in options.systems]
    (options.cache / "search.json").write_text(json.dumps(rows, indent=1))
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in columns) + " |")


def installed(systems: Sequence[str]) -> list[str]:
    """Those that can be imported; the others are told before anything is built."""
    missing = [name for name in systems if name in PACKAGES and importlib.util.find_spec(name) is None]
    for name in missing:
        print(f"{name} is left out: pip install {name}", file=sys.stderr)
    if len(missing) == len(systems):
        raise SystemExit("nothing is left to compare")
    return [name for name in systems if name not in missing]


class Data:
    """Stored vectors and, evenly spaced among them, the queries."""

    def __init__(self, path: Path, n: int, n_queries: int) -> None:
        every = np.load(path, mmap_mode="r")[: n + n_queries]
        self.n = len(every) - n_queries
        self.dim = every.shape[1]
        self._every = every
        self._asked = np.linspace(0, len(every) - 1, n_queries).astype(np.int64)
        self.queries = unit(every[self._asked])

    def halves(self) -> Any:
        """Blocks of float16 [m, dim], without the queries."""
        for start in range(0, len(self._every), BLOCK):
            block = self._every[start : start + BLOCK]
            inside = self._asked[(self._asked >= start) & (self._asked < start + len(block))] - start
            yield np.delete(block, inside, axis=0)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [n_positions, dim]."""
        before = np.arange(len(self._asked))  # so many queries lie before the stored vector that each would follow
        return unit(self._every[positions + np.searchsorted(self._asked - before, positions, side="right")])

    def blocks(self) -> Any:
        """Positions int64 [m] and unit vectors float32 [m, dim]."""
        start = 0
        for halves in self.halves():
            yield np.arange(start, start + len(halves)), unit(halves)
            start += len(halves)


def truth_of(data: Data, cache: Path) -> np.ndarray:
    """Score float32 [n_queries] of each query's tenth nearest, by brute force."""
    path = cache / f"truth-{data.n}-{len(data.queries)}.npy"
    if not path.exists():
        _, scores = nearest(data.queries, (block for _, block in data.blocks()), K)
        np.save(path, scores.min(axis=1))
    return np.load(path)


def build_ours(data: Data, options: argparse.Namespace, *, exact: bool) -> None:
    folder = options.cache / "ours"
    if not (folder / "catalog.sqlite").exists():
        folder.mkdir(exist_ok=True)
        with Catalog.create(folder, fingerprint="f", model="m", dim=data.dim) as catalog:
            start = 0
            for halves in data.halves():
                contents = [(f"{start + row}", 0, 1, 1) for row in range(len(halves))]
                catalog.put_vectors(contents, halves, fingerprint="f")
                start += len(halves)
            catalog.commit()
    with Catalog.open(folder, writable=True) as catalog:
        began = time.monotonic()
        generation = write_generation(
            catalog,
            fingerprint="f",
            dim=data.dim,
            recall=1.0 if exact else options.recall,
            note=lambda line: print(line, file=sys.stderr),
        )
        catalog.put_generation(generation)
        catalog.commit()
    facts = asdict(generation) | {"seconds": round(time.monotonic() - began, 1)}
    (options.cache / f"ours-{'exact' if exact else 'chosen'}.json").write_text(json.dumps(facts))


def build_flat(data: Data, options: argparse.Namespace) -> None:
    index = faiss.IndexFlatIP(data.dim)
    for _, block in data.blocks():
        index.add(block)
    faiss.write_index(index, str(options.cache / "flat"))


def build_faiss_hnsw(data: Data, options: argparse.Namespace) -> None:
    index = faiss.IndexHNSWFlat(data.dim, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = options.ef_construction
    for _, block in data.blocks():
        index.add(block)
    faiss.write_index(index, str(options.cache / "faiss-hnsw"))


def build_hnswlib(data: Data, options: argparse.Namespace) -> None:
    import hnswlib

    index = hnswlib.Index("ip", data.dim)
    index.init_index(data.n, M=options.m, ef_construction=options.ef_construction)
    for positions, block in data.blocks():
        index.add_items(block, positions)
        print(f"{positions[-1] + 1} vectors", file=sys.stderr, flush=True)
    index.save_index(str(options.cache / "hnswlib"))


def build_usearch(data: Data, options: argparse.Namespace) -> None:
    from usearch.index import Index

    index = Index(
        ndim=data.dim, metric="ip", dtype="f32", connectivity=options.m, expansion_add=options.ef_construction
    )
    for positions, block in data.blocks():
        index.add(positions, block)
    index.save(str(options.cache / "usearch"))


BUILD: dict[str, Callable[[Data, argparse.Namespace], None]] = {
    "exact": lambda data, options: build_ours(data, options, exact=True),
    "chosen": lambda data, options: build_ours(data, options, exact=False),
    "flat": build_flat,
    "faiss-hnsw": build_faiss_hnsw,
    "hnswlib": build_hnswlib,
    "usearch": build_usearch,
}


def record_path(cache: Path, name: str) -> Path:
    return cache / f"{name}.built.json"


def opened(name: str, data: Data, cache: Path) -> tuple[Search, Callable[[int], None] | None, int]:
    """A search for positions [n_queries, K], how to set its ef where it has one, and its bytes on disk."""
    path = cache / name
    if name in ("exact", "chosen"):
        facts = json.loads((cache / f"ours-{name}.json").read_text())
        facts.pop("seconds")
        generation = Generation(**facts)
        stored = open_generation(cache / "ours", generation, data.dim)
        vectors = Vectors("f", stored, np.empty(0, np.int64), np.empty((0, data.dim), np.float32))
        size = sum(file.stat().st_size for file in (cache / "ours").glob(f"vectors-{generation.number}.*"))
        return lambda queries: vectors.search(queries, K).ids - 1, None, size
    size = path.stat().st_size
    if name in ("flat", "faiss-hnsw"):
        index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        set_ef = None if name == "flat" else lambda ef: setattr(index.hnsw, "efSearch", ef)
        return lambda queries: index.search(queries, K)[1], set_ef, size
    if name == "hnswlib":
        import hnswlib

        graph = hnswlib.Index("ip", data.dim)
        graph.load_index(str(path))
        return (
            lambda queries: graph.knn_query(queries, K, num_threads=THREADS[0])[0].astype(np.int64),
            graph.set_ef,
            size,
        )
    from usearch.index import Index

    usearch: Any = Index.restore(str(path))
    return (
        lambda queries: np.atleast_2d(usearch.search(queries, K, threads=THREADS[0]).keys).astype(np.int64),
        lambda ef: setattr(usearch, "expansion_search", ef),
        size,
    )


THREADS = [n_cores()]


def use_threads(n: int) -> None:
    THREADS[0] = n
    faiss.omp_set_num_threads(n)


def measured(name: str, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    truth = truth_of(data, options.cache)
    before = private_bytes()
    search, set_ef, size = opened(name, data, options.cache)
    use_threads(n_cores())
    search(data.queries[:FEW])
    memory = private_bytes() - before
    tuned_on, asked = data.queries[::2], data.queries[1::2]
    setting = ""
    if set_ef is not None:
        for ef in EFS:
            set_ef(ef)
            if recall(data, search(tuned_on), tuned_on, truth[::2]) >= options.recall:
                break
        setting = f"ef {ef}"
    elif name == "chosen":
        facts = json.loads((options.cache / "ours-chosen.json").read_text())
        setting = facts["kind"] + " " + json.dumps(json.loads(facts["details"])["parameters"])
    few = asked[:FEW] if name in ("exact", "flat") else asked
    row: dict[str, Any] = {"system": name, "setting": setting}
    row["recall@10"] = round(recall(data, search(asked), asked, truth[1::2]), 4)
    for label, threads in (("1 thread", 1), ("all threads", n_cores())):
        use_threads(threads)
        seconds = [timed(search, query[None]) for query in few]
        row[f"single q/s, {label}"] = round(len(few) / sum(seconds))
        row[f"p50 ms, {label}"] = round(float(np.median(seconds)) * 1000, 3)
        row[f"p95 ms, {label}"] = round(float(np.percentile(seconds, 95)) * 1000, 3)
        row[f"batch q/s, {label}"] = round(len(asked) / timed(search, asked))
    row["build s"] = json.loads(record_path(options.cache, name).read_text())["build_s"]
    row["MB on disk"] = round(size / 1e6)
    row["private MB"] = round(memory / 1e6)
    return row


def timed(search: Search, queries: np.ndarray) -> float:
    began = time.perf_counter()
    search(queries)
    return time.perf_counter() - began


def recall(data: Data, found: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> float:
    """Share of the ten nearest; what scores as the true tenth or more is right."""
    n_hits = 0
    for row, query, tenth in zip(found, queries, truth, strict=True):
        n_hits += min(K, int((data.rows(row) @ query >= tenth - 1e-6).sum()))
    return n_hits / (K * len(queries))


def private_bytes() -> int:
    """RssAnon of this process, in bytes; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell a process's private memory")


if __name__ == "__main__":
    main()
