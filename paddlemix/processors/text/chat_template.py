"""A `chat_template` value -> Template: a known name, a PaddleNLP `chat_template.json`, or what a checkpoint stores.

    {"system": "Be brief.\\n", "conversation": ["Q: {{user}}\\n", "A: {{bot}}</s>\\n"], "query": "Q: {{query}}\\nA: "}

PaddleMIX renders a record with such a file and then parses the text again for the words USER and ASSISTANT, so a file
with those roles is meant to come out as `vicuna_v1`, however it spells them.  Any other file is a template of its own:
trained are each answer and what follows it up to the first special token, or all that follows where there is none.

Source: PaddleNLP paddlenlp/transformers/tokenizer_utils.py, ChatTemplate (3.0.0b4).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from paddlemix.errors import MissingFileError, UserError, did_you_mean
from paddlemix.json_files import parse_json, read_text
from paddlemix.processors.text.known_templates import TEMPLATES, choose_template, get_template
from paddlemix.processors.text.template import CONTENT, IMAGE, SPECIAL_TOKENS, SYSTEM, Template

_USER = re.compile(r"\s*USER:?\s*\{\{\s*user\s*\}\}\s*")
_ASSISTANT = re.compile(r"\s*ASSISTANT:?\s*\{\{\s*bot\s*\}\}\s*(</s>)?\s*")
_KEYS = ("system", "conversation", "query")
_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_JINJA = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}|\{\{|\{%|\{#", re.DOTALL)
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))


def resolve_template(value: str, own: Template | None = None) -> Template:
    """Looks up a template name, or reads a `chat_template.json`.

    Args:
        value: a name such as "vicuna_v1", or a path ending in ".json".
        own: the template of the model that it is for, see `choose_template`.

    Returns:
        `vicuna_v1` for a file with the roles USER and ASSISTANT, whose own system text counts as little as in
        PaddleMIX.

    Raises:
        MissingFileError: the file does not exist or cannot be read.
        UserError: no template has this name, or the file is not a chat template: a key or a placeholder is unknown, an
            answer has no end, or its `query` opens an answer otherwise than its `conversation`.
    """
    if not value.endswith(".json"):
        return choose_template(value, own)
    path = Path(value)
    if not path.is_file():
        raise MissingFileError(f"chat_template '{value}' does not exist (looked from {Path.cwd()})")
    try:
        content = parse_json(read_text(path), repeats=True)
    except MissingFileError:
        raise
    except ValueError as error:  # of the text, of JSON, or what a declared file may not be
        raise UserError(f"chat_template '{value}' is not JSON in UTF-8: {error}") from error
    try:
        return _file_template(content, path.name)
    except UserError as error:
        raise UserError(f"chat_template '{value}': {error}") from error


def _file_template(content: Any, name: str) -> Template:
    turns = content.get("conversation") if isinstance(content, dict) else None
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(text, str) for text in turns):
        raise UserError('it has no "conversation": [user, assistant], two texts')
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        raise UserError(f"the key '{unknown[0]}' is not one of {', '.join(_KEYS)}{did_you_mean(unknown[0], _KEYS)}")
    # roles USER and ASSISTANT -> vicuna_v1, which such files are meant to be
    # anything else            -> a template of its own, taken literally
    if _USER.fullmatch(turns[0]) and _ASSISTANT.fullmatch(turns[1]):
        return TEMPLATES["vicuna_v1"]
    before, after = _split(turns[0], "user", '"conversation"[0]')
    opening, ending = _split(turns[1], "bot", '"conversation"[1]')
    _check_query(content.get("query"), before, after + opening)
    system, first_user = _system(content.get("system") or "")
    # one space before an answer belongs to its first word, as in "ASSISTANT: yes"
    # tokenizers join a space to the word after it: "ASSISTANT:" + " yes", never "ASSISTANT: " + "yes"
    space = " " * (opening or after).endswith(" ")
    after, opening = (after, opening.removesuffix(" ")) if opening else (after.removesuffix(" "), "")
    end = _SPECIAL.search(ending)
    # the end is the first special token; what follows it is written and not trained
    tail, end_text, rest = ("", ending, "") if end is None else (ending[: end.start()], end[0], ending[end.end() :])
    if not end_text.strip():
        raise UserError(
            f"{json.dumps(ending)} follows {{{{bot}}}}, so nothing would end an answer; write {{{{bot}}}}</s> or "
            "another end"
        )
    return read_template(
        {
            "name": name,
            "system": system,
            "first_user": first_user + before + CONTENT + after,
            "user": before + CONTENT + after,
            "assistant": opening,
            "answer": space + CONTENT + tail,
            "end": end_text,
            "after_answer": rest,
        }
    )


def _split(text: str, name: str, where: str) -> tuple[str, str]:
    """What precedes and what follows the one placeholder of a text."""
    found = _JINJA.findall(text)
    for placeholder in found:
        match = _PLACEHOLDER.fullmatch(placeholder)
        if match is None or match[1] != name:
            raise UserError(f"{where} has {placeholder}; only {{{{{name}}}}} is allowed there")
    if len(found) != 1:
        raise UserError(f"{where} has {{{{{name}}}}} {len(found)} times, expected once")
    before, after = text.split(found[0])
    return before, after


def _system(text: Any) -> tuple[str, str]:
    """A template's own system text, and how any system text is written before the first question."""
    if not isinstance(text, str):
        raise UserError(f'"system" is {json.dumps(text)[:80]}, expected text')
    if not _JINJA.search(text):
        return text, SYSTEM
    # a text with a placeholder is a frame for the user's system text, a text without one is itself the system text
    before, after = _split(text, "system", '"system"')
    return "", before + SYSTEM + after


def _check_query(query: Any, before: str, after: str) -> None:
    if query is None:
        return
    if not isinstance(query, str):
        raise UserError(f'"query" is {json.dumps(query)[:80]}, expected text')
    start, end = _split(query, "query", '"query"')
    # prompts would differ from what was trained, in a way that only the quality of answers shows
    if (start, end.rstrip()) != (before, after.rstrip()):
        expected = json.dumps(before + "{{query}}" + after, ensure_ascii=False)
        raise UserError(
            f'"query" is {json.dumps(query, ensure_ascii=False)}, but "conversation" opens an answer with {expected}; '
            'remove "query", or write the same'
        )


def template_value(template: Template) -> str | dict[str, Any]:
    """What a checkpoint stores: the name of a known template, the fields of any other."""
    # a known template by its name alone; one that was changed under a known name by all its fields
    if TEMPLATES.get(template.name) == template:
        return template.name
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(template).items()}
    return {field.name: values[field.name] for field in fields(Template) if values[field.name] != field.default}


def read_template(value: Any) -> Template:
    """The reverse of `template_value`.

    Raises:
        UserError: an unknown name or field, a field of the wrong type, or a text without its placeholder.
    """
    # name   -> a known template
    # fields -> a template of its own
    if isinstance(value, str):
        return get_template(value)
    if not isinstance(value, dict):
        raise UserError(f"chat_template is {json.dumps(value)[:80]}, expected a template's name or its fields")
    # unknown fields are refused: a misspelt "after_answer" would silently change every turn
    known = {field.name: field.default for field in fields(Template)}
    for key, item in value.items():
        if key not in known:
            raise UserError(f"chat_template has the field '{key}', allowed: {', '.join(known)}")
        fits = {"stop": _is_texts, "captions": lambda item: isinstance(item, bool)}.get(key, _is_text)(item)
        if not fits:
            raise UserError(f"chat_template.{key} is {json.dumps(item)[:80]}, which is of the wrong type")
    missing = [key for key in ("name", "user", "assistant", "end") if key not in value]
    if missing:
        raise UserError(f"chat_template lacks {', '.join(missing)}")
    template = Template(**{**value, "stop": tuple(value.get("stop", ()))})
    _check_placeholders(template)
    return template


def _is_text(item: Any) -> bool:
    return isinstance(item, str)


def _is_texts(item: Any) -> bool:
    return isinstance(item, list) and all(map(_is_text, item))


def _check_placeholders(template: Template) -> None:
    # a caption template has no words of the user
    rules = [("answer", CONTENT), ("image", IMAGE)]
    if not template.captions:
        rules += [("user", CONTENT), *([("first_user", CONTENT)] if template.first_user else [])]
    for key, placeholder in rules:
        count = getattr(template, key).count(placeholder)
        if count != 1:
            raise UserError(f"the template's text {key} has {placeholder} {count} times, expected once")
