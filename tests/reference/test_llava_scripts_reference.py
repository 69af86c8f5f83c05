"""LLaVA's own evaluation scripts read the files that `predict` writes, and count what is there.

Run by `make reference`, which puts llava-torch 1.2.2.post1 and the scripts of its repository (commit c121f04) into
`.venv-reference/llava`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from paddlemix.tools import predict
from paddlemix.tools.common.command import run_command
from tests.reference.llava_package import LLAVA, real_file
from tests.tiny_world import World

pytestmark = pytest.mark.reference

LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
Lines = list[dict[str, Any]]


def script(name: str, *arguments: object) -> str:
    """What a script of LLaVA's prints."""
    path = real_file(LLAVA / name)
    done = subprocess.run(
        [sys.executable, str(path), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(LLAVA)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def answers(world: World, tmp_path: Path) -> Callable[..., Path]:
    """Asks a tiny model, then puts given texts in the place of its answers, whose keys and prompts stay."""

    def answer(questions: list[dict[str, Any]], texts: Sequence[str], *more: str, lines: bool = True) -> Path:
        asked, output = tmp_path / "questions.json", tmp_path / "answers.jsonl"
        encoded = [json.dumps(question) for question in questions]
        asked.write_text("\n".join(encoded) + "\n" if lines else f"[{','.join(encoded)}]", encoding="utf-8")
        arguments = ["--model-path", str(world.model), "--input", str(asked), "--output", str(output), *more]
        arguments += ["--image-root", str(world.data), "--max-new-tokens", "4", "--device", "cpu"]
        assert run_command(predict.main, arguments) == 0
        found: Lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        given = [{**line, "text": text} for line, text in zip(found, texts, strict=True)]
        output.write_text("".join(json.dumps(line) + "\n" for line in given), encoding="utf-8")
        return output

    return answer


def test_eval_science_qa(answers: Callable[..., Path], tmp_path: Path) -> None:
    bodies = ["Which is red?\nA. bus\nB. cat", "Context: It rains.\nWhich is wet?\nA. sun\nB. road\nC. sea"]
    asked: Lines = [
        {
            "id": str(number),
            **({"image": f"images/{number}.png"} if number % 2 == 0 else {}),
            "conversations": [
                {"from": "human", "value": ("<image>\n" if number % 2 == 0 else "") + bodies[number % 2]},
                {"from": "gpt", "value": "A"},
            ],
        }
        for number in range(4)
    ]
    path = answers(asked, ["A", "B. The road.", "The answer is B.", "none"], "--single-pred-prompt", lines=False)
    prompts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert prompts == [
        f"{'<image>' + chr(10) if number % 2 == 0 else ''}{bodies[number % 2]}\n{LETTER}" for number in range(4)
    ]
    problems = {
        str(number): {"choices": ["a", "b", "c"][: 2 + number % 2], "answer": number % 2} for number in range(4)
    }
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    out = ["--output-file", tmp_path / "out.json", "--output-result", tmp_path / "result.json"]
    said = script("llava/eval/eval_science_qa.py", "--base-dir", tmp_path, "--result-file", path, *out)
    assert "Total: 4, Correct: 2, Accuracy: 50.00%, IMG-Accuracy: 50.00%" in said
    judged = json.loads((tmp_path / "out.json").read_text())
    shown = {item["question_id"] for items in judged.values() for item in items if item["is_multimodal"]}
    assert shown == {"0", "2"}


def test_eval_pope(answers: Callable[..., Path], tmp_path: Path) -> None:
    labels = ["yes", "no", "yes", "no", "yes"]
    asked = [
        {"question_id": number, "image": "images/0.png", "text": f"Is there a cat?\n{WORD}", "category": "random"}
        for number in range(5)
    ]
    path = answers(asked, ["Yes", "No, there is not.", "No", "Yes", "Yes."])
    folder = tmp_path / "coco"
    folder.mkdir()
    lines = "".join(json.dumps({"label": label}) + "\n" for label in labels)
    (folder / "coco_pope_random.json").write_text(lines)
    given = ["--annotation-dir", folder, "--question-file", tmp_path / "questions.json", "--result-file", path]
    said = script("llava/eval/eval_pope.py", *given)
    assert "Category: random, # samples: 5" in said and "2\t1\t1\t1" in said
    assert "0.667, 0.600, 0.667, 0.667, 0.600" in said  # F1, accuracy, precision, recall, share of yes


def test_eval_textvqa(answers: Callable[..., Path], tmp_path: Path) -> None:
    questions = ["What is the brand?", "what does it say?"]
    asked: Lines = [
        {
            "question_id": f"img{number}",
            "image": f"images/{number}.png",
            "text": f"{question}\nReference OCR token: {'a, b' if number else ''}\n{WORD}",
        }
        for number, question in enumerate(questions)
    ]
    path = answers(asked, ["acme", "Stop."])
    assert [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()] == [
        record["text"] for record in asked
    ]
    references = [["acme"] * 10, ["stop"] * 2 + ["go"] * 8]
    data = [
        {"image_id": f"img{number}", "question": question, "answers": references[number]}
        for number, question in enumerate(questions)
    ]
    (tmp_path / "val.json").write_text(json.dumps({"data": data}))
    given = ["--annotation-file", tmp_path / "val.json", "--result-file", path]
    said = script("llava/eval/eval_textvqa.py", *given)
    assert "Samples: 2" in said
    assert "Accuracy: 80.00%" in said  # (1 + 0.6) / 2: of ten times nine references 2 or 1 agree


def test_convert_gqa_for_eval(answers: Callable[..., Path], tmp_path: Path) -> None:
    asked: Lines = [{"question_id": f"g{number}", "image": "images/0.png", "text": "What?"} for number in range(2)]
    path = answers(asked, ["Red.", "A Bus"])
    script("scripts/convert_gqa_for_eval.py", "--src", path, "--dst", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"questionId": "g0", "prediction": "red"},
        {"questionId": "g1", "prediction": "a bus"},
    ]
