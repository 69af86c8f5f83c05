"""Drawn scenes with questions whose answers are known, in memory: what the first data set of the demo consists of.

A scene is a 32x32 picture of 2x2 cells; a cell is empty or holds one shape.  Questions, in English and Chinese, are
read off the same description that is drawn, so an answer is right by construction; a question with more than one right
answer is never asked.  Knows no file, model or tokenizer.  All sizes are our own, small enough for a model
of 1.5 M weights.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 32  # pixels, one side
CELL_SIZE = 16

# (English, Chinese) everywhere below: the index into such a pair is the language.
COLOURS = (("red", "红色"), ("green", "绿色"), ("blue", "蓝色"), ("yellow", "黄色"), ("purple", "紫色"))
COLOUR_RGB = ((220, 40, 40), (40, 170, 60), (50, 90, 220), (235, 200, 40), (150, 60, 190))
SHAPES = (("circle", "圆形"), ("square", "正方形"), ("triangle", "三角形"))
POSITIONS = (("top left", "左上角"), ("top right", "右上角"), ("bottom left", "左下角"), ("bottom right", "右下角"))
NONE = ("none", "没有")

# (left, top, size) in pixels inside a cell: one large or four small places, so that a box has few distinct values
# Two pixels between shape and cell, so that shapes never touch.
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
    """Random scenes none of which is in `taken`; tints do not count, so this is stricter than comparing pixels."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        # repeats inside the list are allowed; only the other parts must not have the scene
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
        # Blends by coverage: edges are smooth as in a photograph.
        area += cover * (tint - area)
    return pixels.round().astype(np.uint8)


# six in all: three shapes in two sizes
@cache
def _cover(shape: int, size: int) -> np.ndarray:
    """Part of each pixel that a shape covers: float32 [size, size, 1], 0 to 1; drawn 8 times larger, then averaged."""
    # Pillow draws without anti-aliasing.
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
        # A shape with a twin has two right positions.
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
