"""Annotation files of named data sets -> turns: PaddleMIX's `coco_caption`, `vg_caption` and `coco_vqa`.

Their records do not tell their form; the entry's `name` does.

Source: PaddleMIX paddlemix/datasets/{caption_dataset,coco_vqa}.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

from paddlemix.datasets.forms.image_keys import PLACE
from paddlemix.datasets.forms.turns import Record, Turn
from paddlemix.datasets.records.json_values import json_kind
from paddlemix.errors import UserError


def _read_caption(record: Record) -> list[Turn]:
    """`{"image", "caption", "image_id"}`: the question is the image alone.  PaddleMIX trains on the record's one
    caption; of a list, which evaluation files have, the first is used."""
    caption = given = record.get("caption")
    if isinstance(caption, list) and caption:
        caption = caption[0]
    if not isinstance(caption, str):
        raise UserError(f"caption is a JSON {json_kind(given)}, expected text (coco_caption, vg_caption)")
    return [("user", (PLACE,)), ("assistant", (caption,))]


def _read_vqa(record: Record) -> list[Turn]:
    """`{"image", "question", "answer": [...]}`: one answer for each annotator; the most frequent is used, among
    equally frequent ones the first listed."""
    question, answers = record.get("question"), record.get("answer")
    if not isinstance(question, str):
        raise UserError(f"question is a JSON {json_kind(question)}, expected text (coco_vqa)")
    # training files have a list, some test files one text
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        found = json.dumps(answers, ensure_ascii=False)[:80]
        raise UserError(f"answer is {found}, expected a text or a list of texts (coco_vqa)")
    return [("user", (PLACE, "\n" + question)), ("assistant", (Counter(answers).most_common(1)[0][0],))]


# name of a data set -> what reads its records
FORM_READERS: dict[str, Callable[[Record], list[Turn]]] = {
    "coco_caption": _read_caption,
    "vg_caption": _read_caption,
    "coco_vqa": _read_vqa,
}
