"""The scenes as files: pictures and question lists, the first data set of `paddlemix demo`.

Decides how many scenes there are, how they are split, and which questions a record asks.  Knows no model and no
tokenizer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddlemix.demo.pictures import check_disjoint, clear_previous, save_picture
from paddlemix.demo.results import write_result
from paddlemix.demo.scenes import PHRASES, Scene, caption, draw_scene, questions, scenes_outside
from paddlemix.errors import UserError

EVAL_COUNT = 100  # records of scenes_eval.json
CAPTION_COUNT = 8000  # at most, of scenes_captions.json
MAX_SCENES = 100_000  # file names count with five digits
CHINESE_SHARE = 0.25
COLOURS_ASKED = 2  # of the four cells of a training record
BOX_SHARE = 0.2  # share of records that ask for a box
TURNS = (5,)  # questions of a training record: each costs little once the picture is read


@dataclass(frozen=True)
class SceneFiles:
    """Where the scenes are written.

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


def scene_files(directory: Path) -> SceneFiles:
    """The names of the files that `write_scenes` writes to `directory`; nothing is read or written."""
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

    # Drawn first from the seed, so that other counts do not change them.
    held_out = scenes_outside(set(), held_out_count, rng)
    held_out_records = _write_part(directory, 0, held_out, (1,), rng)
    evaluation = scenes_outside(set(held_out), EVAL_COUNT, rng)
    eval_records = _write_part(directory, held_out_count, evaluation, TURNS, rng)
    # outside both others, by description: see `scenes_outside`
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


def _write_part(
    directory: Path, first: int, scenes: list[Scene], turns: tuple[int, ...], rng: random.Random
) -> list[dict[str, Any]]:
    """Draw and save scenes, numbered from `first`; returns their records, `turns` questions each."""
    records = []
    for number, scene in enumerate(scenes, start=first):
        name = f"images/scene_{number:05d}.png"
        save_picture(directory / name, draw_scene(scene, rng))
        records.append(_record(name, scene, rng.choice(turns), rng))
    return records


def _record(name: str, scene: Scene, turns: int, rng: random.Random) -> dict[str, Any]:
    """A record with `turns` different questions, all in one language; one fewer if one of them asks for a box:
    that answer is long, and records of similar length need little padding."""
    # One language per record, as in a conversation.
    language = int(rng.random() < CHINESE_SHARE)
    found = questions(scene, language)
    boxes = found.pop("box", None)
    if turns > 1:  # colours are learned first, so fewer questions about them are enough
        found["colour"] = rng.sample(found["colour"], COLOURS_ASKED)
    asked = [(kind, *item) for kind, items in found.items() for item in items]
    asked = rng.sample(asked, min(turns, len(asked)))
    if turns > 1 and boxes and rng.random() < BOX_SHARE:
        # Takes the place of a question; the last one is then dropped.
        asked[rng.randrange(len(asked) - 1)] = ("box", *rng.choice(boxes))
        asked = asked[: turns - 1]
    pairs = [[rng.choice(PHRASES[kind][language]).format(**words), answer] for kind, words, answer in asked]
    # the image belongs to the first question; later turns refer to it
    pairs[0][0] = "<image>\n" + pairs[0][0]
    return {"image": name, "conversations": pairs}
