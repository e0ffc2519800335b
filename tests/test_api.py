"""The Python API: small, typed, and the same answers as the commands."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from indexing import write_images

import dinosearch
from dinosearch.encoder import quantization
from dinosearch.errors import IndexNotFound, UsageError


@pytest.fixture
def home(tmp_path, monkeypatch, tiny_model, jpeg_folder):
    """A working folder with models/tiny and catalog/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DINOSEARCH_MODELS", raising=False)
    monkeypatch.delenv("DINOSEARCH_INDEXES", raising=False)
    shutil.copytree(tiny_model.path, tmp_path / "models" / "tiny")
    shutil.copytree(jpeg_folder, tmp_path / "catalog")
    return tmp_path


def test_the_public_surface_is_this_and_no_more():
    assert sorted(dinosearch.__all__) == [
        "DinosearchError", "Index", "Match", "__version__", "build_index", "open_index",
    ]  # fmt: skip
    public = sorted(name for name in vars(dinosearch.Index) if not name.startswith("_"))
    assert public == [
        "close", "embed", "failures", "files", "fingerprint", "info", "name", "search", "search_many", "vectors",
    ]  # fmt: skip
    for member in (dinosearch.build_index, dinosearch.open_index, *map(dinosearch.Index.__dict__.get, public)):
        function = member.fget if isinstance(member, property) else member
        assert function.__doc__ or function.__name__ in ("close", "name")
        assert "return" in inspect.get_annotations(function)
    assert Path(dinosearch.__file__).with_name("py.typed").is_file()


def test_importing_the_package_loads_nothing_heavy():
    code = "import dinosearch, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "torch", "faiss", "sqlite3", "PIL"} & set(done.stdout.split())


def test_build_and_search_find_an_image_first(home):
    seen = []
    index = dinosearch.build_index("catalog", progress=lambda step: seen.append(step.stage))
    assert index.summary.new == index.summary.embedded == len(index) == 24
    assert {"scan", "embed", "finish"} <= set(seen)
    matches = index.search("catalog/china/3.jpg", top=5)
    assert [match.rank for match in matches] == [1, 2, 3, 4, 5]
    assert matches[0].path == home / "catalog/china/3.jpg"
    assert matches[0].score == pytest.approx(1, abs=1e-3)
    scores = [match.score for match in matches]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.usefixtures("home")
def test_vectors_and_files_belong_together():
    with dinosearch.build_index(["catalog"], name="mine") as index:
        vectors, files = index.vectors(), index.files()
        assert vectors.shape == (24, 32)
        assert not vectors.flags.writeable
        assert not vectors.flags.owndata
        for file in files[::7]:
            own = vectors[file.row]
            assert own @ own == pytest.approx(1, abs=1e-3)
            assert index.search(own, top=1)[0].path == file.path
            assert own @ index.embed([file.path])[0] == pytest.approx(1, abs=1e-3)
        every = index.search_many(vectors, top=24)
        scores = np.sort(vectors.astype(np.float64) @ vectors.astype(np.float64).T, axis=1)[:, ::-1]
        assert np.allclose([[match.score for match in answer] for answer in every], scores, atol=2e-6)


def test_open_index_takes_a_name_a_folder_or_the_newest(home):
    dinosearch.build_index("catalog")
    for index in ("catalog", home / "indexes" / "catalog", None):
        with dinosearch.open_index(index) as opened:
            assert (opened.name, len(opened)) == ("catalog", 24)
    with pytest.raises(IndexNotFound, match="Build one"):
        dinosearch.open_index("other")


def test_files_vectors_and_urls_may_be_asked_in_one_go(home):
    index = dinosearch.build_index("catalog")
    one, two = index.files()[0], index.files()[9]
    mixed = index.search_many([one.path, index.vectors()[two.row]], top=1)
    assert [answer[0].path for answer in mixed] == [one.path, two.path]
    (home / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(dinosearch.DinosearchError, match=r"bad.jpg: not an image"):
        index.search("bad.jpg")


@pytest.mark.usefixtures("home")
def test_a_table_narrows_the_search():
    rows = [f"{path},{path.parent.name},{number}" for number, path in enumerate(sorted(Path("catalog").rglob("*.jpg")))]
    Path("products.csv").write_text("path,kind,number\n" + "\n".join(rows))
    index = dinosearch.build_index("products.csv")
    matches = index.search("catalog/china/3.jpg", top=24, where=["kind=flower", "number>=18"])
    assert len(matches) == 6
    assert all(match.metadata["kind"] == "flower" and match.metadata["number"] >= 18 for match in matches)
    every = [match for match in index.search("catalog/china/3.jpg", top=24) if match.metadata["kind"] == "flower"]
    kept = [match for match in every if match.metadata["number"] >= 18]
    assert [(m.path, m.score) for m in matches] == [(m.path, m.score) for m in kept]
    with pytest.raises(UsageError, match="no column 'size'"):
        index.search("catalog/china/3.jpg", where=["size=1"])


@pytest.mark.usefixtures("home")
def test_the_options_of_the_command_do_the_same_here():
    parts = [dinosearch.build_index("catalog", shard=f"{part}/2", max_memory=8 << 30) for part in (1, 2)]
    assert [part.name for part in parts] == ["catalog-shard-1-of-2", "catalog-shard-2-of-2"]
    assert sum(map(len, parts)) == 24
    index = dinosearch.build_index("catalog", recall=0.9)
    assert index.info().faiss.recall_target in (None, 0.9)
    file = Path("catalog/china/0.jpg")
    before = file.stat()
    altered = bytearray(file.read_bytes())
    altered[-100] ^= 1
    file.write_bytes(altered)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert dinosearch.build_index("catalog").summary.changed == 0
    verified = dinosearch.build_index("catalog", verify=True)
    assert (verified.summary.changed, verified.info().vectors) == (1, 25)
    assert dinosearch.build_index("catalog", prune=True).info().vectors == 24
    with pytest.raises(UsageError):
        dinosearch.build_index("catalog", shard="3/2")


@pytest.mark.usefixtures("home")
def test_no_images_at_all_are_an_error_and_touch_no_index():
    dinosearch.build_index("catalog").close()
    for name in (None, "mine"):
        with pytest.raises(UsageError, match="no images given"):
            dinosearch.build_index(Path().glob("*.jpg"), name=name)
    assert [path.name for path in Path("indexes").iterdir()] == ["catalog"]


@pytest.mark.usefixtures("home")
def test_what_was_built_with_a_released_file_at_another_size_is_asked_at_that_size():
    import torch

    from dinosearch.vit.folder import ModelFacts, create_vit

    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1}
    torch.save(create_vit(ModelFacts("vit_tiny_patch16_224", tiny, image_size=16)).state_dict(), "dino.pth")
    with dinosearch.build_index("catalog", model="dino.pth", image_size=32) as index:
        file = index.files()[9]
        assert index.embed([file.path])[0] @ index.vectors()[file.row] == pytest.approx(1, abs=1e-3)
    assert sorted(path.name for path in Path("models").iterdir()) == ["dino", "tiny"]


@pytest.mark.usefixtures("home")
def test_what_cannot_be_read_is_listed_not_raised():
    Path("catalog/china/half.jpg").write_bytes(Path("catalog/china/0.jpg").read_bytes()[:900])
    index = dinosearch.build_index("catalog")
    assert [(Path(failure.path).name, failure.status) for failure in index.failures()] == [("half.jpg", "truncated")]
    assert index.info().failed == 1


def test_an_index_of_int8_is_asked_in_int8(home, monkeypatch):
    monkeypatch.setattr(quantization, "LEAST_COSINE", 0.5)
    write_images(home / "catalog" / "more", 60)
    notes = []
    index = dinosearch.build_index("catalog", precision="int8", device="cpu", note=notes.append)
    assert index.summary.embedded == 84
    assert any("mean cosine" in note for note in notes)
    [match] = index.search("catalog/china/3.jpg", top=1)
    assert (match.path, match.score) == (home / "catalog/china/3.jpg", pytest.approx(1, abs=1e-3))
    assert "int8" in index._encoder.engine
    shutil.rmtree(home / "models/tiny/cache")
    with dinosearch.open_index("catalog", device="cpu") as opened:
        [match] = opened.search("catalog/china/3.jpg", top=1)
        assert (match.path, match.score) == (home / "catalog/china/3.jpg", pytest.approx(1, abs=0.05))
        assert "int8" not in opened._encoder.engine


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("sources", [["catalog", "products.csv"], ["products.csv", "catalog"]])
def test_a_file_that_two_sources_name_comes_up_once_with_what_the_table_says(sources):
    paths = sorted(Path("catalog").rglob("*.jpg"))
    Path("products.csv").write_text("path,number\n" + "\n".join(f"{path},{i}" for i, path in enumerate(paths)))
    index = dinosearch.build_index(sources)
    matches = index.search(paths[3], top=24)
    assert len({match.path for match in matches}) == len(matches) == 24
    assert {match.path.name: match.metadata for match in matches[:1]} == {paths[3].name: {"number": 3}}
    assert all("number" in match.metadata for match in matches)


@pytest.mark.usefixtures("home")
def test_the_eight_orientations_of_a_picture_are_one_to_a_search(photos):
    from PIL import Image

    turned = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    Path("turned").mkdir()
    for orientation, turn in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = photos[0] if turn is None else photos[0].transpose(turn)
        stored.save(f"turned/{orientation}.jpg", quality=95, exif=exif)
    index = dinosearch.build_index("turned")
    for answer in index.search_many([f"turned/{orientation}.jpg" for orientation in turned], top=8):
        assert len(answer) == 8
        assert min(match.score for match in answer) >= 0.9999
