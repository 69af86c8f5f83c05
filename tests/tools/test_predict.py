"""The command for files of questions: LLaVA's keys, going on after a kill, sharing the work, errors as lines."""

from __future__ import annotations

import json
import random
import re
import signal
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paddlemix.errors import UserError
from paddlemix.tools import predict
from paddlemix.tools.common.command import run_command
from tests.moments import Moment
from tests.tiny_world import World
from tests.trainer.fork_server import ForkServer

TEXTS = ("What is the colour of the big bus?", "How many?", "这是什么颜色?", "Where is the small cat? " * 3)
KEYS = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]


def write_questions(path: Path, count: int, **changes: dict[str, Any]) -> Path:
    """LLaVA's form; every fifth without an image.  `changes` by `q` and number."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            record: dict[str, Any] = {"question_id": 100 + number, "text": TEXTS[number % 4], "category": "x"}
            if number % 5:
                record["image"] = f"images/{number % 6}.png"
            file.write(json.dumps({**record, **changes.get(f"q{number}", {})}, ensure_ascii=False) + "\n")
    return path


def arguments(world: World, questions: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model-path", str(world.model), "--input", str(questions), "--output", str(output)),
        *("--image-root", str(world.data), "--max-new-tokens", "5", "--batch-size", "4", "--device", "cpu", *more),
    ]


def run(world: World, questions: Path, output: Path, *more: str) -> int:
    return run_command(predict.main, arguments(world, questions, output, *more))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def said(path: Path) -> list[tuple[Any, str]]:
    return [(line["question_id"], line["text"]) for line in read(path)]


def test_a_question_that_asks_for_a_letter_is_another_question(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, output = tmp_path / "q.json", tmp_path / "a.jsonl"
    record = {
        "id": "7",
        "image": "images/0.png",
        "conversations": [{"from": "human", "value": "<image>\nWhich?\nA. b"}],
    }
    questions.write_text(json.dumps([record, {**record, "id": "8", "image": "none.png"}]), encoding="utf-8")
    assert run(world, questions, output, "--single-pred-prompt") == predict.STATUS_FAILED_QUESTIONS
    prompt = f"<image>\nWhich?\nA. b\n{predict.ASKS_FOR_LETTER}"
    assert [(line["question_id"], line["prompt"]) for line in read(output)] == [("7", prompt), ("8", prompt)]
    capsys.readouterr()
    assert run(world, questions, output) == 2
    assert "added line" in capsys.readouterr().err


def test_keys_and_order_are_llavas(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], begun: Path
) -> None:
    questions, output = write_questions(tmp_path / "q.jsonl", 10), tmp_path / "a.jsonl"
    assert run(world, questions, output) == 0
    lines = read(output)
    assert [list(line) for line in lines] == [KEYS] * 10
    assert [line["question_id"] for line in lines] == list(range(100, 110))
    assert [line["prompt"] for line in lines] == [TEXTS[number % 4].strip() for number in range(10)]
    assert all(line["model_id"] == "model" and line["metadata"] == {} for line in lines)
    identities = {line["answer_id"] for line in lines}
    assert len(identities) == 10 and all(len(text) == 22 for text in identities)
    assert set("".join(identities)) <= set(string.ascii_letters + string.digits)
    captured = capsys.readouterr()
    assert f"{output} is complete" in captured.out and "answers" not in captured.err  # no bar where nobody looks
    assert "10 of 10 questions answered in this run, " in captured.out and "failed" not in captured.out
    assert begun.exists()


def test_batch_size_and_threads_change_nothing(world: World, tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "q.jsonl", 11)
    assert run(world, questions, tmp_path / "a.jsonl", "--batch-size", "1") == 0
    assert run(world, questions, tmp_path / "b.jsonl", "--workers", "3") == 0
    assert said(tmp_path / "a.jsonl") == said(tmp_path / "b.jsonl")


def test_training_records_give_references(world: World, tmp_path: Path) -> None:
    assert run(world, world.data / "train.json", tmp_path / "a.jsonl") == 0
    records = json.loads((world.data / "train.json").read_text(encoding="utf-8"))
    lines = read(tmp_path / "a.jsonl")
    assert [line["question_id"] for line in lines] == list(range(12))
    assert [line["reference"] for line in lines] == [record["conversations"][-1][1] for record in records]
    assert list(lines[0]) == [*KEYS, "reference"]


def test_errors_are_lines_and_a_rerun_asks_them_again(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = tmp_path / "later.png"
    bad = {"q2": {"image": str(later)}, "q3": {"text": None}}
    questions, output = write_questions(tmp_path / "q.jsonl", 6, **bad), tmp_path / "a.jsonl"
    assert run(world, questions, output) == 1
    text = capsys.readouterr().out
    assert "4 of 6 questions answered in this run, 2 failed, " in text and "2 lines with an error" in text
    lines = read(output)
    assert ["error" in line for line in lines] == [False, False, True, True, False, False]
    assert f"record 2: image '{later}' does not exist" in lines[2]["error"] and lines[2]["text"] == ""
    assert [line["question_id"] for line in lines] == list(range(100, 106))
    later.write_bytes(world.picture.read_bytes())
    assert run(world, questions, output) == 1
    assert "1 of 6 questions answered in this run, 1 failed, " in capsys.readouterr().out
    again = read(output)
    assert "error" not in again[2] and "error" in again[3]
    assert [again[number] for number in (0, 1, 4, 5)] == [lines[number] for number in (0, 1, 4, 5)]


def test_a_complete_output_is_left_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, output = write_questions(tmp_path / "q.jsonl", 3), tmp_path / "a.jsonl"
    assert run(world, questions, output) == 0
    before = output.read_bytes()
    monkeypatch.setattr("paddlemix.checkpoints.load.load_pretrained", None)  # needs no model
    assert run(world, questions, output) == 0
    assert output.read_bytes() == before and "0 of 3 questions answered" in capsys.readouterr().out


def test_a_line_without_its_text_is_asked_again(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, output = write_questions(tmp_path / "q.jsonl", 3), tmp_path / "a.jsonl"
    assert run(world, questions, output) == 0
    before, lines = said(output), read(output)
    del lines[2]["text"]
    output.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    capsys.readouterr()
    assert run(world, questions, output) == 0
    assert said(output) == before and "1 of 3 questions answered in this run" in capsys.readouterr().out


def test_other_arguments_need_another_output(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, output = write_questions(tmp_path / "q.jsonl", 3), tmp_path / "a.jsonl"
    assert run(world, questions, output) == 0
    assert run(world, questions, output, "--max-new-tokens", "4", "--conv-mode", "llava_v1") == 2
    message = capsys.readouterr().err
    assert 'conv-mode null (now "llava_v1")' in message and "max_new_tokens 5 (now 4)" in message
    write_questions(questions, 4)
    assert run(world, questions, output) == 2
    assert "input content (the file of questions holds others, or is written" in capsys.readouterr().err
    assert run(world, questions, output, "--overwrite") == 0
    assert len(read(output)) == 4


def test_a_model_that_cannot_be_loaded_costs_no_answer(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, output = write_questions(tmp_path / "q.jsonl", 3), tmp_path / "a.jsonl"
    assert run(world, questions, output) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("a.jsonl*")}

    def broken(*arguments: Any) -> None:
        raise UserError("weight lm_head.weight is NaN")

    monkeypatch.setattr("paddlemix.checkpoints.load.load_pretrained", broken)
    assert run(world, questions, output, "--overwrite") == 2
    assert {path.name: path.read_bytes() for path in tmp_path.glob("a.jsonl*")} == before


def test_quantised_while_it_is_loaded(world: World, tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "q.jsonl", 3)
    for flag in ("--load-8bit", "--load-4bit"):
        assert run(world, questions, tmp_path / f"{flag}.jsonl", flag) == 0
        assert len(read(tmp_path / f"{flag}.jsonl")) == 3


@pytest.mark.parametrize("count", [3, 7])
def test_shares_of_llavas_flags_join_by_cat(world: World, tmp_path: Path, count: int) -> None:
    """Of five questions; with seven shares some have none."""
    questions = write_questions(tmp_path / "q.jsonl", 5)
    assert run(world, questions, tmp_path / "whole.jsonl") == 0
    shares = [tmp_path / f"{index}.jsonl" for index in range(count)]
    for index, share in enumerate(shares):
        assert run(world, questions, share, "--num-chunks", str(count), "--chunk-idx", str(index)) == 0
    assert [line for share in shares for line in said(share)] == said(tmp_path / "whole.jsonl")


def test_launched_processes_write_one_file(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    later = tmp_path / "later.png"
    questions, output = write_questions(tmp_path / "q.jsonl", 7, q5={"image": str(later)}), tmp_path / "a.jsonl"
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")

    def launch(*more: str) -> list[int]:
        statuses = []
        for rank in (1, 0):
            monkeypatch.setenv("PADDLE_TRAINER_ID", str(rank))
            statuses.append(run(world, questions, output, *more))
        return statuses

    assert launch() == [0, 1]  # who finishes last says that there are errors: the launcher stops all after a failure
    assert "appears when the other processes have finished" in capsys.readouterr().out
    assert [line["question_id"] for line in read(output)] == list(range(100, 107)) and "error" in read(output)[5]
    later.write_bytes(world.picture.read_bytes())
    assert launch() == [0, 0]
    assert not any("error" in line for line in read(output))
    assert launch() == [0, 0]
    before = said(output)
    output.write_bytes(output.read_bytes()[:-30])  # a disk that was full, a copy that was stopped
    assert launch() == [0, 0] and said(output) == before
    output.write_bytes(output.read_bytes().replace(b'"text": ', b'"txt": ', 1))
    assert launch() == [0, 0] and said(output) == before
    later.write_bytes((world.data / "images" / "1.png").read_bytes())
    assert launch() == [2, 2]
    assert "has answers about pictures that were replaced since: " in capsys.readouterr().err
    later.write_bytes(world.picture.read_bytes())
    assert launch("--max-new-tokens", "4") == [2, 2]
    assert "max_new_tokens 5 (now 4)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.run.json", "later.png", "q.jsonl"]
    assert launch("--max-new-tokens", "4", "--overwrite") == [0, 0]
    whole = tmp_path / "whole.jsonl"
    monkeypatch.delenv("PADDLE_TRAINERS_NUM")
    monkeypatch.delenv("PADDLE_TRAINER_ID")
    assert run(world, questions, whole, "--max-new-tokens", "4") == 0
    assert said(whole) == said(output)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--conv-mode", "vicuna_v11"), "'vicuna_v11' is not one of .*did you mean 'vicuna_v1'"),
        (("--dtype", "bfloat16"), "bfloat16 cannot be computed on CPU"),
        (("--temperature", "-1"), "temperature -1.0 must be at least 0"),
        (("--batch-size", "0"), "batch-size 0 and workers 1 must be at least 1"),
        (("--input", "none.jsonl"), "data file 'none.jsonl' does not exist"),
        (("--model-path", "none"), "model directory 'none' does not exist"),
        (("--num-chunks", "2"), "--num-chunks and --chunk-idx must be given together"),
        (("--num-chunks", "2", "--chunk-idx", "2"), "chunk-idx 2 must be from 0 to num-chunks - 1"),
    ],
)
def test_what_cannot_be_used(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    questions = write_questions(tmp_path / "q.jsonl", 2)
    assert run(world, questions, tmp_path / "a.jsonl", *more) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert re.search(message, captured.err.replace("\n", " "))
    assert not (tmp_path / "a.jsonl").exists()


def test_one_of_several_that_know_nothing_of_each_other(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun each process would answer every question."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    questions = write_questions(tmp_path / "q.jsonl", 2)
    assert run(world, questions, tmp_path / "a.jsonl") == 2
    assert "torchrun has started this command 2 times" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("logs"), "paddlemix.tools.predict", "paddlemix.generation.predict_file")
    yield server
    server.close()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(server: ForkServer, world: World, tmp_path: Path, kills: int) -> None:
    """At its start, in the answers, and while the finished file is written; every question is there exactly once."""
    draw = random.Random(f"{kills} kills")
    questions, output = write_questions(tmp_path / "q.jsonl", 40 * kills), tmp_path / "a.jsonl"
    partial = tmp_path / "a.jsonl.partial"
    command = arguments(world, questions, output)

    def moment() -> Moment:
        """Of a run that is never done: it has ten batches for each kill, and writes nine at most."""
        if draw.choice(("start", "answers", "answers")) == "start":
            return Moment(draw.choice(("read */model.safetensors", "open */a.jsonl.run.json")))
        touch = draw.choice(("write", "sync"))
        return Moment(f"{touch} {partial}", draw.randrange(9), torn=touch == "write" and draw.random() < 0.5)

    first, last = Moment("sync */.a.jsonl.run.json.*", torn=True), Moment(f"write {partial}", 5, torn=True)
    moments = [first, *(moment() for _ in range(kills - 2)), last]
    for number in moments:
        assert server.run(command, number)[0] == -signal.SIGKILL, number
    assert not output.exists()
    kept = partial.read_bytes().split(b"\n")[:-1]
    assert len({line.partition(b"\t")[0] for line in kept}) == len(kept) >= 5 * 4
    assert server.run(command, Moment("sync */.a.jsonl.*.jsonl", torn=True))[0] == -signal.SIGKILL
    status, log = server.run(command)
    assert status == 0, log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.run.json", "q.jsonl"]
    assert run(world, questions, tmp_path / "undisturbed.jsonl") == 0
    assert said(output) == said(tmp_path / "undisturbed.jsonl")
    assert [line["question_id"] for line in read(output)] == list(range(100, 100 + 40 * kills))
    known = {line.partition(b"\t")[2] for line in kept}
    assert known <= set(output.read_bytes().split(b"\n"))  # what was answered before a kill was not asked again
