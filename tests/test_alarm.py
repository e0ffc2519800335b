"""Which looks alarm, and what is turned then."""

from dataclasses import replace

import pytest

from dinosearch.pretrain.alarm import Alarm, Watch, not_a_number, remedy
from dinosearch.pretrain.health import Health
from dinosearch.pretrain.recipe import Recipe, usual_lr

WELL = Health(
    teacher_entropy=4.0,
    teacher_kl=0.8,
    prototypes_used=0.7,
    feature_std=0.8,
    rank=20.0,
    center_norm=1.0,
    loss_of_ln_k=0.8,
)
RECIPE = Recipe(arch="vit_tiny_patch16_224", arch_kwargs={}, image_size=32, patch_size=8)
COLLAPSE = Alarm("collapse", "")


def judged(*looks: Health, done: float = 0.5, recipe: Recipe = RECIPE) -> list[Alarm | None]:
    watch = Watch()
    return [watch.judge(look, done=done, recipe=recipe) for look in looks]


@pytest.mark.parametrize(
    ("signals", "kind", "told"),
    [
        ({"teacher_kl": 0.001, "prototypes_used": 1.0}, "collapse", "assigned alike"),
        ({"teacher_kl": 0.0, "teacher_entropy": 0.0, "prototypes_used": 1 / 4096}, "collapse", "1.0 prototypes serve"),
        (
            {"teacher_kl": 0.3, "teacher_entropy": 0.9, "prototypes_used": 3.32 / 4096},
            "collapse",
            "3.3 prototypes serve",
        ),
        ({"feature_std": 0.001}, "collapse", "same features"),
        ({"loss_of_ln_k": 1.5}, "divergence", "1.50 times"),
    ],
)
def test_what_lasts_alarms_and_says_why(signals: dict[str, float], kind: str, told: str) -> None:
    ill = replace(WELL, **signals)
    first, second, third = judged(ill, ill, ill)
    assert first is second is None
    assert third is not None
    assert third.kind == kind
    assert told in third.why


def test_few_kinds_of_images_that_are_told_apart_alarm_nobody() -> None:
    three_kinds = replace(WELL, teacher_kl=1.0, teacher_entropy=0.1, prototypes_used=3 / 4096)
    assert judged(three_kinds, three_kinds, three_kinds) == [None] * 3


@pytest.mark.parametrize("seen", [{"teacher_kl": 0.02}, {"loss_of_ln_k": 0.99}])
def test_settings_known_to_collapse_need_less_to_alarm(seen: dict[str, float]) -> None:
    looks = [replace(WELL, **seen)] * 3
    assert judged(*looks) == [None] * 3
    for risky in ({"teacher_temperature": 0.2}, {"center_momentum": 0.999}, {"lr": 0.1}):
        assert judged(*looks, recipe=replace(RECIPE, **risky))[-1] is not None
        assert judged(WELL, WELL, WELL, recipe=replace(RECIPE, **risky)) == [None] * 3


def test_it_is_calm_again_when_all_looks_remembered_are_good() -> None:
    watch = Watch()
    calm = []
    for kl in (0.8, 0.0, 0.8, 0.8, 0.8):
        watch.judge(replace(WELL, teacher_kl=kl), done=0.5, recipe=RECIPE)
        calm.append(watch.calm)
    assert calm == [True, False, False, False, True]


def test_one_odd_look_alarms_nobody() -> None:
    ill = replace(WELL, teacher_kl=0.0)
    assert judged(WELL, ill, WELL, WELL, ill, WELL) == [None] * 6


def test_nothing_alarms_while_the_learning_rate_rises() -> None:
    ill = replace(WELL, teacher_kl=0.0)
    assert judged(ill, ill, ill, ill, done=0.05) == [None] * 4


def test_a_watch_that_remembers_goes_on_where_it_stopped() -> None:
    ill = replace(WELL, teacher_kl=0.0)
    watch = Watch()
    for _ in range(2):
        watch.judge(ill, done=0.5, recipe=RECIPE)
    assert Watch(watch.recent).judge(ill, done=0.5, recipe=RECIPE) is not None
    watch.forget()
    assert watch.judge(ill, done=0.5, recipe=RECIPE) is None


def test_a_known_cause_is_mended_alone() -> None:
    warm, changes = remedy(replace(RECIPE, teacher_temperature=0.2), COLLAPSE)
    assert warm == replace(RECIPE, teacher_temperature=0.04)
    assert changes == "teacher temperature 0.2 → 0.04"
    slow, _ = remedy(replace(RECIPE, center_momentum=0.999), COLLAPSE)
    assert slow == replace(RECIPE, center_momentum=0.9)
    usual = usual_lr(RECIPE.batch_size)
    for alarm in (COLLAPSE, not_a_number(None)):
        assert remedy(replace(RECIPE, lr=100 * usual), alarm)[0] == replace(RECIPE, lr=usual)


def test_without_a_known_cause_the_teacher_gets_sharper_and_steadier_and_steps_smaller() -> None:
    recipe, _ = remedy(RECIPE, COLLAPSE)
    assert recipe.lr == RECIPE.lr / 4
    assert recipe.teacher_momentum == pytest.approx(0.995)
    assert recipe.teacher_temperature == recipe.warmup_teacher_temperature == pytest.approx(0.03)
    sharp, _ = remedy(replace(RECIPE, teacher_temperature=0.01), COLLAPSE)
    assert sharp.teacher_temperature == 0.01


@pytest.mark.parametrize("alarm", [Alarm("divergence", ""), not_a_number(None)])
def test_numbers_out_of_hand_lower_the_learning_rate(alarm: Alarm) -> None:
    assert remedy(RECIPE, alarm)[0] == replace(RECIPE, lr=RECIPE.lr / 10)
