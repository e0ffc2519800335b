"""The pipeline: frames, copies of what is under way, bounds and speed."""

import os
import signal
import tarfile
import threading
import time

import pytest
from conftest import encoded
from indexing import ProjectingEncoder, Workshop, a_model, last, set_age, write_image, write_images
from PIL import Image

from dinosearch.images import workers
from dinosearch.images.decode import BadImage
from dinosearch.images.sources import open_sources
from dinosearch.index import embed, limits
from dinosearch.index.contents import failures, index_info, read_vectors
from dinosearch.index.survey import GivenOptions
from dinosearch.index.sync import sync_index

ALL_PAGES = GivenOptions(all_pages=True)


@pytest.fixture
def shop(tmp_path):
    (tmp_path / "images").mkdir()
    return Workshop(tmp_path / "images", tmp_path / "indexes" / "images", a_model(), None, [])


def pages(n: int, seed: int = 0) -> list[Image.Image]:
    return [Image.effect_noise((40, 30), 50 + 10 * (seed + k)).convert("RGB") for k in range(n)]


def write_pages(path, n: int, *, seed: int = 0) -> None:
    first, *others = pages(n, seed)
    first.save(path, save_all=True, append_images=others)


def test_each_page_has_a_vector_and_is_embedded_once(shop):
    write_pages(shop.root / "a.tif", 30)
    write_image(shop.root / "b.png", 1)
    summary = shop.sync(options=ALL_PAGES)
    assert (summary.new, summary.embedded, summary.failed) == (2, 31, 0)
    files, vectors = read_vectors(shop.index)
    assert len(files) == len(vectors) == 31
    assert (vectors @ vectors.T > 0.99999).sum() == 31  # no two alike
    summary = shop.sync(options=ALL_PAGES)
    assert (summary.unchanged, summary.embedded) == (2, 0)


def test_copies_of_pages_cost_nothing_be_they_new_or_under_way(shop):
    write_pages(shop.root / "a.tif", 5)
    for name in ("b.tif", "c.tif", "d.tif"):
        (shop.root / name).write_bytes((shop.root / "a.tif").read_bytes())
    assert shop.sync(options=ALL_PAGES).embedded == 5
    (shop.root / "e.tif").write_bytes((shop.root / "a.tif").read_bytes())
    summary = shop.sync(options=ALL_PAGES)
    assert (summary.new, summary.embedded) == (1, 0)
    assert len(read_vectors(shop.index)[0]) == 25


def test_pages_are_added_when_they_are_asked_for_later(shop):
    write_pages(shop.root / "a.tif", 5)
    assert shop.sync().embedded == 1
    shop.sync(options=ALL_PAGES)
    assert len(read_vectors(shop.index)[0]) == 5


def test_a_file_that_moves_to_where_only_first_pages_count_keeps_one(shop, tmp_path):
    write_pages(shop.root / "a.tif", 3)
    write_image(shop.root / "b.png", 1)
    write_image(tmp_path / "first" / "c.png", 2)
    shop.sync(options=ALL_PAGES)
    shop.sync(roots=[tmp_path / "first"])
    (shop.root / "a.tif").rename(tmp_path / "first" / "a.tif")
    summary = shop.sync(roots=[shop.root, tmp_path / "first"])
    assert (summary.moved, summary.embedded) == (1, 0)
    assert len(read_vectors(shop.index)[0]) == 3


def test_a_bad_page_fails_alone(shop):
    write_pages(shop.root / "a.gif", 6)
    data = (shop.root / "a.gif").read_bytes()
    (shop.root / "a.gif").write_bytes(data[: len(data) * 3 // 4])
    summary = shop.sync(options=ALL_PAGES)
    assert summary.failed == index_info(shop.index).failed == 0  # as files go
    good = len(read_vectors(shop.index)[0])
    assert 1 <= good < 6
    assert {row.status for row in failures(shop.index)} == {"truncated"}


def test_a_bad_page_costs_the_others_nothing_when_the_model_changes(shop):
    write_pages(shop.root / "a.gif", 6)
    data = (shop.root / "a.gif").read_bytes()
    (shop.root / "a.gif").write_bytes(data[: len(data) * 3 // 4])
    shop.sync(options=ALL_PAGES)
    good = [file.frame for file in read_vectors(shop.index)[0]]
    shop.model = a_model(1)
    summary = shop.sync()
    assert (summary.model, summary.unchanged, summary.failed, summary.embedded) == ("m1", 1, 0, len(good))
    assert [file.frame for file in read_vectors(shop.index)[0]] == good
    assert {row.status for row in failures(shop.index)} == {"truncated"}


def test_a_bad_page_is_tried_again_when_the_decoders_change_and_only_then(shop, monkeypatch):
    write_pages(shop.root / "a.gif", 6)
    data = (shop.root / "a.gif").read_bytes()
    (shop.root / "a.gif").write_bytes(data[: len(data) * 3 // 4])
    (shop.root / "b.gif").write_bytes(data[: len(data) * 3 // 4])
    set_age(shop.root / "a.gif", 100)
    set_age(shop.root / "b.gif", 100)
    shop.sync(options=ALL_PAGES)
    tried = []
    decode_frame = workers.OpenFile.decode_frame
    monkeypatch.setattr(
        workers.OpenFile, "decode_frame", lambda file, frame: tried.append(frame) or decode_frame(file, frame)
    )
    assert shop.sync(options=ALL_PAGES).unchanged == 2
    assert tried == []
    monkeypatch.setattr(limits, "decoders", lambda: "newer")
    n_good = len(read_vectors(shop.index)[0])
    assert shop.sync(options=ALL_PAGES).unchanged == 2
    assert tried == list(range(1, n_good // 2 + 1))  # once for both copies
    assert len(read_vectors(shop.index)[0]) == n_good
    assert shop.sync(options=ALL_PAGES).unchanged == 2
    assert tried == list(range(1, n_good // 2 + 1))


def test_pages_beyond_the_most_are_passed_over_and_said(shop, monkeypatch):
    monkeypatch.setattr(embed, "MOST_FRAMES", 3)
    write_pages(shop.root / "a.tif", 5)
    write_pages(shop.root / "b.tif", 3, seed=5)
    assert shop.sync(options=ALL_PAGES).embedded == 6
    assert [note for note in shop.notes if note.startswith("2 pages") and note.endswith("passed over")]


def test_pages_of_a_file_that_could_not_be_read_once_come_back(shop, monkeypatch):
    write_pages(shop.root / "a.tif", 3)
    shop.sync(options=ALL_PAGES)
    set_age(shop.root / "a.tif", 500)

    def denied(*_):
        raise BadImage("unreadable", "denied")

    with monkeypatch.context() as patch:
        patch.setattr(workers.DecodePool, "read", denied)
        assert shop.sync(options=ALL_PAGES).failed == 1
    assert len(read_vectors(shop.index)[0]) == 0
    assert shop.sync(options=ALL_PAGES).failed == 0
    assert len(read_vectors(shop.index)[0]) == 3


def test_a_bound_on_memory_refuses_what_would_not_fit(shop):
    write_images(shop.root, 3)
    large = Image.new("L", (9000, 6000))
    (shop.root / "large.png").write_bytes(encoded(large, "PNG"))
    summary = shop.sync(max_memory=700 << 20)
    assert (summary.new, summary.failed) == (3, 1)
    (failure,) = failures(shop.index)
    assert failure.status == "too-large"
    assert shop.sync(max_memory=4000 << 20).changed == 1


@pytest.mark.parametrize(("large", "searched"), [((1,), (0, 2, 3, 4, 5)), ((2, 3, 5), (0, 1, 4)), ((1, 2, 3), (0,))])
def test_a_page_too_large_costs_itself_and_three_in_a_row_the_rest(shop, monkeypatch, large, searched):
    monkeypatch.setattr(limits, "pixel_budget", lambda _: 5000)
    sides = [200 if page in large else 40 for page in range(6)]
    first, *others = [Image.effect_noise((side, side), 50 + 10 * page) for page, side in enumerate(sides)]
    first.save(shop.root / "a.tif", save_all=True, append_images=others)
    shop.sync(options=ALL_PAGES)
    files, vectors = read_vectors(shop.index)
    assert [file.frame for file in files] == list(searched)
    assert len(vectors) == len(searched)
    assert [status for _, status, *_ in failures(shop.index)] == ["too-large"] * len(large)
    assert shop.sync(options=ALL_PAGES).embedded == 0
    monkeypatch.setattr(limits, "pixel_budget", lambda _: 50000)
    assert shop.sync(options=ALL_PAGES).failed == 0
    assert [file.frame for file in read_vectors(shop.index)[0]] == list(range(6))


def test_copies_of_pages_of_which_one_kills_its_decoder_end_no_run(shop, monkeypatch):
    for name in "abc":
        write_pages(shop.root / f"{name}.tif", 3)
    decode, frame = workers.OpenFile.decode_and_count, workers.OpenFile.decode_frame

    def slow(self):
        time.sleep(0.2)  # copies are read meanwhile
        return decode(self)

    def dies(self, number):
        if number == 1:
            raise BadImage("unreadable", "its decoder was killed")
        return frame(self, number)

    monkeypatch.setattr(workers.OpenFile, "decode_and_count", slow)
    monkeypatch.setattr(workers.OpenFile, "decode_frame", dies)
    shop.sync(options=ALL_PAGES)
    assert len(read_vectors(shop.index)[0]) == 3, "the first page of each"
    assert len(list(failures(shop.index))) == 3
    monkeypatch.undo()
    shop.sync(options=ALL_PAGES)
    assert len(read_vectors(shop.index)[0]) == 9


def test_a_process_that_is_killed_once_costs_no_file(shop, monkeypatch):
    write_images(shop.root, 12)
    decode, killed = workers.OpenFile.decode, []

    def kill_once(file):
        if not killed:
            killed.append(file._worker._process.pid)
            os.kill(killed[0], signal.SIGSEGV)
        return decode(file)

    monkeypatch.setattr(workers.OpenFile, "decode", kill_once)
    summary = shop.sync()
    assert len(killed) == 1
    assert (summary.new, summary.failed, summary.embedded) == (12, 0, 12)


def test_progress_tells_speed_and_what_limits_it(shop):
    write_images(shop.root, 40)
    *_, embedded, _, _ = list(shop.progress())
    assert embedded.stage == "embed"
    assert embedded.images_per_second > 0
    assert embedded.mb_per_second > 0
    assert embedded.limit in ("disk", "decode", "model", "write")


def test_leaving_early_ends_all_processes_and_threads(shop):
    write_images(shop.root, 200)
    before = threading.active_count()
    progress = shop.progress(stop_after=16)
    with pytest.raises(KeyboardInterrupt):
        last(progress)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert shop.sync().embedded < 200


def plan_of(shop, *sources):
    """What the encoder is opened for, with a sample of ten and one of more than there are; and the pixels it sees."""
    found = {}

    def open_encoder(plan):
        found["plan"], found["ten"], found["all"] = plan, plan.sample(10), plan.sample(1000)
        return shop.encoder

    shop.encoder = ProjectingEncoder(shop.model)
    last(sync_index(sources, index_path=shop.index, model=shop.model, encoder_for=open_encoder, workers=2))
    return found


def test_a_sample_is_spread_over_the_images_and_decoded_as_they_are(shop):
    for folder in "abcdefgh":
        write_images(shop.root / folder, 20, seed=ord(folder) * 100)
    (shop.root / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found = plan_of(shop, shop.root)
    assert found["plan"].images == 161
    assert len(found["all"]) == 160
    files, vectors = read_vectors(shop.index)
    folder_of = {}
    for sample in ("ten", "all"):
        scores = shop.encoder.encode(found[sample]) @ vectors.T
        assert scores.max(axis=1).min() > 0.9999
        folder_of[sample] = {files[row].relative[0] for row in scores.argmax(axis=1)}
    assert len(folder_of["ten"]) >= 4
    assert folder_of["all"] == set("abcdefgh")


def test_of_what_only_streams_the_first_images_are_a_sample(shop, tmp_path):
    write_images(tmp_path / "some", 30)
    with tarfile.open(tmp_path / "some.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "some", "some")
    found = plan_of(shop, *open_sources([str(tmp_path / "some.tar.gz")]))
    files, vectors = read_vectors(shop.index)
    assert len(files) == len(found["all"]) == 30
    scores = shop.encoder.encode(found["ten"]) @ vectors.T
    assert sorted(files[row].member for row in scores.argmax(axis=1)) == [f"some/{i:04d}.png" for i in range(10)]
