"""A bar is redrawn on a terminal alone; elsewhere a line is logged now and then."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from paddlemix import progress_bar
from paddlemix.progress_bar import ProgressBar

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, s, in a list of one; the bar sees it pass only where a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress_bar, "_now", lambda: now[0])
    monkeypatch.delenv("PADDLE_TRAINER_ID", raising=False)
    return now


def test_a_log_gets_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("answers", 9000, 150) as bar:
        for _ in range(300):  # five minutes
            clock[0] += 1
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" INFO ")[2] for line in lines][:2] == [
        "answers: 210 of 9,000 (2.3%), 1.0 per second, about 146 min left",
        "answers: 270 of 9,000 (3.0%), 1.0 per second, about 146 min left",
    ]
    assert len(lines) == 5 and bar.done == 450


def test_bytes_and_what_has_no_total(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("model.safetensors", unit="B") as bar:
        clock[0] += 64
        bar.update(128 << 20)
        bar.total = 1 << 30
        clock[0] += 64
        bar.update(128 << 20)
    lines = [line.partition(" INFO ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "model.safetensors: 128MB, 2.00MB per second",
        "model.safetensors: 256MB of 1.00GB (25.0%), 2.00MB per second, about 6 min left",
    ]


def test_a_terminal_gets_a_bar(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ProgressBar("check", unit=" records") as bar:
        bar.total = 3
        clock[0] += 1000
        assert list(bar.over("abc")) == ["a", "b", "c"]
    shown = capsys.readouterr().err
    assert "check" in shown and "3/3" in shown and "INFO" not in shown


@pytest.mark.parametrize("how", ["silent", "another process", "no stream"])
def test_nothing_is_shown(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    if how == "another process":
        monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    if how == "no stream":
        monkeypatch.setattr(sys, "stderr", None)
    with ProgressBar("answers", 9, silent=how == "silent") as bar:
        bar.update(3)
        clock[0] += 10 if how == "no stream" else 1000
        bar.update(3)
    monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_all_bars_keep_the_rule() -> None:
    """A bar of a library's own is drawn in two files alone: here, and for a training run."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "paddlemix").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "tqdm"
    }
    assert found == {"paddlemix/progress_bar.py", "paddlemix/trainer/callbacks/progress.py"}
