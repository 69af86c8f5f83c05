"""Forms of records -> turns: one table, one small function for each form.

Recognises PaddleMIX's pairs, LLaVA's and ShareGPT's `from`/`value`, OpenAI's and ms-swift's `messages` and ms-swift's
`query`/`response`; named data sets are read by `annotations.py`.  `image_markers.py` finds the places of pictures in a
user's text.  Opens no image and knows no template.

Sources: PaddleMIX paddlemix/datasets/dataset.py; haotian-liu/LLaVA docs/Finetune_Custom_Data.md; ms-swift docs,
Custom-dataset; OpenAI API reference, chat completions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paddlemix.datasets.forms.annotations import FORM_READERS
from paddlemix.datasets.forms.image_keys import PLACE, PlacedImage, image_address, image_addresses
from paddlemix.datasets.forms.turns import (
    TOOLS,
    Record,
    Turn,
    check_turn,
    images_at_tokens,
    images_first,
    role_of,
    text_content,
)
from paddlemix.datasets.records.json_values import json_kind
from paddlemix.errors import UserError, did_you_mean
from paddlemix.sample import IMAGE_TOKEN, Role

_PREFERENCE = "preference data (DPO and the like) is not trained here; remove the key to train on the answers alone"
_MEDIA = "only images are; remove the record, or the key where it is not needed"
# What would change a record's meaning if it were ignored.
_REFUSED_KEYS = {
    **dict.fromkeys(("rejected_response", "rejected_messages", "rejected", "chosen"), _PREFERENCE),
    **dict.fromkeys(("videos", "video", "audios", "audio"), _MEDIA),
    **dict.fromkeys(("tools", "functions"), TOOLS),
}


@dataclass(frozen=True)
class Dialect:
    """One form of records.

    Args:
        key: what a record of this form has and others have not.
        shape: how it looks, for messages.
        read: returns the turns.
    """

    key: str
    shape: str
    read: Callable[[Record], list[Turn]]


def read_turns(record: Record, form: str | None = None) -> list[Turn]:
    """The turns of a record.

    Args:
        record: one object of a data file.
        form: `name` of its data set; one of `FORM_READERS` fixes the form, anything else leaves it to the record.

    Returns:
        Roles and contents in order, not yet checked for alternation; a `PlacedImage` where an image is placed.

    Raises:
        UserError: the record has no known form, or two at once, or breaks the rules of its form.
    """
    for key in record.keys() & _REFUSED_KEYS.keys():
        if record[key]:
            raise UserError(f"'{key}' is not supported: {_REFUSED_KEYS[key]}")
    # name of the entry is coco_caption, vg_caption or coco_vqa -> that reader
    # any other name, or none                                   -> the record's own keys
    read = FORM_READERS.get(form) if form is not None else None
    turns = (read or _recognise(record).read)(record)
    system = record.get("system")
    if not system:
        return turns
    if not isinstance(system, str):
        raise UserError(f"system is a JSON {json_kind(system)}, expected text")
    if any(role == "system" for role, _ in turns):
        raise UserError("the key 'system' and a system turn both contain a system text; keep one")
    return [("system", (system,)), *turns]


def read_open_turns(record: Record, form: str | None = None) -> list[Turn]:
    """The turns of a record that may be a question without an answer.

    Args, raises: see `read_turns`; a `text` without a conversation is a question of its own.

    Returns:
        As `read_turns`, without an empty last answer.
    """
    alone = is_bare_question(record, form)
    if alone and record.get("text") is not None:
        turns = read_turns({**record, "conversations": [{"from": "human", "value": _question_text(record)}]})
    elif alone:
        keys, known = ", ".join(map(str, record)) or "none", ", ".join(f"'{dialect.key}'" for dialect in DIALECTS)
        raise UserError(f"neither a question ('text') nor one of {known} (keys: {keys})")
    else:
        # A question may lack the answer that the readers demand: an empty one is put in and dropped again below.
        turns = read_turns({"response": "", "answer": "", "caption": "", **record}, form)
    role, content = turns[-1]
    answered = any(isinstance(piece, PlacedImage) or piece.strip() for piece in content)
    return turns if role != "assistant" or answered else turns[:-1]


def is_bare_question(record: Record, form: str | None = None) -> bool:
    """Whether a record holds no conversation, like those of LLaVA's question files."""
    return form not in FORM_READERS and all(record.get(dialect.key) is None for dialect in DIALECTS)


def _question_text(record: Record) -> str:
    """The text of a question file's record, its images before it unless it places them itself."""
    text = record["text"]
    if not isinstance(text, str):
        raise UserError(f"text is a JSON {json_kind(text)}, expected the question")
    # the text places its images itself
    if IMAGE_TOKEN in text:
        return text
    return f"{IMAGE_TOKEN}\n" * len(image_addresses(record)) + text


def _recognise(record: Record) -> Dialect:
    found = [dialect for dialect in DIALECTS if record.get(dialect.key) is not None]
    if len(found) == 1:
        return found[0]
    # two conversations in one record: whichever were chosen, the other would be lost without a word
    if found:
        keys = " and ".join(f"'{dialect.key}'" for dialect in found)
        raise UserError(f"{keys} are each a conversation; keep one of them")
    keys = ", ".join(map(str, record)) or "none"
    known = [dialect.key for dialect in DIALECTS]
    hint = next(filter(None, (did_you_mean(str(key), known) for key in record)), "")
    forms = ", ".join(f"'{dialect.key}' ({dialect.shape})" for dialect in DIALECTS)
    raise UserError(f"its form is not known (keys: {keys}); a record has one of {forms}{hint}")


def _read_conversations(record: Record) -> list[Turn]:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise UserError("'conversations' is not a list of turns or is empty")
    if all(isinstance(turn, dict) for turn in turns):
        # some of ShareGPT's files have role/content turns under this key
        by_role = all("role" in turn and "from" not in turn for turn in turns)
        read = _message_turn if by_role else _from_value_turn
        return images_at_tokens(record, [read(turn, number) for number, turn in enumerate(turns, 1)])
    if all(isinstance(turn, list) for turn in turns):
        return images_at_tokens(record, _pair_turns(turns, "pair"))
    raise UserError("'conversations' holds neither [question, answer] pairs nor {'from', 'value'} turns throughout")


def _from_value_turn(turn: dict[str, Any], number: int) -> Turn:
    if not {"from", "value"} <= turn.keys():
        raise UserError(
            f"turn {number} has the keys {', '.join(map(str, turn)) or 'none'}, expected 'from' and 'value'"
        )
    check_turn(turn, number)
    role = role_of(turn["from"], f"turn {number}: from=")
    if not isinstance(turn["value"], str):
        raise UserError(f"turn {number}: value is a JSON {json_kind(turn['value'])}, expected text")
    return role, text_content(role, turn["value"])


def _pair_turns(pairs: list[Any], noun: str) -> list[Turn]:
    turns: list[Turn] = []
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            found = json.dumps(pair, ensure_ascii=False)[:80]
            raise UserError(f"{noun} {number} is {found}, expected [question, answer] texts")
        turns += [("user", text_content("user", pair[0])), ("assistant", (pair[1],))]
    return turns


def _read_messages(record: Record) -> list[Turn]:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise UserError("'messages' is not a list of {'role', 'content'} turns or is empty")
    return images_first(record, [_message_turn(message, number) for number, message in enumerate(messages, 1)])


def _message_turn(message: dict[str, Any], number: int) -> Turn:
    check_turn(message, number)
    if not {"role", "content"} <= message.keys():
        raise UserError(
            f"turn {number} has the keys {', '.join(map(str, message)) or 'none'}, expected 'role' and 'content'"
        )
    role, content = role_of(message["role"], f"turn {number}: role="), message["content"]
    if isinstance(content, str):
        return role, text_content(role, content)
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise UserError(f"turn {number}: content is a JSON {json_kind(content)}, expected text or a list of parts")
    return role, tuple(_part(part, role, number) for part in content)


def _part(part: dict[str, Any], role: Role, number: int) -> str | PlacedImage:
    """One content part; `<image>` in the text of a part is text, for images have parts of their own."""
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise UserError(f"turn {number}: the text of a part is a JSON {json_kind(part.get('text'))}, expected text")
        return part["text"]
    # a video or a sound must not become silence
    if kind not in ("image_url", "image"):
        raise UserError(f"turn {number}: a part of type {json.dumps(kind)} is not one of text, image_url, image")
    if role != "user":
        raise UserError(f"turn {number}: a turn of the {role} has an image; only a user's turn can show one")
    value = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key) is not None), None)
    # {"type": "image"} alone: the next image of the record's own list
    if value is None and kind == "image":
        return PLACE
    return PlacedImage(image_address(value, f"turn {number}: {kind}"))


def _read_query(record: Record) -> list[Turn]:
    for key in ("query", "response"):
        if not isinstance(record.get(key), str):
            raise UserError(f"{key} is a JSON {json_kind(record.get(key))}, expected text")
    history = record.get("history") or []
    if not isinstance(history, list):
        raise UserError(f"history is a JSON {json_kind(history)}, expected a list of [question, answer] texts")
    turns = _pair_turns(history, "history pair") + _pair_turns([[record["query"], record["response"]]], "pair")
    return images_first(record, turns)


DIALECTS = (
    Dialect("conversations", "[[question, answer], ...] or [{'from', 'value'}, ...]", _read_conversations),
    Dialect("messages", "[{'role', 'content'}, ...]", _read_messages),
    Dialect("query", "with 'response' and perhaps 'history'", _read_query),
)
