"""What a file of answers was made with, and what has changed since: arguments, model, questions, pictures.

The header is JSON values by name beside the answers, see `answer_file`.  Pictures are compared question by question:
one that has no answer yet, or an error in its place, may get another picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.errors import UserError
from paddlemix.identity import differences, listed

IMAGES = "images"  # in the header: a digest for each question
QUESTIONS = "input content"  # in the header: a digest of the file of questions
VERSION = "header version"  # in the header: what its names mean


@dataclass(frozen=True)
class Asked:
    """What is known of some questions: which they are, and what their pictures hold.

    Args:
        ids: the `question_id` of each.
        digests: one text for each question; "" where there is no picture or none that can be read.
        names: returns the names of the pictures of some questions, by their places.
    """

    ids: list[Any]
    digests: list[str]
    names: Callable[[list[int]], list[str]]


def compare_headers(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between a header that was read and another, one text for each name; pictures do not count."""
    wanted = json.loads(json.dumps(dict(wanted)))  # where a tuple is a list
    if found.get(VERSION) != wanted.get(VERSION):
        return ["it is of another version of this package"]
    names = [name for name in dict.fromkeys((*wanted, *found)) if name != IMAGES]
    texts = (_difference(name, found.get(name), wanted.get(name)) for name in names)
    return [text for text in texts if text]


def _difference(name: str, old: Any, new: Any) -> str:
    if old == new:
        return ""
    # which files of a model differ is said by their names
    if isinstance(old, dict) and isinstance(new, dict):  # digests by name: their values say nothing to anybody
        return f"{name} ({'; '.join(differences(old, new))})"
    if name == QUESTIONS:
        return f"{name} (the file of questions holds others, or is written in another way)"
    return f"{name} {_shown(old)} (now {_shown(new)})"


def check_images(path: Path, before: Any, asked: Asked, answered: np.ndarray) -> None:
    """Compares the pictures of questions that are answered with those that they were answered about.

    Args:
        path: of the answers.
        before: digests of an earlier run, as many as there are questions; anything else says nothing.
        answered: bool [n].

    Raises:
        UserError: some differ; names them.
    """
    if not isinstance(before, list) or len(before) != len(asked.digests):
        return
    pairs = zip(before, asked.digests, answered.tolist(), strict=True)
    # "" on either side says nothing: the picture could not be read then or cannot be read now
    wrong = [place for place, (old, new, done) in enumerate(pairs) if done and old and new and old != new]
    if wrong:
        raise UserError(
            f"{path} has answers about pictures that were replaced since: {listed(asked.names(wrong))}. Put them back "
            "to resume, choose another --output, or begin again with --overwrite"
        )


def known_images(before: Any, asked: Asked) -> list[str]:
    """The digests to remember: those of today, and for pictures that cannot be read now those of before, because an
    answer about them may be kept."""
    if not isinstance(before, list) or len(before) != len(asked.digests):
        return asked.digests
    return [new or old for new, old in zip(asked.digests, before, strict=True)]


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
