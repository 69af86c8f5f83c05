"""The command that shows records: the golden conversations as JSON, marked text, pictures, and no paddle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.processors.run_processor import VisionSizes
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.tools import show_data
from paddlemix.tools.common.command import run_command
from paddlemix.tools.common.processor import _sight
from tests.conftest import HANG, ROOT
from tests.golden_conversations import VOCABULARIES, golden_cases, golden_tokenizer
from tests.tiny import ANYRES_SPEC, PAD_SPEC, make_processor, noise_picture

GOLDEN = [case for case in golden_cases() if case["labels"] is not None and not case["legacy"]]


def write_checkpoint(folder: Path, tokenizer: Tokenizer, **choices: Any) -> Path:
    """What a checkpoint declares, without a weight."""
    folder.mkdir()
    processor = make_processor(tokenizer, **choices)
    (folder / "processor_config.json").write_text(json.dumps(processor.to_dict()))
    tokenizer.save(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return write_checkpoint(tmp_path / "model", tokenizer)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four records: one image, text alone, a missing image, two rounds with an image each."""
    for number in range(2):
        noise_picture(60, 40 + number, number).save(tmp_path / f"{number}.png")
    records = [
        {"image": "0.png", "conversations": [["<image>\nWhat is this?", "A cat."]]},
        {"conversations": [["Hello\x1b[31m", "It is red.\nIt is big."]]},
        {"image": "none.png", "conversations": [["<image>\nQ", "A"]]},
        {"images": ["0.png", "1.png"], "conversations": [["<image>\nOne?", "1"], ["<image>\nTwo?", "2"]]},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


def show(checkpoint: Path, data: Path, *more: str) -> int:
    arguments = ["--model-path", str(checkpoint), "--data", str(data), "--image-root", str(data.parent)]
    return run_command(show_data.main, [*arguments, *more])


def shown(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("version", sorted({case["version"] for case in GOLDEN}))
@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=lambda path: path.parent.name)
def test_json_is_the_golden_conversations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], vocabulary: Path, version: str
) -> None:
    cases = [case for case in GOLDEN if case["version"] == version and case["vocabulary"] == vocabulary]
    checkpoint = write_checkpoint(tmp_path / "model", golden_tokenizer(vocabulary, legacy=False))
    noise_picture(64, 48).save(tmp_path / "a.png")
    records = [
        {"conversations": case["conversations"], **({"image": "a.png"} if case["has_image"] else {})} for case in cases
    ]
    data = tmp_path / "golden.json"
    data.write_text(json.dumps(records))
    assert show(checkpoint, data, "--conv-mode", version, "--json") == 0
    found = shown(capsys)
    assert [value["index"] for value in found] == list(range(len(cases)))
    for value, case in zip(found, cases, strict=True):
        assert (value["input_ids"], value["labels"]) == (case["input_ids"], case["labels"])
        assert value["prompt"] == case.get("prompt", value["prompt"])
        count = case["input_ids"].count(-200)
        assert (value["num_image_tokens"], value["num_tiles"]) == (4 * count, count)


def test_text_shows_what_is_trained(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(checkpoint, data, "--count", "2") == 0
    text = capsys.readouterr().out
    assert text.startswith("[[trained]] tokens are marked so")
    assert "USER: <image x 4>\n  | What is this? ASSISTANT:[[ A cat.</s>]]" in text
    assert "ASSISTANT:[[ It is red.]]\n  | [[It is big.</s>]]" in text
    assert f"{data.parent / '0.png'}: 60x40, 1 tile, 4 tokens" in text
    assert "tokens: " in text and " trained" in text
    assert "\x1b" not in text and "Hello\\x1b[31m" in text


@pytest.mark.parametrize(("no_colour", "coloured"), [("", True), ("1", False)])
def test_colours_are_for_terminals(
    checkpoint: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_colour: str,
    coloured: bool,
) -> None:
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert show(checkpoint, data, "--index", "0") == 0
    text = capsys.readouterr().out
    assert ("ASSISTANT:\x1b[32m A cat.</s>\x1b[0m" in text) is coloured
    assert ("[[ A cat.</s>]]" in text) is not coloured


def test_by_default_the_first_three(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(checkpoint, data) == 1
    text = capsys.readouterr().out
    assert "record 2: image" in text and "none.png' does not exist" in text
    assert "record 3" not in text


def test_a_bad_record_does_not_hide_the_others(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(checkpoint, data, "--json") == 1
    values = shown(capsys)
    assert [value["index"] for value in values] == [0, 1, 2, 3]
    assert "none.png" in values[2]["error"]
    assert values[3]["input_ids"].count(-200) == 2
    assert values[3]["num_tiles"] == 2


def test_what_does_not_fit_is_not_shown(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(checkpoint, data, "--index", "3", "--json") == 0
    whole = shown(capsys)[0]
    limit = str(len(whole["input_ids"]) - 2 + 8 - 1)
    assert show(checkpoint, data, "--index", "3", "--json", "--max-length", limit) == 0
    cut = shown(capsys)[0]
    assert (cut["num_tiles"], cut["num_image_tokens"], cut["input_ids"].count(-200)) == (1, 4, 1)
    assert whole["prompt"].startswith(cut["prompt"]) and cut["prompt"].endswith("1</s>")
    assert show(checkpoint, data, "--index", "3", "--max-length", limit) == 0
    assert "the last 2 turns do not fit and are dropped" in capsys.readouterr().out
    assert show(checkpoint, data, "--index", "3", "--max-length", "5") == 1
    assert "max_length is 5" in capsys.readouterr().out


def test_neighbouring_images_stay_two(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"images": ["0.png", "1.png"], "conversations": [["<image><image> Same?", "No"]]}
    data.write_text(json.dumps([record]))
    assert show(checkpoint, data, "--json") == 0
    value = shown(capsys)[0]
    assert value["input_ids"].count(-200) == 2 and value["num_image_tokens"] == 8
    assert show(checkpoint, data) == 0
    assert "<image x 4><image x 4>" in capsys.readouterr().out


@pytest.mark.parametrize("anyres", [False, True])
def test_pictures_of_the_tiles(
    tmp_path: Path, tokenizer: Tokenizer, data: Path, capsys: pytest.CaptureFixture[str], anyres: bool
) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", tokenizer, spec=ANYRES_SPEC if anyres else PAD_SPEC)
    assert show(checkpoint, data, "--index", "3", "--output", str(tmp_path / "out" / "tiles")) == 0
    files = sorted((tmp_path / "out" / "tiles").iterdir())
    assert [path.name for path in files] == ["000003_0.png", "000003_1.png"]
    assert str(files[0]) in capsys.readouterr().out
    with Image.open(files[0]) as picture:
        assert picture.size == ((28 + 8 + 2 * 28 + 2, 2 * 28 + 2) if anyres else (28, 28))
        assert np.asarray(picture).std() > 10


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--index", "4"], "--index 4: .* has 4 records, 0 to 3"),
        (["--index", "-1"], "--index -1: must be at least 0"),
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--conv-mode", "vicuna_v2"], "did you mean 'vicuna_v1'"),
        (["--data", "none.json"], "none.json' does not exist"),
        (["--model-path", "none"], "none"),
    ],
)
def test_wrong_arguments(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    import re

    assert show(checkpoint, data, *more) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_damaged_config_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"image_size": None}, "image_newline": None}))
    assert _sight(tmp_path) == VisionSizes(image_size=None, image_newline=False)
    for values in ({"vision_config": "x"}, {"vision_config": {"image_size": "336"}}, {"image_newline": "false"}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=r"config\.json.* is .*; allowed: "):
            _sight(tmp_path)


def test_paddle_is_not_loaded(checkpoint: Path, data: Path) -> None:
    script = (
        "import sys; from paddlemix.__main__ import main; status = main(sys.argv[1:]); "
        "assert 'paddle' not in sys.modules; raise SystemExit(status)"
    )
    arguments = ["--model-path", str(checkpoint), "--data", str(data), "--image-root", str(data.parent), "--index", "0"]
    command = [sys.executable, "-c", script, "show-data", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert (result.returncode, result.stderr) == (0, "")


def test_no_picture_that_a_record_names_is_replaced(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not of another record than that which is shown either; files of new names may come among them."""
    (tmp_path / "000000_0.png").write_bytes((tmp_path / "1.png").read_bytes())
    records = [*json.loads(data.read_text()), {"image": "000000_0.png", "conversations": [["<image>\nQ", "A"]]}]
    data.write_text(json.dumps(records))
    assert show(checkpoint, data, "--index", "0", "--output", str(tmp_path), "--overwrite") == 2
    assert f"--output '{tmp_path}' holds pictures that {data} names" in capsys.readouterr().err
    assert (tmp_path / "000000_0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    assert show(checkpoint, data, "--index", "3", "--output", str(tmp_path)) == 0
    assert (tmp_path / "000003_1.png").exists()


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_other_layouts(
    tmp_path: Path, tokenizer: Tokenizer, data: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    """LLaVA's own and llava-hf's files, without weights: the tower's size is known from its declared file."""
    golden = ROOT / "tests" / "golden" / "models" / "llava_v15_llama" / layout
    checkpoint = tmp_path / layout
    for path in golden.rglob("*.json"):
        target = checkpoint / path.relative_to(golden)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    tokenizer.save(checkpoint)
    assert show(checkpoint, data, "--index", "0", "--json") == 0
    assert shown(capsys)[0]["num_image_tokens"] == 4
