"""What disks do to an index: they run full, they damage files, and locks outlive their holders."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from indexing import Workshop, a_model, write_images

from dinosearch.encoder import cache, open_encoder
from dinosearch.errors import DinosearchError, IndexUnusable
from dinosearch.images.sources import open_sources
from dinosearch.index.contents import failures, index_info, read_vectors
from dinosearch.index.forget import forget
from dinosearch.index.locate import index_for
from dinosearch.index.lock import writer_lock
from dinosearch.index.merge import merge_indexes
from dinosearch.query.search import open_index


@pytest.fixture
def shop(tmp_path):
    write_images(tmp_path / "images", 40)
    return Workshop(tmp_path / "images", tmp_path / "indexes" / "images", a_model(), None, [])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk, *, but):
    """Leave so many bytes free."""
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(max(0, free - but)))


def answers(index):
    _, vectors = read_vectors(index)
    with open_index(index) as opened:
        assert len(opened.search(vectors[:1], top=1000)[0]) == len(vectors)
    return len(vectors)


@pytest.mark.parametrize("kilobytes", [0, 4, 16, 40, 80, 120, 160, 200, 240, 280, 320, 400])
def test_a_full_disk_ends_with_one_line_and_an_index_that_answers(shop, small_disk, kilobytes, monkeypatch):
    """The less is free, the earlier it comes: the lock, the log, the catalog, the FAISS file."""
    monkeypatch.setattr("dinosearch.index.sync._check_disk", lambda *_: None)
    shop.index = small_disk / "index"
    shop.sync()
    write_images(shop.root / "more", 400, seed=1000)
    fill(small_disk, but=kilobytes << 10)
    said = line_of(shop.sync)
    assert "\n" not in said
    assert any(word in said for word in ("is full", "No space left", "cannot write")) or kilobytes > 200
    assert answers(shop.index) >= 40
    (small_disk / "filler").unlink()
    shop.sync()
    assert answers(shop.index) == 440


@pytest.mark.parametrize("kilobytes", [0, 16, 40, 100, 160])
def test_a_full_disk_stops_forget_and_merge_likewise(shop, small_disk, kilobytes):
    shop.index = small_disk / "index"
    write_images(shop.root / "more", 300, seed=1000)
    shop.sync()
    fill(small_disk, but=kilobytes << 10)
    with pytest.raises(DinosearchError, match=r"is full|No space left|cannot (write|make)"):
        list(merge_indexes([shop.index], into=small_disk / "merged"))
    assert not (small_disk / "merged").exists()
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "index"]
    assert "\n" not in line_of(lambda: forget(shop.index, [str(shop.root / "0000.png")]))
    assert answers(shop.index) >= 339
    (small_disk / "filler").unlink()
    shop.sync()
    assert answers(shop.index) in (339, 340)


def test_a_model_on_a_full_disk_is_converted_elsewhere(tiny_model, small_disk, tmp_path, monkeypatch):
    shutil.copytree(tiny_model.path, small_disk / "tiny", ignore=shutil.ignore_patterns("cache"))
    model, pixels = replace(tiny_model, path=small_disk / "tiny"), np.full((2, 32, 32, 3), 99, np.uint8)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fill(small_disk, but=40 << 10)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_has_room", lambda *_: True)  # as if it had run full since it was asked
        said = line_of(lambda: open_encoder(model, device="cpu"))
    assert "cannot be written" in said
    assert "\n" not in said
    assert not list(model.cache_path.iterdir())
    found = open_encoder(model, device="cpu").encode(pixels)
    assert np.array_equal(found, open_encoder(tiny_model, device="cpu").encode(pixels))
    assert not list(model.cache_path.iterdir())


def line_of(use):
    """What is said when it goes wrong."""
    try:
        use()
    except DinosearchError as error:
        return str(error)
    return ""


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "header":
        data[16:40] = os.urandom(24)
    elif how == "middle":
        data[4096 : len(data) - 4096] = os.urandom(len(data) - 8192)
    elif how == "truncated":
        del data[len(data) // 2 :]
    elif how == "empty":
        data.clear()
    path.write_bytes(data)
    return bytes(data)


@pytest.mark.parametrize("how", ["header", "middle", "truncated", "empty"])
def test_a_damaged_catalog_is_reported_by_all_and_overwritten_by_none(shop, how):
    shop.sync()
    vectors = np.zeros((1, shop.model.dim), dtype=np.float32)
    data = damage(shop.index / "catalog.sqlite", how)

    def query():
        with open_index(shop.index) as index:
            index.search(vectors, top=3)

    for use in (lambda: index_info(shop.index), query, shop.sync, lambda: forget(shop.index, ["x"])):
        with pytest.raises(IndexUnusable, match=r"is damaged .*(index again)") as caught:
            use()
        assert caught.value.exit_code == 4
        assert "\n" not in str(caught.value)
        assert (shop.index / "catalog.sqlite").read_bytes() == data
    with pytest.raises(IndexUnusable, match="is damaged"):
        index_for(open_sources([str(shop.root)]), name=None, indexes=shop.index.parent)


def test_whatever_is_damaged_there_is_an_answer_or_a_line(shop, tmp_path):
    (shop.root / "bad.png").write_bytes(b"no image")
    shop.sync()
    whole, clock = (shop.index / "catalog.sqlite").read_bytes(), random.Random(0)
    copy = tmp_path / "copy"
    outcomes = []

    def resync(index):
        Workshop(shop.root, index, shop.model, None, []).sync(allow_deletions=True)

    for _ in range(60):
        data = bytearray(whole)
        for _ in range(clock.choice([1, 8, 64])):
            data[clock.randrange(len(data))] ^= 1 << clock.randrange(8)
        for use in (index_info, lambda index: list(failures(index)), answers, resync):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(shop.index, copy)
            (copy / "catalog.sqlite").write_bytes(data)
            try:
                use(copy)
            except DinosearchError as error:
                outcomes.append(error.exit_code)
    assert 4 in outcomes


def test_verify_finds_damage_that_no_query_comes_upon(shop):
    shop.sync()
    path = shop.index / "catalog.sqlite"
    data = bytearray(path.read_bytes())
    at = data.rindex(b"0031.png")  # in the table or its search tree, not in both
    data[at : at + 4] = b"9931"
    path.write_bytes(data)
    with pytest.raises(IndexUnusable, match="is damaged"):
        shop.sync(verify=True)


HOLD = """
import sys, time
from pathlib import Path
from dinosearch.index.lock import writer_lock
with writer_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_holder_is_named_and_a_dead_one_never_blocks(shop):
    shop.sync()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(shop.index)], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        for write in (shop.sync, lambda: forget(shop.index, ["x"])):
            with pytest.raises(DinosearchError, match=f"being written by process {holder.pid} on .* since") as caught:
                write()
            assert caught.value.exit_code == 5
        assert answers(shop.index) == 40
        holder.send_signal(signal.SIGKILL)
    assert (shop.index / "lock.json").exists()
    assert shop.sync().unchanged == 40
    assert not (shop.index / "lock.json").exists()


def test_a_lock_on_a_full_disk_is_held_without_a_name(shop, monkeypatch):
    shop.sync()
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with (
        writer_lock(shop.index),
        pytest.raises(DinosearchError, match="written by another process"),
        writer_lock(shop.index),
    ):
        pass
