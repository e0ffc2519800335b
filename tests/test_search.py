import importlib.util
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from indexing import Workshop, a_model, write_image, write_images
from stores import MODEL, add, all_vectors, catalog_of, clustered

from dinosearch.errors import IndexNotFound, IndexUnusable, ModelMismatch
from dinosearch.index.contents import read_vectors
from dinosearch.index.generation import write_generation
from dinosearch.query.search import open_index, query_images


@pytest.fixture
def shop(tmp_path):
    write_images(tmp_path / "images", 40)
    shop = Workshop(tmp_path / "images", tmp_path / "index", a_model(), None, [])
    shop.sync()
    return shop


def test_matches_are_those_of_brute_force_in_falling_order(shop):
    files, vectors = read_vectors(shop.index)
    queries = np.random.default_rng(5).standard_normal((15, vectors.shape[1])).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    with open_index(shop.index) as index:
        answers = index.search(queries, top=10)
    scores = queries @ vectors.T
    for row, matches in enumerate(answers):
        best = np.argsort(-scores[row])[:10]
        assert [match.path for match in matches] == [files[i].path for i in best]
        assert [match.rank for match in matches] == list(range(1, 11))
        assert np.allclose([match.score for match in matches], scores[row][best], atol=2e-6)


def test_an_indexed_image_comes_back_first_with_a_score_of_one(shop):
    with open_index(shop.index) as index:
        for answer in query_images(index, shop.encoder, sorted(shop.root.iterdir()), top=3):
            assert answer.matches[0].path == Path(answer.query)
            assert answer.matches[0].score >= 0.9999


def test_equal_files_are_each_listed_by_path(shop):
    for name in ("zz.png", "a.png", "sub/m.png"):
        (shop.root / name).parent.mkdir(exist_ok=True)
        shutil.copy2(shop.root / "0007.png", shop.root / name)
    shop.sync()
    with open_index(shop.index) as index:
        [answer] = query_images(index, shop.encoder, [shop.root / "zz.png"], top=5)
    assert [match.path.relative_to(shop.root).as_posix() for match in answer.matches[:4]] == [
        "0007.png", "a.png", "sub/m.png", "zz.png",
    ]  # fmt: skip
    assert len({match.score for match in answer.matches[:4]}) == 1
    assert answer.matches[4].score < answer.matches[3].score


def test_ties_of_different_files_are_cut_by_path_too(shop):
    from PIL import Image

    pixels = Image.open(shop.root / "0000.png")
    for number in range(60):  # the same pixels in 60 different files, more than are fetched at first
        pixels.save(shop.root / f"tie{number:02d}.png", compress_level=number % 10, dpi=(number + 1, 1))
    assert shop.sync().embedded == 60
    with open_index(shop.index) as index:
        for top in (3, 10, 61):
            [answer] = query_images(index, shop.encoder, [shop.root / "0000.png"], top=top)
            names = ["0000.png", *(f"tie{number:02d}.png" for number in range(60))]
            assert [match.path.name for match in answer.matches] == names[:top]


def test_deleted_files_make_room_for_the_next_ones(shop):
    write_images(shop.root, 60, seed=1000)
    shop.sync(allow_deletions=True)
    files, vectors = read_vectors(shop.index)
    query = vectors[:1]
    near = np.argsort(-(query @ vectors.T)[0])
    for row in near[:50]:
        files[row].path.unlink()
    shop.sync(allow_deletions=True)
    with open_index(shop.index) as index:
        [matches] = index.search(query, top=5)
        assert [match.path for match in matches] == [files[row].path for row in near[50:55]]
        assert len(index.search(query, top=1000)[0]) == 10


def test_more_than_there_is_gives_all_and_none_gives_none(shop):
    _, vectors = read_vectors(shop.index)
    with open_index(shop.index) as index:
        assert len(index.search(vectors[:1], top=1000)[0]) == 40
        assert index.search(vectors[:2], top=0) == [[], []]
        assert index.search(vectors[:0], top=5) == []


def test_an_index_of_bad_files_only_answers_with_nothing(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").write_bytes(b"bad")
    shop = Workshop(tmp_path / "images", tmp_path / "index", a_model(), None, [])
    assert shop.sync().failed == 1
    with open_index(shop.index) as index:
        assert index.search(np.ones((1, shop.model.dim), np.float32), top=5) == [[]]


def test_an_unreadable_query_is_an_answer_and_the_others_go_on(shop, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    queries = [shop.root / "0001.png", tmp_path / "bad.jpg", tmp_path / "missing.jpg", shop.root / "0002.png"]
    with open_index(shop.index) as index:
        answers = list(query_images(index, shop.encoder, queries, top=2))
    assert [answer.query for answer in answers] == [str(path) for path in queries]
    assert [bool(answer.error) for answer in answers] == [False, True, True, False]
    assert [len(answer.matches) for answer in answers] == [2, 0, 0, 2]
    assert answers[3].matches[0].path == queries[3]


def test_many_queries_are_answered_in_order_a_batch_at_a_time(shop):
    paths = sorted(shop.root.iterdir()) * 15
    with open_index(shop.index) as index:
        answers = list(query_images(index, shop.encoder, iter(paths), top=1))
    assert [answer.matches[0].path for answer in answers] == paths


def test_an_open_index_sees_what_is_committed_later(shop):
    with open_index(shop.index) as index:
        write_image(shop.root / "later.png", 500)
        shop.sync()
        [answer] = query_images(index, shop.encoder, [shop.root / "later.png"], top=1)
        assert answer.matches[0].path.name == "later.png"
        (shop.root / "later.png").unlink()
        shop.sync()
        _, vectors = read_vectors(shop.index)
        assert len(index.search(vectors[:1], top=100)[0]) == 40


def test_who_may_not_write_to_an_open_index_sees_what_is_committed_later_too(shop, monkeypatch):
    """SQLite is told then that the catalog never changes."""

    @contextmanager
    def no_right_to_write():
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", lambda *_, **__: False)
            yield

    with no_right_to_write():
        index = open_index(shop.index)
    with index:
        for number, name in enumerate(["later.png", "last.png"]):
            write_image(shop.root / name, 500 + number)
            shop.sync()
            with no_right_to_write():
                [answer] = query_images(index, shop.encoder, [shop.root / name], top=1)
            assert answer.matches[0].path.name == name
            assert answer.matches[0].score >= 0.9999
        (shop.root / "later.png").unlink()
        shop.sync()
        with no_right_to_write():
            [answer] = query_images(index, shop.encoder, [shop.root / "last.png"], top=100)
        assert len(answer.matches) == 41


def test_a_query_through_another_model_is_refused(shop):
    from indexing import ProjectingEncoder

    with open_index(shop.index) as index, pytest.raises(ModelMismatch) as caught:
        list(query_images(index, ProjectingEncoder(a_model(1)), [shop.root / "0000.png"]))
    assert caught.value.exit_code == 4


def test_an_open_index_whose_model_was_changed_says_so(shop):
    _, vectors = read_vectors(shop.index)
    with open_index(shop.index) as index:
        shop.model = a_model(1)
        shop.sync()
        with pytest.raises(IndexUnusable, match="another model"):
            index.search(vectors[:1])


def test_no_index_is_said_with_what_to_do(tmp_path):
    with pytest.raises(IndexNotFound, match="dinosearch index"):
        open_index(tmp_path / "nothing")


def test_vectors_are_handed_out_of_unit_length_where_newer_ones_lie_beside_a_tuned_file(tmp_path):
    with catalog_of(tmp_path, clustered(1500, 64)) as catalog:
        catalog.put_generation(write_generation(catalog, fingerprint=MODEL, dim=64, exact_below=100))
        catalog.commit()
        add(catalog, clustered(20, 64, seed=9), start=1500)
        _, expected = all_vectors(catalog)
    with open_index(tmp_path) as index:
        vectors = index.matrix()
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, expected)


def test_the_benchmark_leaves_out_what_is_not_installed(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("benchmark", Path(__file__).parent.parent / "benchmarks/search.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    np.save(tmp_path / "vectors.npy", clustered(120, 8).astype(np.float16))
    options = f"--cache {tmp_path / 'built'} --n 100 --queries 20 --build --systems".split()
    monkeypatch.setitem(sys.modules, "hnswlib", None)  # as if it were not there
    monkeypatch.setattr(sys, "argv", ["search.py", str(tmp_path / "vectors.npy"), *options, "flat", "hnswlib"])
    benchmark.main()
    assert "hnswlib is left out: pip install hnswlib" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "built").glob("*.built.json")] == ["flat.built.json"]
    monkeypatch.setattr(sys, "argv", ["search.py", str(tmp_path / "vectors.npy"), *options, "hnswlib"])
    with pytest.raises(SystemExit, match="nothing is left"):
        benchmark.main()
