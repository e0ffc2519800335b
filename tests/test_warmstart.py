"""Runs that start from weights: what they take over, leave behind, refuse, and how they go on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dinosearch.pretrain.course as course
import dinosearch.pretrain.warmstart as warmstart
from dinosearch.cli.train import _print_report
from dinosearch.errors import DinosearchError, UsageError
from dinosearch.pretrain.config import TrainConfig
from dinosearch.pretrain.course import TrainReport
from dinosearch.pretrain.overrides import read_config
from dinosearch.pretrain.quality import Quality
from dinosearch.pretrain.train import train
from dinosearch.pretrain.warmstart import improved
from dinosearch.vit.folder import ModelFacts, create_vit, open_model, save_model
from dinosearch.vit.resolve import import_model

QUICK: dict[str, Any] = {"batch_size": 8, "out_dim": 32, "local_crops": 2, "local_size": 8}
NO_HEAD: dict[str, Any] = dict.fromkeys(("out_dim", "local_crops", "local_size"))
"""What distillation has no use for, left out."""
FACTS = ModelFacts(
    arch="vit_tiny_patch16_224",
    arch_kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 1},
    image_size=16,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
    pooling="avg",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("train") / "digits"
    folder.mkdir()
    for i, digit in enumerate(load_digits().images[:20]):
        Image.fromarray((digit * 15.9).astype(np.uint8)).resize((20, 20)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with one model of our own, "cats"."""
    torch.manual_seed(1)
    save_model(tmp_path / "models" / "cats", create_vit(FACTS), FACTS, trained={"method": "dino"})
    return tmp_path / "models"


def run(images: Path, models: Path, **settings: Any) -> TrainReport:
    overrides = QUICK | settings.pop("overrides", {})
    note, stop = settings.pop("note", lambda _: None), settings.pop("stop", lambda: False)
    config = TrainConfig(images=(images,), models=models, device="cpu", overrides=overrides, **settings)
    report = list(train(config, note=note, stop=stop))[-1].report
    assert report is not None
    return report


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def released(folder: Path) -> Path:
    """A file in DINO's layout, of 16 px in patches of 4."""
    facts = ModelFacts(arch=FACTS.arch, arch_kwargs=FACTS.arch_kwargs, image_size=16)
    torch.manual_seed(2)
    torch.save({"teacher": create_vit(facts).state_dict()}, folder / "dino.pth")
    return folder / "dino.pth"


def stops_after(n_asked: int) -> Any:
    asked = iter(range(n_asked))
    return lambda: next(asked, None) is None


def test_the_start_decides_architecture_and_preprocessing(images: Path, models: Path) -> None:
    run(images, models, start="cats", steps=0, name="same")
    cats, same = open_model(models / "cats"), open_model(models / "same")
    assert (same.arch, same.mean, same.std, same.pooling) == (cats.arch, cats.mean, cats.std, "avg")
    assert all(torch.equal(tensor, weights(cats.path)[name]) for name, tensor in weights(same.path).items())
    assert same.trained["start"] == {"model": "cats", "fingerprint": cats.fingerprint}
    recipe = same.trained["recipe"]
    assert recipe["lr"] == pytest.approx(0.1 * warmstart.usual_lr(8))
    assert (recipe["freeze_backbone"], recipe["layer_decay"], recipe["teacher_momentum"]) == (0.1, 0.9, 0.996)
    run(images, models, start="cats", steps=0, name="other", overrides={"lr": 0.5, "layer_decay": 1.0})
    other = open_model(models / "other").trained["recipe"]
    assert (other["lr"], other["layer_decay"], other["freeze_backbone"]) == (0.5, 1.0, 0.1)


def test_images_meet_the_square_as_the_start_was_made_for(images: Path, models: Path) -> None:
    squashed = replace(FACTS, fit="squash")
    save_model(models / "cats", create_vit(squashed), squashed, trained={"method": "dino"})
    run(images, models, start="cats", steps=0, name="same")
    assert open_model(models / "same").fit == "squash"


def test_stripes_come_along_as_far_as_they_cut_the_rows(images: Path, models: Path) -> None:
    striped = replace(FACTS, stripes=4)
    save_model(models / "cats", create_vit(striped), striped, trained={"method": "dino"})
    for settings, stripes in (({}, 4), ({"image_size": 24}, 2), ({"stripes": 1}, 1)):
        run(images, models, start="cats", steps=0, overrides=settings, name=f"by-{stripes}")
        made = open_model(models / f"by-{stripes}")
        assert (made.stripes, made.dim) == (stripes, 64 * stripes)
        assert made.load_vit()(torch.zeros(2, 3, made.image_size, made.image_size)).shape == (2, made.dim)


def test_a_start_is_compared_and_exported_with_the_stripes_of_the_run(
    images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    striped = replace(FACTS, stripes=4)
    save_model(models / "cats", create_vit(striped), striped, trained={"method": "dino"})
    lengths = []

    def measure(backbone: Any, *_: Any, **__: Any) -> Quality:
        with torch.inference_mode():
            lengths.append(backbone(torch.zeros(1, 3, 16, 16)).shape[1])
        return Quality(recall_at_1=0.5, rank=2.0)  # as good as before: the start is exported

    monkeypatch.setattr(course, "measure_quality", measure)
    run(images, models, start="cats", steps=2, overrides={"stripes": 1}, name="plain")
    plain = open_model(models / "plain")
    assert set(lengths) == {64}
    assert (plain.dim, plain.trained["start"]["exported"]) == (64, True)
    assert all(torch.equal(tensor, weights(plain.path)[name]) for name, tensor in weights(models / "cats").items())


def test_positions_are_resized_to_the_size_that_is_trained(images: Path, models: Path) -> None:
    run(images, models, start="cats", steps=0, overrides={"image_size": 24}, name="large")
    large = open_model(models / "large")
    assert (large.image_size, large.arch_kwargs["img_size"]) == (24, 24)
    before, after = weights(models / "cats"), weights(large.path)
    assert after["pos_embed"].shape == (1, 1 + 36, 64)
    assert torch.equal(after["blocks.1.mlp.fc1.weight"], before["blocks.1.mlp.fc1.weight"])
    assert torch.equal(after["pos_embed"][:, 0], before["pos_embed"][:, 0])
    with pytest.raises(DinosearchError, match="no multiple of the model's patches of 4 px"):
        run(images, models, start="cats", steps=0, overrides={"image_size": 18}, name="odd")


@pytest.mark.parametrize("name", ["arch", "patch_size", "arch_kwargs", "fit"])
def test_what_the_start_decides_cannot_be_chosen_beside_it(images: Path, models: Path, name: str) -> None:
    value = {"arch": "vit_tiny_patch16_224", "patch_size": 8, "arch_kwargs": {"depth": 3}, "fit": "pad"}[name]
    with pytest.raises(UsageError, match="comes from the model given by --from"):
        run(images, models, start="cats", steps=1, overrides={name: value})


@pytest.mark.slow
def test_a_run_from_weights_resumes_without_them_to_the_same_bits(images: Path, tmp_path: Path) -> None:
    models, file = tmp_path / "models", released(tmp_path)
    whole = run(images, models, start=str(file), steps=8, name="whole")
    half = run(images, models, start=str(file), steps=8, name="half", stop=stops_after(5))
    assert half.stopped
    file.unlink()
    imported = next(model for model in models.iterdir() if model.name.startswith("dino"))
    imported.rename(tmp_path / "gone")
    resumed = run(images, models, name="half", resume=True)
    assert (resumed.resumed_from_step, resumed.steps) == (half.steps, 8)
    assert resumed.fingerprint == whole.fingerprint
    origin = open_model(models / "half").trained["start"]
    assert (origin["model"], origin["fingerprint"]) == ("dino", open_model(tmp_path / "gone").fingerprint)
    assert str(file) in origin["source"]
    with pytest.raises(UsageError, match=r"begun with --from .*dino.pth, not cats"):
        run(images, models, name="half", resume=True, start="cats")


def test_few_images_start_from_imported_weights_unless_told_otherwise(models: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def choice(spec: str | None = None, *, chosen: bool = False, n_images: int = 20) -> str | None:
        start = warmstart.choose_start(
            spec, models=models, n_images=n_images, image_size=None, chosen=chosen, note=said.append
        )
        return start.origin["model"] if start else None

    assert choice() is None  # a model of our own is no start unless asked for
    assert "released weights will probably do better" in said.pop()
    import_model(str(released(tmp_path)), models=models, name="dino")
    assert choice() == "dino"
    assert "--from scratch" in said.pop()
    assert choice("cats") == "cats"
    assert (choice("scratch"), choice(chosen=True), choice(n_images=warmstart.STARTS_BELOW)) == (None, None, None)
    assert not said


@pytest.mark.slow
def test_a_small_model_learns_from_a_larger_one_and_resumes_to_the_same_bits(images: Path, models: Path) -> None:
    cats = open_model(models / "cats")
    settings: dict[str, Any] = {
        "teacher": "cats",
        "steps": 6,
        "overrides": {"method": "distill", "image_size": 8, "patch_size": 4} | NO_HEAD,
    }
    whole = run(images, models, name="whole", **settings)
    half = run(images, models, name="half", stop=stops_after(4), **settings)
    assert half.stopped
    cats.path.rename(models / "away")  # the fingerprint finds it under any name
    resumed = run(images, models, name="half", resume=True, overrides=NO_HEAD)
    assert resumed.fingerprint == whole.fingerprint
    model = open_model(models / "half")
    assert (model.trained["method"], model.image_size) == ("distill", 8)
    assert model.trained["teacher"] == {"model": "away", "fingerprint": cats.fingerprint}
    assert model.load_vit()(torch.zeros(1, 3, 8, 8)).shape == (1, model.dim)


def test_a_teacher_that_lies_elsewhere_is_found_there_again(images: Path, models: Path, tmp_path: Path) -> None:
    (models / "cats").rename(tmp_path / "cats")
    overrides = {"method": "distill", "image_size": 8, "patch_size": 4} | NO_HEAD
    teacher = str(tmp_path / "cats")
    assert run(images, models, name="a", teacher=teacher, steps=6, stop=stops_after(4), overrides=overrides).stopped
    assert run(images, models, name="a", resume=True, overrides=NO_HEAD).steps == 6
    run(images, models, name="b", teacher=teacher, steps=6, stop=stops_after(4), overrides=overrides)
    facts = open_model(tmp_path / "cats")
    torch.manual_seed(8)
    save_model(tmp_path / "cats", create_vit(facts), FACTS, trained={"method": "dino"})  # another one in its place
    with pytest.raises(DinosearchError, match="which this run learns from"):
        run(images, models, name="b", resume=True, overrides=NO_HEAD)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "cats"}, "go together"),
        ({"overrides": {"method": "distill"} | NO_HEAD}, "go together"),
    ],
)
def test_a_teacher_and_distillation_go_together(images: Path, models: Path, settings: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(images, models, steps=1, **settings)


def test_better_is_more_recall_and_then_more_rank() -> None:
    start = Quality(recall_at_1=0.8, rank=10.0)
    assert improved(Quality(0.9, 5.0), start)
    assert improved(Quality(0.8, 11.0), start)
    assert not improved(Quality(0.8, 10.0), start)
    assert not improved(Quality(0.79, 50.0), start)


@pytest.mark.parametrize("better", [False, True])
def test_what_is_exported_is_never_worse_than_the_start(
    images: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], better: bool
) -> None:
    def measured(backbone: torch.nn.Module, *_: Any, **__: Any) -> Quality:
        start = weights(models / "cats")
        trained = any(not torch.equal(tensor, start[name]) for name, tensor in backbone.state_dict().items())
        return Quality(recall_at_1=0.9 if trained == better else 0.8, rank=5.0)

    monkeypatch.setattr(course, "measure_quality", measured)
    said: list[str] = []
    report = run(images, models, start="cats", steps=4, name="new", note=said.append, overrides={"freeze_backbone": 0})
    cats, new = open_model(models / "cats"), open_model(models / "new")
    assert report.fingerprint == new.fingerprint
    same = all(torch.equal(tensor, weights(new.path)[name]) for name, tensor in weights(cats.path).items())
    assert same == (not better)
    assert any("nothing learnt improved on the start" in line for line in said) == (not better)
    assert new.trained["start"]["exported"] == (not better)
    assert new.trained["start"]["quality"]["recall_at_1"] == (0.8 if better else 0.9)
    assert (report.quality["step"], report.quality["recall_at_1"]) == (4 if better else 0, 0.9)
    _print_report(report)
    assert f"features of step {4 if better else 0}: recall@1 0.900" in capsys.readouterr().out
    assert run(images, models, name="new", resume=True) == report


@pytest.mark.parametrize("better", [False, True])
def test_labels_that_choose_judge_the_start_too(
    images: Path, models: Path, monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    start = weights(models / "cats")

    def is_start(backbone: torch.nn.Module) -> bool:
        return all(torch.equal(tensor, start[name]) for name, tensor in backbone.state_dict().items())

    def accuracy(backbone: torch.nn.Module, _facts: ModelFacts) -> tuple[float, int]:
        return (0.5 if is_start(backbone) == better else 0.75), 40

    def recall(backbone: torch.nn.Module, *_: Any, **__: Any) -> Quality:  # says the opposite
        return Quality(recall_at_1=0.9 if is_start(backbone) == better else 0.8, rank=5.0)

    monkeypatch.setattr(course, "measure_quality", recall)
    settings: dict[str, Any] = {"steps": 4, "start": "cats", "overrides": {"freeze_backbone": 0}}
    said: list[str] = []
    report = run(images, models, name="new", evaluate=accuracy, select="labels", note=said.append, **settings)
    assert open_model(models / "new").trained["start"]["exported"] == (not better)
    assert report.knn_top1 == 0.75
    assert any("right by k-NN, by the start 0.750" in line for line in said) == (not better)
    if better:
        by_recall = run(images, models, name="other", evaluate=accuracy, **settings)
        assert open_model(models / "other").trained["start"]["exported"]
        assert by_recall.knn_top1 == 0.5


def test_a_release_is_read_at_the_size_that_is_trained(tmp_path: Path) -> None:
    facts = ModelFacts(arch=FACTS.arch, arch_kwargs=FACTS.arch_kwargs | {"img_size": 264}, image_size=264)
    vit = create_vit(facts)
    torch.save({"teacher": vit.state_dict()}, tmp_path / "dino.pth")
    start = warmstart.choose_start(
        str(tmp_path / "dino.pth"),
        models=tmp_path / "models",
        n_images=20,
        image_size=264,
        chosen=False,
        note=lambda _: None,
    )
    assert start is not None
    positions: Any = start.backbone.pos_embed
    assert torch.equal(positions, vit.state_dict()["pos_embed"]), "not by way of 224 px, the size of a plain import"


def test_a_start_of_a_run_that_never_began_is_none_of_the_next(images: Path, models: Path) -> None:
    run(images, models, start="cats", steps=1, name="a")
    (models / "a" / "model.json").unlink()
    for checkpoint in (models / "a" / "training").glob("checkpoint-*"):
        checkpoint.unlink()
    kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    settings: dict[str, Any] = {
        "name": "a",
        "resume": True,
        "steps": 12,
        "overrides": {"image_size": 16, "patch_size": 4, "arch_kwargs": kwargs},
    }
    assert run(images, models, stop=stops_after(6), **settings).stopped
    assert run(images, models, **settings).steps == 12
    assert "start" not in open_model(models / "a").trained


def test_what_does_not_fit_is_no_start_unless_it_is_asked_for(models: Path, tmp_path: Path) -> None:
    dino = import_model(str(released(tmp_path)), models=models, name="dino")
    said: list[str] = []

    def chosen(spec: str | None = None, **asked: Any) -> warmstart.Start | None:
        settings: dict[str, Any] = {"image_size": None, "channels": None} | asked
        return warmstart.choose_start(spec, models=models, n_images=20, chosen=False, note=said.append, **settings)

    start = chosen()
    assert start is not None
    assert start.origin["fingerprint"] == dino.fingerprint
    assert chosen(channels=3) is not None
    assert chosen(channels=5) is None
    assert chosen(image_size=18) is None
    assert "dino is no start for them" in said[-2]
    with pytest.raises(UsageError, match=r"--from dino takes images of 3 channels, not 5.*scratch"):
        chosen("dino", channels=5)


def test_a_stopped_run_is_no_worse_than_its_start_either(
    images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(course, "improved", lambda *_: False)
    report = run(images, models, start="cats", steps=50, name="stopped", stop=stops_after(6))
    assert report.stopped
    start = weights(models / "cats")
    assert all(torch.equal(start[name], tensor) for name, tensor in weights(models / "stopped").items())


def test_a_recipe_of_a_model_that_learnt_from_another_wants_one(images: Path, models: Path) -> None:
    run(images, models, start="cats", steps=1, name="first")
    page = (models / "first" / "README.md").read_text()
    assert "--config model.json --from cats" in page
    recipe = models / "first" / "model.json"
    with pytest.raises(UsageError, match=r"learnt from cats.*--from"):
        read_config(recipe)
    given = read_config(recipe, start="cats")
    assert not set(given) & set(warmstart.DECIDED)
    assert given["lr"] == open_model(models / "first").trained["recipe"]["lr"]
    assert read_config(recipe, start="scratch")["arch"] == FACTS.arch
