"""`index` with its options, `forget`, `relocate`, `merge` and `failures`, as processes."""

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from indexing import write_images
from test_cli import dinosearch, environment, json_of, lay_out

from dinosearch.cli.index import index
from dinosearch.errors import IndexNotFound
from dinosearch.index.contents import read_vectors
from dinosearch.index.sync import sync_index
from dinosearch.query.search import open_index


@pytest.fixture
def work(tmp_path, tiny_model):
    """A working folder with an untrained model and ten images."""
    lay_out(tmp_path, n_images=0, n_catalog=10)
    shutil.copytree(tiny_model.path, tmp_path / "models/tiny")
    return tmp_path


def test_shards_and_their_merger(work):
    for part in ("1/2", "2/2"):
        dinosearch("index", "catalog", "--shard", part, cwd=work)
    assert sorted(p.name for p in (work / "indexes").iterdir()) == ["catalog-shard-1-of-2", "catalog-shard-2-of-2"]
    done = dinosearch("merge", "catalog-shard-2-of-2", "--name", "catalog", cwd=work, check=2)
    assert "shard 1/2 is missing" in done.stderr
    names = ["catalog-shard-1-of-2", "catalog-shard-2-of-2"]
    [merged] = json_of("merge", *names, "--name", "catalog", cwd=work)
    assert (merged["index"], merged["images"], merged["merged"]) == ("catalog", 10, 2)
    [synced] = json_of("index", "catalog", cwd=work)
    assert (synced["index"], synced["unchanged"], synced["embedded"]) == ("catalog", 10, 0)
    [info] = json_of("info", "--index", names[0], cwd=work)
    assert info["shard"] == "1/2"


def test_what_is_forgotten_stays_forgotten(work):
    dinosearch("index", "catalog", cwd=work)
    done = dinosearch("forget", "catalog/3.jpg", cwd=work)
    assert done.stdout == "catalog: 1 files and 1 vectors erased, 9 images can be searched\n"
    assert "still in their source" in done.stderr
    [synced] = json_of("index", "catalog", cwd=work)
    assert (synced["images"], synced["new"]) == (9, 0)
    done = dinosearch("forget", "catalog/99.jpg", cwd=work, check=1)
    assert "nothing of catalog/99.jpg" in done.stderr


def test_a_catalog_that_was_moved_is_relocated(work):
    dinosearch("index", "catalog", cwd=work)
    (work / "catalog").rename(work / "photos")
    done = dinosearch("relocate", "catalog", "photos", cwd=work)
    assert done.stdout == "catalog: catalog is photos now\n"
    [synced] = json_of("index", "photos", cwd=work)
    assert (synced["index"], synced["unchanged"], synced["embedded"]) == ("catalog", 10, 0)
    [answer] = json_of("query", "cat.jpg", "--top", "1", cwd=work)
    assert answer["matches"][0]["path"] == "photos/0.jpg"
    (work / "photos").rename(work / "again")
    [relocated] = json_of("relocate", "photos", "again", cwd=work)
    assert relocated["sources"] == {"photos": "again"}
    [info] = json_of("info", cwd=work)
    assert [source["location"] for source in info["sources"]] == info["roots"] == ["again"]


def test_an_export_says_where_it_is_byte_for_byte(work):
    dinosearch("index", "catalog", cwd=work)
    name = os.fsdecode(b"caf\xe9")
    done = dinosearch("export", "catalog", "--to", "npy", "--out", name, cwd=work)
    assert done.stdout.splitlines() == [f"{name}.npy", f"{name}.csv"]


def test_options_of_a_source_are_shown_and_said(work):
    dinosearch("index", "catalog", "--exclude", "1*", "--exclude", "2.jpg", "--include-hidden", cwd=work)
    done = dinosearch("index", "catalog", cwd=work)
    assert "catalog: without 1*, 2.jpg, with hidden names, as before" in done.stderr
    shown = dict(line.split("\t") for line in dinosearch("info", cwd=work).stdout.splitlines())
    assert shown["sources"] == "folder catalog (without 1*, without 2.jpg, with hidden names)"
    [info] = json_of("info", cwd=work)
    assert info["sources"][0]["exclude"] == ["1*", "2.jpg"]
    [synced] = json_of("index", "catalog", "--exclude", "", "--skip-hidden", cwd=work)
    assert synced["images"] == 10


def test_the_precision_is_kept_and_said(work):
    done = dinosearch("index", "catalog", "--device", "cpu", "--precision", "fp32", cwd=work)
    assert "engine: OpenVINO fp32" in done.stderr
    write_images(work / "catalog", 1)
    done = dinosearch("index", "catalog", "--device", "cpu", cwd=work)
    assert "catalog: precision fp32, as before" in done.stderr
    assert "engine: OpenVINO fp32" in done.stderr
    done = dinosearch("index", "catalog", "--precision", "int4", cwd=work, check=2)
    assert "Choose auto, fp32, bf16 or int8" in done.stderr


def test_failures_as_csv(work):
    (work / "catalog" / 'odd, "name".jpg').write_bytes(b"no image")
    dinosearch("index", "catalog", cwd=work, check=3)
    rows = list(csv.reader(io.StringIO(dinosearch("failures", "--csv", cwd=work).stdout)))
    assert rows == [
        ["path", "status", "reason", "frame"],
        ['catalog/odd, "name".jpg', "corrupt", rows[1][2], "0"],
    ]
    dinosearch("failures", "--csv", "--json", cwd=work, check=2)


def test_verify_reads_everything_and_embeds_nothing(work):
    dinosearch("index", "catalog", cwd=work)
    [synced] = json_of("index", "catalog", "--verify", cwd=work)
    assert (synced["unchanged"], synced["embedded"], synced["changed"]) == (10, 0, 0)


def test_watch_takes_in_what_changes_until_it_is_interrupted(work):
    command = [sys.executable, "-m", "dinosearch", "index", "catalog", "--watch", "--json"]
    with subprocess.Popen(command, cwd=work, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        deadline = threading.Timer(60, process.kill)  # a line that stays in a buffer must not hang the test
        deadline.start()
        try:
            assert json.loads(process.stdout.readline())["new"] == 10
            time.sleep(2)
            shutil.copy(work / "catalog/0.jpg", work / "catalog/copy.jpg")
            assert json.loads(process.stdout.readline())["new"] == 1
            dinosearch("forget", "catalog/copy.jpg", cwd=work)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 130
        finally:
            deadline.cancel()
            process.kill()


def test_following_begins_with_one_sync(work, monkeypatch):
    monkeypatch.chdir(work)
    syncs = []

    def counted(*arguments, **options):
        syncs.append(arguments)
        return sync_index(*arguments, **options)

    def keep_synced(sources, sync, **_):
        sync(sources)
        raise KeyboardInterrupt

    monkeypatch.setattr("dinosearch.index.sync.sync_index", counted)
    monkeypatch.setattr("dinosearch.index.watch.keep_synced", keep_synced)
    with pytest.raises(KeyboardInterrupt):
        index(["catalog"], watch=True)
    assert len(syncs) == 1


@pytest.mark.parametrize(
    "command",
    [
        ("query", "cat.jpg"),
        ("index", "catalog"),
        pytest.param(("info",), marks=pytest.mark.slow),
        pytest.param(("failures",), marks=pytest.mark.slow),
    ],
)
def test_a_damaged_catalog_is_one_line_and_exit_4(work, command):
    dinosearch("index", "catalog", cwd=work)
    path = work / "indexes/catalog/catalog.sqlite"
    path.write_bytes(path.read_bytes()[:5000])
    done = dinosearch(*command, *(() if command[0] == "index" else ("--index", "catalog")), cwd=work, check=4)
    assert "is damaged" in done.stderr.splitlines()[-1]
    assert path.stat().st_size == 5000


def images_of(index):
    try:
        files, vectors = read_vectors(index)
    except IndexNotFound:
        return 0
    with open_index(index) as opened:
        assert all(answer[0].score > 0.999 for answer in opened.search(vectors[::50], top=1))
    return len(files)


@pytest.mark.slow
@pytest.mark.parametrize("n", [600, pytest.param(6000, id="6000 images")])
def test_killed_at_12_instants_of_a_real_run_it_comes_to_the_end_of_a_calm_one(work, n):
    write_images(work / "many", n)
    began = time.monotonic()
    dinosearch("index", "many", "--name", "calm", cwd=work)
    seconds, clock, counts = time.monotonic() - began, random.Random(0), [0]
    index = work / "indexes" / "killed"
    command = [sys.executable, "-m", "dinosearch", "index", "many", "--name", "killed"]
    for _ in range(12):
        with subprocess.Popen(command, cwd=work, env=environment(), stderr=subprocess.DEVNULL) as process:
            time.sleep(clock.uniform(0.3, 0.9) * seconds)
            process.kill()
        counts.append(images_of(index))
    assert counts == sorted(counts)
    assert counts[-1] > 0
    dinosearch("index", "many", "--name", "killed", cwd=work)
    calm_files, calm = read_vectors(work / "indexes" / "calm")
    files, vectors = read_vectors(index)
    assert files == calm_files
    assert (vectors * calm).sum(axis=1).min() > 0.99999
    with open_index(index) as killed, open_index(work / "indexes" / "calm") as whole:
        for one, other in zip(killed.search(calm[::100], top=1), whole.search(calm[::100], top=1), strict=True):
            assert one[0].path == other[0].path
            assert one[0].score == pytest.approx(other[0].score, abs=1e-5)
    assert os.listdir(index) == [name for name in os.listdir(index) if not name.endswith(".part")]  # noqa: PTH208
