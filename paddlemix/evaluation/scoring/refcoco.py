"""Boxes in answers against the right ones: intersection over union; RefCOCO, RefCOCO+, RefCOCOg.

Source: xtuner/tools/eval_refcoco.py and xtuner/dataset/refcoco_json.py of InternLM/xtuner, after MiniGPT-4's
eval_ref.py; lmms_eval/tasks/refcoco/utils_rec.py of lmms-eval 0.7.3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from paddlemix.evaluation.scoring.answered import LLAVA, Answered, Score, as_text, check_answered, mean, means_by

Box = Sequence[float]

THRESHOLD = 0.5
_STEPS = 100  # MiniGPT-4's boxes are in hundredths of the sides
_LMMS_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_WHOLE = re.compile(r"\d+")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?|-?\.\d+")
_BRACKETED = re.compile(r"\[\s*" + r",\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")


def parse_hundredths(text: str) -> list[int] | None:
    """Four whole numbers, "{<10><20><30><40>}"; None where there are more or fewer, as in "[0.1, 0.2, 0.3, 0.4]"."""
    found = [int(number) for number in _WHOLE.findall(text)]
    return found if len(found) == 4 else None


def parse_bracketed(text: str) -> list[float]:
    """The first four numbers in square brackets; four zeros where there are none."""
    match = _BRACKETED.search(text)
    return [float(number) for number in match.groups()] if match is not None else [0.0] * 4


def parse_numbers(text: str) -> list[float] | None:
    """The first four numbers of a text in any form; None where it has fewer."""
    found = [float(number) for number in _NUMBER.findall(text)[:4]]
    return found if len(found) == 4 else None


def iou(first: Box, second: Box, pixel: float = 0.0) -> float:
    """Intersection over union of two boxes, each left, top, right, bottom.

    Args:
        pixel: 1 where the right and bottom edges belong to a box, as those of pixels do.

    Returns:
        0..1 for boxes whose edges are in order (others are not refused); 0 where both are empty.
    """
    width = min(first[2], second[2]) - max(first[0], second[0]) + pixel
    height = min(first[3], second[3]) - max(first[1], second[1]) + pixel
    common = max(0, width) * max(0, height)
    areas = [(box[2] - box[0] + pixel) * (box[3] - box[1] + pixel) for box in (first, second)]
    union = areas[0] + areas[1] - common
    return common / union if union else 0.0


def hundredths(corner_and_size: Box, width: float, height: float) -> list[int]:
    """A box of COCO (left, top, width, height in pixels) as whole hundredths of the picture's sides, cut off."""
    left, top, box_width, box_height = corner_and_size
    shares = (left / width, top / height, (left + box_width) / width, (top + box_height) / height)
    return [int(share * _STEPS) for share in shares]


def score_refcoco(answered: Sequence[Answered], protocol: str = LLAVA) -> Score:
    """RefCOCO and its kin.

    Args:
        answered: records with "bbox" (left, top, width, height), "width" and "height" of the picture; pixels.

    Returns:
        `accuracy`: the share with an IoU above 0.5.  Under "llava" by XTuner's rules: hundredths, edges within the box.
        Under "lmms-eval" at 0.5 and above of shares of the sides, with `iou`, `accuracy_at_0.1` ... `accuracy_at_0.9`
        and `center_accuracy`.

    Raises:
        UserError: no question, or a record lacks a key.
    """
    check_answered(answered, protocol)
    if protocol != LLAVA:
        return _lmms_score(answered)
    right = []
    for one in answered:
        wanted = hundredths(one.value("bbox"), one.value("width"), one.value("height"))
        said = parse_hundredths(as_text(one.text))
        right.append(float(said is not None and iou(said, wanted, pixel=1) > THRESHOLD))
    by_category = means_by((one.category for one in answered), right, "accuracy")
    return Score(metrics={"accuracy": mean(right)}, by_category=by_category, right=right)


def _lmms_score(answered: Sequence[Answered]) -> Score:
    wanted = [_shares(one) for one in answered]
    said = [parse_bracketed(as_text(one.text)) for one in answered]
    found = [iou(box, answer) for box, answer in zip(wanted, said, strict=True)]
    at = {limit: [float(value >= limit) for value in found] for limit in _LMMS_THRESHOLDS}
    centres = [float(_has_centre(box, answer)) for box, answer in zip(wanted, said, strict=True)]
    right = at[THRESHOLD]
    metrics = {"accuracy": mean(right), "iou": mean(found), "center_accuracy": mean(centres)}
    metrics |= {f"accuracy_at_{limit}": mean(values) for limit, values in at.items()}
    by_category = means_by((one.category for one in answered), right, "accuracy")
    return Score(metrics=metrics, by_category=by_category, right=right)


def _shares(one: Answered) -> list[float]:
    left, top, box_width, box_height = one.value("bbox")
    width, height = one.value("width"), one.value("height")
    return [left / width, top / height, (left + box_width) / width, (top + box_height) / height]


def _has_centre(box: Box, other: Box) -> bool:
    """Whether the centre of the other box lies in the first."""
    across, down = (other[0] + other[2]) / 2, (other[1] + other[3]) / 2
    return box[0] <= across <= box[2] and box[1] <= down <= box[3]
