import json
import os
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from indexing import Workshop, a_model, never, write_images

import dinosearch
from dinosearch.cli import app
from dinosearch.errors import IndexUnusable, UsageError
from dinosearch.index.contents import failures, read_vectors
from dinosearch.index.forget import forget
from dinosearch.index.merge import merge_indexes
from dinosearch.index.survey import GivenOptions, Shard
from dinosearch.index.sync import sync_index
from dinosearch.query.search import open_index

N = 60


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    write_images(root, N)
    for number in range(5):
        shutil.copy2(root / f"{number:04d}.png", root / f"copy{number}.png")
    (root / "bad.png").write_bytes(b"no image")
    (root / os.fsdecode(b"caf\xe9.png")).write_bytes((root / "0001.png").read_bytes())
    for path in root.iterdir():
        os.utime(path, (1e9, 1e9))
    return root


@pytest.fixture
def shop(images, tmp_path):
    return Workshop(images, tmp_path / "whole", a_model(), None, [])


def shards(shop, n):
    paths = []
    for number in range(1, n + 1):
        part = Workshop(shop.root, shop.index.parent / f"part{number}", shop.model, None, [])
        part.sync(shard=Shard(number, n))
        paths.append(part.index)
    return paths


def merge(paths, into):
    return [step.summary for step in merge_indexes(paths, into=into)][-1]


def rows(index, table):
    with sqlite3.connect(index / "catalog.sqlite") as connection:
        skipped = ("created", "shard")
        return [row for row in connection.execute(f"SELECT * FROM {table}") if row[0] not in skipped]


def test_merged_shards_are_the_index_of_one_run_byte_for_byte(shop, tmp_path):
    shop.sync()
    parts = shards(shop, 3)
    assert sum(len(read_vectors(part)[0]) for part in parts) == N + 6
    assert min(len(read_vectors(part)[0]) for part in parts) > 10
    summary = merge(parts, tmp_path / "merged")
    assert (summary.files, summary.images, summary.vectors, summary.failed) == (N + 7, N + 6, N, 1)
    for table in ("meta", "roots"):
        assert rows(tmp_path / "merged", table) == rows(shop.index, table)
    of_files = [
        sorted(row[1:] for row in map(str_first, rows(index, "files"))) for index in (tmp_path / "merged", shop.index)
    ]
    assert of_files[0] == of_files[1]
    assert rows(tmp_path / "merged", "vectors") == rows(shop.index, "vectors")
    assert (tmp_path / "merged" / "vectors-1.faiss").read_bytes() == (shop.index / "vectors-1.faiss").read_bytes()
    queries = read_vectors(shop.index)[1]
    with open_index(shop.index) as whole, open_index(tmp_path / "merged") as merged:
        assert merged.search(queries, top=20) == whole.search(queries, top=20)
    assert list(failures(tmp_path / "merged")) == list(failures(shop.index))


def str_first(row):
    return tuple(repr(cell) for cell in row)


def test_a_merged_index_goes_on_as_the_one_of_one_run(shop, tmp_path):
    merge(shards(shop, 2), tmp_path / "merged")
    steps = list(sync_index([shop.root], index_path=tmp_path / "merged", model=shop.model, encoder_for=never))
    summary = steps[-1].summary
    assert (summary.unchanged, summary.failed, summary.new, summary.embedded) == (N + 6, 1, 0, 0)


def test_a_shard_stays_what_it_is(shop):
    [first, _] = shards(shop, 2)
    part = Workshop(shop.root, first, shop.model, None, [])
    before = read_vectors(first)[0]
    assert part.sync().unchanged == len(before)
    assert "holds shard 1/2" in part.notes[-1]
    with pytest.raises(UsageError, match="holds shard 1/2, not shard 2/2"):
        part.sync(shard=Shard(2, 2))
    shop.sync()
    with pytest.raises(UsageError, match="holds all images, not shard 1/2"):
        shop.sync(shard=Shard(1, 2))


def test_missing_doubled_and_foreign_shards_are_named(shop, tmp_path):
    parts = shards(shop, 4)
    shop.sync()
    into = tmp_path / "merged"
    for paths, message in (
        ([parts[0], parts[2]], "shard 2/4, 4/4 is missing"),
        ([parts[0], parts[0]], "named twice"),
        ([shop.index, parts[0]], "whole is no shard"),
    ):
        with pytest.raises(UsageError, match=message):
            merge(paths, into)
        assert not into.exists()
    with pytest.raises(UsageError, match="is there already"):
        merge(parts, shop.index)


def test_indexes_of_different_models_are_refused(shop, tmp_path):
    shop.sync()
    other = Workshop(shop.root, tmp_path / "other", a_model(1), None, [])
    other.sync()
    with pytest.raises(IndexUnusable, match="Index both with one model") as caught:
        merge([shop.index, other.index], tmp_path / "merged")
    assert caught.value.exit_code == 4


def test_indexes_of_different_and_overlapping_sources_become_one(shop, tmp_path):
    write_images(tmp_path / "more", 5, seed=300)
    shop.sync()
    other = Workshop(shop.root, tmp_path / "other", shop.model, None, [])
    other.sync(roots=[tmp_path / "more", shop.root])
    summary = merge([shop.index, other.index], tmp_path / "merged")
    assert (summary.images, summary.vectors) == (N + 6 + 5, N + 5)
    assert len(np.unique(read_vectors(tmp_path / "merged")[1], axis=0)) == N + 5


def test_sources_seen_by_different_options_are_refused(shop, tmp_path):
    shop.sync()
    other = Workshop(shop.root, tmp_path / "other", shop.model, None, [])
    other.sync(options=GivenOptions(exclude=("copy*",)))
    with pytest.raises(UsageError, match="different options"):
        merge([shop.index, other.index], tmp_path / "merged")


def test_what_was_forgotten_in_one_shard_stays_out_of_the_whole(shop, tmp_path):
    parts = shards(shop, 2)
    path = read_vectors(parts[0])[0][-1].path
    forget(parts[0], [str(path)])
    assert merge(parts, tmp_path / "merged").images == N + 5
    merged = Workshop(shop.root, tmp_path / "merged", shop.model, None, [])
    assert merged.sync().images == N + 5


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_shard_is_one_of_n(text):
    with pytest.raises(UsageError, match="is no part"):
        Shard.parse(text)


def test_merged_shards_are_queried_as_the_index_of_one_run(tmp_path, tiny_model, jpeg_folder, monkeypatch, capsys):
    """To the last digit, by a real model: a vector is the same bits in batches of 24, 12 or 1."""
    monkeypatch.chdir(tmp_path)
    for variable in ("DINOSEARCH_MODELS", "DINOSEARCH_INDEXES"):
        monkeypatch.delenv(variable, raising=False)
    shutil.copytree(tiny_model.path, "models/tiny")
    shutil.copytree(jpeg_folder, "catalog")
    whole = dinosearch.build_index("catalog", name="whole", device="cpu")
    parts = [dinosearch.build_index("catalog", shard=f"{part}/2", device="cpu") for part in (1, 2)]
    assert min(map(len, parts)) > 5
    merge([part.path for part in parts], tmp_path / "indexes" / "merged")
    images = sorted(map(str, Path("catalog").rglob("*.jpg")))
    printed = []
    for name in (whole.name, "merged"):
        app(["query", *images, "--index", name, "--top", "24", "--device", "cpu", "--json"], standalone_mode=False)
        printed.append(capsys.readouterr().out)
    answers = [json.loads(line) for line in printed[0].splitlines()]
    assert [answer["matches"][0]["path"] for answer in answers] == images
    assert {len(answer["matches"]) for answer in answers} == {24}
    assert printed[0] == printed[1]
