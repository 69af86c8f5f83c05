"""Records of a data file -> Samples.

Reads JSON arrays and recognises per record the form of its conversation: PaddleMIX's pairs
(`[["<image>\\nQ", "A"], ...]`) and LLaVA's turns (`[{"from": "human", "value": ...}, ...]`).  Here, and only here,
`<image>` in a user's text becomes a place.  Knows no template and opens no image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paddlemix.errors import MissingFileError, UserError, did_you_mean
from paddlemix.sample import IMAGE_TOKEN, Message, Role, Sample

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Reads a data file.

    Args:
        path: a JSON array of objects, UTF-8.

    Raises:
        MissingFileError: there is no such file, or it cannot be read.
        UserError: the file is not JSON, not an array, or an item is not an object.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else f"does not exist (looked in {Path.cwd()})"
        raise MissingFileError(f"data file '{path}' {problem}; check dataset.data_files")
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise MissingFileError(f"data file '{path}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data file '{path}' is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"data file '{path}' is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    if not isinstance(records, list):
        raise UserError(f"data file '{path}' holds a JSON {_kind(records)}, expected an array of records")
    if not records:
        raise UserError(f"data file '{path}' holds no record")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path} record {number}: a JSON {_kind(record)}, expected an object with 'conversations'")
    return records


def parse_record(record: dict[str, Any], source: str, image_root: str | Path | None = None) -> Sample:
    """Turns one record into a Sample.

    Args:
        record: `conversations` and, where images are used, `image`: a path, a URL or a list of them.
        source: where the record is, e.g. "train.json record 17"; begins every error.
        image_root: folder that relative image paths start from; None for the working directory.

    Returns:
        A Sample whose messages name each of its images exactly once.

    Raises:
        UserError: no conversation, wrong form, roles out of order, an empty answer, text that is not Unicode, or a
            number of `<image>` that is not the number of images.
    """
    try:
        images = tuple(_locate(path, image_root) for path in _image_paths(record))
        messages = _messages(record)
        _check_turns(messages)
        return Sample(messages=_place_images(messages, len(images)), images=images, source=source)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _image_paths(record: dict[str, Any]) -> list[str]:
    value = record.get("image")
    if value is None:
        return []
    paths = value if isinstance(value, list) else [value]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise UserError(f"image is {json.dumps(path)}, expected a path or URL, or a list of them")
    return paths


def _locate(path: str, image_root: str | Path | None) -> str:
    if image_root is None or path.startswith(("http://", "https://")) or Path(path).is_absolute():
        return path
    return str(Path(image_root) / path)


def _messages(record: dict[str, Any]) -> list[tuple[Role, str]]:
    turns = record.get("conversations")
    if turns is None:
        keys = ", ".join(map(str, record)) or "none"
        raise UserError(f"no key 'conversations' (keys: {keys}){did_you_mean('conversations', map(str, record))}")
    if not isinstance(turns, list) or not turns:
        raise UserError("'conversations' is not a list of turns or is empty")
    if all(isinstance(turn, dict) for turn in turns):
        return [_turn_message(turn, number) for number, turn in enumerate(turns, 1)]
    if all(isinstance(turn, list) for turn in turns):
        return [message for number, pair in enumerate(turns, 1) for message in _pair_messages(pair, number)]
    raise UserError("'conversations' holds neither [question, answer] pairs nor {'from', 'value'} turns throughout")


def _turn_message(turn: dict[str, Any], number: int) -> tuple[Role, str]:
    if not {"from", "value"} <= turn.keys():
        raise UserError(
            f"turn {number} has the keys {', '.join(map(str, turn)) or 'none'}, expected 'from' and 'value'"
        )
    role = _ROLES.get(str(turn["from"]))
    if role is None:
        raise UserError(f"turn {number}: from='{turn['from']}' is not one of {', '.join(_ROLES)}")
    if not isinstance(turn["value"], str):
        raise UserError(f"turn {number}: value is a JSON {_kind(turn['value'])}, expected text")
    return role, turn["value"]


def _pair_messages(pair: Sequence[Any], number: int) -> list[tuple[Role, str]]:
    if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise UserError(
            f"pair {number} is {json.dumps(pair, ensure_ascii=False)[:80]}, expected [question, answer] texts"
        )
    return [("user", pair[0]), ("assistant", pair[1])]


def _check_turns(messages: Sequence[tuple[Role, str]]) -> None:
    turns = messages[1:] if messages[0][0] == "system" else messages
    for _, text in messages:
        _check_unicode(text)
    for number, (role, text) in enumerate(turns, 1):
        expected = "user" if number % 2 else "assistant"
        if role != expected:
            raise UserError(
                f"turn {number} is by the {role}, expected the {expected}: turns alternate, the user begins"
            )
        if role == "assistant" and not text.strip():
            raise UserError(f"turn {number}: the answer is empty, so there is nothing to learn")
    if len(turns) % 2 or not turns:
        raise UserError(f"{len(turns)} turns: the last question has no answer, so there is nothing to learn from it")


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found, before = ascii(text[error.start]), text[max(0, error.start - 20) : error.start]
        raise UserError(f"half a character, {found}, follows the text {before!r}; write the whole one") from error


def _place_images(messages: Sequence[tuple[Role, str]], image_count: int) -> tuple[Message, ...]:
    placed, used = [], 0
    for role, text in messages:
        content: list[str | int] = []
        for position, piece in enumerate(text.split(IMAGE_TOKEN) if role == "user" else [text]):
            if position:
                content.append(used)
                used += 1
            if piece:
                content.append(piece)
        placed.append(Message(role=role, content=tuple(content)))
    if used != image_count:
        raise UserError(
            f"{used} {IMAGE_TOKEN} in the questions but {image_count} in 'image'; each image needs one {IMAGE_TOKEN}"
        )
    return tuple(placed)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
