"""Finding image files by name, whatever else lies around."""

import os
from pathlib import Path

import pytest

from dinosearch.errors import DinosearchError
from dinosearch.images import find_images


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")


def found(root: Path) -> list[str]:
    return [image.path for image in find_images(root).images]


def test_images_are_found_by_extension_in_any_case_and_sorted(tmp_path):
    touch(tmp_path, "b.JPG", "a.jpeg", "sub/deep/c.Png", "notes.txt", "jpg", "x.jpg.bak", "Z.avif", "k.heic")
    assert found(tmp_path) == ["Z.avif", "a.jpeg", "b.JPG", "k.heic", "sub/deep/c.Png"]


def test_size_and_time_are_those_of_the_file(tmp_path):
    touch(tmp_path, "a.jpg")
    os.utime(tmp_path / "a.jpg", ns=(1, 1_700_000_000_123_456_789))
    image = find_images(tmp_path).images[0]
    assert (image.size, image.mtime_ns) == (5, 1_700_000_000_123_456_789)


def test_hidden_names_and_thumbnail_folders_are_skipped(tmp_path):
    touch(tmp_path, ".hidden.jpg", "._a.jpg", ".git/a.jpg", "@eaDir/a.jpg", "sub/.b.jpg", "seen.jpg")
    assert found(tmp_path) == ["seen.jpg"]


def test_what_is_no_regular_file_is_skipped_and_a_folder_named_like_an_image_is_walked(tmp_path):
    touch(tmp_path, "folder.jpg/inside.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "broken.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert found(tmp_path) == ["folder.jpg/inside.png"]


def test_a_link_counts_as_its_file_and_linked_folders_are_not_followed(tmp_path):
    touch(tmp_path, "elsewhere/a.jpg", "root/b.jpg")
    (tmp_path / "root/link.jpg").symlink_to(tmp_path / "elsewhere/a.jpg")
    (tmp_path / "root/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/folder.jpg").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/cycle").symlink_to(tmp_path / "root")
    assert found(tmp_path / "root") == ["b.jpg", "link.jpg"]


def test_the_root_itself_may_be_a_link(tmp_path):
    touch(tmp_path, "real/a.jpg")
    (tmp_path / "link").symlink_to("real")
    assert found(tmp_path / "link") == ["a.jpg"]


def test_folders_of_models_are_passed_over_unless_one_is_named_itself(tmp_path):
    made = [f"models/cats/{name}" for name in ("model.json", "weights.safetensors", "curves.png", "training/a.png")]
    touch(tmp_path, *made, "models/b.jpg", "photos/model.json", "photos/sub/weights.safetensors", "photos/sub/c.jpg")
    assert found(tmp_path) == ["models/b.jpg", "photos/sub/c.jpg"]
    assert found(tmp_path / "models") == ["b.jpg"]
    assert found(tmp_path / "models/cats") == ["curves.png", "training/a.png"]


def test_names_that_are_not_utf8_or_hold_newlines_survive(tmp_path):
    raw = os.fsencode(tmp_path) + b"/\xff\xfe.jpg"
    Path(os.fsdecode(raw)).touch()
    touch(tmp_path, "two\nlines.jpg", "ü.jpg")
    paths = found(tmp_path)
    assert [os.fsencode(path) for path in paths] == [b"two\nlines.jpg", "ü.jpg".encode(), b"\xff\xfe.jpg"]
    assert all((tmp_path / path).is_file() for path in paths)


def test_a_folder_that_cannot_be_listed_is_reported_not_raised(tmp_path, monkeypatch):
    touch(tmp_path, "open/a.jpg", "shut/b.jpg")
    real = os.scandir

    def scandir(path):
        if Path(path).name == "shut":  # permissions do not bind the root user, who may run the tests
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    scan = find_images(tmp_path)
    assert [image.path for image in scan.images] == ["open/a.jpg"]
    assert scan.unreadable_folders == [("shut", "Permission denied")]


@pytest.mark.parametrize("name", ["missing", "file.jpg"])
def test_a_root_that_is_no_folder_is_an_error(tmp_path, name):
    touch(tmp_path, "file.jpg")
    with pytest.raises(DinosearchError, match=name):
        find_images(tmp_path / name)
