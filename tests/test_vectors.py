import numpy as np
import pytest
from indexing import DIM, Workshop, a_model, write_image, write_images
from stores import MODEL, add, all_vectors, brute_force, catalog_of, clustered, unit_vectors

from dinosearch.index.catalog import Catalog
from dinosearch.index.contents import read_vectors
from dinosearch.index.generation import write_generation
from dinosearch.index.vectors import open_vectors


@pytest.fixture
def shop(tmp_path):
    write_images(tmp_path / "images", 20)
    shop = Workshop(tmp_path / "images", tmp_path / "index", a_model(), None, [])
    shop.sync()
    return shop


@pytest.mark.parametrize("share_in_generation", [0.0, 0.6, 1.0])
def test_search_equals_brute_force_wherever_a_vector_lies(tmp_path, share_in_generation):
    with Catalog.create(tmp_path, fingerprint=MODEL, model="m", dim=DIM) as catalog:
        stored, n_first = unit_vectors(500, DIM), int(500 * share_in_generation)
        add(catalog, stored[:n_first])
        if n_first:
            catalog.put_generation(write_generation(catalog, fingerprint=MODEL, dim=DIM))
            catalog.commit()
        add(catalog, stored[n_first:], start=n_first)
        found = open_vectors(catalog, note=pytest.fail)
        assert len(found) == 500
        ids, vectors = all_vectors(catalog)
        queries = unit_vectors(70, DIM, seed=1)
        order, scores = brute_force(vectors, queries, 10)
        candidates = found.search(queries, 10)
        assert np.array_equal(candidates.ids, ids[order])
        assert np.allclose(candidates.scores, scores, atol=1e-12)
        alone = found.search(queries[:1], 10)
        assert np.array_equal(alone.scores, candidates.scores[:1])
        everything = found.search(queries[:2], 500)
        assert np.array_equal(everything.ids, ids[brute_force(vectors, queries[:2], 500)[0]])


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


def test_newer_vectors_are_found_beside_a_tuned_generation(tmp_path):
    with catalog_of(tmp_path, clustered(1500, 64)) as catalog:
        catalog.put_generation(write_generation(catalog, fingerprint=MODEL, dim=64, exact_below=100))
        catalog.commit()
        newer = clustered(20, 64, seed=9)
        add(catalog, newer, start=1500)
        found = open_vectors(catalog, note=pytest.fail)
        assert len(found) == 1520
        ids, vectors = all_vectors(catalog)
        candidates = found.search(vectors[1500:], 5)
        assert np.array_equal(candidates.ids[:, 0], ids[1500:])
        assert np.all(np.diff(candidates.scores, axis=1) <= 0)
        alone = [found.search(query[None], 5).scores[0] for query in vectors[1500:]]
        assert np.array_equal(alone, candidates.scores)


def test_equal_vectors_in_a_graph_and_beside_it_have_equal_scores(tmp_path):
    first = clustered(1500, 64)
    with catalog_of(tmp_path, first) as catalog:
        catalog.put_generation(write_generation(catalog, fingerprint=MODEL, dim=64, exact_below=100))
        catalog.commit()
        add(catalog, first[::50], start=1500)
        candidates = open_vectors(catalog, note=pytest.fail).search(clustered(30, 64, seed=2), 1530)
    scores = {int(number): row for number, row in zip(candidates.ids[0], candidates.scores[0], strict=True)}
    assert all(scores[1 + 50 * number] == scores[1501 + number] for number in range(30))


def test_a_batch_is_answered_as_its_queries_alone(tmp_path):
    with catalog_of(tmp_path, clustered(1500, 64)) as catalog:
        catalog.put_generation(write_generation(catalog, fingerprint=MODEL, dim=64, exact_below=100))
        catalog.commit()
        found = open_vectors(catalog, note=pytest.fail)
        queries = clustered(200, 64, seed=11)
        together = found.search(queries, 10)
        alone = np.concatenate([found.search(query[None], 10).ids for query in queries])
        assert np.mean(together.ids == alone) > 0.99  # codes of equal distance may come in another order
