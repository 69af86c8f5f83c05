"""The chat command: piped questions, how it ends, and that an adapter and the merged model say the same."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from paddlemix.examples.llava import run_predict_multiround
from paddlemix.tools import merge_lora_params
from paddlemix.tools._command import run_command
from tests.conftest import ROOT
from tests.tiny_world import World

QUESTIONS = "What is this?\n这是什么颜色?\n"


def chat(monkeypatch: pytest.MonkeyPatch, typed: str | bytes, directory: Path, image: Path | str, *more: str) -> int:
    """Runs the command on piped input, with answers of eight tokens."""
    encoded = typed.encode() if isinstance(typed, str) else typed
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(encoded), encoding="utf-8"))
    arguments = ["--model-path", str(directory), "--image-file", str(image), "--max-new-tokens", "8", *more]
    return run_command(run_predict_multiround.main, arguments)


def answers(shown: str) -> list[str]:
    """What stands behind each `ASSISTANT: `; the text of a round ends where the next prompt begins."""
    return [part.rpartition("USER: ")[0] for part in shown.split("ASSISTANT: ")[1:]]


def test_adapter_and_merged_model_say_the_same(
    world: World, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter in a process of its own, as a user would pipe it."""
    merged = tmp_path / "merged"
    run_command(merge_lora_params.main, ["--lora_path", str(adapter), "--merge_model_path", str(merged)])
    capsys.readouterr()
    script = str(ROOT / "paddlemix/examples/llava/run_predict_multiround.py")
    arguments = ["--model-path", str(adapter), "--image-file", str(world.picture), "--temperature", "0"]
    command = [sys.executable, script, *arguments, "--max-new-tokens", "8"]
    process = subprocess.run(command, input=QUESTIONS.encode(), capture_output=True, cwd=tmp_path, timeout=120)
    assert process.returncode == 0 and process.stderr == b""
    shown = process.stdout.decode()
    assert shown.endswith("USER: exit...\n") and shown.count("ASSISTANT: ") == 2
    assert chat(monkeypatch, QUESTIONS, merged, world.picture, "--temperature", "0") == 0
    assert capsys.readouterr().out == shown
    assert all(answer.strip() for answer in answers(shown))


@pytest.mark.parametrize(
    ("typed", "rounds"), [("What?\n\nmore\n", 1), ("What?\n   \n", 1), ("What?", 1), ("\n", 0), ("", 0)]
)
def test_an_empty_line_or_the_end_of_the_input_ends_it(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, rounds: int
) -> None:
    assert chat(monkeypatch, typed, world.model, world.picture) == 0
    shown = capsys.readouterr().out
    assert shown.count("ASSISTANT: ") == rounds and shown.endswith("exit...\n")


def test_debug_shows_prompt_and_answer_as_json(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, QUESTIONS, world.model, world.picture, "--temperature", "0", "--debug") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [set(line) for line in lines] == [{"prompt", "outputs"}] * 2
    assert "USER: <image>\nWhat is this? ASSISTANT: " in lines[0]["prompt"]
    assert "</s>USER: 这是什么颜色? ASSISTANT: " in lines[1]["prompt"]
    assert lines[1]["prompt"].startswith(lines[0]["prompt"])


def test_equal_seeds_draw_equal_answers(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for seed in ("1", "1", "2"):
        assert chat(monkeypatch, QUESTIONS, world.model, world.picture, "--temperature", "2", "--seed", seed) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]


def test_another_template_is_noted(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "", world.model, world.picture, "--conv-mode", "llava_v1") == 0
    assert capsys.readouterr().err == "note: --conv-mode llava_v1 replaces the checkpoint's template vicuna_v1\n"
    assert chat(monkeypatch, "", world.model, world.picture, "--conv-mode", "v1") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--conv-mode", "vicuna_v11"), "'vicuna_v11' is not one of .*did you mean 'vicuna_v1'"),
        (("--fp16",), "float16 cannot be computed on CPU"),
        (("--dtype", "bfloat16"), "bfloat16 cannot be computed on CPU"),
        (("--temperature", "-1"), "temperature -1.0 must be at least 0"),
        (("--max-new-tokens", "0"), "max_new_tokens 0 must be at least 1"),
        (("--device", "tpu"), "device='tpu' is not one of gpu, npu, xpu, cpu"),
        (("--image-file", "none.png"), "image 'none.png' does not exist"),
        (("--model-path", "none"), "none"),
    ],
)
def test_what_cannot_be_used(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, str],
    message: str,
) -> None:
    assert chat(monkeypatch, QUESTIONS, world.model, world.picture, *more) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert re.search(message, captured.err.replace("\n", " "))


def test_a_question_that_is_no_text(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, b"\xff\xfe What?\n", world.model, world.picture) == 2
    assert "the question is not UTF-8 text (byte 0)" in capsys.readouterr().err


def test_a_question_that_is_too_long_ends_it_with_a_word(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "What? " * 300 + "\n", world.model, world.picture) == 2
    assert "leaves room for; shorten it" in capsys.readouterr().err


def test_a_text_only_model_cannot_look(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "What?\n", world.llama, world.picture) == 2
    assert "the model has no vision tower" in capsys.readouterr().err
