import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from indexing import Workshop, a_model, never, read_in_this_process, set_age, write_image, write_images
from PIL import Image

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.images import read
from dinosearch.images.decode import BadImage
from dinosearch.images.sources import open_sources
from dinosearch.images.sources.tars import TarSource
from dinosearch.images.sources.zips import ZipSource
from dinosearch.index.catalog import Catalog
from dinosearch.index.contents import failures, index_info, read_vectors
from dinosearch.index.survey import GivenOptions
from dinosearch.query.search import open_index


@pytest.fixture
def shop(tmp_path):
    write_images(tmp_path / "images", 20)
    return Workshop(tmp_path / "images", tmp_path / "indexes" / "images", a_model(), None, [])


def counts(summary):
    names = ("new", "changed", "moved", "unchanged", "deleted", "failed", "embedded", "images")
    return {name: getattr(summary, name) for name in names if getattr(summary, name)}


def pack(path, files, *, when=1e9):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, source in files.items():
                archive.write(source, name)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for name, source in files.items():
                archive.add(source, name)
    os.utime(path, (when, when))
    return open_sources([str(path)])


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar", "photos.tar.gz"])
def test_an_archive_is_indexed_like_the_folder_it_holds(shop, tmp_path, name):
    shop.sync()
    files = {f"in/{path.name}": path for path in sorted(shop.root.iterdir())}
    archive = Workshop(shop.root, tmp_path / "archive", shop.model, None, [])
    assert counts(archive.sync(roots=pack(tmp_path / name, files))) == {"new": 20, "embedded": 20, "images": 20}
    of_files, vectors = read_vectors(shop.index)
    members, of_members = read_vectors(archive.index)
    assert [member.member for member in members] == [f"in/{file.relative}" for file in of_files]
    assert (vectors == of_members).all()
    with open_index(archive.index) as index:
        assert index.search(vectors[:1], top=1)[0][0].path == tmp_path / name / "in" / "0000.png"


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar.gz"])
def test_an_archive_that_is_as_it_was_is_not_looked_into(shop, tmp_path, name, monkeypatch):
    files = {path.name: path for path in sorted(shop.root.iterdir())}
    sources = pack(tmp_path / name, files)
    shop.sync(roots=sources)
    with monkeypatch.context() as patch:
        for kind in (ZipSource, TarSource):
            patch.setattr(kind, "scan", never)
            patch.setattr(kind, "read", never)
            patch.setattr(kind, "stream", never)
        assert counts(shop.sync(roots=sources)) == {"unchanged": 20, "images": 20}
    shop.model = a_model(1)
    assert counts(shop.sync(roots=sources)) == {"unchanged": 20, "embedded": 20, "images": 20}
    files.pop("0003.png")
    files["again.png"] = files.pop("0004.png")
    pack(tmp_path / name, files, when=1e9 + 2)
    assert counts(shop.sync(roots=sources)) == {"moved": 1, "deleted": 1, "unchanged": 18, "images": 19}


def test_a_cut_short_run_looks_into_an_archive_again(shop, tmp_path):
    sources = pack(tmp_path / "photos.zip", {path.name: path for path in sorted(shop.root.iterdir())})
    with pytest.raises(KeyboardInterrupt):
        shop.sync(roots=sources, stop_after=8)
    assert counts(shop.sync(roots=sources)) == {"new": 12, "unchanged": 8, "embedded": 12, "images": 20}


def test_images_move_between_folders_and_archives_without_being_embedded(shop, tmp_path):
    first = tmp_path / "other"
    write_image(first / "keep.png", 70)
    sources = open_sources([str(shop.root), str(first)])
    shop.sync(roots=sources)
    packed = [shop.root / "0000.png", shop.root / "0001.png"]
    sources += pack(tmp_path / "photos.zip", {path.name: path for path in packed})
    for path in packed:
        path.unlink()
    assert counts(shop.sync(roots=sources)) == {"moved": 2, "unchanged": 19, "images": 21}


def test_a_missing_archive_is_an_error_and_deletes_nothing(shop, tmp_path):
    sources = pack(tmp_path / "photos.zip", {"a.png": shop.root / "0000.png"})
    shop.sync(roots=sources)
    (tmp_path / "photos.zip").unlink()
    with pytest.raises(DinosearchError, match="stays as it is"):
        shop.sync(roots=sources, allow_deletions=True)
    assert index_info(shop.index).images == 1


def test_a_member_that_claims_more_bytes_than_any_file_has_fails_alone(shop, tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("0000.png", "0001.png"):
            archive.write(shop.root / name, name)
        archive.infolist()[0].file_size = 2**64 - 1  # the directory is written last
    os.utime(path, (1e9, 1e9))
    for expected in ({"new": 1, "failed": 1, "embedded": 1, "images": 1}, {"unchanged": 1, "failed": 1, "images": 1}):
        assert counts(shop.sync(roots=open_sources([str(path)]))) == expected
    assert [row.status for row in failures(shop.index)] == ["too-large"]


def test_files_named_one_by_one_stay_until_they_are_gone(shop):
    names = [str(shop.root / f"{number:04d}.png") for number in range(8)]
    assert counts(shop.sync(roots=open_sources(names[:4]))) == {"new": 4, "embedded": 4, "images": 4}
    assert counts(shop.sync(roots=open_sources(names[4:]))) == {"new": 4, "unchanged": 4, "embedded": 4, "images": 8}
    Path(names[0]).unlink()
    assert counts(shop.sync(roots=open_sources(names[5:6]))) == {"unchanged": 7, "deleted": 1, "images": 7}
    with pytest.raises(DinosearchError, match="is indexed as files and cannot be folder"):
        shop.sync()


def test_options_are_remembered_said_and_replaced(shop):
    write_image(shop.root / ".hidden.png", 70)
    assert shop.sync(options=GivenOptions(exclude=("000*",), include_hidden=True)).images == 11
    assert counts(shop.sync()) == {"unchanged": 11, "images": 11}
    assert shop.notes[-1] == f"{shop.root}: without 000*, with hidden names, as before"
    [source] = index_info(shop.index).sources
    assert (source.kind, source.exclude, source.include_hidden, source.all_pages) == ("folder", ("000*",), True, False)
    shop.sync(options=GivenOptions(exclude=("0001*",)))
    assert shop.notes[-1] == f"{shop.root}: with hidden names, as before"
    assert index_info(shop.index).images == 20
    n_notes = len(shop.notes)
    assert shop.sync(options=GivenOptions(exclude=(), include_hidden=False)).images == 20
    assert counts(shop.sync()) == {"unchanged": 20, "images": 20}
    assert len(shop.notes) == n_notes


def test_what_is_excluded_on_purpose_is_no_mass_deletion_but_what_is_gone_is(shop):
    shop.sync()
    for number in range(10, 16):
        (shop.root / f"{number:04d}.png").unlink()
    with pytest.raises(DinosearchError, match="6 of 20 images are gone"):
        shop.sync(options=GivenOptions(exclude=("000*",)))
    assert index_info(shop.index).sources[0].exclude == ()
    summary = shop.sync(options=GivenOptions(exclude=("000*",)), allow_deletions=True)
    assert counts(summary) == {"unchanged": 4, "deleted": 16, "images": 4}


def test_a_table_may_say_something_else_of_files_that_are_as_they_were(shop, tmp_path):
    table = tmp_path / "photos.csv"
    table.write_text("path,year\n" + "".join(f"images/{n:04d}.png,19{n:02d}\n" for n in range(20)))
    sources = open_sources([str(table)])
    assert counts(shop.sync(roots=sources)) == {"new": 20, "embedded": 20, "images": 20}
    assert index_info(shop.index).metadata == ["year"]
    table.write_text("path,decade\n" + "".join(f"images/{n:04d}.png,{n // 10}\n" for n in range(20)))
    assert counts(shop.sync(roots=sources)) == {"unchanged": 20, "images": 20}
    assert index_info(shop.index).metadata == ["decade"]


def test_a_listed_file_that_is_missing_is_unreadable_and_one_not_listed_any_more_is_gone(shop, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"images/{n:04d}.png\n" for n in range(20)))
    sources = open_sources([str(listing)])
    shop.sync(roots=sources)
    (shop.root / "0000.png").unlink()
    listing.write_text("".join(f"images/{n:04d}.png\n" for n in range(19)))
    assert counts(shop.sync(roots=sources)) == {"unchanged": 18, "failed": 1, "deleted": 1, "images": 18}
    assert [(status, reason) for _, status, reason, _ in failures(shop.index)] == [
        ("unreadable", "No such file or directory")
    ]


def test_named_files_that_are_not_there_any_more_are_asked_about(shop, tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(shop.root.iterdir())))
    sources = open_sources([str(tmp_path / "list.txt")])
    shop.sync(roots=sources)
    for number in range(4):
        (shop.root / f"{number:04d}.png").unlink()
    assert counts(shop.sync(roots=sources)) == {"unchanged": 16, "failed": 4, "images": 16}
    for number in range(4, 10):
        (shop.root / f"{number:04d}.png").unlink()
    with pytest.raises(DinosearchError, match=r"6 of 20 images are gone from .*list\.txt"):
        shop.sync(roots=sources)
    assert index_info(shop.index).images == 16
    assert counts(shop.sync(roots=sources, allow_deletions=True)) == {"unchanged": 10, "failed": 10, "images": 10}


def test_one_place_as_two_kinds_is_refused(shop):
    with pytest.raises(UsageError, match="is given as a folder and as files"):
        shop.sync(roots=open_sources([str(shop.root), str(shop.root / "0000.png")]))


def test_another_model_finds_all_sources_again(shop, tmp_path):
    sources = open_sources([str(shop.root)])
    sources += pack(tmp_path / "photos.zip", {"a.png": write_image(tmp_path / "a.png", 90)})
    shop.sync(roots=sources)
    shop.model = a_model(1)
    assert counts(shop.sync()) == {"unchanged": 21, "embedded": 21, "images": 21}


def test_another_model_leaves_the_options_of_sources_that_were_not_asked_for(shop, tmp_path):
    scans = tmp_path / "scans"
    write_images(scans, 5, seed=50)
    write_image(scans / "drafts" / "a.png", 60)
    write_image(shop.root / "drafts" / "a.png", 61)
    shop.sync(roots=[shop.root, scans], options=GivenOptions(exclude=("old/",)))
    shop.model = a_model(1)
    summary = shop.sync(options=GivenOptions(exclude=("drafts/",), all_pages=True))
    assert counts(summary) == {"deleted": 1, "unchanged": 26, "embedded": 26, "images": 26}
    seen = [(source.exclude, source.all_pages) for source in index_info(shop.index).sources]
    assert seen == [(("drafts/",), True), (("old/",), False)]
    assert shop.notes[-1] == f"{scans}: without old/, as before"


def test_deletions_are_accepted_of_sources_that_were_asked_for_alone(shop, tmp_path):
    other = tmp_path / "other"
    paths = write_images(other, 4, seed=50)
    shop.sync(roots=[shop.root, other])
    for path in paths[:2]:
        path.unlink()
    shop.model = a_model(1)
    with pytest.raises(DinosearchError, match=r"2 of 4 images are gone from .*/other; .*index it again with --yes"):
        shop.sync(allow_deletions=True)
    assert index_info(shop.index).images == 24
    summary = shop.sync(roots=[other], allow_deletions=True)
    assert counts(summary) == {"deleted": 2, "unchanged": 22, "embedded": 22, "images": 22}


def test_verify_finds_a_content_that_changed_behind_its_size_and_time(shop):
    path = shop.root / "0000.bmp"
    Image.new("RGB", (8, 8), "red").save(path)
    set_age(path, 100)
    shop.sync()
    stat = path.stat()
    Image.new("RGB", (8, 8), "blue").save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert counts(shop.sync()) == {"unchanged": 21, "images": 21}
    assert counts(shop.sync(verify=True)) == {"unchanged": 20, "changed": 1, "embedded": 1, "images": 21}
    assert shop.notes[-1].startswith("1 files hold something else than before under the same size and time")
    assert counts(shop.sync(verify=True)) == {"unchanged": 21, "images": 21}


def test_verify_reports_what_a_damaged_disk_cannot_give_any_more(shop, monkeypatch):
    (shop.root / "bad.png").write_bytes(b"no image")
    shop.sync()
    read_bytes = read.read_bytes

    def read_but_one(path):
        if str(path).endswith("0007.png"):
            raise BadImage("unreadable", "Input/output error")
        return read_bytes(path)

    read_in_this_process(monkeypatch, read_but_one)
    assert counts(shop.sync()) == {"unchanged": 20, "failed": 1, "images": 20}
    assert counts(shop.sync(verify=True)) == {"unchanged": 19, "failed": 2, "images": 19}
    assert ("unreadable", "Input/output error") in [row[1:3] for row in failures(shop.index)]
    monkeypatch.undo()
    assert counts(shop.sync()) == {"unchanged": 20, "failed": 1, "images": 20}


def test_verify_looks_into_archives_too(shop, tmp_path):
    sources = pack(tmp_path / "photos.zip", {"a.png": shop.root / "0000.png"})
    shop.sync(roots=sources)
    data = (tmp_path / "photos.zip").read_bytes()
    stat = (tmp_path / "photos.zip").stat()
    at = data.index(b"IDAT") + 20
    (tmp_path / "photos.zip").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    os.utime(tmp_path / "photos.zip", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert counts(shop.sync(roots=sources)) == {"unchanged": 1, "images": 1}
    assert counts(shop.sync(roots=sources, verify=True)) == {"failed": 1}


def test_a_member_that_was_copied_badly_is_read_again_from_a_better_copy(shop, tmp_path):
    path = tmp_path / "photos.zip"
    sources = pack(path, {name: shop.root / name for name in ("0000.png", "0001.png", "0002.png")})
    whole = path.read_bytes()
    at = whole.index(b"IDAT") + 20

    def copied(data, when):
        path.write_bytes(data)
        os.utime(path, (when, when))
        return counts(shop.sync(roots=sources))

    bad = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    assert copied(bad, 2e9) == {"new": 2, "failed": 1, "embedded": 2, "images": 2}
    assert [row.status for row in failures(shop.index)] == ["unreadable"]
    assert copied(whole, 1e9) == {"changed": 1, "unchanged": 2, "embedded": 1, "images": 3}


def test_a_tar_that_was_copied_in_part_is_read_again_whatever_its_time(shop, tmp_path):
    path = tmp_path / "photos.tar"
    sources = pack(path, {"0000.png": shop.root / "0000.png"})
    whole = path.read_bytes()
    for data, expected in [
        (whole[: whole.index(b"\x89PNG") + 300], {"failed": 1}),
        (whole, {"changed": 1, "embedded": 1, "images": 1}),
    ]:
        path.write_bytes(data)
        os.utime(path, (1e9, 1e9))
        assert counts(shop.sync(roots=sources)) == expected


def test_another_number_of_frames_is_not_left_behind(shop):
    shop.sync()
    with Catalog.open(shop.index, writable=True) as catalog:
        [stored, *_] = catalog.stored_files(1, fingerprint=shop.model.fingerprint)
        catalog._write(
            """INSERT INTO files (root, path, frame, size, mtime_ns, content_hash, status)
            SELECT root, path, 1, size, mtime_ns, content_hash, 'corrupt' FROM files WHERE id = ?""",
            [(stored.id,)],
        )
        catalog._write("UPDATE files SET frames = 2 WHERE id = ?", [(stored.id,)])
        catalog.commit()
        assert (catalog.n_failed(), catalog.n_images()) == (0, 20)  # of files; a page is none
    assert [failure.frame for failure in failures(shop.index)] == [1]
    (shop.root / stored.path).rename(shop.root / "moved.png")
    assert counts(shop.sync()) == {"moved": 1, "unchanged": 19, "images": 20}
    assert list(failures(shop.index)) == []  # only first pages count here
    set_age(shop.root / "moved.png", 5)
    shop.sync()
    assert list(failures(shop.index)) == []


@pytest.mark.parametrize("name", ["photos.tar", "photos.tar.gz"])
def test_an_archive_cut_short_loses_nothing_of_what_is_indexed(shop, tmp_path, name):
    files = {path.name: path for path in sorted(shop.root.iterdir())}
    archive = Workshop(shop.root, tmp_path / "archive", shop.model, None, [])
    sources = pack(tmp_path / name, files)
    archive.sync(roots=sources)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 3 // 4])
    cut = archive.sync(roots=open_sources([str(tmp_path / name)]))
    assert cut.deleted == 0
    assert cut.images >= 19  # a member that ends too early is bad, those behind it are out of reach
    (tmp_path / name).write_bytes(whole)
    again = archive.sync(roots=open_sources([str(tmp_path / name)]))
    assert (again.deleted, again.embedded, again.images) == (0, 0, 20)


def test_what_has_no_time_to_trust_is_read_each_time(shop, monkeypatch):
    """As on a server that tells neither date nor tag: a change of equal size must not be missed."""
    import dinosearch.images.sources.folder as folder
    from dinosearch.images.source import UNTRUSTED_TIME, FoundImage, Scan

    scan = folder.FolderSource.scan

    def without_times(self, options, *, note):
        found = scan(self, options, note=note)
        return Scan([FoundImage(image.path, image.size, UNTRUSTED_TIME) for image in found.images])

    monkeypatch.setattr(folder.FolderSource, "scan", without_times)
    shop.sync()
    assert counts(shop.sync()) == {"unchanged": 20, "images": 20}
    with Catalog.open(shop.index, writable=True) as catalog:
        catalog._write("UPDATE files SET mtime_ns = ?", [(UNTRUSTED_TIME,)])
        catalog.commit()
    one = shop.root / "0003.png"
    image = Image.open(one)
    image.putpixel((0, 0), (1, 2, 3))
    size = one.stat().st_size
    for compression in range(10):
        image.save(one, compress_level=compression)
        if one.stat().st_size <= size:
            break
    one.write_bytes(one.read_bytes().ljust(size, b"\0"))
    assert counts(shop.sync()) == {"changed": 1, "unchanged": 19, "embedded": 1, "images": 20}


def test_a_wanted_recall_is_remembered_and_met(shop, monkeypatch):
    from dinosearch.index import generation

    write = generation.write_generation
    monkeypatch.setattr(generation, "write_generation", lambda *a, **k: write(*a, exact_below=100, **k))
    write_images(shop.root / "more", 380, seed=100)
    shop.sync(recall=0.8)
    first = index_info(shop.index).faiss
    assert first.recall_target == 0.8
    assert first.recall_at_10 >= 0.8
    shop.sync()
    assert index_info(shop.index).faiss == first
    shop.sync(recall=1)
    assert index_info(shop.index).faiss.exact
    shop.sync()
    assert index_info(shop.index).faiss.recall_target == 1


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar.gz"])
def test_what_is_excluded_from_an_archive_is_not_taken_for_a_missing_disk(shop, tmp_path, name):
    files = {f"{'drafts' if i % 2 else 'good'}/{i}.png": path for i, path in enumerate(sorted(shop.root.iterdir()))}
    archive = Workshop(shop.root, tmp_path / "archive", shop.model, None, [])
    sources = pack(tmp_path / name, files)
    archive.sync(roots=sources)
    summary = archive.sync(roots=sources, options=GivenOptions(exclude=("drafts/",)))
    assert counts(summary) == {"deleted": 10, "unchanged": 10, "images": 10}
    again = archive.sync(roots=open_sources([str(tmp_path / name)]), options=GivenOptions(exclude=()))
    assert counts(again) == {"new": 10, "unchanged": 10, "images": 20}  # their vectors were still known
