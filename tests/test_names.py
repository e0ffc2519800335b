"""Which names count: patterns of .gitignore, hidden names, system folders."""

import pytest

from dinosearch.errors import UsageError
from dinosearch.images import find_images
from dinosearch.images.source import ScanOptions


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(root, **options):
    return [image.path for image in find_images(root, ScanOptions(**options)).images]


def test_patterns_mean_what_they_mean_in_gitignore(tmp_path):
    touch(tmp_path, "a.tif", "keep.tif", "top.jpg", "sub/top.jpg", "sub/b.jpg", "drafts/c.jpg", "sub/drafts/d.jpg")
    assert found(tmp_path, exclude=("*.tif", "!keep.tif")) == [
        *("drafts/c.jpg", "keep.tif", "sub/b.jpg", "sub/drafts/d.jpg", "sub/top.jpg", "top.jpg")
    ]
    assert found(tmp_path, exclude=("drafts/", "/top.jpg", "*.tif")) == ["sub/b.jpg", "sub/top.jpg"]
    assert found(tmp_path, exclude=("/drafts/", "*.tif", "# no pattern", "")) == [
        *("sub/b.jpg", "sub/drafts/d.jpg", "sub/top.jpg", "top.jpg")
    ]


def test_below_an_excluded_folder_nothing_is_taken_in_again(tmp_path):
    touch(tmp_path, "drafts/c.jpg", "a.jpg")
    assert found(tmp_path, exclude=("drafts/", "!drafts/c.jpg")) == ["a.jpg"]


def test_a_folder_pattern_leaves_a_file_of_that_name(tmp_path):
    touch(tmp_path, "x.jpg", "sub/x.jpg/inside.png")
    assert found(tmp_path, exclude=("x.jpg/",)) == ["x.jpg"]


@pytest.mark.parametrize("pattern", ["!", "[z-a]"])
def test_a_pattern_that_is_none_is_named(tmp_path, pattern):
    with pytest.raises(UsageError, match="--exclude"):
        found(tmp_path, exclude=(pattern,))


def test_hidden_names_are_taken_when_asked_for_but_never_a_systems_own(tmp_path):
    touch(tmp_path, ".a.jpg", ".sub/b.jpg", "c.jpg")
    touch(
        tmp_path, "._c.jpg", ".git/d.jpg", ".Trash-1000/e.jpg", "@eaDir/f.jpg", "$RECYCLE.BIN/g.jpg", "__MACOSX/h.jpg"
    )
    assert found(tmp_path) == ["c.jpg"]
    assert found(tmp_path, include_hidden=True) == [".a.jpg", ".sub/b.jpg", "c.jpg"]
