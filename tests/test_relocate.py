import os
import zipfile

import pytest
from indexing import Workshop, a_model, never, write_image, write_images

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.images.sources import open_sources
from dinosearch.index.contents import index_info
from dinosearch.index.relocate import relocate
from dinosearch.index.sync import sync_index


@pytest.fixture
def shop(tmp_path):
    write_images(tmp_path / "disk" / "images", 40)
    return Workshop(tmp_path / "disk" / "images", tmp_path / "indexes" / "images", a_model(), None, [])


def resync(shop, sources):
    steps = list(sync_index(sources, index_path=shop.index, model=shop.model, encoder_for=never))
    return steps[-1].summary


def test_a_source_that_moved_is_as_it_was_in_its_new_place(shop, tmp_path):
    shop.sync()
    shop.root.rename(tmp_path / "elsewhere")
    relocated = relocate(shop.index, str(shop.root), str(tmp_path / "elsewhere"))
    assert relocated.sources == {str(shop.root): str(tmp_path / "elsewhere")}
    assert index_info(shop.index).roots == [str(tmp_path / "elsewhere")]
    assert resync(shop, [tmp_path / "elsewhere"]).unchanged == 40


def test_all_sources_of_a_disk_move_with_it_and_what_lists_name_too(shop, tmp_path):
    disk = tmp_path / "disk"
    with zipfile.ZipFile(disk / "photos.zip", "w") as archive:
        archive.write(write_image(disk / "aside" / "a.png", 200), "a.png")
    listed = write_image(disk / "listed" / "b.png", 201)
    (tmp_path / "list.txt").write_text(f"{listed}\n")
    os.utime(disk / "photos.zip", (1e9, 1e9))
    specs = [str(shop.root), str(disk / "photos.zip"), str(tmp_path / "list.txt"), str(disk / "aside" / "*.png")]
    shop.sync(roots=open_sources(specs))
    disk.rename(tmp_path / "new")
    relocated = relocate(shop.index, str(disk), str(tmp_path / "new"))
    assert len(relocated.sources) == 3
    assert relocated.entries == 1
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'new' / 'listed' / 'b.png'}\n")
    new = tmp_path / "new"
    specs = [str(new / "images"), str(new / "photos.zip"), str(tmp_path / "list.txt"), str(new / "aside" / "*.png")]
    assert resync(shop, open_sources(specs)).unchanged == 43


def test_a_place_with_other_images_is_refused_and_nothing_changes(shop, tmp_path):
    shop.sync()
    write_images(tmp_path / "other", 40, seed=500)
    with pytest.raises(DinosearchError, match=r"of 32 files 32 are not in .*holds something else"):
        relocate(shop.index, str(shop.root), str(tmp_path / "other"))
    with pytest.raises(DinosearchError, match=r"of 32 files 32 are not in .*No such file"):
        relocate(shop.index, str(shop.root), str(tmp_path / "nowhere"))
    assert index_info(shop.index).roots == [str(shop.root)]


def test_a_few_files_that_changed_since_do_not_matter(shop, tmp_path):
    shop.sync()
    shop.root.rename(tmp_path / "elsewhere")
    write_image(tmp_path / "elsewhere" / "0000.png", 900)
    relocate(shop.index, str(shop.root), str(tmp_path / "elsewhere"))
    assert index_info(shop.index).roots == [str(tmp_path / "elsewhere")]


def test_nonsense_is_refused(shop, tmp_path):
    write_images(tmp_path / "other", 2, seed=500)
    shop.sync(roots=[shop.root, tmp_path / "other"])
    with pytest.raises(DinosearchError, match="no source of images lies in"):
        relocate(shop.index, str(tmp_path / "unknown"), str(shop.root))
    with pytest.raises(DinosearchError, match=r"follows .*other already"):
        relocate(shop.index, str(shop.root), str(tmp_path / "other"))
    with pytest.raises(UsageError, match="same place"):
        relocate(shop.index, str(shop.root), str(shop.root))
    with pytest.raises(UsageError, match="lies inside"):
        relocate(shop.index, str(shop.root), str(tmp_path / "other" / "deep"))
    assert index_info(shop.index).roots == [str(shop.root), str(tmp_path / "other")]


def test_a_link_left_in_the_old_place_does_not_matter(shop, tmp_path):
    shop.sync()
    shop.root.rename(tmp_path / "elsewhere")
    shop.root.symlink_to(tmp_path / "elsewhere")
    relocate(shop.index, str(shop.root), str(tmp_path / "elsewhere"))
    assert index_info(shop.index).roots == [str(tmp_path / "elsewhere")]


def test_a_list_that_names_both_places_is_told_so_and_nothing_is_changed(shop, tmp_path):
    old, new = (write_image(tmp_path / place / "a.png", seed) for seed, place in enumerate(("old", "new")))
    (tmp_path / "list.txt").write_text(f"{old}\n{new}\n")
    shop.sync(roots=open_sources([str(tmp_path / "list.txt")]))
    with pytest.raises(UsageError, match=r"names .*new/a\.png already"):
        relocate(shop.index, str(old.parent), str(new.parent))
    assert resync(shop, open_sources([str(tmp_path / "list.txt")])).unchanged == 2


def test_files_may_move_to_where_others_that_move_too_were(shop, tmp_path):
    outer, inner = write_image(tmp_path / "a" / "x.png", 1), write_image(tmp_path / "a" / "b" / "x.png", 2)
    (tmp_path / "list.txt").write_text(f"{outer}\n{inner}\n")
    shop.sync(roots=open_sources([str(tmp_path / "list.txt")]))
    (tmp_path / "a").rename(tmp_path / "moving")
    (tmp_path / "a").mkdir()
    (tmp_path / "moving").rename(tmp_path / "a" / "b")
    assert relocate(shop.index, str(tmp_path / "a"), str(tmp_path / "a" / "b")).entries == 2
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a/b/x.png\n{tmp_path}/a/b/b/x.png\n")
    assert resync(shop, open_sources([str(tmp_path / "list.txt")])).unchanged == 2
