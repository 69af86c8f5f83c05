"""Handwritten digits with questions: the second data set of `paddlemix demo`, real scans that come with scikit-learn.

1,797 scans of 8x8 pixels, enlarged to 32x32; training pictures get a few moved and turned copies.  Knows no model
and no tokenizer.  Source: scikit-learn `load_digits`, the test part of UCI "Optical Recognition of Handwritten Digits".
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paddlemix.demo.pictures import check_disjoint, clear_previous, save_picture
from paddlemix.demo.results import write_result
from paddlemix.demo.scene_data import CHINESE_SHARE
from paddlemix.demo.scenes import IMAGE_SIZE
from paddlemix.errors import UserError

DIGIT_COUNT = 1797
EVAL_COUNT = 100  # records of digits_eval.json
COPIES = 2  # moved and turned copies of each training picture
MAX_SHIFT = 2  # pixels of the enlarged picture
MAX_TURN = 10.0  # degrees

DIGIT_QUESTION = "What digit is this?"
# (English, Chinese): the index is the language; the first phrase of each is used half the time
DIGIT_PHRASES = (
    (DIGIT_QUESTION, "Which digit do you see?", "Name the digit.", "What number is in the picture?"),
    ("这是什么数字?", "图中是什么数字？"),
)
EVEN_PHRASES = (
    ("Is it even?", "Is this an even number?", "Is the digit even?"),
    ("这是偶数吗?", "它是偶数吗？"),
)
# the answer for an even digit, then the one for an odd digit
YES_NO = (("yes", "no"), ("是", "不是"))


@dataclass(frozen=True)
class DigitFiles:
    """Where the digits are written.

    Args:
        directory: holds the lists and `images/`; image paths in the lists are relative to it.
        train: one or two questions per record.
        evaluation: 100 records like those of `train` on other pictures, for the loss during training.
        held_out: `What digit is this?` for every record; no picture of it is in another list.
    """

    directory: Path
    train: Path
    evaluation: Path
    held_out: Path

    @property
    def lists(self) -> tuple[Path, ...]:
        """The three JSON files."""
        return (self.train, self.evaluation, self.held_out)


def digit_files(directory: Path) -> DigitFiles:
    """The names of the files that `write_digits` writes to `directory`; nothing is read or written."""
    train, evaluation, held_out = (directory / f"digits_{part}.json" for part in ("train", "eval", "heldout"))
    return DigitFiles(directory, train, evaluation, held_out)


def write_digits(directory: Path, held_out_count: int = 360, seed: int = 0) -> DigitFiles:
    """Write the enlarged digits and their question lists.

    As in `write_scenes` the lists are removed first and written last, so a directory with all lists is whole.

    Args:
        directory: made if missing; digit files of an earlier run in it are replaced.
        held_out_count: held-out pictures, 1 to 1,500.
        seed: chooses the split, the copies and the phrases; same seed and count, same bytes.

    Returns:
        The paths of the lists.  A record is `{"image": "images/digit_0042.png", "conversations":
        [["<image>\\nWhat digit is this?", "7"], ["Is it even?", "no"]]}`; a copy is named `digit_0042_1.png`.

    Raises:
        UserError: the count is out of range, scikit-learn is missing, or the directory cannot be written.
    """
    if not 1 <= held_out_count <= 1500:
        raise UserError(f"held_out_count={held_out_count} is not in 1 to 1500 (there are {DIGIT_COUNT} digits)")
    scans, digits = load_scans()
    rng = random.Random(seed)
    files = digit_files(directory)
    clear_previous(directory, files.lists, "digit_[0-9]*.png")

    # Held-out pictures come first, so that they do not depend on the other counts.
    held_out, evaluation, train = split_scans(scans, held_out_count, rng)
    held_out_records = []
    for index in held_out:
        name = _save(directory, index, enlarge(scans[index]))
        held_out_records.append({"image": name, "conversations": [_pair(DIGIT_QUESTION, digits[index])]})
    eval_records = [_record(_save(directory, index, enlarge(scans[index])), digits[index], rng) for index in evaluation]
    # A copy that happens to equal a held-out picture is left out.
    apart = {enlarge(scans[index]).tobytes() for index in held_out + evaluation}
    train_records = []
    for index in train:
        pictures = [enlarge(scans[index])]
        pictures += [vary(pictures[0], rng) for _ in range(COPIES)]
        for copy, pixels in enumerate(pictures):
            if pixels.tobytes() not in apart:
                train_records.append(_record(_save(directory, index, pixels, copy), digits[index], rng))
    # last: a directory that has its lists has all their pictures
    for path, records in zip(files.lists, (train_records, eval_records, held_out_records), strict=True):
        write_result(path, records)
    # by pixels as they are on disk, not by what this function believes it wrote
    check_disjoint(files.train, files.held_out)
    check_disjoint(files.evaluation, files.held_out)
    return files


def load_scans() -> tuple[np.ndarray, list[int]]:
    """The scans as scikit-learn ships them.

    Returns:
        uint8 [1797, 8, 8] with values 0 (paper) to 16 (ink), and the digit 0 to 9 of each.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the digits come with scikit-learn, which is not installed; run: pip install scikit-learn"
        ) from error
    loaded = load_digits()
    return loaded.images.astype(np.uint8), [int(digit) for digit in loaded.target]


def split_scans(scans: np.ndarray, held_out_count: int, rng: random.Random) -> tuple[list[int], list[int], list[int]]:
    """Split by picture, so that no scan is in two parts.

    Args:
        scans: uint8 [N, 8, 8].
        held_out_count: at most N - 100.
        rng: shuffles.

    Returns:
        Indices of held-out (`held_out_count`), evaluation (at most 100) and training scans.  A scan with the same
        bytes as one before it is dropped.
    """
    order = rng.sample(range(len(scans)), len(scans))
    distinct: dict[str, int] = {}
    for index in order:
        # Some scans occur twice in the data set.
        distinct.setdefault(hashlib.sha256(scans[index].tobytes()).hexdigest(), index)
    kept = list(distinct.values())
    split = held_out_count + EVAL_COUNT
    return kept[:held_out_count], kept[held_out_count:split], kept[split:]


def enlarge(scan: np.ndarray) -> np.ndarray:
    """Bicubic enlargement: uint8 [8, 8] of 0 to 16 becomes uint8 [32, 32, 3] of 0 (paper) to 255 (ink)."""
    # Ink is bright on a dark ground, as scikit-learn has it.
    grey = Image.fromarray((scan.astype(np.float32) * (255 / 16)).round().astype(np.uint8))
    return np.asarray(grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB"))


def vary(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """A copy turned by at most 10 degrees and moved by at most 2 pixels each way; uint8 [32, 32, 3] in and out."""
    angle = rng.uniform(-MAX_TURN, MAX_TURN)
    shift = (rng.randint(-MAX_SHIFT, MAX_SHIFT), rng.randint(-MAX_SHIFT, MAX_SHIFT))
    return np.asarray(Image.fromarray(pixels).rotate(angle, Image.Resampling.BICUBIC, translate=shift))


def _save(directory: Path, index: int, pixels: np.ndarray, copy: int = 0) -> str:
    """Write one picture; returns its path relative to `directory`.  Copy 0 is the scan itself."""
    name = f"images/digit_{index:04d}_{copy}.png" if copy else f"images/digit_{index:04d}.png"
    save_picture(directory / name, pixels)
    return name


def _pair(question: str, answer: object) -> list[str]:
    """The first turn of a record."""
    return [f"<image>\n{question}", str(answer)]


def _phrase(phrases: tuple[str, ...], rng: random.Random) -> str:
    """The first phrase half the time, otherwise one of the others."""
    return phrases[0] if rng.random() < 0.5 else rng.choice(phrases[1:])


def _record(name: str, digit: int, rng: random.Random) -> dict[str, Any]:
    """Which digit, then whether it is even (30 %); or only which digit (60 %) or whether it is even (10 %)."""
    language = int(rng.random() < CHINESE_SHARE)
    which = [_phrase(DIGIT_PHRASES[language], rng), str(digit)]
    even = [_phrase(EVEN_PHRASES[language], rng), YES_NO[language][digit % 2]]
    # Mostly the question that is asked at the end, so that few steps are enough.
    turns = rng.choices(([which, even], [which], [even]), weights=(3, 6, 1))[0]
    return {"image": name, "conversations": [_pair(*turns[0]), *turns[1:]]}
