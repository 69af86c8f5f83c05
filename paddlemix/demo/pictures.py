"""The demo's pictures on disk: written, cleared after an interrupted run, and compared between splits.

Serves both data sets; knows neither what a picture shows nor any question.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from paddlemix.errors import MissingFileError, UserError


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
        # Lists first: a killed run must not leave a list that names missing pictures.
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
            # Pixels, not bytes: equal pictures may be compressed differently.
            pixels = image.convert("RGB")
    except OSError as error:
        raise MissingFileError(f"cannot read the image {path}: {error}; make the demo data again") from error
    # with the size: 2x8 and 4x4 pixels can have the same bytes
    return hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).hexdigest()


def check_disjoint(train: Path, held_out: Path) -> None:
    """Make sure that no picture of one list equals a picture of the other.

    Args:
        train, held_out: JSON lists as `write_scenes` writes them; image paths are relative to the list's directory.

    Raises:
        UserError: two pictures have the same pixels; both are named.
        MissingFileError: a list or a picture cannot be read.
    """
    # the smaller list is held in memory
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
