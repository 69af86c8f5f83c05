"""The job of answering a file: shares of processes, names, lines, and what an output may not replace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paddlemix.errors import UserError
from paddlemix.generation.answer_line import read_line
from paddlemix.generation.answer_outputs import AnswerInputs, check_answer_outputs
from paddlemix.generation.joined_shares import count_failed, share_paths
from paddlemix.generation.predict_job import Chunk, PredictJob, model_id

LINE = {"question_id": 1, "prompt": "Q", "text": "A", "answer_id": "x", "model_id": "m", "metadata": {}}


@pytest.mark.parametrize("total", [0, 1, 7, 12])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_shares_hold_every_question_once(total: int, count: int) -> None:
    shares = [Chunk(index=index, count=count).numbers(total) for index in range(count)]
    assert [number for share in shares for number in share] == list(range(total))


def test_a_share_that_does_not_exist() -> None:
    with pytest.raises(UserError, match=r"chunk-idx 3 must be from 0 to num-chunks - 1 \(2\)"):
        Chunk(index=3, count=3)


def test_names_of_models(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    assert model_id(str(tmp_path / "run")) == "run"
    assert model_id(str(tmp_path / "run" / "checkpoint-5")) == "run_checkpoint-5"
    assert model_id("owner/llava-v1.5-7b") == "llava-v1.5-7b"


def test_files_of_the_shares(tmp_path: Path) -> None:
    job = PredictJob(model="m", input="q.json", output=tmp_path / "a.jsonl", chunk=Chunk(index=1, count=2, joined=True))
    assert [path.name for path in share_paths(job)] == ["a.jsonl.0-of-2", "a.jsonl.1-of-2"]
    lines = [json.dumps({**LINE, **more}).encode() for more in ({}, {"error": "none"}, {"text": '"error": '})]
    assert count_failed(lines) == 1  # what an answer says is not an error


def test_a_line_is_of_its_question() -> None:
    text = json.dumps(LINE).encode()
    assert read_line(text) == read_line(text + b"\n", 1) == LINE
    for other in (2, "1", 1.0, True):
        assert read_line(text, other) is None
    assert read_line(text[:-1]) is None
    assert read_line(json.dumps({**LINE, "metadata": None}).encode()) is None


def test_answers_do_not_replace_their_questions(tmp_path: Path) -> None:
    questions = tmp_path / "a.jsonl.partial"
    questions.write_text("{}")
    inputs = AnswerInputs(model=str(tmp_path / "m"), base=None, input=str(questions), image_root=None)
    with pytest.raises(UserError, match="the input"):
        check_answer_outputs(tmp_path / "a.jsonl", (), inputs, overwrite=False)
    check_answer_outputs(tmp_path / "b.jsonl", (), inputs, overwrite=False)
