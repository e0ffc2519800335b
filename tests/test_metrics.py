"""The file of a run's metrics, on a disk that is full for a while."""

import json
from pathlib import Path

import pytest

from dinosearch.pretrain.metrics import Metrics, read_metrics

LINES = [{"step": step, "loss": 5.0 - step / 100} for step in (1, 50, 100, 150)]


def test_a_line_that_finds_no_room_leaves_the_others_whole(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path, said = tmp_path / "metrics.jsonl", list[str]()
    metrics = Metrics(path, n_bytes=0, note=said.append)
    metrics.write(LINES[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))  # a part of the next line
    try:
        metrics.write(LINES[1])
        metrics.write(LINES[2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    metrics.write(LINES[3])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [LINES[0], LINES[3]]
    assert read_metrics(path) == [LINES[0], LINES[3]]
    assert metrics.n_bytes == path.stat().st_size
    assert len(said) == 1
    assert "lacks lines from here on" in said[0]


def test_a_resumed_run_drops_what_it_makes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, n_bytes=0, note=print)
    metrics.write(LINES[0])
    kept = metrics.n_bytes
    metrics.write(LINES[1])
    Metrics(path, n_bytes=kept, note=print).write(LINES[2])
    assert read_metrics(path) == [LINES[0], LINES[2]]
    Metrics(path, n_bytes=10_000, note=print).write(LINES[3])  # of a file that has lost lines
    assert read_metrics(path) == [LINES[0], LINES[2], LINES[3]]


def test_torn_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    first, second, third = (json.dumps(line).encode() for line in LINES[:3])
    path.write_bytes(b"\n".join([first, second[:9] + second, b"\0\0\xff", third, second[:-1]]))
    assert read_metrics(path) == [LINES[0], LINES[2]]
