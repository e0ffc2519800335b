"""The picture and the page that a run leaves in its model's folder."""

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image, ImageColor

from dinosearch.pretrain.card import card, write_card
from dinosearch.pretrain.curves import ALARM, CURVE, GIVEN_UP, HEIGHT, WIDTH, draw_curves
from dinosearch.pretrain.recipe import Recipe
from dinosearch.vit.folder import ModelFacts, ModelFolder, create_vit, save_model

ALARMED = {"step": 30, "kind": "collapse", "why": "all alike", "back_to_step": 10, "changed": "lr 0.1 → 0.001"}


def line(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "loss": 5.0 - step / 100, "images_per_second": 10.0, **values}


def a_model(path: Path, **trained: Any) -> ModelFolder:
    recipe = Recipe(arch="vit_tiny_patch16_224", arch_kwargs={"img_size": 32}, image_size=32, patch_size=8)
    facts = {
        "method": "dino",
        "data": ["photos|of cats"],
        "images": 1234,
        "seed": 5,
        "steps": 60,
        "epochs": 1.5,
        "loss": 4.5,
        "recipe": json.loads(json.dumps(recipe.facts())),
        "health": {"teacher_kl": 0.5, "rank": 12.0, "alarms": []},
    }
    return ModelFolder(
        arch=recipe.arch, arch_kwargs=recipe.arch_kwargs, image_size=32, path=path, dim=192, trained=facts | trained
    )


def has(path: Path, colour: str, box: tuple[int, int, int, int]) -> bool:
    pixels = np.asarray(Image.open(path).crop(box).convert("RGB"))
    return bool((pixels == ImageColor.getrgb(colour)).all(axis=2).any())


def test_one_panel_per_signal_that_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    assert draw_curves([line(step, rank=float(step), lr=0.1) for step in (1, 10, 20)], path)
    assert Image.open(path).size == (2 * WIDTH, 2 * HEIGHT)
    for i in range(3):
        left, top = i % 2 * WIDTH, i // 2 * HEIGHT
        assert has(path, CURVE, (left, top, left + WIDTH, top + HEIGHT))
    assert not has(path, CURVE, (WIDTH, HEIGHT, 2 * WIDTH, 2 * HEIGHT))


def test_a_rising_signal_is_drawn_rising(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    draw_curves([{"step": step, "rank": float(step)} for step in (0, 50, 100)], path)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    heights, columns = np.nonzero((pixels == ImageColor.getrgb(CURVE)).all(axis=2))
    assert np.corrcoef(columns, heights)[0, 1] < -0.99  # rows count from the top


def test_an_alarm_and_what_was_given_up_are_seen(tmp_path: Path) -> None:
    path, whole = tmp_path / "curves.png", (0, 0, WIDTH, HEIGHT)
    lines = [line(1), line(10), line(20), line(30), {"alarm": ALARMED}, line(20), line(40)]
    assert draw_curves(lines, path)
    assert all(has(path, colour, whole) for colour in (CURVE, GIVEN_UP, ALARM))
    assert draw_curves([line(1), line(10)], path)
    assert not has(path, ALARM, whole)
    assert not has(path, GIVEN_UP, whole)


@pytest.mark.parametrize("lines", [[], [line(1)], [line(1), line(2, loss=None)]])
def test_without_two_points_there_is_no_picture(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    assert not draw_curves(lines, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_signal_that_never_moves_is_drawn_too(tmp_path: Path) -> None:
    assert draw_curves([line(step, feature_std=1.0) for step in (1, 2)], tmp_path / "curves.png")


def test_the_card_tells_data_recipe_outcome_and_limits(tmp_path: Path) -> None:
    text = card(a_model(tmp_path / "cats"), curves=True)
    for told in ("# cats", "1,234 images", "photos|of cats", "curves.png", "teacher temperature | 0.04", "No alarm"):
        assert told in text
    assert "## Limits" in text
    assert "rank | 12 (" in text
    assert "](curves.png)" not in card(a_model(tmp_path / "cats"), curves=False)


def test_the_card_tells_how_to_load_it_and_what_it_came_from(tmp_path: Path) -> None:
    told = card(
        a_model(
            tmp_path / "cats",
            failed=7,
            reasons={"lr": "a third of the usual"},
            quality={"recall_at_1": 0.75, "step": 50},
            start={"model": "x", "source": "timm:vit_small_patch16_dinov3.lvd1689m"},
        ),
        curves=False,
    )
    assert "; 7 more could not be read" in told
    assert "| lr | 0.001 | a third of the usual |" in told
    assert "recall_at_1 | 0.75 (" in told or "recall at 1 | 0.75 (" in told
    assert "the DINOv3 License" in told
    assert "dinosearch export models/cats --to onnx" in told
    assert "licence" not in card(a_model(tmp_path / "cats"), curves=False)


def test_the_code_of_the_card_loads_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    facts = ModelFacts(
        arch="vit_tiny_patch16_224",
        arch_kwargs={"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        image_size=16,
    )
    trained = a_model(tmp_path / "cats").trained
    model = save_model(tmp_path / "models/cats", create_vit(facts), facts, trained=trained)
    lines = card(model, curves=False).partition("import timm\n")[2].partition("\n\n")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"timm": timm}
    exec(textwrap.dedent(lines), names)
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(names["vit"](images), model.load_vit()(images))


def test_the_code_of_the_card_gives_vectors_by_stripes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    facts = ModelFacts("vit_tiny_patch16_224", small, 16, pooling="avg", stripes=2)
    trained = a_model(tmp_path / "cats").trained
    model = save_model(tmp_path / "models/cats", create_vit(facts), facts, trained=trained)
    told = card(model, curves=False)
    assert "64 numbers, pooling `avg` in each of 2 horizontal stripes" in told
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"timm": timm, "pixels": torch.randn(3, 3, 16, 16)}
    exec(textwrap.dedent(told.partition("import timm\n")[2].partition("where pixels is")[0]), names)
    torch.testing.assert_close(names["vectors"], model.load_vit()(names["pixels"]), rtol=1e-5, atol=1e-6)


def test_a_wild_excursion_does_not_flatten_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    lines = [line(1, lr=0.1), line(20, lr=1e6), {"alarm": ALARMED | {"step": 20, "back_to_step": 0}}]
    draw_curves([*lines, *(line(step, lr=step / 1000) for step in (10, 20, 30, 40))], path)
    drawn = np.asarray(Image.open(path).crop((WIDTH, 0, 2 * WIDTH, HEIGHT)).convert("RGB"))
    heights = np.nonzero((drawn == ImageColor.getrgb(CURVE)).all(axis=2))[0]
    assert np.ptp(heights) > HEIGHT / 4


def test_the_card_tells_alarms(tmp_path: Path) -> None:
    text = card(a_model(tmp_path / "cats", health={"alarms": [ALARMED]}), curves=False)
    assert "- collapse at step 30: all alike. Went back to step 10, with lr 0.1 → 0.001." in text
    assert "No alarm" not in text


def test_an_untrained_model_says_so(tmp_path: Path) -> None:
    text = card(a_model(tmp_path / "start", method="none", steps=0), curves=False)
    assert "untrained" in text
    assert "How it went" not in text
    text = card(a_model(tmp_path / "start", method="none", steps=0, start={"model": "cats"}), curves=False)
    assert "The weights of `cats` as they were" in text
    assert "random weights" not in text


def test_weights_that_were_not_improved_on_are_not_called_taught(tmp_path: Path) -> None:
    quality = {"step": 0, "recall_at_1": 0.75, "embedding_rank": 20.5}
    start = {"model": "cats", "exported": True, "quality": quality}
    text = card(a_model(tmp_path / "new", start=start, quality=quality), curves=False)
    assert "The weights of `cats` as they were: what was taught" in text
    assert "A vision transformer taught" not in text
    assert "embedding rank | 20.5 (" in text
    better = card(a_model(tmp_path / "new", start=start | {"exported": False}), curves=False)
    assert "A vision transformer taught" in better


def test_both_lie_in_the_model_folder(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    lines = "".join(json.dumps(line(step)) + "\n" for step in (1, 50))
    (tmp_path / "training" / "metrics.jsonl").write_text(lines)
    write_card(a_model(tmp_path))
    assert Image.open(tmp_path / "curves.png").format == "PNG"
    assert "](curves.png)" in (tmp_path / "README.md").read_text()


def test_a_torn_line_of_the_metrics_costs_its_own_points_alone(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    first, second, torn, last = (json.dumps(line(step)) for step in (1, 50, 100, 150))
    pictures = []
    for lines in ([first, second, last], [first, second, torn[:20] + torn, last, torn[:-1]]):
        (tmp_path / "training" / "metrics.jsonl").write_text("\n".join(lines))
        write_card(a_model(tmp_path))
        pictures.append((tmp_path / "curves.png").read_bytes())
    assert pictures[0] == pictures[1]
