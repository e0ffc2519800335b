"""The records of a run for TensorBoard or Weights & Biases, the same as metrics.jsonl holds. Knows no run.

W&B works offline unless the environment's WANDB_MODE says otherwise: nothing leaves the machine unasked.
`wandb sync` sends it later.
"""

import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dinosearch.errors import DinosearchError, UsageError

LOGS = ("tensorboard", "wandb")


class Log(Protocol):
    """Takes the lines of metrics.jsonl, one by one."""

    def write(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_logs(names: Sequence[str]) -> None:
    """Raises UsageError for an unknown log, DinosearchError where its library is missing: before long work."""
    for name in names:
        if name not in LOGS:
            raise UsageError(f"no log {name!r}. Choose {' or '.join(LOGS)}; metrics.jsonl is always written")
        if importlib.util.find_spec(name) is None:
            raise DinosearchError(f"--log {name} needs the package {name}: pip install 'dinosearch[{name}]'")


def open_logs(names: Sequence[str], training: Path, *, config: Mapping[str, Any], first_step: int = 0) -> list[Log]:
    """Begin, or go on with, the logs of a run in its folder `training`.

    config: what the run was asked for, to compare runs by. first_step: where a resumed run goes on.
    """
    check_logs(names)
    kinds: Mapping[str, Callable[..., Log]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
    return [kinds[name](training, config=config, first_step=first_step) for name in names]


class _TensorBoard:
    def __init__(self, training: Path, *, config: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a killed run logged beyond its last checkpoint is made again
        self._writer: Any = SummaryWriter(training / "tensorboard", purge_step=first_step + 1 if first_step else None)
        self._writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()), first_step)

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in _numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])
        if "alarm" in line:
            self._writer.add_text("alarm", str(line["alarm"]["why"]), line["alarm"]["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, training: Path, *, config: Mapping[str, Any], first_step: int) -> None:
        import wandb

        id_path = training / "wandb-id.txt"
        if not (first_step and id_path.is_file()):
            id_path.write_text(uuid.uuid4().hex[:12])
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dinosearch"),
            name=training.parent.name,
            id=id_path.read_text(),
            resume="allow",
            dir=training,
            config=dict(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # steps may go back, after an alarm or a resume; W&B's own counter may not
        self._run.define_metric("*", step_metric="step")

    def write(self, line: Mapping[str, Any]) -> None:
        if "alarm" in line:
            self._run.log({"step": line["alarm"]["step"], "alarm": line["alarm"]["kind"]})
        else:
            self._run.log({"step": line["step"], **_numbers(line)})

    def close(self) -> None:
        self._run.finish()


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in line.items() if name != "step" and isinstance(value, int | float)}
