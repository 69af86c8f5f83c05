"""Forms of records -> turns: one table, one small function for each form.

Recognises PaddleMIX's pairs, LLaVA's and ShareGPT's `from`/`value`, OpenAI's and ms-swift's `messages`, ms-swift's
`query`/`response`, and the annotation files of PaddleMIX's `coco_caption`, `vg_caption` and `coco_vqa`.  Where a user's
text says that a picture stands is known by `image_markers.py`.  Opens no image and knows no template.

Sources: PaddleMIX paddlemix/datasets/{dataset,caption_dataset,coco_vqa}.py; haotian-liu/LLaVA
docs/Finetune_Custom_Data.md; ms-swift docs, Custom-dataset; OpenAI API reference, chat completions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from paddlemix.datasets.forms.image_keys import PLACE, Shown, image_address, image_addresses
from paddlemix.datasets.forms.image_markers import place_tokens, split_text
from paddlemix.errors import UserError, did_you_mean
from paddlemix.sample import IMAGE_TOKEN, Role

Record = Mapping[str, Any]
Turn = tuple[Role, tuple[str | Shown, ...]]

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_TOOLS = "tool calls are not trained here; remove the record"
_PREFERENCE = "preference data (DPO and the like) is not trained here; remove the key to train on the answers alone"
_MEDIA = "only images are; remove the record, or the key where it is not needed"
_UNTRAINED = "every answer is trained; split the record, so that it ends before this turn"
# What would change a record's meaning if it were ignored.
_REFUSED_KEYS = {
    **dict.fromkeys(("rejected_response", "rejected_messages", "rejected", "chosen"), _PREFERENCE),
    **dict.fromkeys(("videos", "video", "audios", "audio"), _MEDIA),
    **dict.fromkeys(("tools", "functions"), _TOOLS),
}
_REFUSED_TURN_KEYS = dict.fromkeys(("tool_calls", "function_call"), _TOOLS)
_REFUSED_ROLES = dict.fromkeys(
    ("tool", "function", "function_call", "tool_call", "tool_response", "observation"), _TOOLS
)


@dataclass(frozen=True)
class Dialect:
    """One form of records.

    Args:
        key: what a record of this form has and others have not.
        shape: how it looks, for messages.
        read: gives the turns.
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
        Roles and contents in order, not yet checked for alternation; a `Shown` where an image stands.

    Raises:
        UserError: the record is of no known form, of two at once, or not as its form demands.
    """
    for key in record.keys() & _REFUSED_KEYS.keys():
        if record[key]:
            raise UserError(f"'{key}' is not supported: {_REFUSED_KEYS[key]}")
    read = FORM_READERS.get(form) if form is not None else None
    turns = (read or _recognise(record).read)(record)
    system = record.get("system")
    if not system:
        return turns
    if not isinstance(system, str):
        raise UserError(f"system is a JSON {json_kind(system)}, expected text")
    if any(role == "system" for role, _ in turns):
        raise UserError("the key 'system' and a turn of the system both give a system text; keep one")
    return [("system", (system,)), *turns]


def read_open_turns(record: Record, form: str | None = None) -> list[Turn]:
    """The turns of a record that may be a question without answer.

    Args, raises: see `read_turns`; a `text` beside no conversation is a question of its own.

    Returns:
        As `read_turns`, without an empty last answer.
    """
    alone = is_alone(record, form)
    if alone and record.get("text") is not None:
        turns = read_turns({**record, "conversations": [{"from": "human", "value": _question_text(record)}]})
    elif alone:
        keys, known = ", ".join(map(str, record)) or "none", ", ".join(f"'{dialect.key}'" for dialect in DIALECTS)
        raise UserError(f"neither a question ('text') nor one of {known} (keys: {keys})")
    else:
        turns = read_turns({"response": "", "answer": "", "caption": "", **record}, form)
    role, content = turns[-1]
    answered = any(isinstance(piece, Shown) or piece.strip() for piece in content)
    return turns if role != "assistant" or answered else turns[:-1]


def is_alone(record: Record, form: str | None = None) -> bool:
    """Whether a record holds no conversation, as those of LLaVA's question files."""
    return form not in FORM_READERS and all(record.get(dialect.key) is None for dialect in DIALECTS)


def _question_text(record: Record) -> str:
    """The text of a question file's record; its images stand before it unless it places them itself."""
    text = record["text"]
    if not isinstance(text, str):
        raise UserError(f"text is a JSON {json_kind(text)}, expected the question")
    if IMAGE_TOKEN in text:
        return text
    return f"{IMAGE_TOKEN}\n" * len(image_addresses(record)) + text


def json_kind(value: Any) -> str:
    """What JSON calls a value: "object", "array", "text", "boolean", "null" or "number"."""
    names = {dict: "object", list: "array", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _recognise(record: Record) -> Dialect:
    found = [dialect for dialect in DIALECTS if record.get(dialect.key) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        keys = " and ".join(f"'{dialect.key}'" for dialect in found)
        raise UserError(f"{keys} are each a conversation of its own; keep one of them")
    keys = ", ".join(map(str, record)) or "none"
    known = [dialect.key for dialect in DIALECTS]
    hint = next(filter(None, (did_you_mean(str(key), known) for key in record)), "")
    forms = ", ".join(f"'{dialect.key}' ({dialect.shape})" for dialect in DIALECTS)
    raise UserError(f"of no known form (keys: {keys}); a record has one of {forms}{hint}")


def _text_content(role: Role, text: str) -> tuple[str | Shown, ...]:
    """A text, each picture of a user's a place."""
    return split_text(text) if role == "user" else (text,)


def _role(name: Any, where: str) -> Role:
    role = _ROLES.get(str(name))
    if role is None:
        reason = _REFUSED_ROLES.get(str(name))
        detail = f" is not supported: {reason}" if reason else f" is not one of {', '.join(_ROLES)}"
        raise UserError(f"{where}'{name}'{detail}")
    return role


def _check_turn(turn: Mapping[str, Any], number: int) -> None:
    for key in turn.keys() & _REFUSED_TURN_KEYS.keys():
        if turn[key]:
            raise UserError(f"turn {number}: '{key}' is not supported: {_REFUSED_TURN_KEYS[key]}")
    for key in ("loss", "weight"):  # of ms-swift and of OpenAI: whether the turn is trained
        if (
            turn.get(key) is not None
            and not turn[key]
            and _ROLES.get(str(turn.get("role", turn.get("from")))) == ("assistant")
        ):
            raise UserError(f"turn {number}: '{key}' {json.dumps(turn[key])} is not supported: {_UNTRAINED}")


def _read_conversations(record: Record) -> list[Turn]:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise UserError("'conversations' is not a list of turns or is empty")
    if all(isinstance(turn, dict) for turn in turns):
        by_role = all("role" in turn and "from" not in turn for turn in turns)
        read = _message_turn if by_role else _from_value_turn
        return _images_at_tokens(record, [read(turn, number) for number, turn in enumerate(turns, 1)])
    if all(isinstance(turn, list) for turn in turns):
        return _images_at_tokens(record, _pair_turns(turns, "pair"))
    raise UserError("'conversations' holds neither [question, answer] pairs nor {'from', 'value'} turns throughout")


def _from_value_turn(turn: dict[str, Any], number: int) -> Turn:
    if not {"from", "value"} <= turn.keys():
        raise UserError(
            f"turn {number} has the keys {', '.join(map(str, turn)) or 'none'}, expected 'from' and 'value'"
        )
    _check_turn(turn, number)
    role = _role(turn["from"], f"turn {number}: from=")
    if not isinstance(turn["value"], str):
        raise UserError(f"turn {number}: value is a JSON {json_kind(turn['value'])}, expected text")
    return role, _text_content(role, turn["value"])


def _pair_turns(pairs: list[Any], noun: str) -> list[Turn]:
    turns: list[Turn] = []
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            found = json.dumps(pair, ensure_ascii=False)[:80]
            raise UserError(f"{noun} {number} is {found}, expected [question, answer] texts")
        turns += [("user", _text_content("user", pair[0])), ("assistant", (pair[1],))]
    return turns


def _read_messages(record: Record) -> list[Turn]:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise UserError("'messages' is not a list of {'role', 'content'} turns or is empty")
    return _images_first(record, [_message_turn(message, number) for number, message in enumerate(messages, 1)])


def _message_turn(message: dict[str, Any], number: int) -> Turn:
    _check_turn(message, number)
    if not {"role", "content"} <= message.keys():
        raise UserError(
            f"turn {number} has the keys {', '.join(map(str, message)) or 'none'}, expected 'role' and 'content'"
        )
    role, content = _role(message["role"], f"turn {number}: role="), message["content"]
    if isinstance(content, str):
        return role, _text_content(role, content)
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise UserError(f"turn {number}: content is a JSON {json_kind(content)}, expected text or a list of parts")
    return role, tuple(_part(part, role, number) for part in content)


def _part(part: dict[str, Any], role: Role, number: int) -> str | Shown:
    """One content part; `<image>` in the text of a part is text, for images have parts of their own."""
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise UserError(f"turn {number}: the text of a part is a JSON {json_kind(part.get('text'))}, expected text")
        return part["text"]
    if kind not in ("image_url", "image"):
        raise UserError(f"turn {number}: a part of type {json.dumps(kind)} is not one of text, image_url, image")
    if role != "user":
        raise UserError(f"turn {number}: an image stands in a turn of the {role}; only a user's turn can show one")
    value = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key) is not None), None)
    if value is None and kind == "image":
        return PLACE
    return Shown(image_address(value, f"turn {number}: {kind}"))


def _read_query(record: Record) -> list[Turn]:
    for key in ("query", "response"):
        if not isinstance(record.get(key), str):
            raise UserError(f"{key} is a JSON {json_kind(record.get(key))}, expected text")
    history = record.get("history") or []
    if not isinstance(history, list):
        raise UserError(f"history is a JSON {json_kind(history)}, expected a list of [question, answer] texts")
    turns = _pair_turns(history, "history pair") + _pair_turns([[record["query"], record["response"]]], "pair")
    return _images_first(record, turns)


def _images_first(record: Record, turns: list[Turn]) -> list[Turn]:
    """ms-swift's rule: images that no text and no part places stand before the first question."""
    turns = _images_at_tokens(record, turns)
    placed = any(isinstance(piece, Shown) for _, content in turns for piece in content)
    count = 0 if placed else len(image_addresses(record))
    first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
    if not count or first is None:
        return turns
    return [*turns[:first], ("user", (PLACE,) * count + turns[first][1]), *turns[first + 1 :]]


def _images_at_tokens(record: Record, turns: list[Turn]) -> list[Turn]:
    """The places of a record's images where other programs' tokens are, if there are as many and no other place."""
    if any(isinstance(piece, Shown) for _, content in turns for piece in content):
        return turns
    users = [number for number, (role, _) in enumerate(turns) if role == "user"]
    contents = place_tokens([turns[number][1] for number in users], len(image_addresses(record)))
    placed = dict(zip(users, contents, strict=True)) if contents is not None else {}
    return [(role, placed.get(number, content)) for number, (role, content) in enumerate(turns)]


def _read_caption(record: Record) -> list[Turn]:
    """`{"image", "caption", "image_id"}`: the question is the image alone.  PaddleMIX trains on the record's one
    caption; of a list, as the evaluation files have it, the first is taken."""
    caption = given = record.get("caption")
    if isinstance(caption, list) and caption:
        caption = caption[0]
    if not isinstance(caption, str):
        raise UserError(f"caption is a JSON {json_kind(given)}, expected text (coco_caption, vg_caption)")
    return [("user", (PLACE,)), ("assistant", (caption,))]


def _read_vqa(record: Record) -> list[Turn]:
    """`{"image", "question", "answer": [...]}`: one answer for each annotator; the most frequent is taken, the first
    listed of equally frequent ones."""
    question, answers = record.get("question"), record.get("answer")
    if not isinstance(question, str):
        raise UserError(f"question is a JSON {json_kind(question)}, expected text (coco_vqa)")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        found = json.dumps(answers, ensure_ascii=False)[:80]
        raise UserError(f"answer is {found}, expected a text or a list of texts (coco_vqa)")
    return [("user", (PLACE, "\n" + question)), ("assistant", (Counter(answers).most_common(1)[0][0],))]


DIALECTS = (
    Dialect("conversations", "[[question, answer], ...] or [{'from', 'value'}, ...]", _read_conversations),
    Dialect("messages", "[{'role', 'content'}, ...]", _read_messages),
    Dialect("query", "with 'response' and perhaps 'history'", _read_query),
)
FORM_READERS: dict[str, Callable[[Record], list[Turn]]] = {
    "coco_caption": _read_caption,
    "vg_caption": _read_caption,
    "coco_vqa": _read_vqa,
}
