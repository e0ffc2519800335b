"""Conditions as people write them, and what they mean to a catalog."""

import json
import os

import pytest

from dinosearch.errors import UsageError
from dinosearch.index.catalog import Catalog
from dinosearch.index.conditions import Condition, check_columns
from dinosearch.index.rows import OK, FileRow

SAID = {
    "a.png": {"brand": "Acme", "price": 5, "made": "2024-03-01", "sold": True},
    "b.png": {"brand": "Zenith", "price": 20.5, "made": "2025-01-31", "sold": False},
    "c.png": {"brand": "007", "price": "unknown"},
    "d.png": None,
}


@pytest.fixture
def catalog(tmp_path):
    import numpy as np

    with Catalog.create(tmp_path, fingerprint="f", model="m", dim=2) as made:
        root = made.add_root("folder", "/pictures")
        for number, (path, said) in enumerate(SAID.items()):
            made.put_vectors([(path, 0, 10 * number, 8)], np.ones((1, 2)), fingerprint="f")
            row = FileRow(root, path, 1, 1, path, OK, width=10 * number, height=8, metadata=json.dumps(said or ""))
            made.put_files([row if said else FileRow(root, path, 1, 1, path, OK, width=10 * number, height=8)])
        made.commit()
        yield made


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["brand=Acme"], "a"),
        (["brand = Acme "], "a"),
        (["brand!=Acme"], "bc"),
        (["brand~E"], "ab"),
        (["brand=007"], "c"),
        (["price<20.5"], "a"),
        (["price<=20.5"], "ab"),
        (["price>=1e1"], "b"),
        (["price=5.0"], "a"),
        (["price=unknown"], "c"),
        (["made>=2025-01-01"], "b"),
        (["made>=2025"], "b"),
        (["made<2025"], "a"),
        (["brand>=100"], "ab"),
        (["path>=2024"], "abcd"),
        (["brand!=nan"], "abc"),
        (["price!=nan"], "abc"),
        (["width>=10", "price>=0"], "b"),
        (["sold=true"], "a"),
        (["sold=false"], "b"),
        (["brand~e", "price>5"], "b"),
        (["path=d.png"], "d"),
        (["path~.PNG", "width>=20"], "cd"),
        (["height=8", "brand=nothing"], ""),
    ],
)
def test_a_condition_leaves_what_fulfils_it(catalog, texts, found):
    conditions = [Condition.parse(text) for text in texts]
    assert [file.path for file in catalog.live_files(where=conditions)] == [f"{name}.png" for name in found]


def test_values_are_values_whatever_they_say(catalog):
    for text in ("brand=' OR 1=1 --", 'brand"=x', "brand=%", "path~'"):
        assert list(catalog.live_files(where=[Condition.parse(text)])) == []


def test_a_path_is_that_of_a_member_too_and_need_not_be_utf8(catalog):
    import numpy as np

    zipped, loose = catalog.add_root("archive", "/photos.zip"), catalog.add_root("folder", "/loose")
    odd = os.fsdecode(b"caf\xe9.png")
    for number, (root, path, member) in enumerate([(zipped, "", "in/a.png"), (loose, odd, "")]):
        catalog.put_vectors([(f"m{number}", 0, 1, 1)], np.ones((1, 2)), fingerprint="f")
        catalog.put_files([FileRow(root, path, 1, 1, f"m{number}", OK, member=member)])

    def found(text):
        return [file.path + file.member for file in catalog.live_files(where=[Condition.parse(text)])]

    assert found("path=in/a.png") == ["in/a.png"]
    assert found(f"path={odd}") == [odd]
    assert found(f"path~{odd[:4]}") == [odd]
    assert found(f"brand={odd}") == []


@pytest.mark.parametrize("text", ["", "brand", "=x", "<3"])
def test_no_condition_is_told_how_to_write_one(text):
    with pytest.raises(UsageError, match="COLUMN=VALUE"):
        Condition.parse(text)


def test_an_unknown_column_is_told_the_known_ones(catalog):
    columns = list(catalog.metadata_columns())
    assert columns == ["brand", "made", "price", "sold"]
    with pytest.raises(UsageError, match=r"no column 'colour' in this index. There are: brand, made, price, sold"):
        check_columns([Condition.parse("colour=red")], columns)
