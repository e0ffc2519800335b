import random
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from crash_worker import SCENES, sync
from indexing import a_model, write_image, write_images
from test_schema import to_format_1

from dinosearch.errors import IndexNotFound
from dinosearch.index import embed
from dinosearch.index.contents import index_info, read_vectors
from dinosearch.index.survey import Shard
from dinosearch.query.search import open_index

HERE = Path(__file__).parent
N = 240
FEW = 40


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("crash") / "images"
    write_images(root, N)
    return root


@pytest.fixture(scope="module")
def calm(images, tmp_path_factory):
    """What an undisturbed run makes of the images."""
    index = tmp_path_factory.mktemp("calm") / "index"
    sync(images, index)
    return contents(index)


def contents(index):
    """What an index holds: files, their vectors and what it says of them; and that a search finds each of them."""
    files, vectors = read_vectors(index)
    with sqlite3.connect(index / "catalog.sqlite") as connection:
        rows = connection.execute(
            """SELECT roots.path, files.path, member, frame, size, mtime_ns, content_hash, status, reason, frames
            FROM files JOIN roots ON roots.id = root ORDER BY 1, 2, 3, 4"""
        ).fetchall()
    with open_index(index) as opened:
        for answer, file in zip(opened.search(vectors[::7], top=1), files[::7], strict=True):
            assert (answer[0].path, answer[0].score) == (file.path, 1.0)
        fingerprint = opened.fingerprint
    return fingerprint, rows, {str(file.path): vector for file, vector in zip(files, vectors, strict=True)}


def assert_same(found, expected):
    assert found[:2] == expected[:2]
    assert list(found[2]) == list(expected[2])
    # float16 of other batches
    assert np.allclose(np.array([*found[2].values()]), np.array([*expected[2].values()]), atol=1e-3)


def assert_some_of(found, expected):
    """An index that is not finished has nothing but what the finished one has."""
    assert found[0] == expected[0]
    for path, vector in found[2].items():
        assert np.allclose(vector, expected[2][path], atol=1e-3)


def assert_tidy(index):
    """Every file in the folder is one that the catalog names."""
    with sqlite3.connect(index / "catalog.sqlite") as connection:
        named = {file for (file,) in connection.execute("SELECT file FROM generations")}
    assert {path.name.rpartition(".")[0] for path in index.glob("vectors-*")} <= {n.rpartition(".")[0] for n in named}


def run(images, index, *, seconds=None):
    """Index in a process of its own, killed after so many seconds of work; how long it worked."""
    arguments = [HERE / "crash_worker.py", "run", images, index]
    with subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, cwd=HERE.parent) as process:
        process.stdout.readline()
        began = time.monotonic()
        if seconds is None:
            assert process.wait() == 0
        else:
            time.sleep(seconds)
            process.kill()
        return time.monotonic() - began


def test_killed_at_random_instants_it_always_answers_and_only_grows(images, calm, tmp_path):
    index, clock, counts = tmp_path / "index", random.Random(0), [0]
    seconds = run(images, tmp_path / "undisturbed")
    for _ in range(12):
        run(images, index, seconds=clock.uniform(0.1, 1) * seconds)
        try:
            found = contents(index)
        except IndexNotFound:
            assert counts[-1] == 0
        else:
            assert_some_of(found, calm)
            counts.append(len(found[2]))
    assert counts == sorted(counts)
    assert counts[-1] > 0
    sync(images, index)
    assert_same(contents(index), calm)
    assert_tidy(index)


@pytest.fixture
def few(tmp_path):
    write_images(tmp_path / "images", FEW)
    return tmp_path / "images"


def before(scene, images, folder):
    """The state of the disk in which a scene begins."""
    index = folder / "index"
    folder.mkdir()
    if scene == "merge":
        for number in (1, 2):
            sync(images, folder / f"part{number}", shard=Shard(number, 2))
    elif scene != "create":
        sync(images, index)
    if scene == "grow":
        write_images(images / "new", 20, seed=500)
        (images / "0000.png").rename(images / "moved.png")
        write_image(images / "0001.png", 900)
        (images / "0002.png").unlink()
    if scene == "prune":
        (images / "0002.png").unlink()
    if scene == "relocate":
        with sqlite3.connect(index / "catalog.sqlite") as connection:
            connection.execute("UPDATE roots SET path = ?", (str(images.parent / "was-here"),))
    if scene == "migrate":
        to_format_1(index / "catalog.sqlite")


@pytest.mark.parametrize("scene", SCENES)
def test_killed_before_any_step_it_answers_and_comes_to_the_same_end(scene, few, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "SAVE_FILES", 16)
    folder = tmp_path / "scene"
    folder.mkdir()
    before(scene, few, folder / "before")
    shutil.copytree(folder / "before", folder / "calm")
    SCENES[scene](few, folder / "calm")
    end = contents(folder / "calm" / "index")
    start = None if scene in ("create", "merge") else contents_of_copy(folder)
    arguments = [HERE / "crash_worker.py", scene, few, folder]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=HERE.parent
    )
    assert done.returncode == 0, done.stderr
    n_steps = int(done.stdout)
    assert n_steps >= {"create": 12, "grow": 10, "merge": 8}.get(scene, 3)
    for step in range(1, n_steps + 1):
        here = folder / str(step) / "index"
        told = f"killed before step {step}: {(folder / f'{step}.txt').read_text()}"
        found = None
        try:
            found = contents(here)
        except IndexNotFound:
            assert scene in ("create", "merge"), told
        if found:
            assert_between(found, start, end, told)
        # What is forgotten, relocated or merged already cannot be once more.
        if not found or found[1] != end[1] or scene not in ("forget", "relocate", "merge"):
            SCENES[scene](few, here.parent)
        elif scene == "forget":
            sync(few, here)
        assert_same(contents(here), end)
        assert_tidy(here)
        erased = [start[2][path].tobytes() for path in set(start[2]) - set(end[2])] if scene == "forget" else []
        assert not any(vector in path.read_bytes() for vector in erased for path in here.iterdir()), told
    assert not list(folder.glob("*/.index*"))


def assert_between(found, start, end, told):
    """Each file has a vector that it had before or has at the end, and none is missing that both have."""
    sides = [side for side in (start, end) if side and side[0] == found[0]]
    assert sides, told
    for path, vector in found[2].items():
        assert any(path in side[2] and np.allclose(vector, side[2][path], atol=1e-3) for side in sides), told
    if start and start[0] == found[0]:
        assert set(start[2]) & set(end[2]) <= set(found[2]), told


def contents_of_copy(folder):
    shutil.copytree(folder / "before", folder / "start")
    return contents(folder / "start" / "index")


def test_killed_while_embedding_anew_the_old_model_answers(few, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "SAVE_FILES", 16)
    before("switch", few, tmp_path / "scene")
    index = tmp_path / "scene" / "index"
    arguments = [HERE / "crash_worker.py", "switch", few, tmp_path / "all"]
    (tmp_path / "all").mkdir()
    shutil.copytree(tmp_path / "scene", tmp_path / "all" / "before")
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=True)
    fingerprints = [
        index_info(tmp_path / "all" / str(step) / "index").fingerprint for step in range(1, int(done.stdout) + 1)
    ]
    switched = fingerprints.index(a_model(1).fingerprint)
    assert fingerprints == [a_model(0).fingerprint] * switched + [a_model(1).fingerprint] * (
        len(fingerprints) - switched
    )
    assert switched > 5
    assert index_info(index).faiss.recall_at_10 == 1.0
