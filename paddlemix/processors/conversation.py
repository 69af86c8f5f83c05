"""Conversation templates as data, and their rendering to pieces.

`render` turns messages into text pieces, special tokens and images, each marked as trained or not; it never tokenises
and nothing parses what it made.  What is trained is by construction every answer and the token that ends it.

Source of names, system texts and separators: haotian-liu/LLaVA llava/conversation.py (commit c121f04).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from paddlemix.errors import UserError, did_you_mean
from paddlemix.sample import IMAGE_TOKEN, Message

PieceKind = Literal["text", "special", "image"]


@dataclass(frozen=True)
class Piece:
    """A stretch of the rendered conversation.

    Args:
        kind: "text", a "special" token (an id of its own where the vocabulary has it), or an "image".
        text: the text or the special token; "<image>" for an image.
        supervised: whether its tokens are trained.
        image: index into `Sample.images` for an image, else None.
    """

    kind: PieceKind
    text: str
    supervised: bool = False
    image: int | None = None


@dataclass(frozen=True, kw_only=True)
class Template:
    """One way to write a conversation down.

    Args:
        name: the key users give in JSON or with `--conv-mode`.
        style: the rendering rule, a key of `_STYLES`.
        system: the text before the first turn; "" for none.
        roles: what stands before a user's and an assistant's turn.
        separator: what ends a turn, or a user's turn where `end` differs.
        end: what ends an answer; trained.
        stop: texts that end generation besides the end-of-sequence token.
    """

    name: str
    style: str
    system: str = ""
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    separator: str = " "
    end: str = "</s>"
    stop: tuple[str, ...] = ()


_SYSTEM_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_SYSTEM_HUMAN = _SYSTEM_USER.replace("curious user", "curious human").replace("the user's", "the human's")

_TEMPLATES = (
    Template(name="vicuna_v1", style="two", system=_SYSTEM_USER),
    Template(name="llava_v1", style="two", system=_SYSTEM_HUMAN),
    Template(name="plain", style="plain", roles=("", ""), separator="\n", end="\n"),
)
_ALIASES = {"v1": "vicuna_v1", "v0_plain": "plain"}
TEMPLATES = {template.name: template for template in _TEMPLATES}


def template_names() -> list[str]:
    """Every name that `get_template` takes."""
    return sorted([*TEMPLATES, *_ALIASES])


def get_template(name: str) -> Template:
    """Looks a template up.

    Raises:
        UserError: no template has this name; lists those that exist.
    """
    template = TEMPLATES.get(_ALIASES.get(name, name))
    if template is None:
        names = template_names()
        raise UserError(f"conversation template '{name}' is not one of {', '.join(names)}{did_you_mean(name, names)}")
    return template


def render(template: Template, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Piece]:
    """Writes a conversation down as pieces.

    Args:
        template: the way to write it.
        messages: an optional system turn, then user and assistant in turn, beginning with the user.
        add_generation_prompt: end with the opening of an assistant's turn; the last message is then the user's.

    Returns:
        Pieces in order, neighbouring unsupervised texts joined.  BOS is not among them.

    Raises:
        UserError: the roles do not alternate, an image stands outside a user's turn, or the template cannot write such
            a conversation.
    """
    for message in messages:
        if message.role != "user" and message.image_indices:
            raise UserError(f"an image stands in a turn of the {message.role}; only a user's turn can show one")
    system, turns = _split_system(template, messages)
    _check_order(turns, add_generation_prompt)
    return _join(_STYLES[template.style](template, system, turns, add_generation_prompt))


def prompt_text(pieces: Sequence[Piece]) -> str:
    """The rendered text for people to read, `<image>` where an image stands."""
    return "".join(piece.text for piece in pieces)


def _split_system(template: Template, messages: Sequence[Message]) -> tuple[str, list[Message]]:
    if messages and messages[0].role == "system":
        return messages[0].text, list(messages[1:])
    return template.system, list(messages)


def _check_order(turns: Sequence[Message], add_generation_prompt: bool) -> None:
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            raise UserError(
                f"turn {number + 1} is by the {message.role}, expected the {expected}: turns alternate user, assistant"
            )
    last = "user" if add_generation_prompt else "assistant"
    if not turns or turns[-1].role != last:
        found = f"ends with a turn of the {turns[-1].role}" if turns else "is empty"
        raise UserError(f"the conversation {found}; its last turn must be by the {last}")


def _content(message: Message) -> list[Piece]:
    """Pieces of a user's turn.  A single image moves to the front, followed by a line break, and the text loses outer
    white space, as the reference's preprocess_multimodal does; several images stay where they are."""
    images = message.image_indices
    if len(images) == 1:
        pieces = [_image(images[0])]
        text = message.text.strip()
        return [*pieces, Piece("text", "\n" + text)] if text else pieces
    return [_image(part) if isinstance(part, int) else Piece("text", part) for part in message.content]


def _image(index: int) -> Piece:
    return Piece("image", IMAGE_TOKEN, image=index)


def _render_two(template: Template, system: str, turns: Sequence[Message], open_turn: bool) -> list[Piece]:
    """`system USER: q ASSISTANT: a</s>USER: ...`"""
    user, assistant = template.roles
    pieces = [Piece("text", system + template.separator if system else "")]
    for message in turns:
        if message.role == "user":
            pieces += [Piece("text", f"{user}: "), *_content(message), Piece("text", template.separator)]
        else:
            pieces += [
                Piece("text", f"{assistant}:"),
                Piece("text", f" {message.text}", supervised=True),
                Piece("special", template.end, supervised=True),
            ]
    return [*pieces, Piece("text", f"{assistant}:")] if open_turn else pieces


def _render_plain(template: Template, system: str, turns: Sequence[Message], open_turn: bool) -> list[Piece]:
    """`<image>caption\\n`: projector pretraining; the user's words are replaced by the image."""
    images = turns[0].image_indices
    if len(turns) > 2 or len(images) != 1:
        raise UserError(
            f"template '{template.name}' takes one image and one caption, got {len(images)} images and "
            f"{(len(turns) + 1) // 2} question-answer pairs; use vicuna_v1 for conversations"
        )
    pieces = [_image(images[0])]
    return pieces if open_turn else [*pieces, Piece("text", turns[1].text + template.end, supervised=True)]


_STYLES: dict[str, Callable[[Template, str, Sequence[Message], bool], list[Piece]]] = {
    "two": _render_two,
    "plain": _render_plain,
}


def _join(pieces: Sequence[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if piece.kind == "text" and not piece.text:
            continue
        previous = joined[-1] if joined else None
        same = previous and previous.kind == piece.kind == "text" and previous.supervised == piece.supervised
        if previous and same:
            joined[-1] = Piece("text", previous.text + piece.text, piece.supervised)
        else:
            joined.append(piece)
    return joined
