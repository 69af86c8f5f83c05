"""RefCOCO, RefCOCO+ and RefCOCOg: where something is that words describe, in MiniGPT-4's files as XTuner reads them.

One file for each split, e.g. refcoco_val.json, refcoco_testA.json; each is a category.

Sources: xtuner/dataset/refcoco_json.py of InternLM/xtuner; lmms_eval/tasks/refcoco/utils_rec.py of lmms-eval 0.7.3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paddlemix.errors import MissingFileError, UserError
from paddlemix.evaluation.benchmarks.benchmark import BenchmarkData, Question, Request
from paddlemix.evaluation.benchmarks.benchmark_files import check_keys, read_json
from paddlemix.evaluation.scoring.answered import LLAVA

_KEYS = ("img_id", "sents", "bbox", "height", "width")
# Where COCO's pictures are, and how a number becomes a name there.
_PICTURES = (
    ("coco/train2017", "{}.jpg"),
    ("train2017", "{}.jpg"),
    ("train2014", "COCO_train2014_{}.jpg"),
    ("coco/train2014", "COCO_train2014_{}.jpg"),
    ("images", "{}.jpg"),
)
_LMMS_PROMPT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of the "
    "region this sentence describes: "
)


def refcoco_files(name: str, *splits: str) -> tuple[str, ...]:
    """The names of the files of a data set."""
    return tuple(f"{name}_{split}.json" for split in splits)


def read_refcoco(request: Request, files: tuple[str, ...]) -> BenchmarkData:
    """The splits that are there of one data set.

    Args:
        files: see `refcoco_files`.

    Raises:
        MissingFileError, UserError: there is no split, or a file is broken.
    """
    paths = [request.folder / name for name in files if (request.folder / name).is_file()]
    if not paths:
        raise MissingFileError(f"there is no {' or '.join(files)} in {request.folder}")
    root, form = _pictures(request.folder)
    questions = []
    for path in paths:
        split = path.stem.rpartition("_")[2]
        for number, record in enumerate(read_json(path, list)):
            check_keys(record, _KEYS, f"{path} record {number}")
            words = str(record["sents"])
            asked = f"[refer] give me the location of {words}" if request.protocol == LLAVA else _LMMS_PROMPT + words
            questions.append(
                Question(
                    question_id=f"{split}-{number}",
                    text=asked,
                    images=(form.format(_image_number(record, path)),),
                    category=split,
                    record=record,
                )
            )
    return BenchmarkData(questions=questions, files=paths, image_root=root)


def _pictures(folder: Path) -> tuple[Path, str]:
    for name, form in _PICTURES:
        # beside the files, or shared by the data sets
        for place in (folder, folder.parent):
            if (place / name).is_dir():
                return place / name, form
    # scores need no pictures: what is missing is said before a model is asked
    return folder / _PICTURES[0][0], _PICTURES[0][1]


def _image_number(record: dict[str, Any], path: Path) -> str:
    """The number in a name such as "COCO_train2014_000000581857_16"."""
    parts = str(record["img_id"]).split("_")
    if len(parts) < 2 or not parts[-2].isdecimal():
        raise UserError(f"{path}: img_id '{record['img_id']}' is not of the form COCO_train2014_NUMBER_NUMBER")
    return parts[-2]
