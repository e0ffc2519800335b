"""Logs for other programs, read back by these programs."""

import sys
import types

import pytest

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.pretrain.logs import check_logs, open_logs

LINES = [
    {"step": 1, "loss": 5.5, "lr": 0.001, "images_per_second": None},
    {"step": 50, "loss": 5.0, "lr": 0.002, "images_per_second": 12.5},
    {"alarm": {"step": 50, "kind": "collapse", "why": "all alike", "back_to_step": 1, "changed": "lr"}},
]


def written(names, training, lines=LINES, **options):
    training.mkdir(parents=True, exist_ok=True)
    for log in open_logs(names, training, config={"lr": 0.1}, **options):
        for line in lines:
            log.write(line)
        log.close()


def test_tensorboard_reads_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written(["tensorboard"], tmp_path, [*LINES, {"step": 60, "loss": 9.0, "lr": 9.0}])
    written(["tensorboard"], tmp_path, [{"step": 51, "loss": 4.5}], first_step=50)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 5.5), (50, 5.0), (51, 4.5)]
    assert [event.step for event in events.Scalars("lr")] == [1, 50]  # step 60 was to be made again
    assert set(events.Tags()["scalars"]) >= {"loss", "lr"}


def test_wandb_is_offline_unless_the_environment_says_otherwise(tmp_path, monkeypatch):
    began, logged = [], []
    run = types.SimpleNamespace(
        log=logged.append, finish=lambda: logged.append("end"), define_metric=lambda *_, **__: None
    )
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()
    fake.Settings = dict
    fake.init = lambda **options: began.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    written(["wandb"], tmp_path / "cats/training")
    monkeypatch.setenv("WANDB_MODE", "online")
    written(["wandb"], tmp_path / "cats/training", [], first_step=50)
    assert [options["mode"] for options in began] == ["offline", "online"]
    assert began[0]["id"] == began[1]["id"]  # the same run goes on
    assert began[0]["name"] == "cats"
    assert logged[:4] == [
        {"step": 1, "loss": 5.5, "lr": 0.001},
        {"step": 50, "loss": 5.0, "lr": 0.002, "images_per_second": 12.5},
        {"step": 50, "alarm": "collapse"},
        "end",
    ]


def test_a_log_that_cannot_be_is_refused_before_the_work(monkeypatch):
    with pytest.raises(UsageError, match="tensorboard or wandb"):
        check_logs(["mlflow"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(DinosearchError, match=r"dinosearch\[wandb\]"):
        check_logs(["wandb"])
