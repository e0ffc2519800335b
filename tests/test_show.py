import io
import os
import sys
from pathlib import Path

import pytest

from dinosearch.cli import show


def test_paths_below_the_current_folder_are_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert show.shown(tmp_path / "a/b.jpg") == "a/b.jpg"
    assert show.shown(Path("a/../b.jpg")) == "b.jpg"
    assert show.shown(tmp_path.parent / "b.jpg") == str(tmp_path.parent / "b.jpg")
    assert show.shown(tmp_path.parent / f"{tmp_path.name}-2/b.jpg") == f"{tmp_path}-2/b.jpg"


def test_names_cannot_steer_the_terminal():
    assert show.printable("a\x1b[2Jb\nc.jpg") == "a\\x1b[2Jb\\nc.jpg"
    assert show.printable("müsli 猫.jpg") == "müsli 猫.jpg"
    assert show.printable(os.fsdecode(b"caf\xe9.jpg")) == "caf\\udce9.jpg"


def test_a_line_with_a_name_that_is_no_text_can_be_printed(capsys):
    name = os.fsdecode(b"caf\xe9")
    show.line(f"catalog: {name}\x1b[2J is here now")
    assert capsys.readouterr().out == "catalog: caf\\udce9\\x1b[2J is here now\n"


def test_a_result_is_in_the_pipe_as_soon_as_it_is_printed(monkeypatch):
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe))
    show.json_line({"new": 1})
    show.line("2 new")
    assert pipe.getvalue() == b'{"new": 1}\n2 new\n'


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_durations(seconds, text):
    assert show.duration(seconds) == text


def test_a_piped_table_is_tab_separated_with_a_header(capsys):
    show.table(["rank", "path"], [(1, "a\tb.jpg"), (2, None)])
    assert capsys.readouterr().out == "rank\tpath\n1\ta\\tb.jpg\n2\t\n"


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr(show.time, "monotonic", lambda: next(clock))
    with show.Progress() as bar:
        for done in (10, 20, 40, 50, 80):
            bar.update("embed", done=done, total=100, details="9 images/s")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "embed  40/100  9 images/s  0:15 left\nembed  80/100  9 images/s  0:07 left\n"
