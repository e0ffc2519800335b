"""Settings that count only beside certain values of others: which, and their refusal. Decides no value itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dinosearch.errors import UsageError


@dataclass(frozen=True)
class Condition:
    """`names` count only where `setting` is one of `values`, or more than 0 where there are none."""

    setting: str
    values: tuple[str, ...]
    names: tuple[str, ...]


OF_PROTOTYPES = (
    *("out_dim", "head_hidden_dim", "head_bottleneck_dim", "norm_last_layer", "freeze_last_layer"),
    *("student_temperature", "teacher_normalisation", "center_momentum", "koleo_weight"),
)
OF_SMALL_CROPS = ("local_size", "local_scale")
CONDITIONS = (
    Condition("method", ("dino", "dinov2"), (*OF_PROTOTYPES, "local_crops", *OF_SMALL_CROPS)),
    Condition("method", ("dinov2",), ("ibot_weight", "mask_probability", "mask_ratio")),
    Condition("method", ("distill",), ("feature_weight",)),
    Condition("optimizer", ("muon",), ("muon_lr",)),
    Condition("teacher_normalisation", ("centering",), ("center_momentum",)),
    Condition("local_crops", (), OF_SMALL_CROPS),
    Condition("drop_path_rate", (), ("uniform_drop_path",)),
)


def unused(settings: Mapping[str, Any]) -> dict[str, Condition]:
    """Names of what has no effect beside these settings, each with what it lacks; what they leave open may have one."""
    found: dict[str, Condition] = {}
    for condition in CONDITIONS:
        value = settings.get(condition.setting)
        if value in (None, "auto") or (value in condition.values if condition.values else value > 0):
            continue
        found |= {name: condition for name in condition.names if name not in found}
    return found


def refuse_unused(asked: Mapping[str, Any], *, beside: Mapping[str, Any]) -> None:
    """Raises UsageError for a setting that was asked for and has no effect beside the others."""
    for name, condition in unused(beside).items():
        if asked.get(name) is not None:
            setting, wanted = condition.setting, " or ".join(condition.values) or "above 0"
            raise UsageError(
                f"{name} has no effect with {setting} {beside[setting]}: leave it out, or choose {setting} {wanted}"
            )
