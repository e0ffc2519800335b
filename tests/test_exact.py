import numpy as np
import pytest
from stores import brute_force, clustered, unit_vectors

from dinosearch.index.exact import nearest, nearest_by_torch, unit_blocks


def in_order(positions, scores):
    order = np.argsort(-scores, axis=1)
    return np.take_along_axis(positions, order, axis=1), np.take_along_axis(scores, order, axis=1)


@pytest.mark.parametrize("step", [7, 100, 1000])
def test_the_nearest_are_those_of_brute_force_in_blocks_of_any_size(step):
    vectors, queries = unit_vectors(1000, 24), unit_vectors(30, 24, seed=1)
    blocks = (vectors[start : start + step] for start in range(0, 1000, step))
    positions, scores = in_order(*nearest(queries, blocks, 10))
    expected, expected_scores = brute_force(vectors, queries, 10)
    assert np.array_equal(positions, expected)
    assert np.allclose(scores, expected_scores, atol=1e-6)


def test_no_vectors_have_no_nearest():
    positions, scores = nearest(unit_vectors(3, 8), [np.empty((0, 8), np.float32)], 0)
    assert positions.shape == scores.shape == (3, 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_torch_finds_the_same_with_rough_products_and_a_second_look(dtype):
    vectors, queries = (3 * clustered(2000, 64)).astype(dtype), clustered(40, 64, seed=1)
    found = in_order(*nearest_by_torch(queries, vectors, 10, device="cpu", block=700))
    expected = in_order(*nearest(queries, unit_blocks(vectors), 10))
    assert np.mean(found[0] == expected[0]) > 0.999
    assert np.allclose(found[1], expected[1], atol=1e-6)
