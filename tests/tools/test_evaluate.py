"""The command for benchmarks, end to end on a tiny model: all of them, resumed after a kill, shared, wrong data."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paddlemix.evaluation.benchmarks.known_benchmarks import BENCHMARKS
from paddlemix.tools import evaluate
from paddlemix.tools.common.command import run_command
from tests.evaluation.benchmarks import tiny_benchmarks as tiny
from tests.moments import Moment
from tests.tiny_world import World
from tests.trainer.fork_server import ForkServer

PREDICTION = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    tiny.build_all(root)
    return root


def arguments(world: World, root: Path, output: Path, names: str, *more: str) -> list[str]:
    return [
        *("--model-path", str(world.model), "--benchmark", names, "--data-root", str(root), "--output", str(output)),
        *("--max-new-tokens", "3", "--batch-size", "4", "--device", "cpu", *more),
    ]


def run(world: World, root: Path, output: Path, names: str, *more: str) -> int:
    return run_command(evaluate.main, arguments(world, root, output, names, *more))


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "result.json").read_text(encoding="utf-8"))
    return found


def predictions(output: Path, name: str) -> list[dict[str, Any]]:
    text = (output / name / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def said(output: Path, name: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "answer_id"} for line in predictions(output, name)]


def names_to_run() -> list[str]:
    """All benchmarks; those that end in an Excel file alone only where one can be written."""
    try:
        import openpyxl  # noqa: F401
    except ImportError:
        return [name for name in BENCHMARKS if not name.startswith("mmbench_test")]
    return list(BENCHMARKS)


def test_every_benchmark_end_to_end(
    world: World, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = names_to_run()
    assert run(world, root, tmp_path, ",".join(names)) == 0
    found = results(tmp_path)
    assert sorted(found) == sorted(names)
    table = capsys.readouterr().out
    for name in names:
        lines, result = predictions(tmp_path, name), found[name]
        assert [key for key in lines[0] if key in PREDICTION] == PREDICTION
        assert result["questions"] == len(lines) and result["protocol"] == "llava"
        assert re.search(rf"^{name} +llava ", table, re.MULTILINE)
        if result["scored_by"] == "paddlemix":
            assert result["headline"] in result["metrics"] and result["by_category"]
        else:
            assert result["metrics"] == {} and (result["scored_by"] == "server") is (BENCHMARKS[name].judged is None)
        made = result["made_with"]
        assert made["model"] == "model" and made["template"] == "vicuna_v1" and made["max_new_tokens"] == 3
        assert made["seed"] == 0 and made["versions"]["paddlemix"] and made["model files"] and len(made["images"]) == 32
        assert all(re.fullmatch("[0-9a-f]{32,}", digest) for digest in made["data"].values())
        assert made["first_prompt"] == lines[0]["prompt"]
    assert len(predictions(tmp_path, "mmbench_dev_en")) == 4 and len(predictions(tmp_path, "mmmu")) == 30
    before = (tmp_path / "result.json").read_bytes()
    # scoring alone, without the model
    argv = ["--score-only", "--benchmark", ",".join(names), "--data-root", str(root), "--output", str(tmp_path)]
    (tmp_path / "result.json").unlink()
    assert run_command(evaluate.main, argv) == 0
    assert (tmp_path / "result.json").read_bytes() == before


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(
        tmp_path_factory.mktemp("logs"), "paddlemix.tools.evaluate", "paddlemix.evaluation.evaluation_run"
    )
    yield server
    server.close()


def test_killed_and_run_again(server: ForkServer, world: World, root: Path, tmp_path: Path) -> None:
    """In the first benchmark's answers, before its result, and in the second one's answers."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    names = "pope,mmbench_dev_en"
    assert run(world, root, whole, names) == 0
    command = arguments(world, root, output, names)
    for moment in (
        Moment("write */pope/predictions.jsonl.partial", 2, torn=True),
        Moment("rename */out/result.json"),
        Moment("write */mmbench_dev_en/predictions.jsonl.partial"),
    ):
        assert server.run(command, moment)[0] == -signal.SIGKILL, moment
    assert "mmbench_dev_en" not in results(output)
    status, log = server.run(command)
    assert status == 0, log
    assert (output / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    for name in names.split(","):
        assert said(output, name) == said(whole, name)


def test_launched_processes_share_the_questions(
    world: World, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(world, root, tmp_path / "whole", "pope,mme") == 0
    capsys.readouterr()
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("PADDLE_TRAINER_ID", rank)
        assert run(world, root, tmp_path / "out", "pope,mme") == 0
        assert ("pope " in capsys.readouterr().out) is (rank == "0")  # the last one scores
    assert said(tmp_path / "out", "pope") == said(tmp_path / "whole", "pope")
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_a_broken_picture_is_one_error_and_costs_no_other_benchmark(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, output = tmp_path / "eval", tmp_path / "out"
    tiny.build_pope(root / "pope")
    tiny.build_gqa(root / "gqa")
    broken = root / "pope" / "val2014" / f"COCO_val2014_{2:012}.jpg"
    good = broken.read_bytes()
    broken.write_bytes(good[: len(good) // 2])
    assert run(world, root, output, "pope,gqa") == 2
    message = capsys.readouterr().err
    assert "pope: 3 of 12 questions could not be asked, so that there is no score" in message and str(broken) in message
    assert list(results(output)) == ["gqa"]
    broken.write_bytes(good)
    assert run(world, root, output, "pope,gqa") == 0
    assert sorted(results(output)) == ["gqa", "pope"]
    broken.unlink()
    assert run(world, root, tmp_path / "other", "pope") == 2
    message = capsys.readouterr().err
    assert f"pope: 1 of 4 pictures are not in {broken.parent}: {broken.name}" in message
    assert not (tmp_path / "other" / "pope" / "predictions.jsonl").exists()


def test_data_of_one_s_own(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training records, and questions with several references and categories."""
    argv = [
        *("--model-path", str(world.model), "--benchmark", "custom", "--output", str(tmp_path), "--device", "cpu"),
        *("--max-new-tokens", "4", "--image-root", str(world.data)),
    ]
    train = str(world.data / "train.json")
    assert run_command(evaluate.main, [*argv, "--data", train, "--metrics", "exact_match,anls,vqa_accuracy"]) == 0
    result = results(tmp_path)["custom"]
    assert list(result["metrics"]) == ["exact_match", "anls", "vqa_accuracy"] and result["questions"] == 12
    assert result["made_with"]["input content"] and "custom" in capsys.readouterr().out
    questions = tmp_path / "q.jsonl"
    lines = [
        {
            "question_id": place,
            "image": "images/0.png",
            "text": f"What {place}?",
            "category": kind,
            "references": ["x", said],
        }
        for place, (kind, said) in enumerate((("a", "y"), ("b", "z")))
    ]
    tiny.write_lines(questions, lines)
    own = [argument if argument != str(tmp_path) else str(tmp_path / "own") for argument in argv]
    assert run_command(evaluate.main, [*own, "--data", str(questions)]) == 0
    # what the model should have said
    answers = predictions(tmp_path / "own", "custom")
    tiny.write_lines(
        questions, [{**line, "references": [one["text"] or "none"]} for line, one in zip(lines, answers, strict=True)]
    )
    assert run_command(evaluate.main, [*own, "--data", str(questions), "--overwrite"]) == 0
    wanted = 1.0 if all(one["text"] for one in answers) else 0.5
    result = results(tmp_path / "own")["custom"]
    assert result["metrics"]["exact_match"] >= wanted and set(result["by_category"]) == {"a", "b"}
    tiny.write_lines(questions, [{**lines[0], "references": []}])
    assert run_command(evaluate.main, [*own, "--data", str(questions)]) == 2
    assert "record 0 has no reference: neither an answer" in capsys.readouterr().err


def test_other_questions_need_another_output(
    world: World, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(world, root, tmp_path, "textvqa", "--limit", "2") == 0
    assert results(tmp_path)["textvqa"]["limit"] == 2 and len(predictions(tmp_path, "textvqa")) == 2
    assert "2 of 5000" in capsys.readouterr().out
    assert run(world, root, tmp_path, "textvqa") == 2
    assert "limit 2 (now null)" in capsys.readouterr().err
    assert run(world, root, tmp_path, "textvqa", "--limit", "2", "--protocol", "lmms-eval") == 2
    assert 'protocol "llava" (now "lmms-eval")' in capsys.readouterr().err
    assert run(world, root, tmp_path, "textvqa", "--limit", "2", "--protocol", "lmms-eval", "--score-only") == 2
    assert 'protocol "llava" (now "lmms-eval")' in capsys.readouterr().err
    assert run(world, root, tmp_path, "textvqa", "--protocol", "lmms-eval", "--overwrite") == 0
    result = results(tmp_path)["textvqa"]
    assert result["protocol"] == "lmms-eval" and result["unit"] == "share" and result["limit"] is None
    assert predictions(tmp_path, "textvqa")[0]["prompt"].startswith("What brand is it?\nAnswer")
    other = tmp_path / "data"
    shutil.copytree(root / "textvqa", other / "textvqa")
    answers = other / "textvqa" / "TextVQA_0.5.1_val.json"
    answers.write_text(answers.read_text(encoding="utf-8").replace("nokia", "htc"), encoding="utf-8")
    assert run(world, other, tmp_path, "textvqa", "--protocol", "lmms-eval") == 2
    assert "was made with other data; give the same to resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--benchmark", "popes"), "benchmark 'popes' is not one of vqav2, .*did you mean 'pope'"),
        (("--benchmark", "custom"), "--benchmark custom needs --data"),
        (("--data", "x.json"), "--data is for --benchmark custom"),
        (("--limit", "0"), "limit 0 must be at least 1"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0 must be at least 1"),
        (("--data-root", "none"), "data root 'none' is not a folder"),
        (("--score-only", "--overwrite"), "--score-only keeps the predictions"),
        (("--judge-model", "x"), "--judge-address must be given"),
        (("--judge-address", "http://x/v1"), "--judge-model must be given"),
        (("--protocol", "x"), "--protocol"),
    ],
)
def test_what_cannot_be_used(
    world: World, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert run(world, root, tmp_path / "out", "pope", *more) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert re.search(message, captured.err.replace("\n", " "))
    assert not (tmp_path / "out").exists()
