import os
import sqlite3
import zipfile

import numpy as np
import pytest
from indexing import Workshop, a_model, write_image, write_images

from dinosearch.cli import forget as command
from dinosearch.errors import DinosearchError
from dinosearch.images.sources import open_sources
from dinosearch.index import forget as forget_module
from dinosearch.index.catalog import Catalog
from dinosearch.index.contents import index_info, read_vectors
from dinosearch.index.forget import forget
from dinosearch.index.generation import write_generation
from dinosearch.index.reader import unit
from dinosearch.index.relocate import relocate
from dinosearch.index.survey import GivenOptions
from dinosearch.query.search import open_index


@pytest.fixture
def shop(tmp_path):
    write_images(tmp_path / "images", 12)
    write_images(tmp_path / "images" / "private", 4, seed=100)
    return Workshop(tmp_path / "images", tmp_path / "indexes" / "images", a_model(), None, [])


def stored_vector(shop, name, model=None):
    with sqlite3.connect(shop.index / "catalog.sqlite") as connection:
        query = """SELECT v.vector FROM vectors AS v JOIN files AS f USING (content_hash)
            WHERE f.path = ? AND v.fingerprint = ?"""
        return connection.execute(query, (name, (model or shop.model).fingerprint)).fetchone()[0]


def traces(shop, *needles):
    """Names of the index's files that hold any of some bytes."""
    return [
        path.name
        for path in shop.index.iterdir()
        for data in [path.read_bytes()]
        if any(each in data for each in needles)
    ]


def as_float32(blob):
    return unit(np.frombuffer(blob, dtype=np.float16)[None]).tobytes()


def test_a_forgotten_file_that_is_gone_leaves_no_trace(shop):
    path = write_image(shop.root / "a-name-like-no-other.png", 77)
    shop.sync()
    of_first_model = stored_vector(shop, path.name)
    shop.model = a_model(1)
    shop.sync()
    of_second_model = stored_vector(shop, path.name)
    needles = [b"a-name-like-no-other", of_first_model, of_second_model, as_float32(of_second_model)]
    assert "catalog.sqlite" in traces(shop, *needles)
    assert "vectors-2.faiss" in traces(shop, as_float32(of_second_model))
    path.unlink()
    forgotten = forget(shop.index, [str(path)])
    assert (forgotten.files, forgotten.vectors, forgotten.excluded, forgotten.images) == (1, 2, [], 16)
    assert traces(shop, *needles) == []
    with open_index(shop.index) as index:
        matches = index.search(np.frombuffer(as_float32(of_second_model), np.float32)[None], top=20)[0]
    assert len(matches) == 16
    assert path not in [match.path for match in matches]
    assert (shop.sync().unchanged, shop.notes) == (16, [])


def test_what_a_forgotten_file_was_before_is_told_and_pruned(shop):
    path = write_image(shop.root / "edited.png", 77)
    shop.sync()
    before = stored_vector(shop, path.name)
    write_image(path, 78, age=10)
    shop.sync()
    said = []
    path.unlink()
    assert (forget(shop.index, [str(path)], note=said.append).files, len(said)) == (1, 1)
    assert said[0].startswith("1 vectors stay that no file has now")
    assert "catalog.sqlite" in traces(shop, before)
    with pytest.raises(DinosearchError, match="dropped by index --prune"):
        forget(shop.index, [str(path)])
    with Catalog.open(shop.index) as catalog:
        assert catalog.n_orphans() == 1
    shop.sync(prune=True)
    with Catalog.open(shop.index) as catalog:
        assert catalog.n_orphans() == 0
    assert traces(shop, before, as_float32(before)) == []


def test_a_forgotten_file_that_is_still_there_is_not_taken_in_again(shop):
    path = write_image(shop.root / "[odd] name!.png", 77)
    write_image(shop.root / "o name!.png", 78)
    shop.sync()
    vector = stored_vector(shop, path.name)
    forgotten = forget(shop.index, [str(path)])
    assert forgotten.excluded == [str(path)]
    assert traces(shop, vector, as_float32(vector)) == []
    summary = shop.sync()
    assert (summary.new, summary.unchanged, summary.images) == (0, 17, 17)
    assert "without 1 forgotten" in shop.notes[-1]
    summary = shop.sync(options=GivenOptions(exclude=("*.tif",)))
    assert (summary.new, summary.unchanged) == (0, 17)


def test_what_a_list_named_from_the_current_folder_stays_forgotten(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(shop.root)
    (tmp_path / "list.txt").write_text("0000.png\n0001.png\n")
    sources = open_sources([str(tmp_path / "list.txt")])
    shop.sync(roots=sources)
    forget(shop.index, ["0000.png"])
    assert shop.sync(roots=sources).images == 1


def test_a_vector_that_another_file_needs_stays(shop):
    (shop.root / "copy.png").write_bytes((shop.root / "0000.png").read_bytes())
    shop.sync()
    forgotten = forget(shop.index, [str(shop.root / "0000.png")])
    assert (forgotten.files, forgotten.vectors, forgotten.images) == (1, 0, 16)
    assert index_info(shop.index).vectors == 16


def test_a_folder_is_forgotten_with_all_below_it(shop, monkeypatch):
    shop.sync()
    monkeypatch.chdir(shop.root)
    forgotten = forget(shop.index, ["private"])
    assert (forgotten.files, len(forgotten.excluded), forgotten.images) == (4, 4, 12)
    assert shop.sync().images == 12


def test_a_source_that_is_forgotten_as_a_whole_is_followed_no_more(shop, tmp_path):
    write_images(tmp_path / "other", 3, seed=300)
    shop.sync(roots=[shop.root, tmp_path / "other"])
    forgotten = forget(shop.index, [str(tmp_path / "other")])
    assert (forgotten.files, forgotten.excluded, forgotten.images) == (3, [], 16)
    assert index_info(shop.index).roots == [str(shop.root)]


def test_a_list_in_a_forgotten_folder_is_followed_as_long_as_it_names_others(shop, tmp_path):
    other = write_image(tmp_path / "other" / "b.png", 300)
    (shop.root / "list.txt").write_text(f"0000.png\n0001.png\n{other}\n")
    shop.sync(roots=open_sources([str(shop.root / "list.txt")]))
    assert forget(shop.index, [str(shop.root)]).images == 1
    assert [file.path for file in read_vectors(shop.index)[0]] == [other]
    assert shop.sync(roots=open_sources([str(shop.root / "list.txt")])).images == 1


def test_what_a_list_reaches_through_links_and_dots_is_shown_plainly_and_forgotten_by_any_of_its_paths(shop, tmp_path):
    (tmp_path / "link").symlink_to(shop.root)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_text(f"../images/0000.png\n{tmp_path}/link/0001.png\n../link/0002.png\n")
    sources = open_sources([str(tmp_path / "lists" / "list.txt")])
    shop.sync(roots=sources)
    shown = {str(file.path) for file in read_vectors(shop.index)[0]}
    linked = {str(tmp_path / "link" / name) for name in ("0001.png", "0002.png")}
    assert shown == {str(shop.root / "0000.png")} | linked
    forget(shop.index, [str(tmp_path / "link" / "0001.png")])
    forget(shop.index, [str(shop.root / "0002.png")])
    forget(shop.index, [str(tmp_path / "lists" / ".." / "link" / "0000.png")])
    assert index_info(shop.index).images == 0


def test_a_lists_own_path_means_all_that_it_names(shop, tmp_path):
    (tmp_path / "list.txt").write_text(f"images/0000.png\n{shop.root}/0001.png\n")
    shop.sync(roots=[shop.root / "private", *open_sources([str(tmp_path / "list.txt")])])
    forgotten = forget(shop.index, [str(tmp_path / "list.txt")])
    assert (forgotten.files, forgotten.images) == (2, 4)
    assert index_info(shop.index).roots == [str(shop.root / "private")]


def test_the_vectors_written_anew_are_held_to_the_memory_and_the_notes_given(shop, monkeypatch):
    shop.sync()
    given = {}

    def watched(*arguments, **options):
        given.update(options)
        return write_generation(*arguments, **options)

    monkeypatch.setattr(forget_module, "write_generation", watched)
    forget(shop.index, [str(shop.root / "0000.png")], max_memory=10**9, note=shop.notes.append)
    assert (given["max_memory"], given["note"]) == (10**9, shop.notes.append)


def test_a_member_of_an_archive_is_forgotten_and_stays_so(shop, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number in range(3):
            archive.write(shop.root / "private" / f"000{number}.png", f"in/{number}.png")
    os.utime(tmp_path / "photos.zip", (1e9, 1e9))
    shop.sync(roots=open_sources([str(tmp_path / "photos.zip")]))
    member = str(tmp_path / "photos.zip" / "in" / "1.png")
    forgotten = forget(shop.index, [member])
    assert (forgotten.files, forgotten.vectors, forgotten.excluded) == (1, 1, [member])
    assert shop.sync(roots=open_sources([str(tmp_path / "photos.zip")])).images == 2


def test_what_is_not_in_the_index_is_an_error_and_changes_nothing(shop):
    shop.sync()
    with pytest.raises(DinosearchError, match=r"nothing of .*9999\.png is in images"):
        forget(shop.index, [str(shop.root / "0000.png"), str(shop.root / "9999.png")])
    assert len(read_vectors(shop.index)[0]) == 16


def test_an_erasure_that_a_reader_or_a_kill_held_up_is_finished_by_the_next_sync(shop, monkeypatch):
    path = shop.root / "private" / "0000.png"
    shop.sync()
    vector = stored_vector(shop, "private/0000.png")
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "finish_erasure", lambda _: False)
        forget(shop.index, [str(path)], note=shop.notes.append)
    assert "another program reads the index" in shop.notes[-1]
    shop.sync()
    assert traces(shop, vector, as_float32(vector), b"private/0000") == []


def test_of_a_file_that_is_still_there_only_its_name_is_kept_and_the_help_says_so(shop):
    path = write_image(shop.root / "a-name-like-no-other.png", 77)
    shop.sync()
    vector = stored_vector(shop, path.name)
    forget(shop.index, [str(path)])
    assert traces(shop, vector, as_float32(vector)) == []
    assert traces(shop, b"a-name-like-no-other") == ["catalog.sqlite"]
    assert "the names are kept" in " ".join((command.forget.__doc__ or "").split())


@pytest.mark.parametrize("mount_point_stays", [False, True])
def test_what_is_forgotten_while_its_disk_is_away_stays_forgotten(shop, tmp_path, mount_point_stays):
    shop.sync()
    shop.root.rename(tmp_path / "away")
    if mount_point_stays:
        shop.root.mkdir()
    forgotten = forget(shop.index, [str(shop.root / "private")])
    assert (forgotten.files, len(forgotten.excluded)) == (4, 4)
    if mount_point_stays:
        shop.root.rmdir()
    (tmp_path / "away").rename(shop.root)
    summary = shop.sync()
    assert (summary.new, summary.unchanged, summary.images) == (0, 12, 12)


def test_what_a_pattern_found_and_is_gone_leaves_no_trace(shop, tmp_path):
    shop.root = tmp_path / "empty"
    path = write_image(tmp_path / "images" / "a-name-like-no-other.png", 77)
    pattern = open_sources([str(tmp_path / "images" / "**" / "*.png")])
    shop.sync(roots=pattern)
    path.unlink()
    assert forget(shop.index, [str(path)]).excluded == []
    assert traces(shop, b"a-name-like-no-other") == []


def test_what_lies_on_a_disk_inside_a_source_stays_forgotten_while_it_is_away(shop, tmp_path):
    shop.sync()
    (shop.root / "private").rename(tmp_path / "away")
    (shop.root / "private").mkdir()  # the mount point
    assert len(forget(shop.index, [str(shop.root / "private")]).excluded) == 4
    (shop.root / "private").rmdir()
    (tmp_path / "away").rename(shop.root / "private")
    assert shop.sync().new == 0


def test_an_erasure_on_a_full_disk_waits(shop, monkeypatch):
    path = write_image(shop.root / "a-name-like-no-other.png", 77)
    shop.sync()
    path.unlink()
    erasing = Catalog.finish_erasure

    class Full:
        def __init__(self, connection):
            self.connection = connection

        def execute(self, statement, *values):
            if statement != "VACUUM":
                return self.connection.execute(statement, *values)
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

    def without_room(catalog):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(catalog, "_connection", Full(catalog._connection))
            return erasing(catalog)

    monkeypatch.setattr(Catalog, "finish_erasure", without_room)
    said = []
    forget(shop.index, [str(path)], note=said.append)
    assert "or the disk has no room" in said[-1]
    monkeypatch.undo()
    assert shop.sync().unchanged == 16
    assert traces(shop, b"a-name-like-no-other") == []


def test_a_renamed_folder_brings_nothing_forgotten_back(shop, tmp_path):
    shop.sync()
    forget(shop.index, [str(shop.root / "private")])
    before = shop.root
    shop.root = shop.root.rename(tmp_path / "pictures")
    with pytest.raises(DinosearchError, match=r"pictures/private/0000.png looks like one .* dinosearch relocate"):
        shop.sync()
    with Catalog.open(shop.index) as catalog:
        assert [root.location for root in catalog.roots().values()] == [str(before)]
    relocate(shop.index, str(before), str(shop.root))
    summary = shop.sync()
    assert (summary.new, summary.unchanged, summary.images) == (0, 12, 12)


def test_a_copy_of_an_image_on_a_disk_that_is_away_brings_nothing_forgotten(shop, tmp_path):
    shop.sync()
    forget(shop.index, [str(shop.root / "private")])
    shop.root = shop.root.rename(tmp_path / "away")
    write_image(tmp_path / "other" / "copy.png", 0)  # as images/0000.png
    write_image(tmp_path / "other" / "new.png", 500)
    summary = shop.sync(roots=[tmp_path / "other"])
    assert (summary.moved, summary.new) == (1, 1)
