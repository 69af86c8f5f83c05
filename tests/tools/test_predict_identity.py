"""One file of answers is of one model, one list of questions and one set of pictures, wherever they are."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.files.weight_files import read_json, write_json
from paddlemix.checkpoints.model_identity import file_identity
from paddlemix.examples.llava import run_predict_multiround
from paddlemix.generation.answer_file import beside
from paddlemix.tools import predict
from paddlemix.tools.common.command import run_command
from tests.tiny_models import flip_bit
from tests.tiny_world import World

QUESTIONS = [
    {"question_id": 7, "image": "0.png", "text": "How many?"},
    {"question_id": 8, "image": "1.png", "text": "What is this?"},
    {"question_id": 9, "text": "Where is the small cat?"},
]


class Place:
    """A model, an adapter on it, questions, pictures and answers in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.questions = folder / "model", folder / "questions.jsonl"
        self.output = folder / "answers.jsonl"

    def run(self, *more: str | Path, model: Path | None = None) -> int:
        arguments = [
            *("--model-path", model or self.model, "--input", self.questions, "--output", self.output, "--image-root"),
            *(self.folder / "images", "--max-new-tokens", "3", "--device", "cpu", *more),
        ]
        return run_command(predict.main, list(map(str, arguments)))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_bytes().split(b"\n")[:-1]]


@pytest.fixture(scope="module")
def answered(world: World, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all questions are answered by a model in the original layout."""
    place = Place(tmp_path_factory.mktemp("answered"))
    convert_checkpoint(world.model, place.model, Conversion(to="llava"))
    config = read_json(place.model / "config.json")
    write_json(place.model / "config.json", {**config, "unfreeze_mm_vision_tower": False})  # the one beside counts
    shutil.copytree(adapter, place.folder / "adapter")
    place.questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    shutil.copytree(world.data / "images", place.folder / "images")
    assert place.run() == 0
    return place.folder


@pytest.fixture
def place(answered: Path, tmp_path: Path) -> Place:
    """A copy, which is another folder with other times and inodes."""
    return Place(Path(shutil.copytree(answered, tmp_path / "copy", copy_function=shutil.copy)))


def test_what_was_copied_or_touched_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in place.folder.rglob("*"):
        os.utime(path, ns=(1, 1))
    monkeypatch.setattr("paddlemix.checkpoints.load.load_pretrained", None)  # needs no model
    before = place.output.read_bytes()
    assert place.run() == 0
    assert place.output.read_bytes() == before


def replace_text(path: Path, old: str, new: str) -> None:
    content = path.read_text(encoding="utf-8")
    assert old in content
    path.write_text(content.replace(old, new), encoding="utf-8")


CHANGES: dict[str, tuple[Callable[[Place], Any], str]] = {
    "tower": (
        lambda place: flip_bit(place.model / "vision_tower", "vision_model.encoder.layers.0.mlp.fc1.weight", 0),
        "model files (changed: weights of vision_tower)",
    ),
    "language model": (
        lambda place: flip_bit(place.model, "model.layers.0.mlp.down_proj.weight"),
        "model files (changed: weights of language_model)",
    ),
    "output layer": (
        lambda place: flip_bit(place.model, "lm_head.weight", 5),
        "model files (changed: weights of lm_head)",
    ),
    "pixels": (
        lambda place: replace_text(place.model / "vision_tower" / "preprocessor_config.json", "0.0039", "0.0040"),
        "model files (new: processor: rescale_factor)",
    ),
    "question": (lambda place: replace_text(place.questions, "How many?", "How much?"), "input content"),
    "picture": (
        lambda place: shutil.copy(place.folder / "images" / "2.png", place.folder / "images" / "1.png"),
        "pictures that were replaced since: ",
    ),
}


@pytest.mark.parametrize("changed", CHANGES)
@pytest.mark.parametrize("finished", [True, False])
def test_one_change(place: Place, capsys: pytest.CaptureFixture[str], changed: str, finished: bool) -> None:
    if not finished:  # as a killed run leaves it
        partial = [b"%d\t%s\n" % (number, json.dumps(line).encode()) for number, line in enumerate(place.lines()[:2])]
        beside(place.output, "partial").write_bytes(b"".join(partial))
        place.output.unlink()
    files = {path: path.read_bytes() for path in place.folder.glob("answers.jsonl*")}
    change, said = CHANGES[changed]
    change(place)
    assert place.run() == 2
    error = capsys.readouterr().err
    assert said in error and "--overwrite" in error
    if changed == "picture":
        assert f"{place.folder / 'images' / '1.png'}." in error
    assert {path: path.read_bytes() for path in place.folder.glob("answers.jsonl*")} == files


def write_otherwise(path: Path) -> None:
    """The same values in another order and on one line."""
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(dict(reversed(values.items()))) + "\n\n", encoding="utf-8")


def answered_by(place: Place, of: str) -> tuple[dict[str, Any], list[Any]]:
    """The keywords and arguments of a run with the model or its adapter, which has answered all questions."""
    if of == "model":
        return {}, []
    given, base = {"model": place.folder / "adapter"}, ["--model-base", place.model]
    assert place.run("--overwrite", *base, **given) == 0
    return given, base


@pytest.mark.parametrize("of", ["model", "adapter"])
def test_what_was_only_written_otherwise_is_the_same(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    given, base = answered_by(place, of)
    monkeypatch.setattr("paddlemix.checkpoints.load.load_pretrained", None)  # needs no model
    files = [path for path in place.folder.rglob("*.json") if path.parent.name in ("model", "adapter", "vision_tower")]
    assert {"config.json", "tokenizer_config.json", "preprocessor_config.json", "lora_config.json"} <= {
        path.name for path in files
    }
    for path in files:
        write_otherwise(path)
    before = place.output.read_bytes()
    assert place.run(*base, **given) == 0
    assert place.output.read_bytes() == before
    replace_text(place.model / "config.json", '"rope_theta": ', '"rope_theta": 1')
    assert place.run(*base, **given) == 2
    said = "config.json: rope_theta" if of == "model" else "base: config.json: rope_theta"
    assert f"model files (changed: {said})" in capsys.readouterr().err


@pytest.mark.parametrize("of", ["model", "adapter"])
def test_answers_of_an_earlier_version(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    """It knew declared files by their bytes: the same bytes are the same model, of others nobody can tell."""
    given, base = answered_by(place, of)
    monkeypatch.setattr("paddlemix.checkpoints.load.load_pretrained", None)  # needs no model
    path = beside(place.output, "run.json")
    now = json.loads(path.read_text())
    files = file_identity(given.get("model", place.model), *map(str, base[1:]))
    earlier = json.dumps({**now, "header version": 2, "model files": files})
    path.write_text(earlier)
    assert place.run(*base, **given) == 0
    assert json.loads(path.read_text()) == now
    path.write_text(earlier)
    config = place.model / "config.json"
    whole = config.read_bytes()
    write_otherwise(config)
    assert place.run(*base, **given) == 2
    name = "config.json" if of == "model" else "base: config.json"
    assert f"byte by byte, and they are not the same now (changed: {name})" in capsys.readouterr().err
    assert path.read_text() == earlier
    config.write_bytes(whole)
    assert place.run(*base, **given) == 0


def test_the_base_of_an_adapter(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = {"model": place.folder / "adapter"}
    assert place.run("--overwrite", "--model-base", place.model, **adapter) == 0
    assert place.run("--model-base", place.model, **adapter) == 0
    flip_bit(place.model, "model.norm.weight")
    assert place.run("--model-base", place.model, **adapter) == 2
    assert "model files (changed: base: weights of language_model)" in capsys.readouterr().err
    assert place.run("--overwrite", "--model-base", place.model, **adapter) == 2
    error = capsys.readouterr().err
    assert "was trained on another base than" in error and "language_model: norm.weight differ" in error


def test_a_picture_of_a_question_without_answer_may_change(place: Place) -> None:
    picture = place.folder / "images" / "1.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:50])
    assert place.run("--overwrite") == 1
    assert ["error" in line for line in place.lines()] == [False, True, False]
    picture.write_bytes(whole)
    assert place.run() == 0
    assert ["error" in line for line in place.lines()] == [False, False, False]
    picture.write_bytes((place.folder / "images" / "2.png").read_bytes())
    assert place.run() == 2  # now it has an answer


@pytest.mark.parametrize("lost", [1, 30, 400])
def test_a_finished_file_that_lost_its_end(place: Place, capsys: pytest.CaptureFixture[str], lost: int) -> None:
    content, lines = place.output.read_bytes(), place.lines()
    place.output.write_bytes(content[:-lost])
    kept = content[:-lost].count(b"\n")
    assert place.run() == 0
    captured = capsys.readouterr()
    if lost == 1:  # the line is whole
        assert place.output.read_bytes() == content and "0 of 3 questions answered" in captured.out
        return
    assert (
        f"was cut short or damaged after line {kept} of 3: the questions from there on are asked again" in captured.err
    )
    assert f"{3 - kept} of 3 questions answered in this run" in captured.out
    assert place.lines()[:kept] == lines[:kept]
    assert [line["text"] for line in place.lines()] == [line["text"] for line in lines]


def test_a_damaged_line_inside(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    content = place.output.read_bytes().split(b"\n")
    content[1] = content[1][:40] + b"\0" + content[1][41:]
    place.output.write_bytes(b"\n".join(content))
    assert place.run() == 0
    assert "2 of 3 questions answered in this run" in capsys.readouterr().out


def test_a_header_of_another_version(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    header = beside(place.output, "run.json")
    header.write_text(json.dumps({"model": "m", "model files": "0123"}))
    assert place.run() == 2
    assert "it is of another version of this package" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_a_base_that_moved(
    place: Place,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    adapter = place.folder / "adapter"
    if kind == "peft":
        from paddlemix.checkpoints.convert.export_adapter import export_adapter

        export_adapter(adapter, tmp_path / "peft")
        adapter = tmp_path / "peft"
    path = adapter / ("lora_config.json" if kind == "ours" else "adapter_config.json")
    values = json.loads(path.read_text())
    values["base_model_name_or_path"] = "/nowhere/base"
    if kind == "ours":
        values["base"] |= {"model": "/nowhere/base", "relative": {}}
    path.write_text(json.dumps(values))
    assert place.run("--overwrite", model=adapter) == 2
    error = capsys.readouterr().err
    key = "'base'" if kind == "ours" else "base_model_name_or_path"
    assert f"set its new place in {key} of {path}" in error
    assert "pass its folder with --model-base (chat, predict)" in error
    assert place.run("--overwrite", "--model-base", world.model, model=adapter) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    chat = ["--model-path", str(adapter), "--model-base", str(world.model), "--device", "cpu", "--max-new-tokens", "2"]
    assert run_command(run_predict_multiround.main, chat) == 0


def test_a_base_for_a_whole_model(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run("--overwrite", "--model-base", place.model) == 2
    assert "--model-base is for adapters" in capsys.readouterr().err
