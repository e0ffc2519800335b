import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from indexing import (
    ProjectingEncoder,
    Workshop,
    a_model,
    last,
    never,
    read_in_this_process,
    set_age,
    write_image,
    write_images,
)
from PIL import Image

from dinosearch.errors import DinosearchError, IndexLocked, IndexNotFound, UsageError
from dinosearch.images import find, read, workers
from dinosearch.images.decode import BadImage, decode
from dinosearch.index import embed, limits
from dinosearch.index.catalog import Catalog
from dinosearch.index.contents import failures, index_info, read_vectors
from dinosearch.index.lock import writer_lock
from dinosearch.index.sync import sync_index
from dinosearch.query.search import open_index


@pytest.fixture
def shop(tmp_path):
    write_images(tmp_path / "images", 20)
    return Workshop(tmp_path / "images", tmp_path / "indexes" / "images", a_model(), None, [])


def counts(summary):
    names = ("new", "changed", "moved", "unchanged", "deleted", "failed", "embedded", "images")
    return {name: getattr(summary, name) for name in names if getattr(summary, name)}


def forbid_reading(monkeypatch):
    monkeypatch.setattr(read, "read_bytes", never)
    monkeypatch.setattr(workers.DecodePool, "read", never)
    monkeypatch.setattr(workers.DecodePool, "take", never)


def indexed(shop):
    files, vectors = read_vectors(shop.index)
    return {file.relative: vector for file, vector in zip(files, vectors, strict=True)}


def calm(shop, tmp_path, **options):
    """The same folder, indexed in one run by an index of its own."""
    other = Workshop(shop.root, tmp_path / "calm", shop.model, None, [])
    other.sync(**options)
    return indexed(other)


def assert_as_in_a_calm_run(shop, tmp_path):
    found, expected = indexed(shop), calm(shop, tmp_path)
    assert list(found) == list(expected)
    assert np.allclose(np.array([*found.values()]), np.array([*expected.values()]), atol=1e-3)  # float16, other batches


def test_a_first_run_embeds_every_image_as_the_encoder_alone_does(shop):
    summary = shop.sync()
    assert counts(summary) == {"new": 20, "embedded": 20, "images": 20}
    assert (summary.index, summary.model) == ("images", "m0")
    assert summary.images_per_second > 0
    found = indexed(shop)
    for name in ("0000.png", "0013.png"):
        pixels = decode((shop.root / name).read_bytes(), shop.encoder.fit).pixels
        expected = shop.encoder.encode(pixels[None])[0]
        assert np.linalg.norm(found[name]) == pytest.approx(1, abs=1e-6)
        assert found[name] @ expected > 0.99999


def test_an_unchanged_folder_opens_no_file_and_no_encoder(shop, monkeypatch):
    shop.sync()
    before = (shop.index / "vectors-1.faiss").stat()
    forbid_reading(monkeypatch)
    summary = last(sync_index([shop.root], index_path=shop.index, model=shop.model, encoder_for=never))
    assert counts(summary) == {"unchanged": 20, "images": 20}
    assert (shop.index / "vectors-1.faiss").stat() == before


def test_an_unchanged_folder_imports_neither_torch_nor_faiss(shop):
    shop.sync()
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from indexing import Workshop, a_model
Workshop(Path({str(shop.root)!r}), Path({str(shop.index)!r}), a_model(), None, []).sync()
print([name for name in ("torch", "timm", "faiss", "openvino", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_moved_and_renamed_files_are_not_embedded_again(shop, tmp_path):
    shop.sync()
    (shop.root / "deep" / "er").mkdir(parents=True)
    (shop.root / "0003.png").rename(shop.root / "renamed.png")
    (shop.root / "0004.png").rename(shop.root / "deep" / "er" / "0004.png")
    assert counts(shop.sync()) == {"moved": 2, "unchanged": 18, "images": 20}
    assert_as_in_a_calm_run(shop, tmp_path)


def test_a_wholly_moved_folder_is_moved_files_and_no_mass_deletion(shop, tmp_path):
    shop.sync()
    (shop.root / "sub").mkdir()
    for path in shop.root.glob("*.png"):
        path.rename(shop.root / "sub" / path.name)
    assert counts(shop.sync()) == {"moved": 20, "images": 20}
    assert_as_in_a_calm_run(shop, tmp_path)


def test_files_copied_elsewhere_and_deleted_are_moved_whatever_their_time(shop):
    shop.sync()
    shutil.copyfile(shop.root / "0000.png", shop.root / "later.png")
    (shop.root / "0000.png").unlink()
    assert counts(shop.sync()) == {"moved": 1, "unchanged": 19, "images": 20}


def test_of_one_gone_and_two_new_equal_files_one_is_moved_and_one_new(shop):
    shop.sync()
    shutil.copy2(shop.root / "0000.png", shop.root / "copy.png")
    (shop.root / "0000.png").rename(shop.root / "moved.png")
    assert counts(shop.sync()) == {"moved": 1, "new": 1, "unchanged": 19, "images": 21}


def test_two_files_that_swap_names_keep_their_vectors(shop, tmp_path):
    shop.sync()
    a, b = shop.root / "0000.png", shop.root / "0001.png"
    set_age(a, 500)
    shop.sync()
    a.rename(shop.root / "c.png")
    b.rename(a)
    (shop.root / "c.png").rename(b)
    assert counts(shop.sync()) == {"changed": 2, "unchanged": 18, "images": 20}
    assert_as_in_a_calm_run(shop, tmp_path)


def test_a_copy_is_new_and_costs_no_embedding(shop):
    shop.sync()
    shutil.copy2(shop.root / "0000.png", shop.root / "copy.png")
    assert counts(shop.sync()) == {"new": 1, "unchanged": 20, "images": 21}
    assert np.array_equal(indexed(shop)["copy.png"], indexed(shop)["0000.png"])


def test_copies_within_one_run_are_embedded_once(shop):
    for number in range(30):
        shutil.copy2(shop.root / f"{number % 3:04d}.png", shop.root / f"copy{number}.png")
    assert counts(shop.sync()) == {"new": 50, "embedded": 20, "images": 50}
    assert shop.encoder.n_seen == 20
    assert index_info(shop.index).vectors == 20


def test_copies_of_a_bad_file_within_one_run_fail_alike(shop):
    for number in range(10):
        (shop.root / f"bad{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    assert counts(shop.sync()) == {"new": 20, "embedded": 20, "failed": 10, "images": 20}
    assert len({(status, reason) for _, status, reason, _ in failures(shop.index)}) == 1


def test_copies_of_a_file_whose_decoder_is_killed_fail_alike_and_end_no_run(shop, monkeypatch):
    paths = [write_image(shop.root / f"heavy{number}.png", 500, size=(31, 17)) for number in range(5)]
    decode = workers.OpenFile.decode

    def dies(self):
        if self.size == paths[0].stat().st_size:
            time.sleep(0.2)  # the next copy is read meanwhile
            raise BadImage("unreadable", "its decoder was killed")
        return decode(self)

    monkeypatch.setattr(workers.OpenFile, "decode", dies)
    for _ in range(2):
        assert counts(shop.sync())["failed"] == 5
        found = [(status, reason) for _, status, reason, _ in failures(shop.index)]
        assert found == [("unreadable", "its decoder was killed")] * 5
    monkeypatch.undo()
    assert counts(shop.sync()).get("failed", 0) == 0


def test_a_changed_file_is_embedded_again(shop, tmp_path):
    shop.sync()
    write_image(shop.root / "0005.png", 99, size=(40, 30), age=10)
    assert counts(shop.sync()) == {"changed": 1, "unchanged": 19, "embedded": 1, "images": 20}
    assert_as_in_a_calm_run(shop, tmp_path)


def test_a_touched_file_is_unchanged_and_read_only_once(shop, monkeypatch):
    shop.sync()
    set_age(shop.root / "0005.png", 10)
    assert counts(shop.sync()) == {"unchanged": 20, "images": 20}
    forbid_reading(monkeypatch)
    assert counts(shop.sync()) == {"unchanged": 20, "images": 20}


def test_a_file_from_beyond_what_64_bits_of_nanoseconds_hold_is_indexed_like_others(shop, monkeypatch):
    path, year_2300 = shop.root / "0000.png", 10_413_792_000 * 10**9
    os.utime(path, ns=(year_2300, year_2300))
    if path.stat().st_mtime_ns != year_2300:
        pytest.skip("this file system knows no such year")
    assert counts(shop.sync()) == {"new": 20, "embedded": 20, "images": 20}
    forbid_reading(monkeypatch)
    assert counts(shop.sync()) == {"unchanged": 20, "images": 20}


def test_a_change_within_one_tick_of_the_clock_is_noticed(shop, tmp_path, monkeypatch):
    read_in_this_process(monkeypatch, read.read_bytes)
    monkeypatch.setattr(read, "_FINE_TICK_NS", 60 * 10**9)  # as if the clock of the file system stood still
    path = shop.root / "0000.png"
    one, other = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    one.save(path, format="BMP")
    shop.sync()
    written = path.stat()
    other.save(path, format="BMP")
    os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert path.stat().st_size == written.st_size
    assert counts(shop.sync()) == {"changed": 1, "unchanged": 19, "embedded": 1, "images": 20}
    assert_as_in_a_calm_run(shop, tmp_path)


def test_a_file_that_changes_while_it_is_read_is_stored_as_it_was_hashed(shop, monkeypatch, tmp_path):
    path = shop.root / "0007.png"
    read_bytes = read.read_bytes
    times = iter([200, 100])

    def read_and_change(name):
        data = read_bytes(name)
        if Path(name) == path and (age := next(times, None)):
            write_image(path, 1000 + age, size=(30, 30), age=age)
        return data

    read_in_this_process(monkeypatch, read_and_change)
    assert counts(shop.sync()) == {"new": 20, "embedded": 20, "images": 20}
    assert_as_in_a_calm_run(shop, tmp_path)
    forbid_reading(monkeypatch)
    assert counts(shop.sync()) == {"unchanged": 20, "images": 20}


def test_a_file_that_never_stops_changing_is_unreadable_and_tried_again(shop, monkeypatch):
    path, read_bytes = shop.root / "0007.png", read.read_bytes

    def read_and_change(name):
        data = read_bytes(name)
        if Path(name) == path:
            path.write_bytes(data + b"x")
        return data

    read_in_this_process(monkeypatch, read_and_change)
    assert counts(shop.sync()) == {"new": 19, "embedded": 19, "failed": 1, "images": 19}
    assert [status for _, status, *_ in failures(shop.index)] == ["unreadable"]
    monkeypatch.undo()
    assert counts(shop.sync()) == {"changed": 1, "unchanged": 19, "embedded": 1, "images": 20}


def test_deleted_files_leave_the_results_and_may_come_back_for_nothing(shop):
    shop.sync()
    (shop.root / "0000.png").rename(shop.root.parent / "aside.png")
    assert counts(shop.sync()) == {"deleted": 1, "unchanged": 19, "images": 19}
    assert "0000.png" not in indexed(shop)
    assert index_info(shop.index).vectors == 20
    (shop.root.parent / "aside.png").rename(shop.root / "0000.png")
    assert counts(shop.sync()) == {"new": 1, "unchanged": 19, "images": 20}


def test_pruned_vectors_are_gone_for_good(shop, tmp_path):
    shop.sync()
    (shop.root / "0019.png").rename(tmp_path / "aside.png")
    assert counts(shop.sync(prune=True)) == {"deleted": 1, "unchanged": 19, "images": 19}
    assert index_info(shop.index).vectors == 19
    (tmp_path / "aside.png").rename(shop.root / "0019.png")
    assert counts(shop.sync()) == {"new": 1, "unchanged": 19, "embedded": 1, "images": 20}
    assert_as_in_a_calm_run(shop, tmp_path)


def test_a_fifth_may_be_gone_but_not_more(shop):
    shop.sync()
    for number in range(4):
        (shop.root / f"{number:04d}.png").unlink()
    assert counts(shop.sync()) == {"deleted": 4, "unchanged": 16, "images": 16}
    for number in range(4, 8):
        (shop.root / f"{number:04d}.png").unlink()
    write_image(shop.root / "another.png", 77)
    with pytest.raises(DinosearchError, match=r"4 of 16 images are gone from .*--yes"):
        shop.sync()
    assert len(indexed(shop)) == 16
    assert counts(shop.sync(allow_deletions=True)) == {
        "new": 1, "deleted": 4, "unchanged": 12, "embedded": 1, "images": 13,
    }  # fmt: skip


def test_moves_are_matched_before_the_share_of_the_gone_is_judged(shop):
    shop.sync()
    for number in range(8):
        path = shop.root / f"{number:04d}.png"
        if number < 2:
            path.unlink()
        else:
            path.rename(shop.root / f"moved{number}.png")
    assert counts(shop.sync()) == {"moved": 6, "deleted": 2, "unchanged": 12, "images": 18}


def test_a_missing_root_is_an_error_and_deletes_nothing(shop, tmp_path):
    shop.sync()
    shop.root.rename(tmp_path / "unplugged")
    with pytest.raises(DinosearchError, match="no folder"):
        shop.sync(allow_deletions=True)
    assert len(indexed(shop)) == 20
    (tmp_path / "unplugged").rename(shop.root)
    assert counts(shop.sync()) == {"unchanged": 20, "images": 20}


def test_an_empty_root_is_an_error_and_deletes_nothing(shop, tmp_path):
    shop.sync()
    shop.root.rename(tmp_path / "unplugged")
    shop.root.mkdir()
    with pytest.raises(DinosearchError, match="no image found"):
        shop.sync(allow_deletions=True)
    assert len(indexed(shop)) == 20


def test_a_first_run_without_images_leaves_no_index_behind(tmp_path):
    (tmp_path / "images").mkdir()
    shop = Workshop(tmp_path / "images", tmp_path / "indexes" / "images", a_model(), None, [])
    with pytest.raises(DinosearchError, match="no image found"):
        shop.sync()
    assert not (tmp_path / "indexes").exists()


def test_files_below_a_folder_that_cannot_be_listed_are_not_gone(shop, monkeypatch):
    for number in range(10):
        write_image(shop.root / "sub" / "deep" / f"{number}.png", 200 + number)
    shop.sync()
    scandir = os.scandir

    def scandir_but_sub(path):
        if Path(os.fspath(path)).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(find.os, "scandir", scandir_but_sub)
    assert counts(shop.sync()) == {"unchanged": 20, "images": 30}
    assert "Permission denied" in shop.notes[-1]
    monkeypatch.undo()
    assert counts(shop.sync()) == {"unchanged": 30, "images": 30}


def test_another_model_waits_for_files_out_of_reach(shop, monkeypatch):
    write_image(shop.root / "sub" / "a.png", 200)
    shop.sync()
    scandir = os.scandir

    def scandir_but_sub(path):
        if Path(os.fspath(path)).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(find.os, "scandir", scandir_but_sub)
    shop.model = a_model(1)
    summary = shop.sync()
    assert (summary.model, summary.embedded, summary.images) == ("m0", 20, 21)
    assert "1 image is out of reach" in shop.notes[-1]
    monkeypatch.undo()
    summary = shop.sync()
    assert (summary.model, summary.embedded, summary.images) == ("m1", 1, 21)


NOBODY = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from indexing import Workshop, a_model, write_images
from dinosearch.index.contents import failures, index_info
from dinosearch.query.search import open_index, query_images
shop = Workshop(Path(sys.argv[2]), Path(sys.argv[3]), a_model(), None, [])
"""


def as_nobody(code, *paths):
    """Run code as somebody whom permissions bind, which they do not for root with its usual powers."""
    arguments = [sys.executable, "-c", NOBODY + code, str(Path(__file__).parent), *map(str, paths)]
    bound = drop_roots_powers if os.geteuid() == 0 else None
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, preexec_fn=bound)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def drop_roots_powers():
    """For this process and all that it starts: to read and write in spite of permissions (Linux, prctl(2))."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP


@pytest.fixture
def public():
    """A folder that everybody may write to, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    for path, _, _ in os.walk(folder):
        Path(path).chmod(0o777)
    shutil.rmtree(folder)


def test_unreadable_files_are_tried_again_and_folders_kept(public):
    root, index = public / "images", public / "indexes" / "images"
    write_images(root, 10)
    write_images(root / "sub", 10, seed=100)
    sync = "s = shop.sync(); print(json.dumps([s.new, s.unchanged, s.failed, s.deleted, s.embedded, s.images]))"
    (root / "0000.png").chmod(0)
    assert as_nobody(sync, root, index) == [19, 0, 1, 0, 19, 19]
    listing = "print(json.dumps([f[1:3] for f in failures(shop.index)]))"
    assert as_nobody(listing, root, index) == [["unreadable", "Permission denied"]]
    (root / "sub").chmod(0)
    assert as_nobody(sync, root, index) == [0, 9, 1, 0, 0, 19]
    (root / "sub").chmod(0o755)
    (root / "0000.png").chmod(0o644)
    assert as_nobody("s = shop.sync(); print(json.dumps([s.changed, s.unchanged, s.embedded]))", root, index) == [
        1,
        19,
        1,
    ]
    (root / "0001.png").chmod(0)
    set_age(root / "0001.png", 5)
    assert as_nobody(sync, root, index) == [0, 19, 1, 0, 0, 19]
    (root / "0001.png").chmod(0o644)
    assert as_nobody(sync, root, index) == [0, 20, 0, 0, 0, 20]


def test_a_read_only_index_is_searched_and_not_written(public):
    root, index = public / "images", public / "indexes" / "images"
    write_images(root, 10)
    Workshop(root, index, a_model(), None, []).sync()
    index.chmod(0o555)
    code = """
shop.progress()
with open_index(shop.index) as index:
    answers = list(query_images(index, shop.encoder, [shop.root / "0004.png"], top=3))
try:
    shop.sync()
except Exception as error:
    message = f"{type(error).__name__} {error}"
print(json.dumps([[m.path.name for m in answers[0].matches], answers[0].matches[0].score, message]))
"""
    names, score, message = as_nobody(code, root, index)
    assert (len(names), names[0], score) == (3, "0004.png", 1.0)
    assert message.startswith("DinosearchError cannot write to")
    assert sorted(p.name for p in index.iterdir()) == ["catalog.sqlite", "lock", "vectors-1.faiss"]


def test_bad_files_are_remembered_by_content_until_the_decoders_change(shop, monkeypatch):
    bad = shop.root / "bad.jpg"
    bad.write_bytes(b"no image at all")
    set_age(bad, 100)
    truncated = shop.root / "truncated.png"
    truncated.write_bytes((shop.root / "0000.png").read_bytes()[:-200])
    set_age(truncated, 100)
    assert counts(shop.sync()) == {"new": 20, "failed": 2, "embedded": 20, "images": 20}
    assert {Path(path).name: status for path, status, *_ in failures(shop.index)} == {
        "bad.jpg": "corrupt", "truncated.png": "truncated",
    }  # fmt: skip
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        assert counts(shop.sync()) == {"unchanged": 20, "failed": 2, "images": 20}
    with monkeypatch.context() as patch:
        patch.setattr(workers.OpenFile, "decode", never)
        bad.rename(shop.root / "moved.jpg")
        shutil.copyfile(truncated, shop.root / "copy.png")
        set_age(truncated, 50)
        assert counts(shop.sync()) == {"unchanged": 20, "failed": 3, "images": 20}
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(limits, "decoders", lambda: "newer")
        decode = workers.OpenFile.decode
        patch.setattr(workers.OpenFile, "decode", lambda file: seen.append(file.size) or decode(file))
        assert counts(shop.sync()) == {"unchanged": 20, "failed": 3, "images": 20}
        assert len(seen) == 2
        shop.sync()
        assert len(seen) == 2


def test_a_bad_file_that_was_mended_is_changed(shop):
    bad = shop.root / "bad.png"
    bad.write_bytes(b"no image")
    shop.sync()
    write_image(bad, 500)
    assert counts(shop.sync()) == {"changed": 1, "unchanged": 20, "embedded": 1, "images": 21}
    assert list(failures(shop.index)) == []


def test_a_good_file_that_was_spoilt_fails_and_leaves_the_results(shop):
    shop.sync()
    (shop.root / "0000.png").write_bytes(b"spoilt")
    assert counts(shop.sync()) == {"unchanged": 19, "failed": 1, "images": 19}
    assert "0000.png" not in indexed(shop)


def test_what_was_too_large_is_tried_again_with_a_larger_budget(shop, monkeypatch):
    write_image(shop.root / "large.png", 5, size=(100, 100))
    monkeypatch.setattr(limits, "pixel_budget", lambda _: 5000)
    assert counts(shop.sync()) == {"new": 20, "failed": 1, "embedded": 20, "images": 20}
    assert [status for _, status, *_ in failures(shop.index)] == ["too-large"]
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        assert counts(shop.sync()) == {"unchanged": 20, "failed": 1, "images": 20}
    monkeypatch.setattr(limits, "pixel_budget", lambda _: 50000)
    assert counts(shop.sync()) == {"unchanged": 20, "changed": 1, "embedded": 1, "images": 21}


def test_names_that_are_not_utf8_or_hold_newlines_are_kept(shop):
    names = [b"caf\xe9.png", b"new\nline.png", b"\x1b[31mred.png", "käse.png".encode()]
    for number, name in enumerate(names):
        write_image(shop.root / os.fsdecode(name), 300 + number)
    assert counts(shop.sync()) == {"new": 24, "embedded": 24, "images": 24}
    assert counts(shop.sync()) == {"unchanged": 24, "images": 24}
    assert {os.fsencode(name) for name in indexed(shop)} >= set(names)
    (shop.root / os.fsdecode(names[0])).rename(shop.root / os.fsdecode(b"\xff\xfe.png"))
    assert counts(shop.sync()) == {"moved": 1, "unchanged": 23, "images": 24}
    with open_index(shop.index) as index:
        _, vectors = read_vectors(shop.index)
        found = {os.fsencode(match.path.name) for match in index.search(vectors[:1], top=24)[0]}
    assert b"\xff\xfe.png" in found
    (shop.root / os.fsdecode(b"\xff\xfe.png")).unlink()
    assert counts(shop.sync()) == {"deleted": 1, "unchanged": 23, "images": 23}


def test_a_second_writer_is_told_who_holds_the_index(shop):
    shop.sync()
    with writer_lock(shop.index), pytest.raises(IndexLocked, match=f"written by process {os.getpid()} on .* since 20"):
        shop.sync()
    assert counts(shop.sync()) == {"unchanged": 20, "images": 20}


def test_readers_answer_while_a_writer_is_at_work(shop, monkeypatch):
    shop.sync()
    write_images(shop.root, 60)
    monkeypatch.setattr(embed, "SAVE_FILES", 8)
    monkeypatch.setattr("dinosearch.index.sync._PROGRESS_SECONDS", 0)
    sizes = []
    with open_index(shop.index) as index:
        _, vectors = read_vectors(shop.index)
        for _ in shop.progress():
            sizes.append(len(index.search(vectors[:1], top=100)[0]))
    assert sizes == sorted(sizes)
    assert sizes[0] == 20
    assert len(set(sizes)) > 3
    assert sizes[-1] == 60


def test_an_interrupted_run_keeps_what_was_embedded_and_resumes(shop, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        shop.sync(stop_after=8)
    kept = len(indexed(shop))
    assert kept == 8
    summary = shop.sync()
    assert counts(summary) == {"new": 12, "unchanged": 8, "embedded": 12, "images": 20}
    assert_as_in_a_calm_run(shop, tmp_path)


def test_a_consumer_that_stops_early_keeps_what_was_embedded(shop, monkeypatch):
    monkeypatch.setattr("dinosearch.index.sync._PROGRESS_SECONDS", 0)
    progress = shop.progress()
    for step in progress:
        if step.done:
            break
    progress.close()
    assert len(indexed(shop)) == step.done
    assert counts(shop.sync())["images"] == 20


def test_another_model_answers_only_when_all_is_embedded(shop, tmp_path):
    shop.sync()
    before = indexed(shop)
    shop.model = a_model(1)
    with pytest.raises(KeyboardInterrupt):
        shop.sync(stop_after=8)
    assert index_info(shop.index).fingerprint == a_model(0).fingerprint
    assert all(np.array_equal(vector, before[name]) for name, vector in indexed(shop).items())
    with open_index(shop.index) as index:
        assert index.search(np.array([before["0003.png"]]), top=1)[0][0].path.name == "0003.png"
    summary = shop.sync()
    assert counts(summary) == {"unchanged": 20, "embedded": 12, "images": 20}
    info = index_info(shop.index)
    assert (info.fingerprint, info.model, info.vectors) == (a_model(1).fingerprint, "m1", 20)
    assert_as_in_a_calm_run(shop, tmp_path)


def test_what_another_model_cannot_read_is_found_until_that_one_answers(shop, monkeypatch):
    wide = write_image(shop.root / "0000-wide.png", 500, size=(31, 17))
    shop.sync()
    n_bytes, decode = wide.stat().st_size, workers.OpenFile.decode

    def refuse(file):
        if file.size == n_bytes:
            raise BadImage("unsupported", "another number of channels")
        return decode(file)

    monkeypatch.setattr(workers.OpenFile, "decode", refuse)
    shop.model = a_model(1)
    with pytest.raises(KeyboardInterrupt):
        shop.sync(stop_after=8)
    assert index_info(shop.index).model == "m0"
    assert len(indexed(shop)) == 21
    assert list(failures(shop.index)) == []
    assert counts(shop.sync()) == {"unchanged": 20, "failed": 1, "embedded": 12, "images": 20}
    assert [(Path(row.path), row.reason) for row in failures(shop.index)] == [(wide, "another number of channels")]


def test_a_model_that_can_read_none_of_the_images_does_not_take_over(shop, monkeypatch):
    shop.sync()
    before = indexed(shop)
    shop.model = replace(a_model(1), mean=(0.5,) * 5)
    with pytest.raises(DinosearchError, match=r"m1 \(3 channels, and the model takes 5\); m0 still answers"):
        shop.sync()

    def denied(*_):
        raise BadImage("unreadable", "Input/output error")

    shop.model = a_model(1)
    with monkeypatch.context() as patch:
        patch.setattr(workers.DecodePool, "read", denied)
        with pytest.raises(DinosearchError, match=r"m1 \(Input/output error\); m0 still answers"):
            shop.sync()
    assert index_info(shop.index).model == "m0"
    assert list(failures(shop.index)) == []
    assert indexed(shop).keys() == before.keys()
    assert all(np.array_equal(vector, before[name]) for name, vector in indexed(shop).items())
    shop.model = a_model(0)
    assert counts(shop.sync()) == {"unchanged": 20, "images": 20}


def test_going_back_to_the_earlier_model_embeds_only_what_is_new(shop, tmp_path):
    shop.sync()
    shop.model = a_model(1)
    shop.sync()
    write_image(shop.root / "another.png", 400)
    assert counts(shop.sync()) == {"new": 1, "unchanged": 20, "embedded": 1, "images": 21}
    shop.model = a_model(0)
    assert counts(shop.sync()) == {"unchanged": 21, "embedded": 1, "images": 21}
    assert_as_in_a_calm_run(shop, tmp_path)


def test_moves_under_another_model_are_moved_and_embedded(shop, tmp_path):
    shop.sync()
    (shop.root / "0000.png").rename(shop.root / "moved.png")
    shop.model = a_model(1)
    assert counts(shop.sync()) == {"moved": 1, "unchanged": 19, "embedded": 20, "images": 20}
    assert_as_in_a_calm_run(shop, tmp_path)


def test_a_content_that_changed_behind_its_size_and_time_is_found_by_another_model(shop):
    path = shop.root / "0000.bmp"
    Image.new("RGB", (8, 8), "red").save(path)
    set_age(path, 100)
    shop.sync()
    stat = path.stat()
    Image.new("RGB", (8, 8), "blue").save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    shop.model = a_model(1)
    assert counts(shop.sync()) == {"changed": 1, "unchanged": 20, "embedded": 21, "images": 21}


def test_an_index_follows_several_roots(shop, tmp_path):
    other = tmp_path / "other"
    write_images(other, 5, seed=50)
    shop.sync()
    assert counts(shop.sync(roots=[shop.root, other])) == {"new": 5, "unchanged": 20, "embedded": 5, "images": 25}
    (shop.root / "0000.png").rename(other / "from-the-other.png")
    assert counts(shop.sync(roots=[shop.root, other])) == {"moved": 1, "unchanged": 24, "images": 25}
    assert counts(shop.sync(roots=[other])) == {"unchanged": 6, "images": 25}
    shop.model = a_model(1)
    assert counts(shop.sync(roots=[other])) == {"unchanged": 25, "embedded": 25, "images": 25}


def test_a_root_that_moved_as_a_whole_is_moved_files_and_followed_no_more(shop, tmp_path):
    shop.sync()
    old, shop.root = shop.root, shop.root.rename(tmp_path / "elsewhere")
    assert counts(shop.sync()) == {"moved": 20, "images": 20}
    assert index_info(shop.index).roots == [str(shop.root)]
    assert shop.notes == [f"{old} is not there, and all of its images are elsewhere: it is followed no more"]
    assert_as_in_a_calm_run(shop, tmp_path)


def test_of_a_root_that_is_not_there_only_what_turned_up_is_moved(shop, tmp_path):
    shop.sync()
    old, shop.root = shop.root, tmp_path / "elsewhere"
    shutil.copytree(old, shop.root)
    assert counts(shop.sync()) == {"new": 20, "images": 40}, "copies, as long as the first root is there"
    third = tmp_path / "third"
    write_images(third, 1, seed=300)
    shutil.copy2(shop.root / "0007.png", third)
    shop.root.rename(tmp_path / "unplugged")
    assert counts(shop.sync(roots=[third])) == {"new": 1, "moved": 1, "embedded": 1, "images": 41}
    assert shop.notes == [f"{shop.root} is not there: 19 images stay in the index until dinosearch forget {shop.root}"]
    (tmp_path / "unplugged").rename(shop.root)
    assert counts(shop.sync(roots=[shop.root])) == {"new": 1, "unchanged": 19, "images": 42}


def test_a_root_inside_another_is_refused(shop):
    write_image(shop.root / "sub" / "a.png", 60)
    shop.sync()
    with pytest.raises(UsageError, match="lies inside"):
        shop.sync(roots=[shop.root / "sub"])
    assert index_info(shop.index).roots == [str(shop.root)]


def test_one_of_several_roots_that_is_unplugged_is_not_hidden_by_the_others(shop, tmp_path):
    other = tmp_path / "other"
    write_images(other, 2, seed=50)
    shop.sync(roots=[shop.root, other])
    (other / "0000.png").unlink()
    with pytest.raises(DinosearchError, match="1 of 2 images are gone from"):
        shop.sync(roots=[shop.root, other])


def test_a_model_that_gives_no_numbers_is_refused(shop, monkeypatch):
    shop.progress()
    monkeypatch.setattr(type(shop.encoder), "encode", lambda self, pixels: np.full((len(pixels), self.dim), np.nan))
    with pytest.raises(DinosearchError, match="no numbers"):
        shop.sync()


def test_a_disk_too_small_is_said_before_the_work(shop, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(DinosearchError, match="are free"):
        last(sync_index([shop.root], index_path=shop.index, model=shop.model, encoder_for=never))


def test_an_index_killed_before_its_catalog_was_made_is_made_then(shop):
    shop.index.mkdir(parents=True)
    (shop.index / "catalog.sqlite").touch()
    with pytest.raises(IndexNotFound):
        Catalog.open(shop.index)
    assert counts(shop.sync()) == {"new": 20, "embedded": 20, "images": 20}


def test_the_real_encoder_gives_the_vectors_of_its_own_encode(jpeg_folder, tiny_model, tmp_path):
    from dinosearch.encoder import open_encoder

    encoder = open_encoder(tiny_model, device="cpu")
    summary = last(
        sync_index([jpeg_folder], index_path=tmp_path / "index", model=tiny_model, encoder_for=lambda _: encoder)
    )
    assert counts(summary) == {"new": 24, "embedded": 24, "images": 24}
    files, vectors = read_vectors(tmp_path / "index")
    pixels = np.stack([decode(file.path.read_bytes(), encoder.fit).pixels for file in files])
    assert ((vectors * encoder.encode(pixels)).sum(axis=1) > 0.9999).all()


def test_the_precision_is_remembered_handed_to_the_encoder_and_said(shop):
    plans = []

    def sync(**options):
        shop.notes.clear()
        encoder = ProjectingEncoder(shop.model)
        return last(
            sync_index(
                [shop.root], index_path=shop.index, model=shop.model, note=shop.notes.append,
                encoder_for=lambda plan: plans.append(plan) or encoder, **options,
            )
        )  # fmt: skip

    for number, (asked, precision, said) in enumerate(
        [
            (None, "auto", []),
            ("int8", "int8", []),
            (None, "int8", ["images: precision int8, as before"]),
            ("auto", "auto", []),
            (None, "auto", []),
        ]
    ):
        write_image(shop.root / f"new-{number}.png", 1000 + number)
        summary = sync(precision=asked)
        assert summary.embedded == (21 if number == 0 else 1)  # another precision makes nothing anew
        assert (plans[-1].precision, plans[-1].images) == (precision, summary.embedded)
        assert shop.notes == said
        with open_index(shop.index) as opened:
            assert opened.precision == precision
    with pytest.raises(UsageError, match="no precision 'int4'"):
        sync(precision="int4")
