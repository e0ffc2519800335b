import errno
import os
import subprocess
import sys
import time

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from dinosearch.errors import DinosearchError, ModelNotFound
from dinosearch.vit.folder import ModelFacts, create_vit, list_models, open_model, save_model
from dinosearch.vit.resolve import DEFAULT_MODEL, import_model, resolve_model

FACTS = ModelFacts(
    arch="vit_tiny_patch16_224",
    arch_kwargs={"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1},
    image_size=16,
)
CLOSED = "http://127.0.0.1:9"
"""The discard port: nobody listens."""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder with two models, the newer named "dogs", below an empty working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name, year in (("cats", 2024), ("dogs", 2025)):
        save_model(tmp_path / "models" / name, create_vit(FACTS), FACTS, trained={}, created=f"{year}-01-01T00:00:00")
    return tmp_path / "models"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub out of reach; what lies in the returned folder was fetched before."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_on_hub(hub, arch):
    """Random weights for one of timm's models, laid out as the hub's client caches them; the model itself."""
    torch.manual_seed(1)
    vit = timm.create_model(arch, num_classes=0, global_pool="token")
    repository, commit = hub / f"models--timm--{arch}", "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    save_file(vit.state_dict(), repository / "snapshots" / commit / "model.safetensors")
    return vit.eval()


def test_nothing_named_is_the_newest(models):
    notes = []
    assert resolve_model(None, models=models, note=notes.append).name == "dogs"
    assert len(notes) == 1
    assert "dogs" in notes[0]
    assert "--model" in notes[0]


def test_a_name_a_folder_and_a_relative_folder(models):
    assert resolve_model("cats", models=models).path == models / "cats"
    assert resolve_model(str(models / "cats"), models=models).name == "cats"
    assert resolve_model("models/cats", models=models).name == "cats"


def test_an_own_model_keeps_its_size(models):
    assert resolve_model("cats", models=models, image_size=16).image_size == 16
    with pytest.raises(DinosearchError, match=r"cats works at 16 px. Leave --image-size out"):
        resolve_model("cats", models=models, image_size=32)


@pytest.mark.parametrize("spec", ["birds", "models/birds", "/nowhere", "models", "", "birds.pth"])
def test_unknown_names_list_what_there_is(models, spec):
    with pytest.raises(ModelNotFound, match="There are: dogs, cats"):
        resolve_model(spec, models=models)


def test_an_unknown_name_without_any_model(tmp_path):
    with pytest.raises(ModelNotFound, match=r"no model 'birds'.*dinosearch train IMAGES"):
        resolve_model("birds", models=tmp_path / "models")


def test_a_released_file_is_converted_once(models, tmp_path):
    vit = create_vit(FACTS).eval()
    torch.save({"teacher": {f"backbone.{k}": v for k, v in vit.state_dict().items()}}, tmp_path / "my dino.pth")
    notes = []
    first = resolve_model("my dino.pth", models=models, note=notes.append)
    assert (first.path, first.image_size, first.trained["method"]) == (models / "my-dino", 16, "imported")
    assert torch.equal(first.load_vit()(torch.ones(1, 3, 16, 16)), vit(torch.ones(1, 3, 16, 16)))
    assert resolve_model(str(tmp_path / "my dino.pth"), models=models) == first
    assert len(notes) == 1
    assert "imported as" in notes[0]

    larger = resolve_model("my dino.pth", models=models, image_size=32)
    assert (larger.path, larger.image_size) == (models / "my-dino-2", 32)
    assert resolve_model("my dino.pth", models=models, image_size=32) == larger
    assert resolve_model("my dino.pth", models=models) == first

    torch.save(create_vit(FACTS).state_dict(), tmp_path / "my dino.pth")
    assert resolve_model("my dino.pth", models=models).fingerprint != first.fingerprint


def test_a_broken_file_leaves_no_model_behind(models, tmp_path):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(DinosearchError, match="web page"):
        resolve_model("page.pth", models=models)
    assert len(list(models.iterdir())) == 2


def test_a_known_import_needs_neither_torch_nor_timm(models, tmp_path):
    torch.save(create_vit(FACTS).state_dict(), tmp_path / "dino.pth")
    resolve_model("dino.pth", models=models)
    code = (
        "import sys; from pathlib import Path; from dinosearch.vit.resolve import resolve_model\n"
        "for spec in ('dino.pth', 'cats', None): resolve_model(spec, models=Path('models'))\n"
        "assert not {'torch', 'timm', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_the_default_comes_from_the_hub_once(hub, tmp_path):
    vit = put_on_hub(hub, DEFAULT_MODEL.removeprefix("timm:"))
    models, notes = tmp_path / "models", []
    model = resolve_model(None, models=models, note=notes.append)
    assert model.name == "vit_small_patch14_reg4_dinov2.lvd142m"
    assert (model.image_size, model.crop_pct, model.pooling, model.dim) == (224, 1.0, "token", 384)
    assert len(notes) == 3  # what was chosen by default, that it is fetched, where it went
    assert DEFAULT_MODEL in notes[0]
    vit.set_input_size(224)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(model.load_vit()(images), vit(images))

    (hub / "models--timm--vit_small_patch14_reg4_dinov2.lvd142m").rename(hub / "gone")
    notes.clear()
    assert resolve_model(DEFAULT_MODEL, models=models, note=notes.append) == model
    assert notes == []
    assert [found.name for found in list_models(models)] == [model.name]


def test_another_size_of_a_timm_model_is_another_model(hub, tmp_path):
    put_on_hub(hub, "vit_tiny_patch16_224.augreg_in21k")
    models, spec = tmp_path / "models", "timm:vit_tiny_patch16_224.augreg_in21k"
    native = resolve_model(spec, models=models)
    small = resolve_model(spec, models=models, image_size=96)
    assert (native.image_size, small.image_size) == (224, 96)
    assert (native.crop_pct, native.mean) == (0.9, (0.5, 0.5, 0.5))
    assert native.fingerprint != small.fingerprint
    assert resolve_model(spec, models=models) == native
    assert resolve_model(spec, models=models, image_size=96) == small
    assert resolve_model(spec, models=models, image_size=224) == native
    assert small.load_vit()(torch.zeros(1, 3, 96, 96)).shape == (1, 192)


@pytest.mark.usefixtures("hub")
def test_without_a_network_one_line_names_both_ways_out(tmp_path):
    started = time.monotonic()
    with pytest.raises(ModelNotFound) as raised:
        resolve_model(None, models=tmp_path / "models")
    assert time.monotonic() - started < 10
    message = str(raised.value)
    assert "\n" not in message
    assert "dinosearch train IMAGES" in message
    assert "--model FILE.pth" in message
    assert not (tmp_path / "models").exists()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:vit_smal", "timm has no model 'vit_smal'"),
        ("timm:", "timm has no model ''"),
        ("timm:vit_tiny_patch16_224.fb_dino", r"no weights .* There are timm:vit_tiny_patch16_224\.augreg_in21k"),
        ("timm:vit_tiny_patch16_18x2_224", "timm has no model"),
        ("timm:vit_base_patch16_plus_240", "no pretrained weights.*Choose one with a tag"),
    ],
)
def test_unknown_timm_models(tmp_path, spec, message):
    with pytest.raises(ModelNotFound, match=message) as raised:
        resolve_model(spec, models=tmp_path / "models")
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("hub")
def test_timm_models_that_are_no_vision_transformers_are_refused(tmp_path):
    with pytest.raises(DinosearchError, match="Choose a vision transformer"):
        resolve_model("timm:resnet18.a1_in1k", models=tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.usefixtures("hub")
def test_telemetry_of_the_hub_is_off(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    with pytest.raises(ModelNotFound):
        resolve_model(None, models=tmp_path / "models")
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


@pytest.mark.usefixtures("hub")
def test_a_proxy_that_does_not_answer_is_told_in_one_line(tmp_path, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, CLOSED)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    started = time.monotonic()
    with pytest.raises(ModelNotFound, match="could not be fetched") as raised:
        resolve_model(None, models=tmp_path / "models")
    assert time.monotonic() - started < 20
    assert "\n" not in str(raised.value)


def test_the_newest_model_keeps_its_size_too(models):
    with pytest.raises(DinosearchError, match=r"dogs works at 16 px"):
        resolve_model(None, models=models, image_size=32)


def test_the_weights_of_a_folder_are_its_model(models):
    assert resolve_model("models/cats/weights.safetensors", models=models).name == "cats"
    assert len(list(models.iterdir())) == 2


def test_an_import_takes_a_name_and_a_size_and_is_found_again(models, tmp_path):
    vit = create_vit(FACTS).eval()
    torch.save(vit.state_dict(), tmp_path / "dino.pth")
    small = import_model("dino.pth", models=models)
    assert (small.name, small.image_size) == ("dino", 16)
    with pytest.raises(DinosearchError, match="import its file again: --model FILE --image-size 32"):
        resolve_model("dino", models=models, image_size=32)
    large = import_model("dino.pth", models=models, name="large", image_size=32)
    assert (large.path, large.image_size) == (models / "large", 32)
    assert large.load_vit()(torch.ones(1, 3, 32, 32)).shape == (1, 64)
    assert import_model("dino.pth", models=models) == small
    assert import_model("dino.pth", models=models, image_size=32) == large
    assert import_model("models/cats/weights.safetensors", models=models).name == "cats-2"
    assert (
        import_model("models/dogs", models=models, name="wolves").fingerprint == open_model(models / "dogs").fingerprint
    )


@pytest.mark.parametrize(
    ("spec", "name", "message"),
    [
        ("dino.pth", "cats", "exists. Choose another --name"),
        ("dino.pth", "a/b", "no name"),
        ("gone.pth", None, "no file"),
    ],
)
def test_an_import_refuses_what_it_cannot_do(models, tmp_path, spec, name, message):
    torch.save(create_vit(FACTS).state_dict(), tmp_path / "dino.pth")
    with pytest.raises(DinosearchError, match=message):
        import_model(spec, models=models, name=name)
    assert {model.name for model in list_models(models)} == {"cats", "dogs"}


@pytest.mark.usefixtures("hub")
def test_patches_fill_the_square_of_a_timm_model(tmp_path):
    with pytest.raises(DinosearchError, match=r"512 px is no multiple .* of 14 px. Use --image-size 504 or 518"):
        resolve_model(None, models=tmp_path / "models", image_size=512)
    with pytest.raises(DinosearchError, match=r"100 px is no multiple .* of 8 px. Use --image-size 96 or 104"):
        resolve_model("timm:xcit_small_12_p8_224.fb_in1k", models=tmp_path / "models", image_size=100)
    assert not (tmp_path / "models").exists()


def test_an_imported_model_of_timm_may_have_another_size_later(hub, tmp_path):
    put_on_hub(hub, "vit_tiny_patch16_224.augreg_in21k")
    models = tmp_path / "models"
    native = resolve_model("timm:vit_tiny_patch16_224.augreg_in21k", models=models)
    small = resolve_model(None, models=models, image_size=96)
    assert (small.image_size, small.arch) == (96, native.arch)
    assert resolve_model(native.name, models=models, image_size=96) == small
    assert resolve_model(native.name, models=models, image_size=224) == native


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written .Permission denied.; HF_HOME"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be written .No space left on device.; HF_HOME"),
        (ConnectionError("reset"), "no way to the Hugging Face hub"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_why_nothing_was_fetched_is_told(tmp_path, monkeypatch, error, says):
    def fails(*_args, pretrained=False, **_kwargs):
        assert pretrained
        raise error

    monkeypatch.setattr("timm.create_model", fails)
    with pytest.raises(ModelNotFound, match=says):
        resolve_model(None, models=tmp_path / "models")
