"""Chat and batch prediction with one model over several processes: the answers of one process, from one of them alone.

What is tested: paddlemix/generation/leading.py, paddlemix/generation/following.py, paddlemix/parallel/messages.py and
paddlemix/parallel/groups.py.  Scores and batches of every family are in `test_tensor_families.py`.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import HANG
from tests.parallel.cluster import Cluster, Outcome, Where, device_environment
from tests.parallel.rank import Hook
from tests.parallel.tensor_commands import SETTINGS
from tests.tiny_world import World

NAMES = ("internlm", "qwen")  # biases, grouped heads


@pytest.fixture(scope="module")
def led(cluster: Cluster) -> dict[str, bool]:
    outcome = cluster.call(2, "tests.parallel.tensor_commands:led_conversations", names=list(NAMES))
    assert outcome.ok, outcome.told()
    assert outcome.results[1] == {}
    return outcome.results[0]


@pytest.mark.parametrize(("name", "kind"), itertools.product(NAMES, SETTINGS))
def test_a_led_conversation_is_that_of_one_process(led: dict[str, bool], name: str, kind: str) -> None:
    """Several rounds about two pictures, after a round that was taken back."""
    assert led[f"{name} {kind}"]


def chat(cluster: Cluster, ranks: int, world: World, typed: str, *more: str) -> Outcome:
    arguments = ["--model-path", world.model, "--image-file", world.picture, "--max-new-tokens", "6", *more]
    hooks = [Hook("tests.parallel.tensor_commands:type_in", rank=0, values={"text": typed})]
    command = "examples.llava.run_predict_multiround"
    return cluster.run(ranks, command, *arguments, "--tensor-parallel", ranks, hooks=hooks)


def said(outcome: Outcome) -> str:
    return outcome.logs[0][outcome.logs[0].index("USER: ") :]


@pytest.mark.parametrize(
    ("typed", "more", "statuses", "told"),
    [
        ("What is this?\n/back\nWhat?\nWhere?\n", ("--temperature", "0"), [0, 0], "exit..."),
        ("What is this?\nWhere?\n\n", ("--temperature", "1", "--seed", "3"), [0, 0], "exit..."),
        ("What is this?\n/image nothing.png\n", ("--temperature", "0"), [2, 0], "nothing.png"),
    ],
)
def test_a_chat_is_that_of_one_process_and_ends_all(
    cluster: Cluster, world: World, typed: str, more: tuple[str, ...], statuses: list[int], told: str
) -> None:
    one, two = chat(cluster, 1, world, typed, *more), chat(cluster, 2, world, typed, *more)
    assert [one.statuses, two.statuses] == [statuses[:1], statuses], two.told()
    assert said(one) == said(two) and told in said(two)
    assert "USER: " not in two.logs[1]


def test_ctrl_c_stops_an_answer_and_not_the_chat(cluster: Cluster, world: World) -> None:
    """A real signal in the middle of a computation that all processes take part in."""
    hooks = [
        Hook("tests.parallel.tensor_commands:type_in", rank=0, values={"text": "What is this?\nWhere?\n"}),
        Hook("tests.parallel.tensor_commands:interrupt_step", rank=0, values={"number": 3}),
    ]
    arguments = ["--model-path", world.model, "--max-new-tokens", "6", "--temperature", "0", "--tensor-parallel", 2]
    outcome = cluster.run(2, "examples.llava.run_predict_multiround", *arguments, hooks=hooks)
    assert outcome.statuses == [0, 0], outcome.told()
    assert said(outcome).count(" [stopped]") == 1 and said(outcome).count("ASSISTANT: ") == 2
    assert said(outcome).endswith("exit...\n")


def test_heads_that_do_not_divide_are_one_error(cluster: Cluster, world: World) -> None:
    outcome = chat(cluster, 3, world, "")
    assert outcome.statuses == [2, 2, 2], outcome.told()
    assert "allowed: 1, 2" in outcome.logs[0]


@pytest.fixture(scope="module")
def questions(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five about pictures and without, and one whose picture is lost."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    records: list[dict[str, Any]] = [
        {"question_id": number, "text": f"What is {'this' * number}?"} for number in range(5)
    ]
    records[1]["image"] = records[4]["image"] = str(world.picture)
    records.append({"question_id": 5, "text": "Where?", "image": "lost.png"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def predict(
    cluster: Cluster, ranks: int, world: World, questions: Path, output: Path, *more: Any, where: Where = "cpu"
) -> Outcome:
    arguments = ["--model-path", world.model, "--input", questions, "--output", output, "--max-new-tokens", "6"]
    return cluster.run(ranks, "tools.predict", *arguments, "--batch-size", "2", *more, where=where)


def answers(path: Path) -> list[dict[str, Any]]:
    """Without what is drawn anew each time."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "answer_id"} for line in lines]


@pytest.mark.parametrize("ranks", [2, 4])
def test_predict_answers_as_one_process(
    cluster: Cluster, world: World, questions: Path, tmp_path: Path, ranks: int
) -> None:
    """With one share or two; started again it asks the question that failed, and no other."""
    one, several = tmp_path / "one.jsonl", tmp_path / "several.jsonl"
    assert predict(cluster, 1, world, questions, one).statuses == [1]
    outcome = predict(cluster, ranks, world, questions, several, "--tensor-parallel", 2)
    assert sorted(outcome.statuses) == [0] * (ranks - 1) + [1], outcome.told()
    assert answers(several) == answers(one) and "lost.png" in answers(one)[5]["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("one.jsonl", "one.jsonl.run.json", "several.jsonl", "several.jsonl.run.json")
    ]
    if ranks == 4:
        again = predict(cluster, ranks, world, questions, several, "--tensor-parallel", 2)
        assert sorted(again.statuses) == [0, 0, 0, 1], again.told()
        assert "0 of " in again.logs[0] and answers(several) == answers(one)


def test_a_chat_starts_its_processes_itself(cluster: Cluster, world: World, tmp_path: Path) -> None:
    """As a user types it; the first process has the input and the output, and nothing is left."""
    arguments = ["--model-path", str(world.model), "--image-file", str(world.picture), "--max-new-tokens", "6"]
    arguments += ["--temperature", "0", "--tensor-parallel", "2"]
    process = subprocess.run(
        [sys.executable, "-m", "paddlemix", "chat", *arguments],
        input=b"What is this?\nWhere?\n",
        capture_output=True,
        cwd=tmp_path,
        env={**device_environment("cpu"), "TMPDIR": str(tmp_path)},
        timeout=HANG,
    )
    assert process.returncode == 0, process.stderr.decode()
    one = chat(cluster, 1, world, "What is this?\nWhere?\n", "--temperature", "0")
    assert process.stdout.decode() == said(one)
    assert b"FLAGS" not in process.stderr
    assert not list(tmp_path.iterdir())


def test_cards_answer_as_the_cpu(cluster: Cluster, world: World, questions: Path, tmp_path: Path) -> None:
    """Each process on a card of its own, which chooses the tokens itself."""
    one, several = tmp_path / "one.jsonl", tmp_path / "several.jsonl"
    predict(cluster, 1, world, questions, one)
    more = ("--tensor-parallel", 2, "--device", "npu", "--dtype", "float32")
    outcome = predict(cluster, 2, world, questions, several, *more, where="npu")
    assert sorted(outcome.statuses) == [0, 1], outcome.told()
    assert answers(several) == answers(one)
