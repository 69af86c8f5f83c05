"""The demo from end to end in small: every step is the command a user types, with a few records and steps."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.demo import pipeline
from paddlemix.demo.digits import write_digits
from paddlemix.demo.model import write_start_model
from paddlemix.demo.pipeline import DemoFolder, run_demo
from paddlemix.demo.questioning import answer_questions
from paddlemix.demo.scene_data import write_scenes
from paddlemix.errors import UserError
from paddlemix.examples.llava import pretrain, run_predict_multiround
from paddlemix.tools import demo, supervised_finetune
from paddlemix.tools.common.command import run_command
from tests.tiny_world import World, changed, weights

MAINS = {
    "examples/llava/pretrain.py": pretrain.main,
    "tools/supervised_finetune.py": supervised_finetune.main,
    "examples/llava/run_predict_multiround.py": run_predict_multiround.main,
}
FEW = ["max_steps=2", "per_device_train_batch_size=2", "eval_steps=2", "max_evaluate_steps=1", "device=cpu"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A demo of few records and steps inside this process; gives the commands that were run."""
    commands: list[list[str]] = []

    def run(arguments: Sequence[str], typed: str | None = None) -> None:
        commands.append(list(arguments))
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed or ""))
        more = FEW if "predict" not in arguments[0] else ["--max-new-tokens", "4"]
        assert run_command(MAINS[arguments[0]], [*arguments[1:], *more]) == 0

    def write_few_digits(directory: Path) -> object:
        files = write_digits(directory)
        for path in (*files.lists, files.held_out):
            records = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(records[:10], ensure_ascii=False), encoding="utf-8")
        return files

    monkeypatch.setattr(pipeline, "write_scenes", partial(write_scenes, train_count=60, held_out_count=10))
    monkeypatch.setattr(pipeline, "write_digits", write_few_digits)
    monkeypatch.setattr(pipeline, "run_command_line", run)
    return commands


def test_the_whole_demo(small: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = DemoFolder(tmp_path / "demo")
    result = run_demo(folder)
    assert json.loads((folder.root / "result.json").read_text(encoding="utf-8")) == result
    assert set(result) >= {"accuracy_before", "accuracy_after", "scene_accuracy", "held_out_images", "seconds"}
    assert result["held_out_images"] == 10
    assert all(0 <= result[key] <= 1 for key in result if key.endswith(("before", "after", "accuracy")))  # type: ignore[operator]
    assert load_pretrained(folder.scenes).adapter is None
    assert load_pretrained(folder.digits).adapter is not None
    for path in ("digits.png", "scenes.png", "digits/loss.png", "scenes/loss.png"):
        assert (folder.root / path).read_bytes()[:4] == b"\x89PNG"
    names = [Path(command[0]).stem for command in small]
    assert names == ["pretrain", "supervised_finetune", "supervised_finetune", "run_predict_multiround"]
    shown = capsys.readouterr().out
    assert "held-out digits, after LoRA" in shown and shown.count("ASSISTANT: ") == 2
    assert not [path for path in tmp_path.iterdir() if path != folder.root]


def test_prepare_only(small: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the shipped tiny recipes start from, in any folder."""
    assert run_command(demo.main, ["--output", str(tmp_path / "demo"), "--prepare-only"]) == 0
    assert small == []
    folder = DemoFolder(tmp_path / "demo")
    assert f"wrote {folder.data} and {folder.start}" in capsys.readouterr().out
    loaded = load_pretrained(folder.start)
    assert loaded.processor is not None
    assert loaded.processor.template.name == "mistral_instruct"
    assert len(loaded.processor.tokenizer) == loaded.model.config.text.vocab_size
    assert (folder.data / "scenes_captions.json").is_file()


def test_the_start_model_depends_on_the_seed_alone(tokenizer_directory: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_start_model(tokenizer_directory, tmp_path / name, seed)
    one, same, other = (weights(tmp_path / name) for name in "abc")
    assert not changed(one, same) and changed(one, other)


def test_a_step_that_fails_ends_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="this step of the demo ended with status 2; see its message above"):
        pipeline.run_command_line(["tools/supervised_finetune.py", str(tmp_path / "none.json")])
    captured = capfd.readouterr()
    assert "== python paddlemix/tools/supervised_finetune.py" in captured.out
    assert captured.err.startswith("error: configuration file ") and captured.err.count("\n") == 1


def test_questions_are_answered_in_order(world: World) -> None:
    """More of them than one batch holds, pictures of several sizes."""
    records = json.loads((world.data / "train.json").read_text(encoding="utf-8"))
    asked = [record for record in records if "image" in record] * 8
    path = world.root / "questions.json"
    path.write_text(json.dumps(asked, ensure_ascii=False), encoding="utf-8")
    verdicts = answer_questions(world.model, path, world.data)
    path.unlink()
    assert len(verdicts) == len(asked) == 72
    for verdict, record in zip(verdicts, asked, strict=True):
        question, expected = record["conversations"][0]
        assert verdict.question == question.removeprefix("<image>\n") and verdict.expected == expected
        assert verdict.image_path == world.data / record["image"]
    assert [verdict.answer for verdict in verdicts[:9]] == [verdict.answer for verdict in verdicts[9:18]]


def test_a_model_without_tokenizer_cannot_be_questioned(world: World, tmp_path: Path) -> None:
    for path in world.model.iterdir():
        if "token" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="has no tokenizer files, so it cannot be questioned"):
        answer_questions(tmp_path, world.data / "eval.json", world.data)


def test_a_folder_with_other_content_needs_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = DemoFolder(tmp_path / "mine")
    (folder.start).mkdir(parents=True)
    (folder.start / "model.safetensors").write_text("any model", encoding="utf-8")
    monkeypatch.setattr(pipeline, "write_scenes", lambda *_: pytest.fail("it began"))
    assert run_command(demo.main, ["--output", str(folder.root), "--prepare-only"]) == 2
    assert [path.name for path in folder.root.iterdir()] == ["start"]
    pipeline.check_folder(folder, overwrite=True)
    (folder.root / ".paddlemix-demo").touch()  # an earlier demo's
    pipeline.check_folder(folder)
    pipeline.check_folder(DemoFolder(tmp_path / "new"))
