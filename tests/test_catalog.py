import os
import sqlite3

import numpy as np
import pytest

from dinosearch.errors import DinosearchError, IndexNotFound, IndexUnusable
from dinosearch.index import database
from dinosearch.index import reader as reader_module
from dinosearch.index.catalog import Catalog, FileRow
from dinosearch.index.database import network_file_system
from dinosearch.index.rows import DecoderKeys
from dinosearch.index.schema import FORMAT

DIM = 8


@pytest.fixture
def catalog(tmp_path):
    with Catalog.create(tmp_path, fingerprint="f" * 16, model="m", dim=DIM) as catalog:
        yield catalog


def unit(n, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fill(catalog, n, *, root="/photos", fingerprint="f" * 16):
    number = catalog.add_root("folder", root)
    catalog.put_vectors([(f"{i:032x}", 0, 4, 3) for i in range(n)], unit(n), fingerprint=fingerprint)
    catalog.put_files(FileRow(number, f"{i}.png", 10, 20, f"{i:032x}", "ok", width=4, height=3) for i in range(n))
    return number


def test_what_is_not_committed_is_seen_by_nobody_and_undone(catalog, tmp_path):
    fill(catalog, 3)
    with Catalog.open(tmp_path) as reader:
        assert reader.n_images() == 0
        catalog.commit()
        assert reader.n_images() == 3
        fill(catalog, 5)
        catalog.rollback()
        assert reader.n_images() == catalog.n_images() == 3


def test_vectors_come_back_as_unit_vectors_within_half_precision(catalog):
    fill(catalog, 5)
    [(ids, vectors)] = catalog.vector_blocks(fingerprint="f" * 16)
    assert ids.tolist() == sorted(ids.tolist())
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.allclose(vectors, unit(5), atol=1e-3)


def test_vectors_are_read_in_blocks_that_miss_none(catalog, monkeypatch):
    monkeypatch.setattr(reader_module, "_BLOCK", 4)
    fill(catalog, 10)
    blocks = list(catalog.vector_blocks(fingerprint="f" * 16))
    assert [len(ids) for ids, _ in blocks] == [4, 4, 2]
    assert sum(len(files) for files, _ in catalog.live_vectors()) == 10
    assert [file.path for file in catalog.live_files()] == [f"{i}.png" for i in range(10)]


def test_a_content_has_one_vector_a_model_and_it_stays(catalog):
    fill(catalog, 3)
    catalog.put_vectors([(f"{0:032x}", 0, 4, 3)], unit(1, seed=9), fingerprint="f" * 16)
    [(_, vectors)] = catalog.vector_blocks(fingerprint="f" * 16)
    assert len(vectors) == 3
    assert np.allclose(vectors, unit(3), atol=1e-3)


def test_ids_of_pruned_vectors_are_never_used_again(catalog):
    number = fill(catalog, 3)
    before = [int(i) for ids, _ in catalog.vector_blocks(fingerprint="f" * 16) for i in ids]
    catalog.remove_files(file.id for file in catalog.stored_files(number, fingerprint="f" * 16))
    assert catalog.prune() == 3
    fill(catalog, 3)
    after = [int(i) for ids, _ in catalog.vector_blocks(fingerprint="f" * 16) for i in ids]
    assert min(after) > max(before)


def test_paths_that_are_not_utf8_are_kept_as_bytes(catalog, tmp_path):
    number = catalog.add_root("folder", os.fsdecode(b"/ph\xf6tos"))
    name = os.fsdecode(b"caf\xe9.png")
    catalog.put_files([FileRow(number, name, 1, 2, None, "unreadable", "why")])
    catalog.put_files([FileRow(number, "käse.png", 1, 2, None, "unreadable", "why")])
    catalog.commit()
    assert {stored.path for stored in catalog.stored_files(number, fingerprint="")} == {name, "käse.png"}
    assert os.fsencode(catalog.roots()[number].location) == b"/ph\xf6tos"
    rows = sqlite3.connect(tmp_path / "catalog.sqlite").execute("SELECT typeof(path) FROM files ORDER BY 1").fetchall()
    assert rows == [("blob",), ("text",)]


def test_members_that_are_not_utf8_are_kept_as_bytes(catalog):
    number = catalog.add_root("archive", "/photos.tar")
    member = os.fsdecode(b"caf\xe9.png")
    catalog.put_vectors([("aa", 0, 4, 3)], unit(1), fingerprint="f" * 16)
    catalog.put_files([FileRow(number, "", 1, 2, "aa", "ok", member=member, frames=2)])
    catalog.put_files([FileRow(number, "", 1, 2, "aa", "corrupt", "why", member=member, frame=1)])
    [stored] = catalog.stored_files(number, fingerprint="f" * 16)
    [failed] = catalog.failures()
    [live] = catalog.live_files()
    [([searched], _)] = catalog.live_vectors()
    [chosen] = catalog.live_files(vector_ids=[live.vector_id])
    copied = [file.row.member for file in catalog.files_to_copy(number)]
    assert {each.member for each in (stored, failed, live, searched, chosen)} == {member} == set(copied)
    catalog.put_files([FileRow(number, "", 1, 2, "aa", "ok", member=member)])
    assert list(catalog.failures()) == []  # the further frame went
    catalog.move_files([(stored.id, FileRow(number, "", 1, 2, "aa", "ok", member=f"in/{member}"))])
    assert [each.member for each in catalog.stored_files(number, fingerprint="")] == [f"in/{member}"]


def test_the_files_of_one_root_of_many_are_the_same_looked_up_alone(catalog, monkeypatch):
    keys = DecoderKeys("old", "old, large")
    numbers = []
    for root in range(3):
        number = catalog.add_root("folder", f"/photos/{root}")
        for i in range(6):
            content = f"{root}-{i}"
            if i != 2:  # a good file without a vector
                catalog.put_vectors([(content, 0, 4, 3)], unit(1), fingerprint="f" * 16)
            catalog.put_files([FileRow(number, f"{i}.tif", 1, 2, content, "ok", frames=2)])
            tried = "new" if i == 4 else "old"
            row = FileRow(number, f"{i}.tif", 1, 2, content, "corrupt", "why", frame=1, decoders=tried)
            catalog.put_files([row])
        catalog.put_files([FileRow(number, "bad.tif", 1, 2, "bad", "corrupt", "why", decoders="old")])
        numbers.append(number)
    found = []
    for repay in (1, 10**9):  # passes over all, each root by itself
        monkeypatch.setattr(reader_module, "_PASSES_REPAY", repay)
        found.append([list(catalog.stored_files(number, fingerprint="f" * 16, keys=keys)) for number in numbers])
    assert found[0] == found[1]
    for files in found[0]:
        assert [file.path for file in files if not file.embedded] == ["2.tif", "4.tif", "bad.tif"]


def test_what_a_table_says_of_a_file_holds_for_all_its_frames(catalog):
    number = catalog.add_root("table", "/photos.csv")
    catalog.put_files([FileRow(number, "a.tif", 1, 2, "aa", "ok", frames=2, metadata='{"price": 1}')])
    catalog.put_files([FileRow(number, "a.tif", 1, 2, "aa", "ok", frame=1, metadata='{"price": 1}')])
    [stored] = catalog.stored_files(number, fingerprint="")
    catalog.set_metadata([(stored.id, '{"price": 2}')])
    assert [file.row.metadata for file in catalog.files_to_copy(number)] == ['{"price": 2}'] * 2


def test_an_unreadable_file_keeps_the_hash_it_had(catalog):
    number = fill(catalog, 1)
    catalog.put_files([FileRow(number, "0.png", 10, 20, None, "unreadable", "denied")])
    [stored] = catalog.stored_files(number, fingerprint="f" * 16)
    assert (stored.status, stored.content_hash) == ("unreadable", f"{0:032x}")
    assert catalog.n_images() == 0


def test_a_file_that_was_refused_unread_is_no_word_on_what_it_held_before(catalog):
    number = fill(catalog, 1)
    content = f"{0:032x}"
    catalog.put_files([FileRow(number, "0.png", 2**40, 20, None, "too-large", "huge", decoders="old 100")])
    [stored] = catalog.stored_files(number, fingerprint="f" * 16)
    assert (stored.status, stored.content_hash) == ("too-large", None)
    assert catalog.known_content(content, fingerprint="e" * 16, decoders="old", large="old 100") is None


def test_a_failure_is_known_by_content_to_the_decoders_that_failed(catalog):
    number = catalog.add_root("folder", "/photos")
    catalog.put_files([FileRow(number, "a", 1, 2, "aa", "corrupt", "why", decoders="old")])
    catalog.put_files([FileRow(number, "b", 1, 2, "bb", "too-large", "big", decoders="old 100")])

    def known(content, decoders="old", large="old 100"):
        return catalog.known_content(content, fingerprint="f" * 16, decoders=decoders, large=large)

    assert known("aa") == ("corrupt", "why", None, None)
    assert known("aa", decoders="new") is None
    assert known("bb") == ("too-large", "big", None, None)
    assert known("bb", large="old 200") is None
    assert known("cc") is None


def test_a_newer_format_is_refused_with_what_to_do(catalog, tmp_path):
    catalog.close()
    connection = sqlite3.connect(tmp_path / "catalog.sqlite")
    connection.execute(f"PRAGMA user_version = {FORMAT + 1}")
    connection.close()
    for writable in (False, True):
        with pytest.raises(IndexUnusable, match=f"has format {FORMAT + 1}.*Update dinosearch") as caught:
            Catalog.open(tmp_path, writable=writable)
        assert caught.value.exit_code == 4


def test_a_foreign_database_is_refused(tmp_path):
    connection = sqlite3.connect(tmp_path / "catalog.sqlite")
    connection.execute("CREATE TABLE files (name)")
    connection.close()
    with pytest.raises(IndexUnusable, match="no catalog of dinosearch"):
        Catalog.open(tmp_path)


def test_a_damaged_catalog_is_reported_with_what_to_do(catalog, tmp_path):
    fill(catalog, 2000)
    catalog.commit()
    catalog.close()
    path = tmp_path / "catalog.sqlite"
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(IndexUnusable, match=r"is damaged .*index again"), Catalog.open(tmp_path) as damaged:
        damaged.n_images()
    path.write_bytes(b"no database at all, but long enough to look like one" * 100)
    with pytest.raises(IndexUnusable, match=r"is damaged"):
        Catalog.open(tmp_path)


def test_a_missing_catalog_is_no_index(tmp_path):
    with pytest.raises(IndexNotFound, match="Build"):
        Catalog.open(tmp_path)
    assert not (tmp_path / "catalog.sqlite").exists()


def test_a_full_disk_is_said_and_what_was_saved_stays(catalog, tmp_path):
    number = fill(catalog, 3)
    catalog.commit()
    pages = catalog._rows("PRAGMA page_count")[0][0]
    catalog._rows(f"PRAGMA max_page_count = {pages}")
    rows = [FileRow(number, "x" * 3000 + str(i), 1, 2, None, "unreadable") for i in range(100)]
    with pytest.raises(DinosearchError, match="is full") as caught:
        catalog.put_files(rows)
    assert caught.value.exit_code == 1
    catalog.rollback()
    with Catalog.open(tmp_path) as reader:
        assert reader.n_images() == 3


def test_local_disks_get_a_write_ahead_log_and_network_disks_do_not(tmp_path, monkeypatch):
    with Catalog.create(tmp_path, fingerprint="f", model="m", dim=DIM) as catalog:
        assert catalog._rows("PRAGMA journal_mode") == [("wal",)]
        assert catalog._rows("PRAGMA synchronous") == [(2,)]
    monkeypatch.setattr(database, "network_file_system", lambda _: "nfs4")
    notes = []
    with Catalog.open(tmp_path, writable=True, note=notes.append) as catalog:
        assert catalog._rows("PRAGMA journal_mode") == [("delete",)]
        assert catalog._rows("PRAGMA synchronous") == [(2,)]
    assert "network file system (nfs4)" in notes[0]


def test_network_file_systems_are_told_by_the_deepest_mount(tmp_path):
    folder, mounts = tmp_path / "with space" / "in", tmp_path / "mounts"
    (folder / "local").mkdir(parents=True)
    point = str(tmp_path / "with space").replace(" ", "\\040")
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {point} nfs4 rw 0 0\n/dev/b {point}/in/local xfs rw 0 0\n")
    assert network_file_system(folder, mounts=mounts) == "nfs4"
    assert network_file_system(folder / "local", mounts=mounts) is None
    assert network_file_system(tmp_path, mounts=mounts) is None
    assert network_file_system(tmp_path, mounts=tmp_path / "absent") is None


def test_a_file_is_written_with_all_its_pages_or_not_at_all(catalog):
    root = fill(catalog, 2)
    rows = [FileRow(root, "p.tif", 10, 20, f"{9:032x}", "ok", frame=frame, frames=3) for frame in range(3)]
    good = {stored.path for stored in catalog.stored_files(root, fingerprint="f" * 16)}

    class Interrupted:
        def __getattr__(self, _name):  # as a signal between two rows
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        catalog.put_files([*rows[:2], Interrupted()])
    catalog.commit()
    assert {stored.path for stored in catalog.stored_files(root, fingerprint="f" * 16)} == good
    catalog.put_files(rows)
    assert len(list(catalog.stored_files(root, fingerprint="f" * 16))) > len(good)
