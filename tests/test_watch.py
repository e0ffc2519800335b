import os
import shutil
import threading
import time
import zipfile

import pytest
from indexing import Workshop, a_model, write_image, write_images

from dinosearch.errors import DinosearchError, IndexUnusable
from dinosearch.images.sources import open_sources
from dinosearch.index import watch
from dinosearch.index.contents import read_vectors
from dinosearch.index.forget import forget
from dinosearch.index.lock import writer_lock
from dinosearch.index.watch import keep_synced


class Enough(Exception):
    """What ends the following in these tests."""


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    monkeypatch.setattr(watch, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(watch, "RETRY_SECONDS", 0.1)


@pytest.fixture
def shop(tmp_path):
    write_images(tmp_path / "images", 6)
    return Workshop(tmp_path / "images", tmp_path / "images" / "indexes" / "images", a_model(), None, [])


def follow(shop, specs, *actions):
    """Syncs by what they found, one action in the world after each; ends when the last has been noticed."""
    found, remaining, threads = [], list(actions), []

    def sync(due):
        summary = shop.sync(roots=due)
        counts = {
            name: getattr(summary, name) for name in ("new", "changed", "moved", "deleted") if getattr(summary, name)
        }
        if found and not counts:
            return
        found.append(counts)
        if not remaining:
            raise Enough
        threads.append(threading.Timer(0.2, remaining.pop(0)))
        threads[-1].start()

    try:
        with pytest.raises(Enough):
            keep_synced(open_sources(specs), sync, index_path=shop.index, note=shop.notes.append)
    finally:
        for thread in threads:
            thread.join()
    return found


def test_what_changes_in_a_folder_is_synced(shop):
    found = follow(
        shop,
        [str(shop.root)],
        lambda: write_images(shop.root / "sub", 3, seed=50),
        lambda: (shop.root / "sub").rename(shop.root / "renamed"),
        lambda: write_image(shop.root / "0000.png", 99),
        lambda: (shop.root / "0001.png").unlink(),
    )
    assert found == [{"new": 6}, {"new": 3}, {"moved": 3}, {"changed": 1}, {"deleted": 1}]
    assert len(read_vectors(shop.index)[0]) == 8


def test_a_folder_with_a_dot_in_its_name_that_is_moved_out_is_noticed(shop, tmp_path):
    write_images(shop.root / "trip.2024", 1, seed=50)
    found = follow(shop, [str(shop.root)], lambda: (shop.root / "trip.2024").rename(tmp_path / "elsewhere"))
    assert found == [{"new": 7}, {"deleted": 1}]


def test_a_source_that_disappears_is_waited_for(shop, tmp_path):
    def unplug():
        shop.root.rename(tmp_path / "unplugged")
        time.sleep(0.5)
        write_image(tmp_path / "unplugged" / "another.png", 70)
        (tmp_path / "unplugged").rename(shop.root)

    shop.index = tmp_path / "index"
    assert follow(shop, [str(shop.root)], unplug, lambda: write_image(shop.root / "late.png", 71)) == [
        {"new": 6},
        {"new": 1},
        {"new": 1},
    ]
    said = " ".join(shop.notes)
    assert "is gone; what is indexed of it stays" in said
    assert "is back" in said


def test_an_archive_that_is_written_anew_is_synced(shop, tmp_path):
    def pack(n):
        with zipfile.ZipFile(tmp_path / "new.zip", "w") as archive:
            for path in sorted(shop.root.glob("*.png"))[:n]:
                archive.write(path, path.name)
        os.utime(tmp_path / "new.zip", (1e9 + n, 1e9 + n))
        (tmp_path / "new.zip").replace(tmp_path / "photos.zip")

    pack(4)
    shop.index = tmp_path / "index"
    assert follow(shop, [str(tmp_path / "photos.zip")], lambda: pack(6)) == [{"new": 4}, {"new": 2}]


def test_a_source_that_nothing_tells_of_is_synced_by_the_clock(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "CLOCK_SECONDS", 0.3)
    shop.index = tmp_path / "index"
    pattern = str(shop.root / "*.png")
    assert follow(shop, [pattern], lambda: write_image(shop.root / "new.png", 60)) == [{"new": 6}, {"new": 1}]


def test_folders_on_a_network_file_system_are_synced_by_the_clock(shop, monkeypatch):
    monkeypatch.setattr(watch, "network_file_system", lambda _: "nfs4")
    monkeypatch.setattr(watch, "CLOCK_SECONDS", 0.3)
    found = follow(shop, [str(shop.root)], lambda: write_image(shop.root / "new.png", 60))
    assert found == [{"new": 6}, {"new": 1}]


def test_writing_the_index_itself_is_no_change(shop):
    syncs = []

    def sync(due):
        syncs.append(time.monotonic())
        shop.sync(roots=due)
        if len(syncs) == 2:
            raise Enough

    late = threading.Timer(1.5, lambda: write_image(shop.root / "new.png", 60))
    late.start()
    with pytest.raises(Enough):
        keep_synced(open_sources([str(shop.root)]), sync, index_path=shop.index, note=print)
    late.join()
    assert syncs[1] - syncs[0] > 1.2


def test_what_goes_wrong_later_is_said_and_tried_again(shop, tmp_path):
    shop.index = tmp_path / "index"
    outcomes = iter([None, DinosearchError("no luck"), None])
    calls = []

    def sync(due):
        calls.append(due)
        if len(calls) == 1:
            threading.Timer(0.2, lambda: write_image(shop.root / "new.png", 60)).start()
        if error := next(outcomes):
            raise error
        if len(calls) == 3:
            raise Enough

    with pytest.raises(Enough):
        keep_synced(open_sources([str(shop.root)]), sync, index_path=shop.index, note=shop.notes.append)
    assert shop.notes[0].startswith("no luck (tried again in")


@pytest.mark.parametrize("later", [False, True])
def test_an_index_that_cannot_be_used_any_more_ends_it(shop, later):
    calls = []

    def sync(_due):
        calls.append(1)
        if not later or len(calls) == 2:
            raise IndexUnusable("damaged")
        threading.Timer(0.2, lambda: write_image(shop.root / "new.png", 60)).start()

    with pytest.raises(IndexUnusable):
        keep_synced(open_sources([str(shop.root)]), sync, index_path=shop.index, note=print)


def test_between_syncs_others_may_write(shop):
    def others():
        with writer_lock(shop.index):
            pass
        shutil.copy2(shop.root / "0000.png", shop.root / "copy.png")

    assert follow(shop, [str(shop.root)], others) == [{"new": 6}, {"new": 1}]


def test_a_source_that_was_forgotten_is_not_taken_in_again(shop, tmp_path):
    private = tmp_path / "private"
    write_images(private, 3, seed=100)
    shop.index = tmp_path / "index"

    def forget_one():
        forget(shop.index, [str(private)])
        write_image(private / "new.png", 60)
        write_image(shop.root / "new.png", 61)

    assert follow(shop, [str(shop.root), str(private)], forget_one) == [{"new": 9}, {"new": 1}]
    assert {file.root for file in read_vectors(shop.index)[0]} == {shop.root}


def test_nothing_is_followed_once_all_sources_were_forgotten(shop, tmp_path):
    shop.index = tmp_path / "index"
    synced = []

    def forget_all():
        forget(shop.index, [str(shop.root)])
        write_image(shop.root / "new.png", 60)

    def sync(due):
        assert not synced
        synced.append(shop.sync(roots=due).new)
        threading.Timer(0.2, forget_all).start()

    with pytest.raises(DinosearchError, match="no source that was followed"):
        keep_synced(open_sources([str(shop.root)]), sync, index_path=shop.index, note=shop.notes.append)
    assert (synced, read_vectors(shop.index)[0]) == ([6], [])
    assert f"{shop.root} is no source of index any more: not followed" in shop.notes
