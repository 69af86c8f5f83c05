"""Every command with its output at, in, above and linked to everything that its inputs need, and told to overwrite:
it is refused at once, and every byte that was there still is."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from paddlemix.__main__ import COMMANDS
from paddlemix.tools.common.command import run_command
from tests.tiny_models import GOLDEN

Arguments = Callable[[Path, Path], list[str]]  # of the world's folder and the output

DIRECTORIES = {  # what is needed -> folder
    "base": "models/base",
    "subfolder": "models/base/parts",
    "tower": "towers/clip",
    "weights elsewhere": "store/blobs",
    "adapter": "runs/adapter",
    "the adapter's base": "bases/of_adapter",
    "projector": "projectors",
    "data": "data",
    "images": "images",
    "checkpoint": "runs/old/checkpoint-2",
}
FILES = {  # what is needed -> file
    "questions": "data/q.jsonl",
    "data": "data/train.json",
    "table": "data/table.csv",
    "image": "images/a.png",
    "weights": "models/base/model.safetensors",
    "linked weights": "store/blobs/extra.safetensors",
    "the tower's config": "towers/clip/config.json",
    "the run's file": "data/run.json",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of inputs; a base's tower, and some of its weights, are elsewhere.  Every test leaves it alone."""
    tmp_path = tmp_path_factory.mktemp("guarded")
    for name in (*DIRECTORIES.values(), "out"):
        (tmp_path / name).mkdir(parents=True)
    original = GOLDEN / "llava_v15_llama" / "original"
    shutil.copytree(original / "vision_tower", tmp_path / "towers/clip", dirs_exist_ok=True)
    for name in ("models/base", "bases/of_adapter"):
        for file in ("config.json", "model.safetensors"):
            shutil.copy(original / file, tmp_path / name)
    for name in ("models/base", "bases/of_adapter"):
        shutil.copytree(GOLDEN.parent / "training" / "tokenizer", tmp_path / name, dirs_exist_ok=True)
    for name in ("models/base", "bases/of_adapter"):
        config = tmp_path / name / "config.json"
        values = json.loads(config.read_text()) | {"mm_vision_tower": str(tmp_path / "towers/clip")}
        config.write_text(json.dumps(values))
    (tmp_path / "store/blobs/extra.safetensors").write_bytes(b"weights")
    (tmp_path / "models/base/extra.safetensors").symlink_to(tmp_path / "store/blobs/extra.safetensors")
    base = {"model": str(tmp_path / "bases/of_adapter"), "relative": {"model": "../../bases/of_adapter"}}
    (tmp_path / "runs/adapter/lora_config.json").write_text(json.dumps({"paddlemix_format": 1, "base": base}))
    (tmp_path / "runs/adapter/adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "projectors/mm_projector.bin").write_bytes(b"weights")
    (tmp_path / "runs/old/checkpoint-2/training_state.json").write_text('{"global_step": 2}')
    Image.new("RGB", (4, 4)).save(tmp_path / "images/a.png")
    record = {
        "id": "0",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}],
    }
    (tmp_path / "data/train.json").write_text(json.dumps([record]))
    (tmp_path / "data/q.jsonl").write_text(json.dumps({"question_id": 1, "image": "a.png", "text": "Q"}) + "\n")
    (tmp_path / "data/table.csv").write_text("image,question,answer\na.png,Q,A\n")
    dataset = {"train": [{"data_files": str(tmp_path / "data/train.json"), "image_root": str(tmp_path / "images")}]}
    (tmp_path / "data/run.json").write_text(
        json.dumps({"dataset": dataset, "output_dir": "o", "model_name_or_path": str(tmp_path / "models/base")})
    )
    return tmp_path


def digests(folder: Path) -> dict[str, str]:
    """Path -> digest of every file, target of every link; folders too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def train(key: str | None = None, value: str = "") -> Arguments:
    """Arguments of a training run, with one more key that names a path of the world."""

    def make(root: Path, output: Path) -> list[str]:
        entry = {"data_files": str(root / "data/train.json"), "image_root": str(root / "images")}
        values = {
            "model_name_or_path": root / "models/base",
            "output_dir": output,
            "overwrite_output_dir": "true",
            "do_train": "true",
            "device": "cpu",
            "dataset": json.dumps({"train": [entry]}),
        }
        if key is not None:
            values[key] = root / value
        return [f"{name}={text}" for name, text in values.items()]

    return make


def quantize(root: Path, output: Path) -> list[str]:
    return ["--model-path", f"{root}/models/base", "--output", f"{output}", "--kind", "int8"]


def convert(root: Path, output: Path) -> list[str]:
    return ["--input", f"{root}/models/base", "--output", f"{output}", "--to", "paddlemix"]


def convert_adapter(root: Path, output: Path) -> list[str]:
    return ["--input", f"{root}/runs/adapter", "--output", f"{output}", "--to", "llava"]


def merge(root: Path, output: Path) -> list[str]:
    given = ["--model_name_or_path", f"{root}/models/base", "--lora_path", f"{root}/runs/adapter"]
    return [*given, "--merge_model_path", f"{output}", "--overwrite"]


def show(root: Path, output: Path) -> list[str]:
    data = ["--data", f"{root}/data/train.json", "--image-root", f"{root}/images"]
    return ["--model-path", f"{root}/models/base", *data, "--output", f"{output}", "--overwrite"]


def predict(root: Path, output: Path) -> list[str]:
    given = ["--model-path", f"{root}/models/base", "--input", f"{root}/data/q.jsonl", "--device", "cpu"]
    return [*given, "--image-root", f"{root}/images", "--output", f"{output}", "--overwrite"]


def evaluate(root: Path, output: Path) -> list[str]:
    data = ["--benchmark", "custom", "--data", f"{root}/data/train.json", "--image-root", f"{root}/images"]
    model = ["--model-path", f"{root}/models/base", "--device", "cpu"]
    return [*model, *data, "--output", f"{output}", "--overwrite"]


def predict_adapter(root: Path, output: Path) -> list[str]:
    given = ["--model-path", f"{root}/runs/adapter", "--input", f"{root}/data/q.jsonl", "--device", "cpu"]
    return [*given, "--output", f"{output}", "--overwrite"]


def check(flag: str, of_run: bool = False) -> Arguments:
    """Arguments of check-data; the model is the run's own, or another."""

    def make(root: Path, output: Path) -> list[str]:
        model = ["--model-path", f"{root}/bases/of_adapter"] * (not of_run)
        return [f"{root}/data/run.json", *model, flag, f"{output}", "--overwrite", "--workers", "1"]

    return make


def convert_data(source: str) -> Arguments:
    def make(root: Path, output: Path) -> list[str]:
        return [f"{root}/{source}", "--image-root", f"{root}/images", "--output", f"{output}", "--overwrite"]

    return make


_WHOLE = ("at", "in", "above", "linked", "in a link")
_BASE = ("base", "subfolder", "tower")
_STORE = ("weights elsewhere",), ("at", "above", "linked")  # beside linked weights others may come
# command, arguments, what is needed, how the output stands to it
FOLDERS: list[tuple[str, Arguments, tuple[str, ...], tuple[str, ...]]] = [
    ("finetune", train(), _BASE, _WHOLE),
    ("finetune", train(), *_STORE),
    (
        "finetune",
        train("resume_from_checkpoint", "runs/old/checkpoint-2"),
        ("base", "checkpoint"),
        ("at", "in", "linked"),
    ),
    ("finetune", train("resume_from_checkpoint", "runs/old/checkpoint-2"), ("tower",), _WHOLE),
    ("finetune", train("lora_path", "runs/adapter"), ("adapter", "the adapter's base"), _WHOLE),
    ("finetune", train("pretrain_mm_mlp_adapter", "projectors/mm_projector.bin"), ("projector",), ("at", "linked")),
    ("pretrain", train(), ("base", "tower", "data", "images"), ("at", "linked", "above")),
    ("convert", convert, _BASE, _WHOLE),
    ("convert", convert, *_STORE),
    ("convert", convert_adapter, ("adapter", "the adapter's base"), _WHOLE),
    ("quantize", quantize, _BASE, _WHOLE),
    ("quantize", quantize, *_STORE),
    ("merge-lora", merge, (*_BASE, "the adapter's base"), _WHOLE),
    ("merge-lora", merge, *_STORE),
    ("merge-lora", merge, ("adapter",), ("in", "above", "in a link")),
    ("evaluate", evaluate, _BASE, ("at", "linked")),
    ("show-data", show, _BASE, ("at", "in", "linked", "in a link")),
]
_FILE = ("at", "linked", "hard link")
OUTPUT_FILES: list[tuple[str, Arguments, tuple[str, ...], tuple[str, ...]]] = [
    ("predict", predict, ("questions", "image", "weights", "linked weights", "the tower's config"), _FILE),
    ("check-data", check("--fix"), ("data", "image", "weights", "the run's file"), _FILE),
    ("check-data", check("--report"), ("data", "image", "weights", "the run's file"), _FILE),
    ("convert-data", convert_data("data/table.csv"), ("table", "image"), ("linked", "hard link")),
    ("convert-data", convert_data("data/q.jsonl"), ("questions",), _FILE),
    ("convert-data", convert_data("data/q.jsonl"), ("image",), ("linked", "hard link")),
]
BESIDE: list[tuple[str, Arguments, tuple[str, ...]]] = [
    ("predict", predict, ("base", "subfolder", "tower")),
    ("predict", predict_adapter, ("adapter", "the adapter's base")),
    ("check-data", check("--fix"), ("base", "tower")),
    ("check-data", check("--report"), ("base", "tower", "the adapter's base")),
    ("check-data", check("--fix", of_run=True), ("base", "tower")),
]


def cases() -> Iterator[object]:
    for number, (command, arguments, needs, places) in enumerate(FOLDERS):
        for need in needs:
            for place in places:
                yield pytest.param(
                    command, arguments, DIRECTORIES[need], place, id=f"{number} {command} {place} {need}"
                )
    for number, (command, arguments, needs, places) in enumerate(OUTPUT_FILES):
        for need in needs:
            for place in places:
                yield pytest.param(command, arguments, FILES[need], place, id=f"{number} {command} {place} {need} file")
    for number, (command, arguments, needs) in enumerate(BESIDE):
        for need in needs:
            name = f"{number} {command} new file in {need}"
            yield pytest.param(command, arguments, DIRECTORIES[need], "new.json", id=name)


def output_of(folder: Path, needed: str, place: str) -> Path:
    """Where the command is told to write."""
    path, link = folder / needed, folder / "out" / "link.json"
    if place == "hard link":
        os.link(path, link)
    elif "link" in place:
        link.symlink_to(path)
    return {
        "at": path,
        "in": path / "new",
        "above": path.parent,
        "linked": link,
        "in a link": link / "new",
        "hard link": link,
        "new.json": path / "new.json",
    }[place]


@pytest.mark.parametrize(("command", "arguments", "needed", "place"), list(cases()))
def test_nothing_that_a_command_needs_is_ever_lost(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, arguments: Arguments, needed: str, place: str
) -> None:
    output = output_of(folder, needed, place)
    before = digests(folder)
    main = importlib.import_module(COMMANDS[command].module).main
    try:
        assert run_command(main, arguments(folder, output)) == 2
        error = capsys.readouterr().err
        assert str(output) in error and error.count("\n") == 1, error
        assert "which must stay as it is" in error or "is not a JSON file, so it is never replaced" in error, error
        assert digests(folder) == before
    finally:
        (folder / "out" / "link.json").unlink(missing_ok=True)


def test_there_are_enough_of_them() -> None:
    assert len(list(cases())) > 40
    assert {case.values[0] for case in cases()} == COMMANDS.keys() - {"doctor", "demo", "chat", "launch"}  # type: ignore[attr-defined]
