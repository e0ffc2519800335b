"""Which source a word on the command line is, and the sources that are files of this machine."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dinosearch.errors import DinosearchError
from dinosearch.images import BadImage
from dinosearch.images.source import UNTRUSTED_TIME, FoundImage, ScanOptions
from dinosearch.images.sources import known_source, open_source, open_sources, read_image

KINDS = ("folder", "files", "glob", "list", "table", "archive", "remote")


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*names, data=b"pixels"):
    for name in names:
        path = Path(os.fsdecode(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def scanned(source, **options):
    return source.scan(ScanOptions(**options), note=lambda _: None)


def paths(source, **options):
    return [image.path for image in scanned(source, **options).images]


def shown(source):
    return [source.shown_path(image) for image in scanned(source).images]


def test_a_folder_is_known_by_its_real_path(tmp_path):
    write("real/a.jpg", "real/sub/b.png")
    Path("link").symlink_to("real")
    [source] = open_source("link")
    assert (source.kind, source.location) == ("folder", str(tmp_path / "real"))
    assert shown(source) == [str(tmp_path / "real/a.jpg"), str(tmp_path / "real/sub/b.png")]
    image = scanned(source).images[0]
    assert source.read(image).data == b"pixels"
    assert source.file_path(image) == str(tmp_path / "real/a.jpg")
    assert source.stamp() is None


def test_a_folder_named_like_an_archive_or_image_is_a_folder():
    write("x.jpg/a.jpg", "y.zip/a.jpg", "z.csv/a.jpg")
    assert [source.kind for source in open_sources(["x.jpg", "y.zip", "z.csv"])] == ["folder"] * 3


def test_files_named_one_by_one_are_one_source_per_folder(tmp_path):
    write("photos/a.jpg", "photos/b.jpg", "photos/c.jpg", "more/d.jpg", "photos/.e.jpg")
    sources = open_sources(["photos/b.jpg", "photos/a.jpg", "more/d.jpg", "photos/.e.jpg", "photos/a.jpg"])
    assert [(source.kind, source.location) for source in sources] == [
        ("files", str(tmp_path / "photos")),
        ("files", str(tmp_path / "more")),
    ]
    assert paths(sources[0]) == [".e.jpg", "a.jpg", "b.jpg"]
    assert paths(sources[0], exclude=("a.*",)) == [".e.jpg", "b.jpg"]


def test_named_files_keep_those_of_earlier_runs_as_long_as_they_exist():
    write("photos/a.jpg", "photos/b.jpg", "photos/c.jpg")
    [source] = open_sources(["photos/b.jpg"])
    source.add(["a.jpg", "gone.jpg"])
    assert paths(source) == ["a.jpg", "b.jpg"]
    Path("photos/b.jpg").unlink()
    assert paths(source) == ["a.jpg"]


def test_a_pattern_is_matched_as_a_shell_would(tmp_path):
    write("p/a.png", "p/b.jpg", "p/sub/c.png", "p/sub/deep/d.png", "p/.hidden/e.png", "p/note.txt", "q/f.png")
    [source] = open_sources(["p/**/*.png"])
    assert (source.kind, source.location) == ("glob", f"{tmp_path}/p/**/*.png")
    assert paths(source) == ["a.png", "sub/c.png", "sub/deep/d.png"]
    assert shown(source)[1] == str(tmp_path / "p/sub/c.png")
    assert paths(source, include_hidden=True) == [".hidden/e.png", "a.png", "sub/c.png", "sub/deep/d.png"]
    assert paths(source, exclude=("deep/",)) == ["a.png", "sub/c.png"]
    for pattern, expected in {
        "p/*": ["a.png", "b.jpg"],
        "p/[ab].???": ["a.png", "b.jpg"],
        "p/*/*.png": ["sub/c.png"],
        "p/**": ["a.png", "b.jpg", "sub/c.png", "sub/deep/d.png"],
        "p/**/**/d*": ["sub/deep/d.png"],
        "p/.hid*/*": [".hidden/e.png"],
        "?/*.png": ["p/a.png", "q/f.png"],
    }.items():
        [source] = open_source(pattern)
        assert paths(source) == expected, pattern


def test_a_pattern_follows_no_links_to_folders():
    write("p/a.png", "elsewhere/b.png")
    Path("p/cycle").symlink_to(".")
    Path("p/other").symlink_to("../elsewhere")
    [source] = open_source("p/**/*.png")
    assert paths(source) == ["a.png"]


def test_a_pattern_below_a_folder_with_brackets_in_its_name(monkeypatch):
    write("[x]/a.png", "x/b.png")
    monkeypatch.chdir("[x]")
    [source] = open_source("*.png")
    assert [Path(path).name for path in shown(source)] == ["a.png"]


def test_a_pattern_of_archives_gives_one_source_for_each():
    write("shards/1.tar", "shards/0.tar", "shards/x.zip", "shards/a.jpg")
    sources = open_sources(["shards/*"])
    assert [(source.kind, Path(source.location).name) for source in sources] == [
        *(("archive", "0.tar"), ("archive", "1.tar"), ("archive", "x.zip"), ("glob", "*"))
    ]


def test_what_is_not_there_or_no_source_is_one_line_with_what_to_do():
    write("movie.mkv", data=b"\0\1\2")
    os.mkfifo("pipe.zip")
    for spec, says in {
        "nowhere": "no folder or file nowhere. Check",
        "nothing/*.jpg": "no folder .*/nothing",
        "*.png": r"no image or archive matches \*.png",
        "pipe.zip": "pipe.zip is no folder, image, list",
        "movie.mkv": "movie.mkv is no folder, image, list",
        "ftp://host/a.jpg": "neither s3://",
        "x" * 300: r"cannot read x+ \(File name too long\). Check",
        "y" * 300 + "/*.jpg": "no folder .*y. Check",
        "movie.mkv/a.jpg": "no folder or file movie.mkv/a.jpg. Check",
    }.items():
        with pytest.raises(DinosearchError, match=says) as caught:
            open_source(spec)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "remote"])
def test_a_source_that_is_gone_is_known_and_says_so_when_scanned(tmp_path, kind):
    source = known_source(kind, f"{tmp_path}/gone/*.png" if kind == "glob" else f"{tmp_path}/gone")
    assert source.kind == kind
    with pytest.raises(DinosearchError, match="gone"):
        scanned(source)


def test_a_list_names_files_relative_to_itself_or_to_the_current_folder(tmp_path):
    write("lists/beside.jpg", "here.jpg", "noext", "abs/.b.jpg", b"lists/\xff.jpg", "lists/#c.jpg")
    lines = [b"\xef\xbb\xbf# a comment", b"", b"beside.jpg", b"here.jpg", b"./beside.jpg", b"gone.jpg", b"../noext"]
    lines += [os.fsencode(tmp_path / "abs/.b.jpg"), b"\xff.jpg", b"./#c.jpg", b"  "]
    Path("lists/all.txt").write_bytes(b"\r\n".join(lines))
    [source] = open_source("lists/all.txt")
    assert source.kind == "list"
    found = {image.path: image for image in scanned(source).images}
    assert sorted(found, key=os.fsencode) == [
        *("#c.jpg", "../noext", str(tmp_path / "abs/.b.jpg"), str(tmp_path / "here.jpg")),
        *("beside.jpg", "gone.jpg", "\udcff.jpg"),
    ]
    assert list(found) == sorted(found, key=os.fsencode)
    assert source.read(found["beside.jpg"]).data == source.read(found["\udcff.jpg"]).data == b"pixels"
    assert (found["gone.jpg"].size, found["gone.jpg"].mtime_ns) == (0, UNTRUSTED_TIME)
    with pytest.raises(BadImage, match="unreadable: No such file"):
        source.read(found["gone.jpg"])


def test_a_list_of_which_nothing_is_there_is_an_error():
    Path("all.lst").write_text("disk/a.jpg\ndisk/b.jpg\n")
    with pytest.raises(DinosearchError, match=r"none of the 2 files that .*all.lst names is there"):
        scanned(open_source("all.lst")[0])


def test_a_list_leaves_out_what_is_excluded():
    write("a.jpg", "drafts/b.jpg")
    Path("all.lst").write_text("a.jpg\ndrafts/b.jpg\n")
    [source] = open_source("all.lst")
    assert paths(source, exclude=("drafts/",)) == ["a.jpg"]


def test_what_was_printed_can_be_read_again():
    write("a.jpg")
    assert read_image("a.jpg").data == b"pixels"
    with pytest.raises(BadImage, match="No such file"):
        read_image("gone.zip/a.jpg")
    for path in ("x" * 300, "x" * 300 + ".zip/a.jpg"):
        with pytest.raises(BadImage, match="File name too long"):
            read_image(path)
    with pytest.raises(BadImage, match="ftp:// is not among"):
        read_image("ftp://host/a.jpg")


@pytest.mark.parametrize("spec", ["p", "p/a.jpg", "p/*.jpg", "all.lst", "some.tar"])
def test_a_time_beyond_64_bits_is_the_same_number_when_it_is_scanned_and_read(spec):
    write("p/a.jpg")
    Path("all.lst").write_text("p/a.jpg\n")
    with tarfile.open("some.tar", "w") as archive:
        archive.add("p/a.jpg")
    year_2300 = 10_413_792_000 * 10**9
    for path in ("p/a.jpg", "some.tar"):
        os.utime(path, ns=(year_2300, year_2300))
        if Path(path).stat().st_mtime_ns != year_2300:
            pytest.skip("this file system knows no such year")
    [source] = open_sources([spec])
    [image] = scanned(source).images
    assert -(2**63) <= image.mtime_ns < 2**63
    assert source.read(image).mtime_ns == image.mtime_ns


def test_streams_belong_to_compressed_tars_alone():
    write("p/a.jpg")
    with pytest.raises(AssertionError):
        open_source("p")[0].stream([FoundImage("a.jpg", 1, 1)])


def test_what_only_other_sources_need_is_not_loaded_for_a_folder():
    code = "import sys; from dinosearch.images.sources import open_source; open_source('.'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"fsspec", "aiohttp", "pyarrow", "pathspec"} & set(done.stdout.split())
