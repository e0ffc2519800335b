"""Zip files, tars and webdatasets: what is found in them and read from them, and what a damaged one gives."""

import gzip
import io
import json
import os
import struct
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from indexing import set_age

from dinosearch.errors import DinosearchError
from dinosearch.images import BadImage, decode_rgb
from dinosearch.images.source import FoundImage, ScanOptions
from dinosearch.images.sources import archives, known_source, open_source, read_image

KINDS = ("zip", "tar", "tar.gz", "tar.bz2", "tar.xz")


def write_archive(path: Path, members: dict[str, bytes], *, age: float = 1000) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    else:
        with tarfile.open(path, f"w:{path.suffix[1:].replace('tar', '')}") as archive:
            for name, data in members.items():
                add(archive, name, data)
    set_age(path, age)
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes, **attributes: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    archive.addfile(info, io.BytesIO(data))


def opened(path: Path):
    [source] = open_source(str(path))
    return source


def scanned(source, **options):
    return source.scan(ScanOptions(**options), note=lambda _: None)


def names(source, **options):
    return [image.member for image in scanned(source, **options).images]


def contents(source, images):
    """Data or status of each member, read the way the source allows."""
    if source.sequential:
        results = list(source.stream(images))
    else:
        results = []
        for image in images:
            try:
                results.append((image, source.read(image)))
            except BadImage as bad:
                results.append((image, bad))
    return {i.member: f"{r.status}: {r.reason}" if isinstance(r, BadImage) else r.data for i, r in results}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_members_are_read_and_nothing_is_written_beside(tmp_path, kind, jpeg_folder):
    photo = (jpeg_folder / "china/0.jpg").read_bytes()
    members = {"b/1.jpg": photo, "a.PNG": b"x" * 3000, "note.txt": b"hello", "b/": b"", "ü/\n.gif": b"gif"}
    members.pop("b/") if kind != "zip" else None
    path = write_archive(tmp_path / f"some.{kind}", members)
    before = {each: each.stat() for each in tmp_path.iterdir()}
    source = opened(path)
    scan = scanned(source)
    assert (source.kind, source.location, source.sequential) == ("archive", str(path), kind not in ("zip", "tar"))
    assert [(i.path, i.member, i.size) for i in scan.images] == [
        *(("", "a.PNG", 3000), ("", "b/1.jpg", len(photo)), ("", "ü/\n.gif", 3))
    ]
    assert scan.unreadable_folders == []
    read = contents(source, scan.images)
    assert read == {name: members[name] for name in ("a.PNG", "b/1.jpg", "ü/\n.gif")}
    assert decode_rgb(read["b/1.jpg"]).size == (320, 220)
    assert source.shown_path(scan.images[1]) == f"{path}/b/1.jpg"
    assert source.file_path(scan.images[1]) is None
    assert {each: each.stat().st_mtime_ns for each in tmp_path.iterdir()} == {
        each: facts.st_mtime_ns for each, facts in before.items()
    }


def test_a_known_archive_is_read_without_being_scanned_first(tmp_path, kind):
    path = write_archive(tmp_path / f"some.{kind}", {"a.jpg": b"a", "b.jpg": b"b"})
    source = known_source("archive", str(path))
    image = FoundImage("", 1, 1, "b.jpg")
    assert contents(source, [image, FoundImage("", 1, 1, "gone.jpg")]) == {
        "b.jpg": b"b",
        "gone.jpg": "unreadable: is not in the archive any more",
    }


def test_what_was_printed_can_be_read_again(tmp_path, kind):
    path = write_archive(tmp_path / f"some.{kind}", {"dir/a.jpg": b"pixels", "/abs.jpg": b"abs"})
    assert read_image(f"{path}/dir/a.jpg").data == b"pixels"
    assert read_image(f"{path}//abs.jpg").data == b"abs"
    with pytest.raises(BadImage, match="not in the archive"):
        read_image(f"{path}/dir/b.jpg")
    path.write_bytes(b"no archive at all" * 100)
    with pytest.raises(BadImage, match=r"unreadable: .*cannot be read as an archive"):
        read_image(f"{path}/dir/a.jpg")


def test_names_that_point_outside_are_only_names(tmp_path, kind):
    members = {"../up.jpg": b"1", "/etc/abs.jpg": b"2", "./here.jpg": b"3", "a/../b.jpg": b"4", "c\\d.jpg": b"5"}
    path = write_archive(tmp_path / f"some.{kind}", members)
    source = opened(path)
    scan = scanned(source)
    assert contents(source, scan.images) == {
        **{"../up.jpg": b"1", "/etc/abs.jpg": b"2", "here.jpg": b"3"},
        **{"a/../b.jpg": b"4", "c\\d.jpg": b"5"},
    }
    assert list(tmp_path.parent.glob("*up.jpg")) == []


def test_hidden_and_excluded_members_are_passed_over(tmp_path, kind):
    members = dict.fromkeys(["a.jpg", ".b.jpg", "c/.d/e.jpg", "c/._f.jpg", "__MACOSX/g.jpg", "drafts/h.jpg"], b"")
    source = opened(write_archive(tmp_path / f"some.{kind}", members))
    assert names(source) == ["a.jpg", "drafts/h.jpg"]
    assert names(source, include_hidden=True) == [".b.jpg", "a.jpg", "c/.d/e.jpg", "drafts/h.jpg"]
    assert names(source, exclude=("drafts/",)) == ["a.jpg"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_members_with_one_name_the_last_counts(tmp_path, kind):
    path = tmp_path / f"some.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for data in ("first", "second!"):
                archive.writestr("a.jpg", data)
    else:
        with tarfile.open(path, f"w:{kind[4:]}") as archive:
            for data in (b"first", b"second!"):
                add(archive, "a.jpg", data)
    set_age(path, 1000)
    source = opened(path)
    scan = scanned(source)
    assert [image.size for image in scan.images] == [7]
    assert contents(source, scan.images) == {"a.jpg": b"second!"}


def test_the_stamp_tells_whether_anything_may_have_changed(tmp_path, kind, monkeypatch):
    path = write_archive(tmp_path / f"some.{kind}", {"a.jpg": b"a"})
    stamp = opened(path).stamp()
    assert stamp == opened(path).stamp() == f"{path.stat().st_size}:{path.stat().st_mtime_ns}"
    write_archive(path, {"a.jpg": b"b"}, age=500)
    assert opened(path).stamp() != stamp
    now = time.time_ns()
    os.utime(path, ns=(now, now))
    monkeypatch.setattr(time, "time_ns", lambda: now)  # a busy machine may not look again before the tick is over
    assert opened(path).stamp() is None


def test_a_changed_member_of_equal_size_and_date_is_noticed(tmp_path, kind):
    path = tmp_path / f"some.{kind}"
    before = scanned(opened(write_archive(path, {"a.jpg": b"a"}))).images
    assert scanned(opened(path)).images == before
    assert scanned(opened(write_archive(path, {"a.jpg": b"b"}, age=500))).images != before


def test_an_archive_replaced_since_the_scan_gives_no_bytes_of_another(tmp_path, kind):
    path = write_archive(tmp_path / f"some.{kind}", {"a.jpg": b"a" * 2000})
    source = opened(path)
    scan = scanned(source)
    path.unlink()
    write_archive(path, {"first.jpg": b"f" * 700, "a.jpg": b"b" * 2000}, age=500)
    assert contents(source, scan.images) == {"a.jpg": "unreadable: the archive changes while it is read"}


def test_what_is_no_archive_or_was_cut_at_its_beginning_is_an_error(tmp_path, kind):
    path = tmp_path / f"some.{kind}"
    for data in (b"no archive at all" * 100, b""):
        path.write_bytes(data)
        with pytest.raises(DinosearchError, match="cannot be read as an archive") as caught:
            scanned(opened(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz"])
def test_a_tar_cut_off_gives_what_came_before_and_leaves_the_rest_unknown(tmp_path, kind):
    random = os.urandom(60_000)
    path = write_archive(tmp_path / f"some.{kind}", {f"{i:02}.jpg": random[i * 3000 :][:3000] for i in range(20)})
    path.write_bytes(path.read_bytes()[:40_000])
    set_age(path, 1000)
    source = opened(path)
    scan = scanned(source)
    n_whole = len(scan.images) - 1
    assert 5 < n_whole < 19
    [(folder, reason)] = scan.unreadable_folders
    assert folder == ""
    assert "damaged" in reason
    read = contents(source, scan.images)
    whole = [read[f"{i:02}.jpg"] for i in range(n_whole)]
    assert whole == [random[i * 3000 :][:3000] for i in range(n_whole)]
    assert str(read[f"{n_whole:02}.jpg"]).startswith("unreadable: ")


def test_a_tar_with_a_broken_header_in_its_middle_is_not_taken_to_end_there(tmp_path):
    path = write_archive(tmp_path / "some.tar", {f"{i}.jpg": b"x" * 512 for i in range(5)})
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 100] ^= 0xFF  # in the third header
    path.write_bytes(data)
    scan = scanned(opened(path))
    assert [image.member for image in scan.images] == ["0.jpg", "1.jpg"]
    assert [folder for folder, _ in scan.unreadable_folders] == [""]


def test_a_tar_without_the_blocks_at_its_end_is_whole(tmp_path):
    path = write_archive(tmp_path / "some.tar", {"a.jpg": b"x" * 512})
    path.write_bytes(path.read_bytes()[:1024])
    scan = scanned(opened(path))
    assert (len(scan.images), scan.unreadable_folders) == (1, [])


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_links_and_devices_in_a_tar_are_passed_over(tmp_path, kind):
    path = tmp_path / f"some.{kind}"
    with tarfile.open(path, f"w:{kind[4:]}") as archive:
        add(archive, "a.jpg", b"a")
        for number, type_ in enumerate([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]):
            add(archive, f"{number}.jpg", b"", type=type_, linkname="/etc/passwd")
        add(archive, "dir.jpg", b"", type=tarfile.DIRTYPE)
        add(archive, "b.jpg", b"b")
    source = opened(path)
    assert contents(source, scanned(source).images) == {"a.jpg": b"a", "b.jpg": b"b"}


def test_a_tar_header_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "some.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "a.jpg", b"a")
        add(archive, "long", b"x" * (2**20 + 1), type=tarfile.GNUTYPE_LONGNAME)
    scan = scanned(opened(path))
    assert [image.member for image in scan.images] == ["a.jpg"]
    assert scan.unreadable_folders == [("", "the archive is damaged: a header of 1048577 bytes")]


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("size", [-512, -1, 2**62, 2**70])
def test_a_size_that_no_member_of_a_tar_has_ends_its_scan(tmp_path, kind, form, size):
    good, bad = tarfile.TarInfo("a.jpg"), tarfile.TarInfo("b.jpg")
    good.size = 1
    if form == tarfile.PAX_FORMAT:
        bad.pax_headers = {"size": str(size)}
    else:
        bad.size = size
    data = good.tobuf(form) + b"a".ljust(512, b"\0") + bad.tobuf(form) + b"b".ljust(1024, b"\0")
    path = tmp_path / f"some.{kind}"
    path.write_bytes(gzip.compress(data) if kind == "tar.gz" else data)
    source = opened(path)
    scan = scanned(source)
    assert [folder for folder, _ in scan.unreadable_folders] == [""]
    assert all(0 <= image.size < 2**63 for image in scan.images)
    read = contents(source, scan.images)
    assert read.pop("a.jpg") == b"a"
    assert all(each.startswith("too-large: ") for each in read.values())


def test_links_in_a_zip_are_passed_over(tmp_path):
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("a.jpg", "a")
    assert names(opened(path)) == ["a.jpg"]


def test_an_encrypted_or_broken_member_costs_only_itself(tmp_path):
    path = write_archive(tmp_path / "some.zip", {"a.jpg": b"a" * 99, "b.jpg": b"b" * 99, "c.jpg": b"c" * 99})
    data = bytearray(path.read_bytes())
    starts = [info.header_offset for info in zipfile.ZipFile(path).infolist()]
    entries = [at for at in range(len(data)) if data[at : at + 4] == b"PK\x01\x02"]
    data[starts[0] + 6] |= 1  # encrypted, here and in the directory
    data[entries[0] + 8] |= 1
    data[starts[1] + 30 + len("b.jpg")] ^= 0xFF  # its first byte
    path.write_bytes(data)
    source = opened(path)
    read = contents(source, scanned(source).images)
    assert read["a.jpg"] == "unreadable: encrypted"
    assert read["b.jpg"].startswith("unreadable: damaged in the archive (")
    assert read["c.jpg"] == b"c" * 99


def test_a_member_that_claims_to_be_huge_is_refused_unread(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 10_000)
    source = opened(write_archive(tmp_path / f"some.{kind}", {"a.jpg": b"\0" * 10_001, "b.jpg": b"b"}))
    read = contents(source, scanned(source).images)
    assert read["a.jpg"].startswith("too-large")
    assert read["b.jpg"] == b"b"


def test_a_zip_member_gives_no_more_bytes_than_it_announced(tmp_path):
    path = write_archive(tmp_path / "some.zip", {"a.jpg": b"\0" * 1_000_000})
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", 100)
    path.write_bytes(data)
    source = opened(path)
    [read] = contents(source, scanned(source).images).values()
    assert read == b"\0" * 100 or str(read).startswith("unreadable")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_many_threads_read_one_archive(tmp_path, kind):
    members = {f"{i}.jpg": os.urandom(2000 + i) for i in range(200)}
    source = opened(write_archive(tmp_path / f"some.{kind}", members))
    images = scanned(source).images * 3
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda image: source.read(image).data == members[image.member], images))


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_what_stands_beside_an_image_in_a_webdataset_is_its_metadata(tmp_path, kind):
    members = {
        **{"s/001.jpg": b"1", "s/001.cls": b"7", "s/001.txt": b"ein Hund\n", "s/001.json": b'{"w": 5, "n": NaN}'},
        **{
            "s/002.json": b"[1, 2]",
            "s/002.left.png": b"2",
            "s/003.jpg": b"3",
            "s/003.json": b"{broken",
            "004.jpg": b"",
        },
        **{"s/005.cls": b"dog", "s/005.jpg": b"5", "s/005.txt": b"x" * 70_000},
    }
    source = opened(write_archive(tmp_path / f"data.{kind}", members))
    scan = scanned(source)
    assert {image.member: image.metadata and json.loads(image.metadata) for image in scan.images} == {
        "s/001.jpg": {"cls": 7, "txt": "ein Hund", "w": 5, "n": None},
        "s/002.left.png": {"json": [1, 2]},
        "s/003.jpg": "",
        "004.jpg": "",
        "s/005.jpg": {"cls": "dog"},
    }
    assert contents(source, scan.images)["s/001.jpg"] == b"1"


@pytest.mark.parametrize("text", ["--5", "5-", "٣", "²", "1" * 16, "-"])
def test_what_is_plainly_no_number_of_a_class_stays_text(tmp_path, text):
    path = write_archive(tmp_path / "data.tar", {"1.jpg": b"1", "1.cls": text.encode()})
    scan = scanned(opened(path))
    assert scan.unreadable_folders == []
    assert json.loads(scan.images[0].metadata) == {"cls": text}


def test_half_a_letter_in_a_sidecar_becomes_a_mark(tmp_path):
    sidecar = rb'{"a\ud800": ["\udce9", "\ud83d\ude00", "\u00e9"]}'
    path = write_archive(tmp_path / "data.tar", {"1.jpg": b"1", "1.json": sidecar})
    [image] = scanned(opened(path)).images
    assert json.loads(image.metadata) == {"a\ufffd": ["é", "😀", "é"]}


def test_numbers_that_json_cannot_hold_are_left_out_of_a_sidecar(tmp_path):
    sidecar = b'{"a": 1e999, "b": [-1e999, 2, {"c": 1e999, "d": ""}], "e": -1.5, "f": true}'
    path = write_archive(tmp_path / "data.tar", {"1.jpg": b"1", "1.json": sidecar})
    [image] = scanned(opened(path)).images
    assert "Infinity" not in image.metadata
    assert json.loads(image.metadata) == {"a": None, "b": [None, 2, {"c": None, "d": ""}], "e": -1.5, "f": True}


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_flipped_byte_in_a_compressed_member_costs_only_that_member(tmp_path, method):
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.jpg", bytes(range(256)) * 20)
        archive.writestr("b.jpg", b"b" * 99)
    whole = path.read_bytes()
    n_bytes = zipfile.ZipFile(path).infolist()[0].compress_size
    for at in range(35 + 9, 35 + n_bytes, 7):  # after the version of the method, which nobody reads
        data = bytearray(whole)
        data[at] ^= 0xFF
        path.write_bytes(data)
        source = opened(path)
        read = contents(source, scanned(source).images)
        assert str(read["a.jpg"]).startswith("unreadable: "), at
        assert read["b.jpg"] == b"b" * 99


def test_archives_with_flipped_bytes_give_members_reasons_or_one_error(tmp_path, kind):
    whole = write_archive(tmp_path / f"some.{kind}", {f"{i}.jpg": os.urandom(300) for i in range(4)}).read_bytes()
    random = np.random.default_rng(0)
    n_errors = n_read = 0
    for _ in range(300):
        data = bytearray(whole)
        for at in random.integers(0, len(data), random.integers(1, 6)):
            data[at] = random.integers(0, 256)
        (tmp_path / f"some.{kind}").write_bytes(data)
        source = known_source("archive", str(tmp_path / f"some.{kind}"))
        try:
            n_read += sum(isinstance(each, bytes) for each in contents(source, scanned(source).images).values())
        except DinosearchError:
            n_errors += 1
    assert n_errors + n_read > 100


def test_damage_to_a_zstd_tar_is_one_error(tmp_path, monkeypatch):
    """Python 3.14's module, in what of it matters here, where there is none."""

    class ZstdError(Exception):
        pass

    def refuse(*_: object) -> None:
        raise ZstdError("Unable to decompress Zstandard data")

    zstd = SimpleNamespace(ZstdError=ZstdError, open=refuse)
    monkeypatch.setitem(sys.modules, "compression", SimpleNamespace(zstd=zstd))
    monkeypatch.setitem(sys.modules, "compression.zstd", zstd)
    (tmp_path / "photos.tar.zst").write_bytes(b"no zstd")
    source = known_source("archive", str(tmp_path / "photos.tar.zst"))
    with pytest.raises(DinosearchError, match="Unable to decompress"):
        source.scan(ScanOptions(), note=pytest.fail)


def test_many_zips_are_not_all_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("dinosearch.images.sources.zips.MOST_OPEN", 3)
    paths = [write_archive(tmp_path / f"{i}.zip", {"a.jpg": bytes([i]), "b.jpg": b"b"}) for i in range(9)]

    def n_open() -> int:
        return len({path.resolve() for path in Path("/proc/self/fd").iterdir()} & set(paths))

    sources = [opened(path) for path in paths]
    for source in sources:
        scanned(source)
        assert n_open() <= 3
    for _ in range(2):
        for i, source in enumerate(sources):
            assert source.read(scanned_image(source, "a.jpg")).data == bytes([i])
            assert n_open() <= 3
    with ThreadPoolExecutor(8) as threads:
        tasks = [threads.submit(source.read, scanned_image(source, "b.jpg")) for source in sources * 20]
        assert all(task.result().data == b"b" for task in tasks)


def scanned_image(source, member):
    return next(image for image in scanned(known_source("archive", source.location)).images if image.member == member)


def test_a_zip_replaced_while_it_was_closed_gives_no_bytes_of_another(tmp_path):
    path = write_archive(tmp_path / "a.zip", {"a.jpg": b"first"})
    source = opened(path)
    [image] = scanned(source).images
    source.close()
    write_archive(path, {"a.jpg": b"other"}, age=500)
    with pytest.raises(BadImage, match="changes while it is read"):
        source.read(image)
    path.write_bytes(path.read_bytes()[:40])  # half written
    with pytest.raises(BadImage, match="changes while it is read"):
        source.read(image)
