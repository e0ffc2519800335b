"""Runs on Fashion-MNIST by the recipe's own settings, sound and ruined: who alarms, and what is learnt in the end."""

from pathlib import Path
from typing import Any

import pytest

import dinosearch.demo.data as data_module
from dinosearch.demo.data import DEBIAN_FOLDER, DemoImages, lay_out
from dinosearch.pretrain.config import TrainConfig
from dinosearch.pretrain.course import TrainReport
from dinosearch.pretrain.recipe import usual_lr
from dinosearch.pretrain.train import train
from dinosearch.query.exam import Exam, open_exam
from dinosearch.vit.folder import open_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason=f"needs Debian's {data_module.DEBIAN_PACKAGE}"),
]
STEPS = 600
BATCH = 32
SETTINGS: dict[str, Any] = {"batch_size": BATCH, "out_dim": 2048}


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> DemoImages:
    """2,000 images to learn from and as many to be asked about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "N_TRAIN", 2000)
        patch.setattr(data_module, "N_TEST", 2000)
        return lay_out(tmp_path_factory.mktemp("fashion"), data=DEBIAN_FOLDER, note=lambda _: None)


def run(images: DemoImages, models: Path, *, steps: int = STEPS, **overrides: float) -> TrainReport:
    config = TrainConfig(
        images=(images.train_folder,), models=models, steps=steps, device="cpu", overrides=SETTINGS | overrides
    )
    *_, last = train(config)
    assert last.report is not None
    return last.report


def accuracy(exam: Exam, report: TrainReport) -> float:
    model = open_model(Path(report.model))
    share, _ = exam(model.load_vit(), model.facts())
    return share


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({"teacher_temperature": 0.2, "warmup_teacher_temperature": 0.2}, "teacher temperature 0.2 → 0.04"),
        ({"center_momentum": 0.999}, "center momentum 0.999 → 0.9"),
        ({"lr": 100 * usual_lr(BATCH)}, "lr "),
    ],
)
def test_a_ruinous_setting_alarms_and_the_run_still_learns(
    fashion: DemoImages, tmp_path: Path, overrides: dict[str, float], changed: str
) -> None:
    exam = open_exam(str(fashion.labels_path), [fashion.train_folder.parent])
    before = accuracy(exam, run(fashion, tmp_path, steps=0))
    report = run(fashion, tmp_path, **overrides)
    after = accuracy(exam, report)
    alarms = report.health["alarms"]
    assert alarms
    assert alarms[0]["kind"] in ("collapse", "divergence")
    assert changed in alarms[0]["changed"]
    assert report.steps == STEPS
    assert after > before


def test_the_defaults_alarm_nobody(fashion: DemoImages, tmp_path: Path) -> None:
    report = run(fashion, tmp_path)
    assert report.health["alarms"] == []
