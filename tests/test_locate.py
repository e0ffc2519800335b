import ctypes
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from indexing import Workshop, a_model, write_images

from dinosearch.errors import IndexNotFound, IndexUnusable, UsageError
from dinosearch.images.sources import known_source
from dinosearch.index.catalog import Catalog
from dinosearch.index.locate import index_for, indexes_path, list_indexes, resolve_index


def sources(path):
    return [known_source("folder", str(path.resolve()))]


def sync(root, index):
    write_images(root, 2)
    Workshop(root, index, a_model(), None, []).sync()
    return index


def test_the_newest_index_is_the_one_created_last_whatever_was_written_since(tmp_path):
    indexes = tmp_path / "indexes"
    first, second = sync(tmp_path / "a", indexes / "z"), sync(tmp_path / "b", indexes / "y")
    write_images(tmp_path / "a", 3)
    sync(tmp_path / "a", first)
    (indexes / "not an index").mkdir()
    (indexes / "begun").mkdir()
    (indexes / "begun" / "catalog.sqlite").touch()
    (indexes / "README.md").touch()
    assert list_indexes(indexes) == [second, first]
    shutil.copytree(second, indexes / ".second.merging")  # as a merge that was killed leaves it
    assert list_indexes(indexes) == [second, first]
    notes = []
    assert resolve_index(None, indexes=indexes, note=notes.append) == second
    assert "y" in notes[0]


def cut_short(index):
    path = index / "catalog.sqlite"
    path.write_bytes(path.read_bytes()[:5000])


def make_newer(index):
    with closing(sqlite3.connect(index / "catalog.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(("spoil", "why"), [(cut_short, "is damaged"), (make_newer, "has format 99")])
def test_an_index_that_cannot_be_opened_is_said_and_no_reason_to_build_one(tmp_path, spoil, why):
    indexes, notes = tmp_path / "indexes", []
    first, second = sync(tmp_path / "a", indexes / "a"), sync(tmp_path / "b", indexes / "b")
    spoil(second)
    assert resolve_index(None, indexes=indexes, note=notes.append) == first
    assert notes[0].startswith("left out: ")
    assert str(second) in notes[0]
    assert why in notes[0]
    assert notes[1:] == [f"index: {first} (the newest that can be opened; --index chooses another)"]
    index_for(sources(tmp_path / "c"), name=None, indexes=indexes, note=notes.append)
    assert notes[2:] == notes[:1]
    spoil(first)
    with pytest.raises(IndexUnusable, match=rf"{re.escape(str(first))}.* {why}"):
        resolve_index(None, indexes=indexes, note=notes.append)


def test_an_index_is_named_by_name_or_folder(tmp_path):
    path = sync(tmp_path / "a", tmp_path / "indexes" / "a")
    assert resolve_index("a", indexes=tmp_path / "indexes", note=print) == path
    assert resolve_index(str(path), indexes=tmp_path / "elsewhere", note=print) == path
    with pytest.raises(IndexNotFound, match="dinosearch index"):
        resolve_index("b", indexes=tmp_path / "indexes", note=print)
    with pytest.raises(IndexNotFound, match="dinosearch index"):
        resolve_index(None, indexes=tmp_path / "elsewhere", note=print)


def test_a_folder_finds_its_index_again_under_whatever_name(tmp_path, monkeypatch):
    indexes = tmp_path / "indexes"
    path = sync(tmp_path / "photos", indexes / "summer")
    monkeypatch.chdir(tmp_path)
    assert index_for(sources(Path("photos/../photos")), name=None, indexes=indexes) == path
    assert index_for(sources(tmp_path / "photos"), name="winter", indexes=indexes) == indexes / "winter"


def test_another_folder_of_the_same_name_gets_a_number(tmp_path):
    indexes = tmp_path / "indexes"
    assert index_for(sources(tmp_path / "one" / "photos"), name=None, indexes=indexes) == indexes / "photos"
    sync(tmp_path / "one" / "photos", indexes / "photos")
    second = index_for(sources(tmp_path / "two" / "photos"), name=None, indexes=indexes)
    assert second == indexes / "photos-2"
    sync(tmp_path / "two" / "photos", second)
    assert index_for(sources(tmp_path / "three" / "photos"), name=None, indexes=indexes) == indexes / "photos-3"
    assert index_for(sources(tmp_path / "two" / "photos"), name=None, indexes=indexes) == second


def test_sources_that_are_new_join_the_index_of_the_others(tmp_path):
    indexes, notes = tmp_path / "indexes", []

    def follow(index, *names):
        index.mkdir(parents=True, exist_ok=True)
        with Catalog.create(index, fingerprint="0", model="m", dim=1) as catalog:
            for name in names:
                catalog.add_root("folder", str(tmp_path / name))
            catalog.commit()
        return index

    def place(*names, shard=None):
        of_all = [source for name in names for source in sources(tmp_path / name)]
        return index_for(of_all, name=None, indexes=indexes, shard=shard, note=notes.append)

    path = follow(place("a"), "a", "b")
    assert place("c", "a", "b") == path
    assert notes == ["a follows 2 of these 3 sources, and the others from now on; --name makes another index"]
    assert place("a", "c") == path
    assert place("a", "b", shard="1/2") == indexes / "a-shard-1-of-2"
    follow(place("c"), "c")
    assert place("a", "c") == indexes / "a-2", "two indexes may be meant"
    both = follow(indexes / "both", "a", "c")
    assert place("a", "c", "d") == both
    assert place("a", "b", "c") == indexes / "a-2"


def test_an_index_that_was_only_begun_is_gone_on_with(tmp_path):
    begun = tmp_path / "indexes" / "photos"
    begun.mkdir(parents=True)
    (begun / "catalog.sqlite").touch()
    assert index_for(sources(tmp_path / "photos"), name=None, indexes=tmp_path / "indexes") == begun


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "new\nline"])
def test_a_name_must_be_a_file_name(tmp_path, name):
    with pytest.raises(UsageError, match="cannot be the name"):
        index_for(sources(tmp_path), name=name, indexes=tmp_path)


def test_indexes_lie_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("DINOSEARCH_INDEXES", raising=False)
    assert str(indexes_path()) == "indexes"
    monkeypatch.setenv("DINOSEARCH_INDEXES", str(tmp_path))
    assert indexes_path() == tmp_path


LIST_AND_NAME = """
import sys
from pathlib import Path
from dinosearch.images.sources import known_source
from dinosearch.index.locate import index_for, list_indexes
indexes = Path("indexes")
other = known_source("folder", "/x/other")
print(*(path.name for path in list_indexes(indexes)), index_for([other], name=None, indexes=indexes))
"""


def test_an_index_that_one_may_not_look_into_is_passed_over(tmp_path):
    sync(tmp_path / "a", tmp_path / "indexes" / "a")
    sync(tmp_path / "b", tmp_path / "indexes" / "other").chmod(0)
    done = subprocess.run(
        [sys.executable, "-c", LIST_AND_NAME],
        cwd=tmp_path,
        preexec_fn=drop_roots_powers if os.geteuid() == 0 else None,
        capture_output=True,
        text=True,
        check=False,
    )
    (tmp_path / "indexes" / "other").chmod(0o755)
    assert done.stdout.split() == ["a", "indexes/other-2"], done.stderr


def drop_roots_powers():
    """For this process and all that it starts: to read in spite of permissions (Linux, prctl(2))."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP
