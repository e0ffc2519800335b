import os
from dataclasses import replace

import numpy as np
import pytest
from indexing import DIM, Workshop, a_model, write_image, write_images

from dinosearch.errors import DinosearchError
from dinosearch.index import vectors as vectors_module
from dinosearch.index.catalog import Catalog, FileRow
from dinosearch.index.contents import index_info, read_vectors
from dinosearch.index.vectors import DamagedGeneration, check_file, open_vectors, wanted_generation, write_generation

MODEL = "f" * 16


@pytest.fixture
def shop(tmp_path):
    write_images(tmp_path / "images", 20)
    shop = Workshop(tmp_path / "images", tmp_path / "index", a_model(), None, [])
    shop.sync()
    return shop


def unit(n, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def add(catalog, vectors, *, start=0):
    root = catalog.add_root("folder", str(catalog.path.parent))
    names = [f"{i:06}" for i in range(start, start + len(vectors))]
    catalog.put_vectors([(name, 0, 1, 1) for name in names], vectors, fingerprint=MODEL)
    catalog.put_files(FileRow(root, name, 1, 1, name, "ok") for name in names)
    catalog.commit()


def brute_force(stored, queries, k):
    scores = queries.astype(np.float64) @ stored.astype(np.float64).T
    order = np.argsort(-scores, axis=1)[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def all_vectors(catalog):
    ids, vectors = zip(*catalog.vector_blocks(fingerprint=MODEL), strict=True)
    return np.concatenate(ids), np.concatenate(vectors)


@pytest.mark.parametrize("share_in_generation", [0.0, 0.6, 1.0])
def test_search_equals_brute_force_wherever_a_vector_lies(tmp_path, share_in_generation):
    with Catalog.create(tmp_path, fingerprint=MODEL, model="m", dim=DIM) as catalog:
        stored, n_first = unit(500), int(500 * share_in_generation)
        add(catalog, stored[:n_first])
        if n_first:
            catalog.put_generation(write_generation(catalog, fingerprint=MODEL, dim=DIM))
            catalog.commit()
        add(catalog, stored[n_first:], start=n_first)
        found = open_vectors(catalog, note=pytest.fail)
        assert len(found) == 500
        ids, vectors = all_vectors(catalog)
        queries = unit(70, seed=1)
        order, scores = brute_force(vectors, queries, 10)
        candidates = found.search(queries, 10)
        assert np.array_equal(candidates.ids, ids[order])
        assert np.allclose(candidates.scores, scores, atol=1e-12)
        alone = found.search(queries[:1], 10)
        assert np.array_equal(alone.scores, candidates.scores[:1])
        everything = found.search(queries[:2], 500)
        assert np.array_equal(everything.ids, ids[brute_force(vectors, queries[:2], 500)[0]])


def test_plain_faiss_opens_the_file_under_the_ids_of_the_catalog(shop):
    import faiss

    index = faiss.read_index(str(shop.index / "vectors-1.faiss"))
    assert (index.ntotal, index.d, index.metric_type) == (20, DIM, faiss.METRIC_INNER_PRODUCT)
    with Catalog.open(shop.index) as catalog:
        [(ids, vectors)] = catalog.vector_blocks(fingerprint=catalog.fingerprint)
    scores, found = index.search(vectors, 1)
    assert np.array_equal(found[:, 0], ids)
    assert np.allclose(scores, 1)
    assert np.array_equal(index.reconstruct(int(ids[3])), vectors[3])


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm", [damage, os.unlink, lambda path: os.truncate(path, 100), lambda path: path.write_text("x")]
)
def test_a_damaged_file_is_done_without_and_written_anew_by_the_next_sync(shop, harm):
    _, vectors = read_vectors(shop.index)
    notes = []
    with Catalog.open(shop.index) as catalog:
        sound = open_vectors(catalog, note=pytest.fail).search(vectors, 5)
        harm(shop.index / "vectors-1.faiss")
        found = open_vectors(catalog, note=notes.append).search(vectors, 5)
    assert np.array_equal(found.ids, sound.ids)
    assert np.array_equal(found.scores, sound.scores)
    assert "answering from the catalog" in notes[0]
    assert shop.sync().embedded == 0
    with Catalog.open(shop.index) as catalog:
        again = open_vectors(catalog, note=pytest.fail).search(vectors, 5)
        assert catalog.generation().number == 2
    assert np.array_equal(again.ids, sound.ids)


def test_a_large_file_is_hashed_only_where_it_is_not_the_writers_own(shop, monkeypatch):
    monkeypatch.setattr(vectors_module, "ALWAYS_HASHED", 0)
    with Catalog.open(shop.index) as catalog:
        generation = catalog.generation()
    path = shop.index / generation.file
    with monkeypatch.context() as patch:
        patch.setattr(vectors_module, "_checksum", lambda _: pytest.fail("hashed"))
        check_file(shop.index, generation)
    stat = path.stat()
    damage(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DamagedGeneration):
        check_file(shop.index, generation)


def test_a_file_that_holds_something_else_under_the_right_checksum_is_refused(tmp_path):
    import faiss

    with Catalog.create(tmp_path, fingerprint=MODEL, model="m", dim=DIM) as catalog:
        add(catalog, unit(10))
        generation = write_generation(catalog, fingerprint=MODEL, dim=DIM)
        other = faiss.IndexFlatIP(DIM)
        other.add(unit(10))
        path = tmp_path / generation.file
        faiss.write_index(other, str(path))
        facts = {"size": path.stat().st_size, "checksum": vectors_module._checksum(path)}
        catalog.put_generation(replace(generation, **facts))
        catalog.commit()
        notes = []
        assert len(open_vectors(catalog, note=notes.append)) == 10
        assert "something else" in notes[0]


def test_one_old_generation_is_kept_for_readers_that_hold_it(shop):
    for number in range(3):
        write_image(shop.root / f"more{number}.png", 900 + number)
        shop.sync()
    assert sorted(path.name for path in shop.index.glob("vectors-*")) == ["vectors-3.faiss", "vectors-4.faiss"]


def test_a_reader_of_the_generation_before_goes_on_answering(shop):
    with Catalog.open(shop.index) as catalog:
        held = open_vectors(catalog, note=pytest.fail)
        _, vectors = read_vectors(shop.index)
        before = held.search(vectors, 3)
        for number in range(3):
            write_image(shop.root / f"more{number}.png", 900 + number)
            shop.sync()
        assert not (shop.index / "vectors-1.faiss").exists()
        assert np.array_equal(held.search(vectors, 3).ids, before.ids)


def test_a_large_index_is_written_anew_only_when_enough_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors_module, "_SMALL", 100)
    with Catalog.create(tmp_path, fingerprint=MODEL, model="m", dim=DIM) as catalog:
        add(catalog, unit(1000))
        assert wanted_generation(catalog, MODEL) == "none yet"
        catalog.put_generation(write_generation(catalog, fingerprint=MODEL, dim=DIM))
        assert wanted_generation(catalog, MODEL) is None
        add(catalog, unit(20, seed=2), start=1000)
        assert wanted_generation(catalog, MODEL) is None
        add(catalog, unit(10, seed=3), start=1020)
        assert wanted_generation(catalog, MODEL) == "30 newer vectors, 0 pruned"
        assert wanted_generation(catalog, "another") == "another model"


def test_a_file_that_cannot_be_written_leaves_an_index_that_answers(shop, monkeypatch):
    import faiss

    def full(*_):
        raise RuntimeError("write error in vectors-2.faiss: 10 != 20 (No space left on device)")

    write_image(shop.root / "more.png", 900)
    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", full)
        with pytest.raises(DinosearchError, match=r"No space left on device.*free some space"):
            shop.sync()
    _, vectors = read_vectors(shop.index)
    with Catalog.open(shop.index) as catalog:
        assert len(open_vectors(catalog, note=pytest.fail)) == len(vectors) == 21
    assert shop.sync().unchanged == 21
    assert index_info(shop.index).faiss.bytes_per_image > 4 * DIM


def test_recall_is_measured_not_assumed():
    import faiss

    stored = unit(1000)
    exact = faiss.IndexFlatIP(DIM)
    exact.add(stored)
    assert vectors_module._recall(exact, stored) == 1.0
    rough = faiss.index_factory(DIM, "PQ4x4", faiss.METRIC_INNER_PRODUCT)
    rough.train(stored)
    rough.add(stored)
    queries = stored[np.linspace(0, 999, 100).astype(int)]
    truth, found = brute_force(stored, queries, 10)[0], rough.search(queries, 10)[1]
    expected = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth, found, strict=True)])
    assert 0.05 < expected < 0.9
    assert vectors_module._recall(rough, stored) == pytest.approx(expected, abs=0.01)
