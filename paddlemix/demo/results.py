"""What the demo shows at its end: verdicts, the share of right ones, a table, a picture, and JSON files.

Knows answers as text only, no model and not how they were generated.  JSON of the whole room is written here, always
through a second file, so that a reader finds the old file or the new one and never half of one.
"""

from __future__ import annotations

import json
import os
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from paddlemix.errors import MissingFileError, UserError
from paddlemix.sample import IMAGE_TOKEN

COLUMNS, ROWS = 6, 4  # pictures of one report
LINE_WIDTH = 28  # characters above a picture


@dataclass(frozen=True)
class Verdict:
    """One held-out question and what the model said.

    Args:
        image_path: the picture.
        question: as asked; a leading `<image>` is not shown.
        answer: of the model.
        expected: the right answer.
    """

    image_path: Path
    question: str
    answer: str
    expected: str

    @property
    def correct(self) -> bool:
        """Whether the answer is the expected one, spaces at both ends aside."""
        return self.answer.strip() == self.expected.strip()


def accuracy(verdicts: Sequence[Verdict]) -> float:
    """Share of correct answers, 0 to 1.

    Raises:
        UserError: there is no verdict.
    """
    if not verdicts:
        raise UserError("there are no answers to count; ask at least one held-out question")
    return sum(verdict.correct for verdict in verdicts) / len(verdicts)


def format_table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """A plain table for a terminal.

    Args:
        rows: cells, each row as long as the header.
        header: names of the columns.

    Returns:
        Lines without a final line end: header, rule, rows; columns two spaces apart and left-aligned, a Chinese
        character counting as two columns of the terminal.

    Raises:
        ValueError: a row is longer or shorter than the header.
    """
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} cells, the header {len(header)}: {row}")
    # By terminal columns, not characters: Chinese ones are twice as wide.
    widths = [max(_columns(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "  ".join(cell + " " * (width - _columns(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _columns(text: str) -> int:
    """Terminal columns that a text takes."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def write_picture(path: Path, items: Sequence[Verdict], title: str) -> int:
    """Draw the first 24 verdicts with an English question, each with its picture, as one PNG.

    A question outside ASCII is skipped: the font that comes with matplotlib has no Chinese characters.

    Args:
        path: of the PNG; its directory is made if missing.
        items: verdicts, in the order of drawing.
        title: one line above all.

    Returns:
        The number of verdicts drawn, 1 to 24.

    Raises:
        UserError: no question is in ASCII, matplotlib is missing, or the file cannot be written.
        MissingFileError: a picture cannot be read.
    """
    shown = [item for item in items if item.question.isascii()][: COLUMNS * ROWS]
    if not shown:
        raise UserError(f"none of {len(items)} questions is in ASCII, which is all the font has; add English questions")
    figure = draw_verdicts(shown, title)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the format is given, since the ending .partial names none
        figure.savefig(partial, format="png")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; name a file that you can write") from error
    return len(shown)


def draw_verdicts(items: Sequence[Verdict], title: str) -> Any:
    """A matplotlib figure of verdicts; no text touches that of another picture.

    Raises:
        UserError: matplotlib is missing.
        MissingFileError: a picture cannot be read.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise UserError("matplotlib, which draws the picture, is not installed; run: pip install matplotlib") from error

    rows = -(-len(items) // COLUMNS)
    padded = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)  # inches around each picture with its texts
    # No pyplot: it would choose a window system.
    figure = Figure(figsize=(2.4 * COLUMNS, 2.75 * rows + 0.6), dpi=100, layout=padded)
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    for axes in (grid := figure.subplots(rows, COLUMNS, squeeze=False).ravel()):
        axes.axis("off")
    for axes, item in zip(grid, items, strict=False):
        _draw_verdict(axes, item)
    return figure


def _draw_verdict(axes: Any, item: Verdict) -> None:
    """One picture: the question above it, the answer below, green when correct, else red with the right one."""
    try:
        with Image.open(item.image_path) as image:
            axes.imshow(image.convert("RGB"), interpolation="nearest")
    except OSError as error:
        raise MissingFileError(f"cannot read the image {item.image_path}: {error}; make the demo data again") from error
    axes.set_title(_shown(item.question.replace(IMAGE_TOKEN, "")), fontsize=9, parse_math=False)
    answer = item.answer.strip() or "(nothing)"
    lines = [f"ok: {answer}"] if item.correct else [f"wrong: {answer}", f"right: {item.expected}"]
    verdict = "\n".join(map(_shown, lines))
    axes.set_xlabel(verdict, fontsize=9, color="green" if item.correct else "red", parse_math=False)
    # the grid's axes are off, so that unused places stay empty; the label below needs them on, without ticks
    axes.axis("on")
    axes.set(xticks=[], yticks=[])


def _shown(text: str) -> str:
    """Text as the font can draw it: at most two lines, characters outside ASCII and line ends as escapes."""
    # what a model answers can be any text, also line ends and other scripts
    plain = text.strip().encode("unicode_escape").decode("ascii")
    return "\n".join(textwrap.wrap(plain, LINE_WIDTH, max_lines=2, placeholder="..."))


def write_result(path: Path, result: dict[str, Any] | list[Any]) -> None:
    """Write JSON in one step: whoever reads `path` finds the old file or the whole new one.

    Args:
        path: of the file; its directory is made if missing.
        result: what `json` can write, without NaN and infinity; Chinese stays readable, a list gets a line per record.

    Raises:
        UserError: the file cannot be written.
        ValueError: a number is NaN or infinite.
    """
    # A list of records may have thousands; one per line keeps it readable.
    if isinstance(result, list):  # one record per line: easy to read and to compare
        lines = ",\n".join(json.dumps(record, ensure_ascii=False, allow_nan=False) for record in result)
        text = f"[\n{lines}\n]"
    else:
        text = json.dumps(result, ensure_ascii=False, allow_nan=False, indent=2)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            # On the disk before the rename, or a power cut could leave an empty file.
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; name a file that you can write") from error
