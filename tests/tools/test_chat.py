"""The chat command: piped questions, how it ends, and that an adapter and the merged model say the same."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.datasets.forms.parse import parse_record
from paddlemix.examples.llava import run_predict_multiround
from paddlemix.generation.incremental import IncrementalModel
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.tools import merge_lora_params
from paddlemix.tools.common.command import run_command
from paddlemix.tools.common.terminal import Terminal
from tests.conftest import HANG, ROOT
from tests.tiny_world import World

QUESTIONS = "What is this?\n这是什么颜色?\n"


class Typed(io.TextIOWrapper):
    """An input that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def chat(
    monkeypatch: pytest.MonkeyPatch,
    typed: str | bytes,
    directory: Path,
    image: Path | str,
    *more: str,
    by_hand: bool = False,
) -> int:
    """Runs the command on piped input, with answers of eight tokens."""
    encoded = io.BytesIO(typed.encode() if isinstance(typed, str) else typed)
    monkeypatch.setattr(sys, "stdin", (Typed if by_hand else io.TextIOWrapper)(encoded, encoding="utf-8"))
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
    process = subprocess.run(command, input=QUESTIONS.encode(), capture_output=True, cwd=tmp_path, timeout=HANG)
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
        (("--fp16", "--dtype", "bfloat16"), "--fp16 and --dtype bfloat16 contradict each other"),
        (("--dtype", "bfloat16"), "bfloat16 cannot be computed on CPU"),
        (("--temperature", "-1"), "temperature -1.0 must be at least 0"),
        (("--max-new-tokens", "0"), "max_new_tokens 0 must be at least 1"),
        (("--device", "tpu"), "device='tpu' is not one of gpu, npu, xpu, cpu"),
        (("--image-file", "none.png"), "image 'none.png' does not exist"),
        (("--model-path", "none"), "none"),
        (("--image-file", "http://127.0.0.1:9/x.png"), "127.0.0.1:9/x.png"),
        (("--num-beams", "3"), "--num-beams 3 needs --no-stream"),
        (("--num-beams", "3", "--no-stream", "--temperature", "0.5"), "num_beams 3 needs temperature 0, not 0.5"),
        (("--top-p", "0"), "top_p 0.0 must be above 0"),
        (("--seed", "-1"), "'-1' is not a seed; give a whole number from 0 to"),
        (("--on-overflow", "drop"), "on_overflow='drop' is not one of stop, drop_oldest"),
        (("--conv-mode", "gemma_instruct", "--system", "x"), "'gemma_instruct' has no place for a system text"),
    ],
)
def test_what_cannot_be_used(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
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


@pytest.mark.parametrize("more", [("--image-file", "PICTURE"), ()])
def test_several_images_or_none(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    """Without an image it is a chat in words."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\n"))
    paths = [str(world.picture) if part == "PICTURE" else part for part in more * 2]
    arguments = ["--model-path", str(world.model), "--max-new-tokens", "4", "--debug", *paths]
    assert run_command(run_predict_multiround.main, arguments) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-2])
    assert record["prompt"].count("<image>") == len(paths) // 2


def test_the_whole_answer_at_once_is_the_streamed_one(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for more in ((), ("--no-stream",)):
        assert chat(monkeypatch, QUESTIONS, world.model, world.picture, "--temperature", "0", *more) == 0
        shown.append([answer.strip() for answer in answers(capsys.readouterr().out)])
    assert shown[0] == shown[1]


def test_beams_change_the_default_temperature(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, QUESTIONS, world.model, world.picture, "--num-beams", "2", "--no-stream") == 0
    assert capsys.readouterr().out.count("ASSISTANT: ") == 2


@pytest.mark.parametrize("flag", ["--load-8bit", "--load-4bit"])
def test_few_bits(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert chat(monkeypatch, QUESTIONS, world.model, world.picture, flag) == 0
    assert capsys.readouterr().out.count("ASSISTANT: ") == 2


def test_flags_reach_the_answers(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(Terminal, "run", lambda self: seen.append(self._session))
    flags = {"top-p": 0.9, "top-k": 7, "seed": 3, "repetition-penalty": 1.2, "temperature": 0.7}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    more = ("--stop", "###", "--stop", "END", "--system", "Be brief.", "--on-overflow", "drop_oldest")
    assert chat(monkeypatch, "", world.model, world.picture, *given, *more) == 0
    assert seen[0].settings == GenerationSettings(
        max_new_tokens=8, top_p=0.9, top_k=7, seed=3, repetition_penalty=1.2, temperature=0.7, stop=("###", "END")
    )
    assert (seen[0].system, seen[0].on_overflow) == ("Be brief.", "drop_oldest")


# ---- commands within a chat ----


def test_another_image_going_back_and_beginning_again(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = world.data / "images" / "3.png"
    typed = f"What?\n/image {other}\nAnd this?\n/back\n/reset\nWhat?\n/back\n/help\n//x is what?\n"
    assert chat(monkeypatch, typed, world.model, world.picture, "--temperature", "0", "--debug") == 0
    shown = capsys.readouterr().out
    prompts = [json.loads(line)["prompt"] for line in shown.splitlines() if line.startswith("{")]
    assert [prompt.count("<image>") for prompt in prompts] == [1, 2, 1, 1]
    assert prompts[2] == prompts[0] and "USER: <image>\n/x is what? ASSISTANT:" in prompts[3]
    for said in (
        "45 x 40 pixels, shown with the next question",
        "1 rounds left",
        "a new conversation",
        "0 rounds left",
    ):
        assert said in shown
    assert "/save FILE" in shown


def test_a_saved_conversation_is_a_record_that_training_reads(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "chat.json"
    typed = f"What is this?\n/save {target}\nHow many?\n/save {target}\n"
    assert chat(monkeypatch, typed, world.model, world.picture, "--temperature", "0", "--system", "Be brief.") == 0
    assert f"2 rounds in {target}" in capsys.readouterr().out
    sample = parse_record(json.loads(target.read_text())[0], "chat.json record 0")
    assert sample.images == (str(world.picture),)
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert sample.messages[1].content[0] == 0 and sample.messages[3].text == "How many?"
    assert chat(monkeypatch, f"What?\n/save {target}\n", world.model, world.picture) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    inside = world.model / "chat.json"
    assert chat(monkeypatch, f"What?\n/save {inside}\n", world.model, world.picture) == 2
    assert f"/save '{inside}' is inside the model" in capsys.readouterr().err and not inside.exists()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("/imag x.png", "'/imag' is not one of /image, /back, /reset, /save, /help; did you mean '/image'"),
        ("/image none.png", "image 'none.png' does not exist"),
        ("/image http://127.0.0.1:9/x.png", "127.0.0.1:9/x.png"),
        ("/image", "/image needs a path or an http"),
        ("/back two", "/back expects a number of rounds, not 'two'"),
        (f"/back {'9' * 5000}", "/back expects a number of rounds, not '9999"),
        ("/back", "cannot go back 1 rounds; the conversation has 0"),
        ("/save", "/save needs a file name"),
        ("/save x.json", "there is nothing to save yet"),
        ("<image> or <image>?", "the question has <image> 2 times, but 1 image was given"),
    ],
)
def test_a_line_that_cannot_be_used(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, message: str
) -> None:
    """It ends a piped chat, and is only said to somebody who types."""
    assert chat(monkeypatch, f"{typed}\nWhat?\n", world.model, world.picture) == 2
    assert message in capsys.readouterr().err
    assert chat(monkeypatch, f"{typed}\nWhat?\n", world.model, world.picture, by_hand=True) == 0
    captured = capsys.readouterr()
    assert message in captured.err and captured.out.rstrip().endswith("exit...")
    assert "ASSISTANT: " in captured.out


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real signal, in the middle of the first answer's fourth token."""
    feed, calls = IncrementalModel.step, itertools.count()

    def interrupted(self: IncrementalModel, tokens: np.ndarray) -> np.ndarray:
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return feed(self, tokens)

    monkeypatch.setattr(IncrementalModel, "step", interrupted)
    assert chat(monkeypatch, QUESTIONS, world.model, world.picture, "--temperature", "0", "--debug") == 0
    shown = capsys.readouterr().out
    records = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    assert shown.count(" [stopped]") == 1 and len(records) == 2
    assert records[1]["prompt"].startswith(records[0]["prompt"])
    assert shown.endswith("exit...\n")


def test_ctrl_c_before_an_answer_begins_keeps_the_image_for_the_next_question(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, calls = IncrementalModel.extend, itertools.count()

    def interrupted(self: IncrementalModel, *given: Any) -> np.ndarray:
        if next(calls) == 0:
            raise KeyboardInterrupt
        return read(self, *given)

    monkeypatch.setattr(IncrementalModel, "extend", interrupted)
    assert chat(monkeypatch, QUESTIONS, world.model, world.picture, "--debug") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(records) == 1 and "USER: <image>\n这是什么颜色? ASSISTANT:" in records[0]["prompt"]


def test_a_text_only_model_cannot_look(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "What?\n", world.llama, world.picture) == 2
    assert "the model has no vision tower" in capsys.readouterr().err
