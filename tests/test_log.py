"""The logger speaks on rank 0, and metrics survive what a killed run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paddlemix.errors import MissingFileError
from paddlemix.log import MetricsWriter, logger, process_rank, read_metrics


@pytest.fixture(autouse=True)
def usual_level() -> Iterator[None]:
    level = logger.level
    yield
    logger.setLevel(level)


def test_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PADDLE_TRAINER_ID", raising=False)
    assert process_rank() == 0
    monkeypatch.setenv("PADDLE_TRAINER_ID", "3")
    assert process_rank() == 3


@pytest.mark.parametrize(("rank", "heard"), [("0", ["INFO one", "ERROR two"]), ("1", ["ERROR two"])])
def test_other_ranks_report_errors_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, heard: list[str]
) -> None:
    monkeypatch.setenv("PADDLE_TRAINER_ID", rank)
    logger.info("one")
    logger.error("two")
    captured = capsys.readouterr()
    assert [line.partition(" ")[2] for line in captured.err.splitlines()] == heard
    assert captured.out == ""


def test_no_secret_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    logger.warning("%s fails", "https://me:hidden@host/a.png?token=hidden")
    assert capsys.readouterr().err.endswith("WARNING https://***@host/a.png?token=*** fails\n")


def test_metrics_come_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    lines: list[dict[str, Any]] = [{"step": 1, "loss": 0.5}, {"step": 2, "note": "两\u2028lines\x85\n"}, {"epoch": 1.0}]
    for line in lines:
        MetricsWriter(path).write(line)
    assert read_metrics(path) == lines
    assert [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n")[:-1]] == lines


def test_half_written_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo', encoding="utf-8")
    assert read_metrics(str(path)) == [{"step": 1}, {"step": 2}]
    path.write_bytes('{"step": 1}\n7\n{"answer": "\u4e2d'.encode()[:-1])  # within a character
    MetricsWriter(path).truncate_after(1)
    assert read_metrics(path) == [{"step": 1}]


def test_resumed_run_drops_what_it_writes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.truncate_after(3)  # a first run has nothing to drop
    assert not path.exists()
    writer.write({"device": "cpu"})
    for step in range(1, 6):
        writer.write({"step": step})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 6')
    writer.truncate_after(3)
    writer.write({"step": 4, "again": True})
    steps = [{"step": step} for step in (1, 2, 3)]
    assert read_metrics(path) == [{"device": "cpu"}, *steps, {"step": 4, "again": True}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_metrics(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="absent.jsonl' does not exist; a run writes it into its output_dir"):
        read_metrics(tmp_path / "absent.jsonl")
