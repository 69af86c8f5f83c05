"""The demo's data: right answers (read again from the pixels), disjoint splits, record form, tokenizer, report."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paddlemix.demo import digits, pictures, results, scene_data, scenes, vocabulary
from paddlemix.errors import MissingFileError, UserError

# Written down again on purpose: the test reads pictures without the tables that drew them.
PURE = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 90, 220), "yellow": (235, 200, 40)}
PURE["purple"] = (150, 60, 190)
CHINESE = {
    "红色": "red",
    "绿色": "green",
    "蓝色": "blue",
    "黄色": "yellow",
    "紫色": "purple",
    "没有": "none",
    "圆形": "circle",
    "正方形": "square",
    "三角形": "triangle",
    "左上角": "top left",
    "右上角": "top right",
    "左下角": "bottom left",
    "右下角": "bottom right",
}
CORNERS = ("top left", "top right", "bottom left", "bottom right")


@pytest.fixture(scope="module")
def scene_lists(tmp_path_factory: pytest.TempPathFactory) -> scene_data.SceneFiles:
    return scene_data.write_scenes(tmp_path_factory.mktemp("scenes"), train_count=300, held_out_count=60, seed=3)


@pytest.fixture(scope="module")
def digit_lists(tmp_path_factory: pytest.TempPathFactory) -> digits.DigitFiles:
    return digits.write_digits(tmp_path_factory.mktemp("digits"), held_out_count=1500, seed=3)


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def tree(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, by relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def see(path: Path) -> dict[str, tuple[str, str, str]]:
    """Colour, shape and box of each filled corner, found in the pixels alone."""
    pixels = np.asarray(Image.open(path)).astype(int)
    differs = np.abs(pixels - pixels[0, 0]).max(axis=2) > 12
    found = {}
    for number, corner in enumerate(CORNERS):
        top, left = 16 * (number // 2), 16 * (number % 2)
        rows, columns = np.nonzero(differs[top : top + 16, left : left + 16])
        if len(rows) == 0:
            continue
        rows, columns = rows + top, columns + left
        middle = pixels[(rows.min() + rows.max()) // 2 + 1, (columns.min() + columns.max()) // 2]
        colour = min(PURE, key=lambda name: np.abs(middle - PURE[name]).sum())
        sides = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        full = len(rows) / ((sides[2] - sides[0]) * (sides[3] - sides[1]))
        upper_corner = differs[rows.min() : rows.min() + 2, columns.min() : columns.min() + 2].all()
        lower_corner = differs[rows.max(), columns.min()] or differs[rows.max() - 1, columns.min()]
        shape = "square" if full == 1 and upper_corner else "circle" if full > 0.72 else "triangle"
        assert shape != "triangle" or lower_corner
        found[corner] = (colour, shape, ", ".join(f"{side / 32:.2f}" for side in sides))
    return found


def answer_from_pixels(question: str, seen: dict[str, tuple[str, str, str]]) -> str:
    """The answer to any question of the scenes, in English; `question` has its Chinese names replaced already."""
    names = "|".join(("circle", "square", "triangle"))
    corner = next((corner for corner in CORNERS if corner in question), None)
    colour = next((colour for colour in PURE if colour in question), None)
    shape = re.search(rf"\b({names})\b|({names})的?", question)
    if colour and shape:
        word = shape.group(1) or shape.group(2)
        places = [place for place, item in seen.items() if item[:2] == (colour, word)]
        assert len(places) == 1, "the question has more than one answer"
        return seen[places[0]][2] if "box" in question or "边框" in question else places[0]
    if corner:
        by_colour = re.search("colou?r|颜色", question)
        return seen[corner][0 if by_colour else 1] if corner in seen else "none"
    return str(sum(colour in (None, item[0]) for item in seen.values()))


def to_english(text: str) -> str:
    for chinese, english in CHINESE.items():
        text = text.replace(chinese, english)
    return text


def test_every_scene_answer_is_what_the_pixels_show(scene_lists: scene_data.SceneFiles) -> None:
    kinds = set()
    for path in (scene_lists.train, scene_lists.evaluation, scene_lists.held_out):
        for record in read(path):
            seen = see(scene_lists.directory / record["image"])
            for question, answer in record["conversations"]:
                assert answer_from_pixels(to_english(question), seen) == to_english(answer), (record, seen)
                kinds.add(to_english(answer))
    assert {"none", "1", "4", "purple", "top left", "0.06, 0.06, 0.44, 0.44"} <= kinds


def test_captions_name_every_shape(scene_lists: scene_data.SceneFiles) -> None:
    train_pictures = {record["image"] for record in read(scene_lists.train)}
    for record in read(scene_lists.captions):
        ((question, caption),) = record["conversations"]
        seen = see(scene_lists.directory / record["image"])
        said = re.findall(r"a (\w+) (\w+) in the (\w+ \w+)", caption)
        assert said == [(colour, shape, corner) for corner, (colour, shape, _) in seen.items()]
        assert question == "<image>\n" and record["image"] in train_pictures


def test_scene_records_have_the_pair_form(scene_lists: scene_data.SceneFiles) -> None:
    sizes = {scene_lists.train: 300, scene_lists.evaluation: 100, scene_lists.held_out: 60, scene_lists.captions: 300}
    chinese = 0
    for path, size in sizes.items():
        records = read(path)
        assert len(records) == size
        for record in records:
            assert set(record) == {"image", "conversations"}
            assert Image.open(path.parent / record["image"]).size == (32, 32)
            turns = record["conversations"]
            single = path in (scene_lists.held_out, scene_lists.captions)
            assert len(turns) == 1 if single else 3 <= len(turns) <= 5
            assert [question.count("<image>") for question, _ in turns] == [1] + [0] * (len(turns) - 1)
            assert turns[0][0].startswith("<image>\n") and all(answer for _, answer in turns)
            chinese += not turns[0][0].isascii()
    assert 0.15 < chinese / 460 < 0.35


def test_no_split_shares_a_picture(scene_lists: scene_data.SceneFiles, digit_lists: digits.DigitFiles) -> None:
    for files in (scene_lists, digit_lists):
        parts = []
        for path in (files.train, files.evaluation, files.held_out):
            pictures = [files.directory / record["image"] for record in read(path)]
            parts.append({np.asarray(Image.open(picture).convert("RGB")).tobytes() for picture in pictures})
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_check_disjoint_names_both_pictures_even_when_compressed_otherwise(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for name, level in (("a", 1), ("b", 9)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png", compress_level=level)
        (tmp_path / f"{name}.json").write_text(json.dumps([{"image": f"{name}.png", "conversations": []}]))
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    with pytest.raises(UserError, match=r"a\.png .* b\.png|a\.png of .*b\.png"):
        pictures.check_disjoint(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(MissingFileError, match="none.json"):
        pictures.check_disjoint(tmp_path / "none.json", tmp_path / "b.json")


def test_a_held_out_scene_is_never_drawn_for_training() -> None:
    one_shape = {scene for scene in scenes.scenes_outside(set(), 5000, random.Random(0)) if len(scene.items) == 1}
    again = scenes.scenes_outside(one_shape, 5000, random.Random(0))
    assert len(one_shape) > 300 and not one_shape & set(again)


def test_same_seed_same_bytes_after_an_interrupted_run(scene_lists: scene_data.SceneFiles, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/scene_99999.png").write_bytes(b"half a pict")
    (tmp_path / "images/mine.png").write_bytes(b"not ours")
    (tmp_path / "scenes_train.json").write_text("[")
    scene_data.write_scenes(tmp_path, train_count=300, held_out_count=60, seed=3)
    written = tree(tmp_path)
    assert written.pop("images/mine.png")
    assert written == tree(scene_lists.directory)
    other = scene_data.write_scenes(tmp_path, train_count=20, held_out_count=60, seed=4)
    assert read(other.held_out) != read(scene_lists.held_out)


def test_held_out_scenes_do_not_depend_on_the_training_count(
    scene_lists: scene_data.SceneFiles, tmp_path: Path
) -> None:
    fewer = scene_data.write_scenes(tmp_path, train_count=1, held_out_count=60, seed=3)
    assert fewer.held_out.read_bytes() == scene_lists.held_out.read_bytes()
    first = "images/scene_00000.png"
    assert (tmp_path / first).read_bytes() == (scene_lists.directory / first).read_bytes()


def test_digit_answers_are_scikit_learns_labels(digit_lists: digits.DigitFiles) -> None:
    from sklearn.datasets import load_digits

    target = load_digits().target
    asked = set()
    for path in digit_lists.lists:
        for record in read(path):
            digit = int(target[int(re.findall(r"\d+", record["image"])[0])])
            for question, answer in record["conversations"]:
                asked.add(question.removeprefix("<image>\n"))
                even = "even" in question or "偶数" in question
                yes = "yes no" if question.isascii() else "是 不是"
                assert answer == (yes.split()[digit % 2] if even else str(digit))
    assert {"What digit is this?", "Is it even?", "这是什么数字?", "这是偶数吗?"} <= asked


def test_digit_lists(digit_lists: digits.DigitFiles) -> None:
    train, evaluation, held_out = (read(path) for path in digit_lists.lists)
    assert (len(train), len(evaluation), len(held_out)) == (3 * 197, 100, 1500)
    assert all(record["conversations"][0][0] == "<image>\nWhat digit is this?" for record in held_out)
    assert all(len(record["conversations"]) == 1 for record in held_out)
    asked = [[question for question, _ in record["conversations"]] for record in train]
    assert ["<image>\nWhat digit is this?", "Is it even?"] in asked and ["<image>\nIs it even?"] in asked
    scans, _ = digits.load_scans()
    sides = []
    for records in (train, evaluation, held_out):
        indices = {int(re.findall(r"\d+", record["image"])[0]) for record in records}
        sides.append({scans[index].tobytes() for index in indices})
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_a_scan_that_occurs_twice_is_kept_once() -> None:
    scans = np.zeros((400, 8, 8), dtype=np.uint8)
    scans[:, 0, 0] = np.arange(400) % 200  # every scan has a twin
    held_out, evaluation, train = digits.split_scans(scans, 60, random.Random(0))
    assert (len(held_out), len(evaluation), len(train)) == (60, 100, 40)
    assert len({index % 200 for index in held_out + evaluation + train}) == 200


def test_digits_repeat_for_a_seed(digit_lists: digits.DigitFiles, tmp_path: Path) -> None:
    digits.write_digits(tmp_path, held_out_count=1500, seed=3)
    assert tree(tmp_path) == tree(digit_lists.directory)


def test_varied_digit_moves_by_at_most_two_pixels() -> None:
    dot = np.zeros((32, 32, 3), dtype=np.uint8)
    dot[15:17, 15:17] = 255
    rng = random.Random(0)
    centres = np.array([np.argwhere(digits.vary(dot, rng)[:, :, 0] > 100).mean(axis=0) for _ in range(50)])
    assert np.abs(centres - 15.5).max() < 2.6 and centres.std() > 0.5


@pytest.mark.parametrize("counts", [(0, 10), (10, 0), (99_900, 1)])
def test_scene_counts_out_of_range(tmp_path: Path, counts: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"train_count={counts[0]}, held_out_count={counts[1]}.*99900"):
        scene_data.write_scenes(tmp_path, *counts)


@pytest.mark.parametrize("count", [0, 1501])
def test_digit_count_out_of_range(tmp_path: Path, count: int) -> None:
    with pytest.raises(UserError, match=f"held_out_count={count} is not in 1 to 1500"):
        digits.write_digits(tmp_path, held_out_count=count)


def test_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot write in .*taken"):
        scene_data.write_scenes(tmp_path / "taken", 1, 1)


@pytest.fixture(scope="module")
def tokenizer_directory(
    scene_lists: scene_data.SceneFiles, digit_lists: digits.DigitFiles, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = vocabulary.corpus([*scene_lists.lists, *digit_lists.lists])
    assert 512 <= vocabulary.train_tokenizer(texts, directory) <= 700
    return directory


def test_tokenizer_round_trip(
    scene_lists: scene_data.SceneFiles, digit_lists: digits.DigitFiles, tokenizer_directory: Path
) -> None:
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(tokenizer_directory, legacy=False)
    texts = set(vocabulary.corpus([*scene_lists.lists, *digit_lists.lists]))
    assert "[INST] What digit is this? [/INST] 7" in texts
    for text in (*texts, "Größe: 7 €", "你好，世界！", "two\nlines", "two  spaces "):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
    assert len(tokenizer("[INST] What digit is this? [/INST] 7").input_ids) < 16


def test_tokenizer_is_of_the_llama_kind(tokenizer_directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory, use_fast=False)
    assert type(tokenizer).__name__ == "LlamaTokenizer" and tokenizer.legacy is False
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert (tokenizer.pad_token, tokenizer.model_max_length) == ("<unk>", 512)
    assert tokenizer("a</s>\n").input_ids[0] == 1 and tokenizer("a</s>").input_ids[-1] == 2
    assert tokenizer("x").input_ids[-1] != 2
    assert tokenizer.tokenize("a\nb").count("<0x0A>") == 1
    assert [token for token in tokenizer.tokenize("0.56") if token != "▁"] == ["0", ".", "5", "6"]


def test_tokenizer_is_the_same_for_the_same_texts(tmp_path: Path) -> None:
    texts = ["[INST] What digit is this? [/INST] 7", "[INST] 左上角是什么颜色? [/INST] red"]
    sizes = [vocabulary.train_tokenizer(iter(texts), tmp_path / name, 400) for name in "ab"]
    assert sizes[0] == sizes[1] <= 400
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert set(tree(tmp_path / "a")) == {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}


def test_tokenizer_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no texts"):
        vocabulary.train_tokenizer(["", "\n"], tmp_path)
    with pytest.raises(UserError, match="vocab_size=262 .* need 263"):
        vocabulary.train_tokenizer(["abc"], tmp_path, 262)
    assert vocabulary.train_tokenizer(["abc"], tmp_path, 263) == 263
    with pytest.raises(MissingFileError, match="nowhere.json"):
        list(vocabulary.corpus([tmp_path / "nowhere.json"]))


def verdicts(directory: Path) -> list[results.Verdict]:
    Image.new("RGB", (32, 32), "red").save(directory / "red.png")
    answers = [("7", " 7\n"), ("$x$ 红\n", "7"), ("", "7"), ("Red", "red")]
    found = [results.Verdict(directory / "red.png", "<image>\nWhat is it?", *answer) for answer in answers]
    return [*found, results.Verdict(directory / "red.png", "这是什么?", "7", "7")]


def test_verdict_and_accuracy(tmp_path: Path) -> None:
    items = verdicts(tmp_path)
    assert [item.correct for item in items] == [True, False, False, False, True]
    assert results.accuracy(items) == 0.4
    with pytest.raises(UserError, match="at least one"):
        results.accuracy([])


def test_picture_shows_english_questions(tmp_path: Path) -> None:
    target = tmp_path / "deep/er/answers.png"
    assert results.write_picture(target, verdicts(tmp_path), "40 % of $5") == 4
    picture = np.asarray(Image.open(target).convert("RGB")).astype(int)
    assert ((picture[:, :, 1] > 100) & (picture[:, :, 0] < 30)).any(), "no green verdict"
    assert not target.with_name("answers.png.partial").exists()
    with pytest.raises(UserError, match="none of 1 questions"):
        results.write_picture(target, verdicts(tmp_path)[-1:], "")
    with pytest.raises(MissingFileError, match="gone.png"):
        results.write_picture(target, [results.Verdict(tmp_path / "gone.png", "q", "a", "a")], "")


def test_no_text_of_a_picture_touches_that_of_another(tmp_path: Path) -> None:
    """Two lines above and four below each picture, between some with one; pictures of any shape."""
    for number, size in enumerate(((32, 32), (90, 30), (30, 90))):
        Image.new("RGB", size, "red").save(tmp_path / f"{number}.png")
    texts = ("7", "a large red circle to the left of " * 3, "7")
    items = [
        results.Verdict(tmp_path / f"{n % 3}.png", f"Q {texts[n % 2]}", texts[(n // 2) % 3], texts[n % 3])
        for n in range(20)
    ]
    figure = results.draw_verdicts(items, "title")
    figure.draw_without_rendering()
    drawn = [axes for axes in figure.axes if axes.get_title()]
    assert len(drawn) == 20
    boxes = [[axes.title.get_window_extent(), axes.xaxis.label.get_window_extent(), axes.bbox] for axes in drawn]
    for one, other in itertools.combinations(boxes, 2):
        assert not any(box.overlaps(another) for box in one for another in other)


def test_table_aligns_chinese() -> None:
    lines = results.format_table([("红色", "ok"), ("a", "")], ("answer", "is")).split("\n")
    assert lines == ["answer  is", "------  --", "红色    ok", "a"]
    with pytest.raises(ValueError, match="row 0 has 1 cells, the header 2"):
        results.format_table([("a",)], ("b", "c"))


def test_result_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new/result.json"
    results.write_result(path, {"accuracy": 0.5, "answer": "红色"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"accuracy": 0.5, "answer": "红色"}
    with pytest.raises(ValueError):
        results.write_result(path, {"loss": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8"))["accuracy"] == 0.5
    results.write_result(path, [])
    assert json.loads(path.read_text()) == [] and [item.name for item in path.parent.iterdir()] == ["result.json"]
