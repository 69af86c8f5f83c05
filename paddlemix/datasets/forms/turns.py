"""What all forms of records share: roles, turns, what is refused in a turn, and where a record's own images are placed.

Opens no image and knows no template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from paddlemix.datasets.forms.image_keys import PLACE, PlacedImage, image_addresses
from paddlemix.datasets.forms.image_markers import place_tokens, split_text
from paddlemix.errors import UserError
from paddlemix.sample import Role

Record = Mapping[str, Any]
Turn = tuple[Role, tuple[str | PlacedImage, ...]]

# roles as OpenAI, LLaVA and ShareGPT write them -> ours
_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


TOOLS = "tool calls are not trained here; remove the record"
_UNTRAINED = "every answer is trained; split the record, so that it ends before this turn"
# What would change a turn's meaning if it were ignored.
_REFUSED_TURN_KEYS = dict.fromkeys(("tool_calls", "function_call"), TOOLS)
_REFUSED_ROLES = dict.fromkeys(
    ("tool", "function", "function_call", "tool_call", "tool_response", "observation"), TOOLS
)


def text_content(role: Role, text: str) -> tuple[str | PlacedImage, ...]:
    """The content of a turn that is a text; in a user's, each picture that it names becomes a place."""
    return split_text(text) if role == "user" else (text,)


def role_of(name: Any, where: str) -> Role:
    """Our name of a role.

    Args:
        name: as the record has it.
        where: begins the error, "turn 2: from=".

    Raises:
        UserError: it is not known, or belongs to tool calls.
    """
    role = _ROLES.get(str(name))
    if role is None:
        reason = _REFUSED_ROLES.get(str(name))
        detail = f" is not supported: {reason}" if reason else f" is not one of {', '.join(_ROLES)}"
        raise UserError(f"{where}'{name}'{detail}")
    return role


def check_turn(turn: Mapping[str, Any], number: int) -> None:
    """Refuses a turn with tool calls, or an answer that is not to be trained.

    Args:
        turn: an object of `conversations` or `messages`.
        number: its place, from 1, for the error.

    Raises:
        UserError: it is refused.
    """
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


def images_first(record: Record, turns: list[Turn]) -> list[Turn]:
    """The turns with the record's images in their places, by ms-swift's rule."""
    # a text or a part places an image           -> the places decide
    # other programs' tokens, one for each image -> the tokens decide
    # neither                                    -> all images before the first question
    turns = images_at_tokens(record, turns)
    placed = any(isinstance(piece, PlacedImage) for _, content in turns for piece in content)
    count = 0 if placed else len(image_addresses(record))
    first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
    if not count or first is None:
        return turns
    return [*turns[:first], ("user", (PLACE,) * count + turns[first][1]), *turns[first + 1 :]]


def images_at_tokens(record: Record, turns: list[Turn]) -> list[Turn]:
    """The turns with a place at each image token of another program, if there are as many tokens as images and no other
    place."""
    if any(isinstance(piece, PlacedImage) for _, content in turns for piece in content):
        return turns
    users = [number for number, (role, _) in enumerate(turns) if role == "user"]
    contents = place_tokens([turns[number][1] for number in users], len(image_addresses(record)))
    placed = dict(zip(users, contents, strict=True)) if contents is not None else {}
    return [(role, placed.get(number, content)) for number, (role, content) in enumerate(turns)]
