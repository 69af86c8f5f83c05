"""Drawn scenes with questions whose answers are known: the first data set of `paddlemix demo`.

A scene is a 32x32 picture of 2x2 cells; a cell is empty or holds one shape.  Questions, in English and Chinese, are
read off the same description that is drawn, so an answer is right by construction; a question with more than one right
answer is never asked.  Knows no model and no tokenizer.  All sizes are ours: small enough for a model of 1.5 M weights.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from paddlemix.demo.report import write_result
from paddlemix.errors import MissingFileError, UserError

IMAGE_SIZE = 32  # pixels, one side
CELL_SIZE = 16
EVAL_COUNT = 100  # records of scenes_eval.json
CAPTION_COUNT = 8000  # at most, of scenes_captions.json
MAX_SCENES = 100_000  # file names count with five digits
CHINESE_SHARE = 0.25
COLOURS_ASKED = 2  # of the four cells of a training record
BOX_SHARE = 0.2  # of records, that ask for a box
TURNS = (5,)  # questions of a training record: each costs little once the picture is read

# (English, Chinese) everywhere below: the index into such a pair is the language.
COLOURS = (("red", "红色"), ("green", "绿色"), ("blue", "蓝色"), ("yellow", "黄色"), ("purple", "紫色"))
COLOUR_RGB = ((220, 40, 40), (40, 170, 60), (50, 90, 220), (235, 200, 40), (150, 60, 190))
SHAPES = (("circle", "圆形"), ("square", "正方形"), ("triangle", "三角形"))
POSITIONS = (("top left", "左上角"), ("top right", "右上角"), ("bottom left", "左下角"), ("bottom right", "右下角"))
NONE = ("none", "没有")

# (left, top, size) in pixels inside a cell: one large or four small places, so that a box has few distinct values
PLACES = ((2, 2, 12), (2, 2, 8), (6, 2, 8), (2, 6, 8), (6, 6, 8))

PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "colour": (
        ("What colour is the shape in the {position}?", "Which colour is in the {position}?"),
        ("{position}是什么颜色?",),
    ),
    "count": (("How many shapes are there?", "Count the shapes."), ("有几个图形?",)),
    "position": (
        ("Where is the {colour} {shape}?", "In which corner is the {colour} {shape}?"),
        ("{colour}的{shape}在哪里?",),
    ),
    "box": (("Give the box of the {colour} {shape}.",), ("给出{colour}的{shape}的边框。",)),
}


@dataclass(frozen=True)
class SceneFiles:
    """Where the scenes are.

    Args:
        directory: holds the lists and `images/`; image paths in the lists are relative to it.
        train: three to five questions per record.
        evaluation: 100 records like those of `train`, for the loss during training.
        held_out: one question per record; no picture of it is in another list.
        captions: one caption per record, on pictures of `train`, for pretraining.
    """

    directory: Path
    train: Path
    evaluation: Path
    held_out: Path
    captions: Path

    @property
    def lists(self) -> tuple[Path, ...]:
        """The four JSON files."""
        return (self.train, self.evaluation, self.held_out, self.captions)


@dataclass(frozen=True)
class Item:
    """One shape: indices into `COLOURS` and `SHAPES`, and its box (left, top, size) in pixels of the image."""

    colour: int
    shape: int
    left: int
    top: int
    size: int

    @property
    def box(self) -> str:
        """Left, top, right, bottom as parts of the image side, e.g. "0.06, 0.56, 0.44, 0.94"."""
        sides = (self.left, self.top, self.left + self.size, self.top + self.size)
        return ", ".join(f"{side / IMAGE_SIZE:.2f}" for side in sides)


@dataclass(frozen=True)
class Scene:
    """What a picture shows: four cells in the order of `POSITIONS`, and whether the background is light."""

    cells: tuple[Item | None, ...]
    light: bool

    @property
    def items(self) -> list[Item]:
        """The shapes, in reading order."""
        return [cell for cell in self.cells if cell is not None]


def scene_files(directory: Path) -> SceneFiles:
    """The names that `write_scenes` gives to its files in `directory`; nothing is read or written."""
    train, evaluation, held_out, captions = (
        directory / f"scenes_{part}.json" for part in ("train", "eval", "heldout", "captions")
    )
    return SceneFiles(directory, train, evaluation, held_out, captions)


def write_scenes(directory: Path, train_count: int = 8000, held_out_count: int = 400, seed: int = 0) -> SceneFiles:
    """Draw the scenes and write their question lists.

    The lists are removed first and written last: a directory with all lists is whole, and a rerun after an interruption
    starts cleanly.  The held-out part depends on `seed` and `held_out_count` alone.

    Args:
        directory: made if missing; scene files of an earlier run in it are replaced.
        train_count: training pictures, >= 1.
        held_out_count: held-out pictures, >= 1; both counts and 100 evaluation pictures together <= 100,000.
        seed: same seed and counts, same bytes.

    Returns:
        The paths of the lists.  A record is
        `{"image": "images/scene_00500.png", "conversations": [["<image>\\nHow many shapes are there?", "3"], ...]}`.

    Raises:
        UserError: a count is out of range, or the directory cannot be written.
    """
    if train_count < 1 or held_out_count < 1 or train_count + held_out_count + EVAL_COUNT > MAX_SCENES:
        raise UserError(
            f"train_count={train_count}, held_out_count={held_out_count}: both must be at least 1 "
            f"and together at most {MAX_SCENES - EVAL_COUNT}"
        )
    rng = random.Random(seed)
    files = scene_files(directory)
    clear_previous(directory, files.lists, "scene_" + "[0-9]" * 5 + ".png")

    held_out = scenes_outside(set(), held_out_count, rng)
    held_out_records = _write_part(directory, 0, held_out, (1,), rng)
    evaluation = scenes_outside(set(held_out), EVAL_COUNT, rng)
    eval_records = _write_part(directory, held_out_count, evaluation, TURNS, rng)
    train = scenes_outside({*held_out, *evaluation}, train_count, rng)
    train_records = _write_part(directory, held_out_count + EVAL_COUNT, train, TURNS, rng)
    captions = [
        {"image": record["image"], "conversations": [["<image>\n", caption(scene)]]}
        for record, scene in zip(train_records[:CAPTION_COUNT], train[:CAPTION_COUNT], strict=True)
    ]
    for path, records in zip(files.lists, (train_records, eval_records, held_out_records, captions), strict=True):
        write_result(path, records)
    check_disjoint(files.train, files.held_out)
    check_disjoint(files.evaluation, files.held_out)
    return files


def random_scene(rng: random.Random) -> Scene:
    """A scene of one to four shapes in random cells, colours and places."""
    filled = rng.sample(range(len(POSITIONS)), rng.choices((1, 2, 3, 4), weights=(2, 3, 3, 2))[0])
    cells: list[Item | None] = [None] * len(POSITIONS)
    for cell in sorted(filled):
        left, top, size = rng.choice(PLACES)
        cells[cell] = Item(
            colour=rng.randrange(len(COLOURS)),
            shape=rng.randrange(len(SHAPES)),
            left=left + CELL_SIZE * (cell % 2),
            top=top + CELL_SIZE * (cell // 2),
            size=size,
        )
    return Scene(tuple(cells), rng.random() < 0.5)


def scenes_outside(taken: set[Scene], count: int, rng: random.Random) -> list[Scene]:
    """Random scenes none of which is in `taken`; tints do not count, so this is stricter than unequal pixels."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if scene not in taken:
            scenes.append(scene)
    return scenes


def draw_scene(scene: Scene, rng: random.Random) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: what to draw.
        rng: varies the grey of the background and, by at most 15 of 255 per channel, the tint of every shape.

    Returns:
        uint8 [32, 32, 3], RGB.
    """
    grey = rng.randint(205, 235) if scene.light else rng.randint(20, 50)
    pixels = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), grey, dtype=np.float32)
    for item in scene.items:
        tint = np.clip([channel + rng.randint(-15, 15) for channel in COLOUR_RGB[item.colour]], 0, 255)
        cover = _cover(item.shape, item.size)
        area = pixels[item.top : item.top + item.size, item.left : item.left + item.size]
        area += cover * (tint - area)
    return pixels.round().astype(np.uint8)


@cache
def _cover(shape: int, size: int) -> np.ndarray:
    """Part of each pixel that a shape covers: float32 [size, size, 1], 0 to 1; drawn 8 times larger, then averaged."""
    scale, end = 8, 8 * size - 1
    canvas = Image.new("L", (size * scale, size * scale))
    pencil = ImageDraw.Draw(canvas)
    if shape == 0:
        pencil.ellipse((0, 0, end, end), fill=255)
    elif shape == 1:
        pencil.rectangle((0, 0, end, end), fill=255)
    else:
        pencil.polygon(((0, end), (end, end), (end / 2, 0)), fill=255)
    return (np.asarray(canvas.reduce(scale), dtype=np.float32) / 255)[:, :, None]


def questions(scene: Scene, language: int) -> dict[str, list[tuple[dict[str, str], str]]]:
    """Every question that has exactly one right answer.

    Args:
        scene: what is shown.
        language: 0 English, 1 Chinese.

    Returns:
        For each kind of `PHRASES` the list of (words to fill into a phrase, answer); "position" and "box" are left out
        when every shape of the scene has a twin.
    """
    found: dict[str, list[tuple[dict[str, str], str]]] = {"colour": []}
    for position, item in zip(POSITIONS, scene.cells, strict=True):
        words = {"position": position[language]}
        found["colour"].append((words, (COLOURS[item.colour] if item else NONE)[language]))
    found["count"] = [({}, str(len(scene.items)))]

    kinds = [(item.colour, item.shape) for item in scene.items]
    for position, item in zip(POSITIONS, scene.cells, strict=True):
        if item is None or kinds.count((item.colour, item.shape)) > 1:
            continue
        words = {"colour": COLOURS[item.colour][language], "shape": SHAPES[item.shape][language]}
        found.setdefault("position", []).append((words, position[language]))
        found.setdefault("box", []).append((words, item.box))
    return found


def caption(scene: Scene) -> str:
    """The whole scene in words: "a red circle in the top left and a blue square in the bottom right"."""
    parts = [
        f"a {COLOURS[item.colour][0]} {SHAPES[item.shape][0]} in the {position[0]}"
        for position, item in zip(POSITIONS, scene.cells, strict=True)
        if item is not None
    ]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _write_part(
    directory: Path, first: int, scenes: list[Scene], turns: tuple[int, ...], rng: random.Random
) -> list[dict[str, Any]]:
    """Draw and save scenes, numbered from `first`; returns their records, each with one of `turns` many questions."""
    records = []
    for number, scene in enumerate(scenes, start=first):
        name = f"images/scene_{number:05d}.png"
        save_picture(directory / name, draw_scene(scene, rng))
        records.append(_record(name, scene, rng.choice(turns), rng))
    return records


def _record(name: str, scene: Scene, turns: int, rng: random.Random) -> dict[str, Any]:
    """A record with `turns` different questions, all in one language; with one less where one of them asks for a box.
    That answer is long, and records of like length need little padding."""
    language = int(rng.random() < CHINESE_SHARE)
    found = questions(scene, language)
    boxes = found.pop("box", None)
    if turns > 1:  # colours are learned soonest, so that fewer of them are enough
        found["colour"] = rng.sample(found["colour"], COLOURS_ASKED)
    asked = [(kind, *item) for kind, items in found.items() for item in items]
    asked = rng.sample(asked, min(turns, len(asked)))
    if turns > 1 and boxes and rng.random() < BOX_SHARE:
        asked[rng.randrange(len(asked) - 1)] = ("box", *rng.choice(boxes))
        asked = asked[: turns - 1]
    pairs = [[rng.choice(PHRASES[kind][language]).format(**words), answer] for kind, words, answer in asked]
    pairs[0][0] = "<image>\n" + pairs[0][0]
    return {"image": name, "conversations": pairs}


def clear_previous(directory: Path, lists: Iterable[Path], pattern: str) -> None:
    """Remove what an earlier, perhaps interrupted, run left; afterwards `directory/images` exists.

    Args:
        directory: of the data set; made if missing.
        lists: JSON files to remove, first of all, so that no list ever names a picture that is gone.
        pattern: glob of the pictures to remove from `directory/images`; other files stay.

    Raises:
        UserError: the directory cannot be made or written.
    """
    try:
        (directory / "images").mkdir(parents=True, exist_ok=True)
        for path in (*lists, *(directory / "images").glob(pattern)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write in {directory}: {error}; name a directory that you can write") from error


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as a PNG; the lowest compression, because these pictures are tiny and many.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        Image.fromarray(pixels).save(path, compress_level=1)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; free some space or name another directory") from error


def pixel_digest(path: Path) -> str:
    """SHA-256 of a picture's decoded size and RGB pixels, in hex: equal for equal pictures, however compressed.

    Raises:
        MissingFileError: there is no readable picture at `path`.
    """
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
    except OSError as error:
        raise MissingFileError(f"cannot read the image {path}: {error}; make the demo data again") from error
    return hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).hexdigest()


def check_disjoint(train: Path, held_out: Path) -> None:
    """Make sure that no picture of one list equals a picture of the other.

    Args:
        train, held_out: JSON lists as `write_scenes` writes them; image paths are relative to the list's directory.

    Raises:
        UserError: two pictures have the same pixels; both are named.
        MissingFileError: a list or a picture cannot be read.
    """
    seen = {pixel_digest(path): path for path in listed_pictures(held_out)}
    for path in listed_pictures(train):
        if twin := seen.get(pixel_digest(path)):
            raise UserError(
                f"{path} of {train.name} shows the same pixels as {twin} of {held_out.name}: "
                "a held-out picture must not be trained on; delete the directory and make the demo data again"
            )


def listed_pictures(path: Path) -> list[Path]:
    """The pictures that a JSON list names, in order.

    Raises:
        MissingFileError: there is no such list.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no list {path}; make the demo data again")
    return [path.parent / record["image"] for record in json.loads(path.read_text(encoding="utf-8"))]
