"""How long a sync takes of a folder in which nothing changed: 200,000 files, a stat each.

    python benchmarks/resync.py [--files 200000] [--dim 384]

Makes the files (each a few bytes, no two the same) and a catalog that knows them, with a vector each, in a temporary
folder; then syncs it in processes of their own, as `dinosearch index` does, and times each as a whole.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dinosearch.index.catalog import Catalog
from dinosearch.index.rows import FileRow
from dinosearch.vit.folder import ModelFolder

PER_FOLDER = 500


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--files", type=int, default=200_000)
    arguments.add_argument("--dim", type=int, default=384)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images, index = Path(folder) / "images", Path(folder) / "index"
        make_files(images, chosen.files)
        model = ModelFolder(
            arch="none", arch_kwargs={}, image_size=8, path=Path("model"), dim=chosen.dim, fingerprint="0" * 16
        )
        fill_catalog(index, images, model, chosen.files)
        # The first run writes the FAISS file.
        for what in ("with the FAISS file", "unchanged", "unchanged", "unchanged"):
            began = time.perf_counter()
            summary = in_a_process(images, index, chosen.dim)
            seconds = time.perf_counter() - began
            assert summary["unchanged"] == chosen.files, summary
            print(
                f"{what}: {seconds:.2f} s from start to end of the process, {summary['seconds']:.2f} s of sync, "
                f"{chosen.files / summary['seconds']:,.0f} files/s"
            )


def make_files(images: Path, n: int) -> None:
    for number in range(n):
        if number % PER_FOLDER == 0:
            (images / f"{number // PER_FOLDER:04d}").mkdir(parents=True)
        (images / f"{number // PER_FOLDER:04d}" / f"{number:08d}.jpg").write_bytes(number.to_bytes(8, "big"))


def fill_catalog(index: Path, images: Path, model: ModelFolder, n: int) -> None:
    index.mkdir()
    random = np.random.default_rng(0)
    with Catalog.create(index, fingerprint=model.fingerprint, model="model", dim=model.dim) as catalog:
        root = catalog.add_root("folder", str(images.resolve()))
        for start in range(0, n, 10_000):
            numbers = range(start, min(n, start + 10_000))
            # The order of hashes is none of the order of names.
            hashes = [f"{number * 0x9E3779B97F4A7C15 % 2**64:032x}" for number in numbers]
            vectors = random.standard_normal((len(hashes), model.dim), dtype=np.float32)
            catalog.put_vectors([(each, 0, 500, 375) for each in hashes], vectors, fingerprint=model.fingerprint)
            rows = []
            for number, content in zip(numbers, hashes, strict=True):
                name = f"{number // PER_FOLDER:04d}/{number:08d}.jpg"
                rows.append(FileRow(root, name, 8, (images / name).stat().st_mtime_ns, content, "ok", "", 500, 375))
            catalog.put_files(rows)
            catalog.commit()


def in_a_process(images: Path, index: Path, dim: int) -> dict[str, float]:
    code = f"""
import dataclasses, json
from pathlib import Path
from dinosearch.index.sync import sync_index
from dinosearch.vit.folder import ModelFolder
model = ModelFolder(
    arch="none", arch_kwargs={{}}, image_size=8, path=Path("model"), dim={dim}, fingerprint={"0" * 16!r}
)
for progress in sync_index([Path({str(images)!r})], index_path=Path({str(index)!r}), model=model, encoder_for=None):
    pass
print(json.dumps(dataclasses.asdict(progress.summary)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
