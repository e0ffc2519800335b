import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from dinosearch.errors import DinosearchError, ModelMismatch, ModelNotFound
from dinosearch.vit.folder import (
    FORMAT,
    ModelFacts,
    create_vit,
    find_by_fingerprint,
    free_name,
    list_models,
    models_path,
    open_model,
    remove_model,
    save_model,
)

FACTS = ModelFacts(
    arch="vit_tiny_patch16_224",
    arch_kwargs={"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    image_size=16,
)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return create_vit(FACTS).eval()


def save(path, vit, facts=FACTS, **kwargs):
    return save_model(path, vit, facts, trained={"method": "dino", "steps": 3}, **kwargs)


def edit_json(model, **changes):
    path = model.path / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_saved_model_opens_as_what_it_was(tmp_path, vit):
    facts = dataclasses.replace(FACTS, fit="pad", interpolation="bilinear", mean=(0.5, 0.4, 0.3), crop_pct=0.9)
    saved = save(tmp_path / "cats", vit, facts)
    opened = open_model(tmp_path / "cats")
    assert opened == saved
    assert opened.facts() == facts
    assert (opened.name, opened.dim, opened.trained) == ("cats", 32, {"method": "dino", "steps": 3})
    assert len(opened.fingerprint) == 16
    int(opened.fingerprint, 16)
    opened.verify()
    loaded = opened.load_vit()
    images = torch.randn(2, 3, 16, 16)
    assert not loaded.training
    assert torch.equal(loaded(images), vit(images))
    assert sorted(path.name for path in opened.path.iterdir()) == ["model.json", "weights.safetensors"]


def test_model_json_names_everything_a_reader_needs(tmp_path, vit):
    facts = json.loads((save(tmp_path / "m", vit).path / "model.json").read_text())
    assert facts["format"] == 1  # without stripes
    assert set(facts) == {
        *("format", "arch", "arch_kwargs", "image_size", "fit", "crop_pct", "interpolation", "mean", "std"),
        *("pooling", "stripes", "dim", "fingerprint", "created", "trained"),
    }


def test_timm_loads_the_weights_by_itself(tmp_path, vit):
    model = save(tmp_path / "m", vit)
    loaded = timm.create_model(
        model.arch, checkpoint_path=model.weights_path, num_classes=0, global_pool=model.pooling, **model.arch_kwargs
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), vit(images))


@pytest.mark.parametrize(
    "change",
    [{"fit": "squash"}, {"crop_pct": 0.9}, {"interpolation": "lanczos"}, {"mean": (0.5, 0.5, 0.5)}, {"pooling": "avg"}],
)
def test_preprocessing_and_pooling_change_the_fingerprint(tmp_path, vit, change):
    before = save(tmp_path / "a", vit)
    assert save(tmp_path / "b", vit, dataclasses.replace(FACTS, **change)).fingerprint != before.fingerprint


def test_weights_alone_decide_the_rest_of_the_fingerprint(tmp_path, vit):
    first = save(tmp_path / "a", vit)
    again = save_model(tmp_path / "elsewhere", vit, FACTS, trained={"steps": 99}, created="2020-01-01T00:00:00+00:00")
    assert again.fingerprint == first.fingerprint
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.bias[3] += 1e-6
    assert save(tmp_path / "b", vit).fingerprint != first.fingerprint


def test_half_precision_is_stored_as_float32(tmp_path, vit):
    model = save(tmp_path / "m", vit.bfloat16())
    assert {tensor.dtype for tensor in load_file(model.weights_path).values()} == {torch.float32}


def test_saving_again_keeps_created_and_replaces_the_weights(tmp_path, vit):
    first = save(tmp_path / "m", vit, created="2024-05-01T00:00:00+00:00")
    with torch.no_grad():
        vit.cls_token += 1
    second = save(tmp_path / "m", vit)
    assert second.created == first.created
    assert second.fingerprint != first.fingerprint
    second.verify()


def test_files_get_the_mode_that_the_umask_allows(tmp_path, vit):
    model = save(tmp_path / "m", vit)
    (tmp_path / "plain").touch()
    plain = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in model.path.iterdir()} == {plain}


def test_replaced_weights_are_noticed(tmp_path, vit):
    model = save(tmp_path / "m", vit)
    state = load_file(model.weights_path)
    state["cls_token"] += 1
    save_file(state, model.weights_path)
    with pytest.raises(ModelMismatch, match=r"is not the file that model.json describes.*Restore"):
        model.verify()


def test_edited_preprocessing_is_noticed(tmp_path, vit):
    model = save(tmp_path / "m", vit)
    edit_json(model, crop_pct=0.5)
    with pytest.raises(ModelMismatch):
        open_model(model.path).verify()


def test_missing_weights(tmp_path, vit):
    model = save(tmp_path / "m", vit)
    model.weights_path.unlink()
    with pytest.raises(ModelNotFound, match=r"weights.safetensors is missing. Put it back"):
        model.verify()
    with pytest.raises(DinosearchError, match=r"weights.safetensors cannot be loaded.*Restore"):
        model.load_vit()


@pytest.mark.parametrize("keep", [0, 5, 3000, -100])
def test_cut_weights(tmp_path, vit, keep):
    model = save(tmp_path / "m", vit)
    model.weights_path.write_bytes(model.weights_path.read_bytes()[:keep])
    for use in (model.verify, model.load_vit):
        with pytest.raises(DinosearchError, match="Restore") as raised:
            use()
        assert "\n" not in str(raised.value)


def test_weights_of_another_architecture(tmp_path, vit):
    model = save(tmp_path / "m", vit)
    edit_json(model, arch_kwargs=FACTS.arch_kwargs | {"depth": 3})
    with pytest.raises(DinosearchError, match=r"cannot be loaded as vit_tiny_patch16_224") as raised:
        open_model(model.path).load_vit()
    assert "\n" not in str(raised.value)


def test_a_newer_format_is_refused(tmp_path, vit):
    model = save(tmp_path / "m", vit)
    edit_json(model, format=FORMAT + 1)
    with pytest.raises(DinosearchError, match=rf"newer dinosearch \(model format {FORMAT + 1}\). Update: pip install"):
        open_model(model.path)


def test_keys_of_later_versions_are_ignored(tmp_path, vit):
    model = save(tmp_path / "m", vit)
    edit_json(model, colour="green")
    assert open_model(model.path) == model


@pytest.mark.parametrize("text", ["", "{", '{"arch": ', "[1, 2]", '"text"', "null", "\xff\xfe"])
def test_a_broken_model_json(tmp_path, vit, text):
    model = save(tmp_path / "m", vit)
    (model.path / "model.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DinosearchError, match=r"model.json.*Restore") as raised:
        open_model(model.path)
    assert "\n" not in str(raised.value)


def test_missing_keys_are_named(tmp_path, vit):
    model = save(tmp_path / "m", vit)
    (model.path / "model.json").write_text('{"format": 1, "arch": "vit_tiny_patch16_224", "dim": 32}')
    with pytest.raises(DinosearchError, match=r"lacks arch_kwargs, fingerprint, image_size. Restore"):
        open_model(model.path)


@pytest.mark.parametrize("name", ["nowhere", "file", "file/below"])
def test_no_model(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelNotFound, match=r"no model in .*dinosearch train"):
        open_model(tmp_path / name)


def test_models_are_listed_newest_first_by_their_own_time(tmp_path, vit):
    for name, created in (("a", "2024-01-01"), ("b", "2026-01-01"), ("c", "2025-01-01")):
        save(tmp_path / name, vit, created=f"{created}T00:00:00.000+00:00")
    os.utime(tmp_path / "a" / "model.json", (2e9, 2e9))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "README.md").write_text("models")
    assert [model.name for model in list_models(tmp_path)] == ["b", "c", "a"]
    assert list_models(tmp_path / "nowhere") == []


def test_a_model_is_found_by_its_fingerprint(tmp_path, vit):
    model = save(tmp_path / "a", vit)
    save(tmp_path / "b", vit, dataclasses.replace(FACTS, fit="pad"))
    assert find_by_fingerprint(model.fingerprint, models=tmp_path) == model
    assert find_by_fingerprint("0" * 16, models=tmp_path) is None


def test_a_removed_model_is_gone(tmp_path, vit):
    model = save(tmp_path / "a", vit)
    model.cache_path.mkdir()
    remove_model(model.path)
    assert not model.path.exists()


def test_models_live_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("DINOSEARCH_MODELS", "/elsewhere")
    assert models_path() == Path("/elsewhere")
    monkeypatch.setenv("DINOSEARCH_MODELS", "")
    assert models_path() == Path("models")


def test_names_are_made_free_and_plain(tmp_path):
    assert free_name("cats", tmp_path) == "cats"
    (tmp_path / "cats").mkdir()
    assert free_name("cats", tmp_path) == "cats-2"
    (tmp_path / "cats-2").mkdir()
    assert free_name("cats", tmp_path) == "cats-3"
    assert free_name("../my cats!", tmp_path) == "my-cats"
    assert free_name("//", tmp_path) == "images"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"arch": "vit_smal_patch16_224"}, "timm has no architecture"),
        ({"arch": "vit_tiny"}, "timm has no architecture 'vit_tiny'. Did you mean "),
        ({"arch": "resnet18", "arch_kwargs": {}}, "Choose a vision transformer"),
        ({"arch_kwargs": {"img_size": 16, "patch_size": 8, "embed_dim": 33, "num_heads": 2}}, "timm cannot build"),
        ({"arch_kwargs": {"colour": "green"}}, "timm cannot build"),
    ],
)
def test_impossible_architectures(facts, message):
    with pytest.raises(DinosearchError, match=message) as raised:
        create_vit(dataclasses.replace(FACTS, **facts))
    assert "\n" not in str(raised.value)


def test_reading_facts_imports_no_torch(tmp_path, vit):
    save(tmp_path / "m", vit)
    code = (
        "import sys; from pathlib import Path; from dinosearch.vit.folder import list_models\n"
        f"model, = list_models(Path({str(tmp_path)!r})); model.verify()\n"
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unreadable_model_does_not_hide_the_others(tmp_path: Path) -> None:
    facts = ModelFacts(
        arch="vit_tiny_patch16_224",
        arch_kwargs={"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        image_size=16,
    )
    good = save_model(tmp_path / "good", create_vit(facts), facts, trained={})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.json").write_text("{")
    said: list[str] = []
    assert [model.name for model in list_models(tmp_path, note=said.append)] == ["good"]
    assert len(said) == 1
    assert "bad" in said[0]
    found = find_by_fingerprint(good.fingerprint, models=tmp_path)
    assert found is not None
    assert found.name == "good"
