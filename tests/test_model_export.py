"""Exports of models, read back by who will read them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from dinosearch.encoder import export
from dinosearch.encoder.conversion import import_openvino
from dinosearch.encoder.export import export_model
from dinosearch.errors import DinosearchError, UsageError
from dinosearch.vit.folder import ModelFacts, create_vit, open_model, quiet, save_model

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FACTS = ModelFacts(arch="vit_tiny_patch16_224", arch_kwargs=SMALL, image_size=16)


def saved(path, facts=FACTS, **kwargs):
    """A random model, of which no tensor is all zeros or ones."""
    facts = replace(facts, arch_kwargs=facts.arch_kwargs | kwargs)
    torch.manual_seed(0)
    vit = create_vit(facts)
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return save_model(path, vit, facts, trained={})


def some_pixels(n=5):
    return np.random.default_rng(7).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


def vectors_of(model, pixels):
    """By the definition of `ModelFolder.load_vit`."""
    images = (torch.from_numpy(pixels).float() / 255 - torch.tensor(model.mean)) / torch.tensor(model.std)
    vectors = model.load_vit()(images.permute(0, 3, 1, 2)).detach().numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_timm_loads_the_weights_by_itself(tmp_path):
    saved(tmp_path / "m")
    facts = json.loads((tmp_path / "m/model.json").read_text())
    vit = timm.create_model(
        facts["arch"], num_classes=0, **facts["arch_kwargs"], checkpoint_path=str(tmp_path / "m/weights.safetensors")
    )
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(vit.eval()(images), open_model(tmp_path / "m").load_vit()(images))


@pytest.mark.parametrize("pooling", [{}, {"pooling": "avg", "stripes": 2}], ids=["token", "stripes"])
@pytest.mark.parametrize(("form", "ending"), [("onnx", "onnx"), ("openvino", "xml")])
def test_a_graph_gives_the_vectors_of_the_model_for_any_number_of_images(tmp_path, form, ending, pooling):
    if form == "onnx":
        pytest.importorskip("onnx")
    model = saved(tmp_path / "m", replace(FACTS, **pooling), reg_tokens=2)
    written = export_model(model, form=form, out=tmp_path / "out" / "tiny", note=quiet)
    assert written.cosine > 0.99999
    assert written.max_difference < 1e-4
    compiled = (
        import_openvino()
        .Core()
        .compile_model(str(tmp_path / f"out/tiny.{ending}"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    )
    for n in (1, 5):
        pixels = some_pixels(n)
        assert np.abs(compiled({"pixels": pixels})["vectors"] - vectors_of(model, pixels)).max() < 1e-4
    told = json.loads((tmp_path / "out/tiny.json").read_text())
    assert told["fingerprint"] == model.fingerprint
    assert told["input"].startswith("pixels: uint8 [n, 16, 16, 3]")
    assert {path.name for path in written.files} == {path.name for path in (tmp_path / "out").iterdir()}


def test_onnx_says_of_itself_what_it_is(tmp_path):
    onnx = pytest.importorskip("onnx")
    model = saved(tmp_path / "m")
    [path, _] = sorted(export_model(model, form="onnx", out=tmp_path / "m.onnx", note=quiet).files, reverse=True)
    written = onnx.load(str(path))
    onnx.checker.check_model(written)
    facts = {entry.key: entry.value for entry in written.metadata_props}
    assert facts["fingerprint"] == model.fingerprint
    assert json.loads(facts["mean"]) == list(model.mean)


def test_unlike_vectors_are_refused_and_nothing_is_kept(tmp_path, monkeypatch):
    model = saved(tmp_path / "m")
    monkeypatch.setattr(export, "_by_openvino", lambda _path: lambda pixels: -vectors_of(model, pixels))
    with pytest.raises(DinosearchError, match=r"cosine -1\.0000"):
        export_model(model, form="openvino", out=tmp_path / "out/m", note=quiet)
    assert not list((tmp_path / "out").iterdir())


def test_what_cannot_be_is_said_in_one_line(tmp_path, monkeypatch):
    model = saved(tmp_path / "m")
    with pytest.raises(UsageError, match="onnx, openvino, hf"):
        export_model(model, form="tflite", note=quiet)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(DinosearchError, match=r"dinosearch\[onnx\]"):
        export_model(model, form="onnx", out=tmp_path / "x", note=quiet)


HF_CASES = [
    ({}, "vit"),
    ({"init_values": 0.5}, "dinov2"),
    ({"init_values": 0.5, "reg_tokens": 3, "no_embed_class": True}, "dinov2_with_registers"),
    ({"reg_tokens": 3}, "dinov2_with_registers"),
]


@pytest.mark.parametrize(("kwargs", "model_type"), HF_CASES)
def test_transformers_loads_it_and_gives_the_vectors(tmp_path, kwargs, model_type):
    pytest.importorskip("transformers")
    model = saved(tmp_path / "m", **kwargs)
    written = export_model(model, form="hf", out=tmp_path / "hf", note=quiet)
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == model_type
    assert written.cosine > 0.99999
    assert written.max_difference < 1e-5


@pytest.mark.parametrize(("kwargs", "model_type"), HF_CASES)
def test_the_folder_for_transformers_holds_every_tensor(tmp_path, kwargs, model_type, monkeypatch):
    monkeypatch.setattr(export, "_compare", lambda *_: (1.0, 0.0))
    model = saved(tmp_path / "m", **kwargs)
    export_model(model, form="hf", out=tmp_path / "hf", note=quiet)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == (model_type, 32, 2)
    ours, theirs = load_file(model.weights_path), load_file(tmp_path / "hf/model.safetensors")
    query = theirs["encoder.layer.1.attention.attention.query.weight"]
    assert torch.equal(query, ours["blocks.1.attn.qkv.weight"][:32])
    assert theirs["embeddings.position_embeddings"].shape == (1, 1 + 4, 32)
    # theirs has its own of: pooler (an identity), mask token, scales of 1
    extra = {"vit": 32 * 32 + 32, "dinov2": 32}.get(model_type, 32 + (0 if "init_values" in kwargs else 4 * 32))
    n_ours = sum(tensor.numel() for tensor in ours.values())
    shift = 32 if kwargs.get("no_embed_class") else -32 * kwargs.get("reg_tokens", 0)  # positions of class, registers
    assert sum(tensor.numel() for tensor in theirs.values()) == n_ours + extra + shift


FOREIGN = [
    (replace(FACTS, pooling="avg"), "class token"),
    (replace(FACTS, pooling="avg", stripes=2, arch_kwargs=SMALL | {"class_token": False}), "class token"),
    (replace(FACTS, arch_kwargs=SMALL | {"qk_norm": True}), "blocks"),
    (
        ModelFacts("vit_small_patch16_dinov3", {"img_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}, 16),
        "Eva",
    ),
]


@pytest.mark.parametrize(("facts", "why"), FOREIGN)
def test_other_models_are_timms_within_transformers(tmp_path, facts, why, monkeypatch):
    monkeypatch.setattr(export, "_compare", lambda *_: (1.0, 0.0))
    model, said = saved(tmp_path / "m", facts), []
    export_model(model, form="hf", out=tmp_path / "hf", note=said.append)
    assert any("timm_wrapper" in line and why in line for line in said)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    vit = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).eval()  # as the wrapper does
    tensors = load_file(tmp_path / "hf/model.safetensors")
    vit.load_state_dict({name.removeprefix("timm_model."): tensor for name, tensor in tensors.items()})
    images = torch.randn(2, 3, 16, 16)
    patches = vit.forward_features(images)[:, vit.num_prefix_tokens :]
    vectors = vit(images) if model.stripes == 1 else vit.fc_norm(patches.unflatten(1, (2, -1)).mean(dim=2)).flatten(1)
    torch.testing.assert_close(vectors, model.load_vit()(images), atol=1e-5, rtol=1e-5)
    assert ("last_hidden_state" in (tmp_path / "hf/dinosearch.json").read_text()) == (model.stripes > 1)


@pytest.mark.parametrize(("facts", "why"), FOREIGN)
def test_transformers_loads_them_too(tmp_path, facts, why):
    pytest.importorskip("transformers")
    written = export_model(saved(tmp_path / "m", facts), form="hf", out=tmp_path / "hf", note=quiet)
    assert written.cosine > 0.99999, why
    assert written.max_difference < 1e-5


@pytest.mark.parametrize(("form", "ending"), [("onnx", "onnx"), ("openvino", "xml")])
def test_a_model_of_five_channels_is_exported_with_five(tmp_path, form, ending):
    if form == "onnx":
        pytest.importorskip("onnx")
    five = replace(FACTS, mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(0.2, 0.3, 0.2, 0.3, 0.2))
    model = saved(tmp_path / "m", five, in_chans=5)
    written = export_model(model, form=form, out=tmp_path / "five", note=quiet)
    assert written.cosine > 0.99999
    pixels = np.random.default_rng(7).integers(0, 256, (3, 16, 16, 5), dtype=np.uint8)
    graph = (
        import_openvino()
        .Core()
        .compile_model(str(tmp_path / f"five.{ending}"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    )
    assert np.allclose(graph({0: pixels})[0], vectors_of(model, pixels), atol=1e-5)
    assert "[n, 16, 16, 5]" in json.loads((tmp_path / "five.json").read_text())["input"]
