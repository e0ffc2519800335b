import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from indexing import Workshop, a_model, write_images

from dinosearch.errors import IndexNotFound
from dinosearch.index.contents import index_info, read_vectors
from dinosearch.query.search import open_index

N = 240


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("crash") / "images"
    write_images(root, N)
    return root


@pytest.fixture(scope="module")
def calm(images, tmp_path_factory):
    """What an undisturbed run makes of the images, by the seed of the model."""
    vectors = {}
    for seed in (0, 1):
        shop = Workshop(images, tmp_path_factory.mktemp("calm") / "index", a_model(seed), None, [])
        shop.sync()
        files, vectors[seed] = read_vectors(shop.index)
    return [file.relative for file in files], vectors


def worker(images, index, where="never", *, seed=0):
    here = Path(__file__).parent
    arguments = [here / "crash_worker.py", here, images, index, seed, where]
    return subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, cwd=here.parent)


def assert_answers(index, calm, seed=0):
    """Every image that is in the index is found, with the vector of a calm run; returns how many there are."""
    names, vectors = calm
    files, found = read_vectors(index)
    rows = [names.index(file.relative) for file in files]
    assert np.allclose(found, vectors[seed][rows], atol=1e-3)
    with open_index(index) as opened:
        assert opened.fingerprint == a_model(seed).fingerprint
        for answer, file in zip(opened.search(found[::20], top=1), files[::20], strict=True):
            assert (answer[0].path, answer[0].score) == (file.path, 1.0)
    return len(files)


def assert_as_calm(index, images, calm, seed=0):
    Workshop(images, index, a_model(seed), None, []).sync()
    assert assert_answers(index, calm, seed) == N
    assert [file.relative for file in read_vectors(index)[0]] == calm[0]
    assert len(list(index.glob("vectors-*"))) == len([p for p in index.glob("vectors-*.faiss") if p.stat().st_size])


def test_killed_at_random_instants_it_always_answers_and_only_grows(images, calm, tmp_path):
    index, clock, counts = tmp_path / "index", random.Random(0), [0]
    for _ in range(6):
        with worker(images, index) as process:
            process.stdout.readline()
            time.sleep(clock.uniform(0.3, 1.2))  # the processes that decode start in the first of it
            process.kill()
        try:
            counts.append(assert_answers(index, calm))
        except IndexNotFound:
            assert counts[-1] == 0
    assert counts == sorted(counts)
    assert counts[-1] > 0
    assert_as_calm(index, images, calm)


@pytest.mark.parametrize(
    "where",
    [
        "before-commit:1",
        "after-commit:1",
        "before-commit:2",
        "after-commit:5",
        "before-faiss",
        "half-faiss",
        "after-faiss",
    ],
)
def test_killed_at_each_point_of_saving_it_answers_and_goes_on(images, calm, tmp_path, where):
    index = tmp_path / "index"
    with worker(images, index, where) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    saved = {"before-commit:1": 0, "after-commit:1": 0, "before-commit:2": 0, "after-commit:5": 64}.get(where, N)
    assert assert_answers(index, calm) == saved
    shop = Workshop(images, index, a_model(), None, [])
    summary = shop.sync()
    assert (summary.new, summary.unchanged, summary.embedded) == (N - saved, saved, N - saved)
    assert_as_calm(index, images, calm)


@pytest.mark.parametrize("where", ["after-commit:4", "half-faiss", "after-faiss"])
def test_killed_while_embedding_anew_the_old_model_answers(images, calm, tmp_path, where):
    shop = Workshop(images, tmp_path / "index", a_model(0), None, [])
    shop.sync()
    with worker(images, shop.index, where, seed=1) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert assert_answers(shop.index, calm, seed=0) == N
    shop.model = a_model(1)
    assert shop.sync().embedded == {"after-commit:4": N - 48}.get(where, 0)
    assert assert_answers(shop.index, calm, seed=1) == N
    assert index_info(shop.index).faiss.recall_at_10 == 1.0
