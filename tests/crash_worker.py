"""Index a folder with a slow encoder, and die of SIGKILL where told to: at a commit, or about the FAISS file.

Usage: crash_worker.py TESTS_FOLDER IMAGES INDEX MODEL_SEED WHERE, with WHERE one of never, before-commit:N,
after-commit:N, before-faiss, half-faiss, after-faiss.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])

from indexing import ProjectingEncoder, a_model, last

from dinosearch.index import embed, vectors
from dinosearch.index.catalog import Catalog
from dinosearch.index.sync import sync_index

images, index, seed, where = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
kind, _, number = where.partition(":")
commit, write_generation = Catalog.commit, vectors.write_generation
n_commits = 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def commit_and_die(catalog: Catalog) -> None:
    global n_commits
    n_commits += 1
    if kind == "before-commit" and n_commits == int(number):
        die()
    commit(catalog)
    if kind == "after-commit" and n_commits == int(number):
        die()


def write_and_die(catalog: Catalog, **options: object) -> object:
    if kind == "before-faiss":
        die()
    if kind == "half-faiss":
        (catalog.path.parent / f"vectors-{catalog.next_generation()}.faiss.part").write_bytes(b"IxM2 half")
        die()
    generation = write_generation(catalog, **options)
    if kind == "after-faiss":
        die()
    return generation


Catalog.commit = commit_and_die
vectors.write_generation = write_and_die
embed.SAVE_FILES = 16
model = a_model(seed)
encoder = ProjectingEncoder(model, seconds_per_batch=0.01)
print("ready", flush=True)
last(sync_index([images], index_path=index, model=model, encoder_for=lambda _: encoder, workers=2))
