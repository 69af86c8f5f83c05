"""A `chat_template` value -> Template: a known name, or the path of a PaddleNLP `chat_template.json`.

PaddleMIX renders a record with that file and then parses the text again for the words USER and ASSISTANT, so whatever
the file spells, a sample is meant to come out as `vicuna_v1`.  Here it does, for every spelling of those roles.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from paddlemix.errors import MissingFileError, UserError
from paddlemix.processors.templates import TEMPLATES, Template, get_template

_USER = re.compile(r"\s*USER:?\s*\{\{\s*user\s*\}\}\s*")
_ASSISTANT = re.compile(r"\s*ASSISTANT:?\s*\{\{\s*bot\s*\}\}\s*(</s>)?\s*")


def resolve_template(value: str) -> Template:
    """Looks up a template name, or reads a `chat_template.json`.

    Args:
        value: a name such as "vicuna_v1", or a path ending in ".json".

    Raises:
        MissingFileError: the file does not exist.
        UserError: no template has this name, or the file's roles are not USER and ASSISTANT.
    """
    if not value.endswith(".json"):
        return get_template(value)
    path = Path(value)
    if not path.is_file():
        raise MissingFileError(f"chat_template '{value}' does not exist (looked from {Path.cwd()})")
    try:
        user, assistant = json.loads(path.read_text(encoding="utf-8"))["conversation"]
        known = _USER.fullmatch(user) and _ASSISTANT.fullmatch(assistant)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"chat_template '{value}' has no \"conversation\": [user, assistant]: {error}") from error
    if known:
        return TEMPLATES["vicuna_v1"]
    raise UserError(
        f"chat_template '{value}' has the roles {user!r} and {assistant!r}; only USER and ASSISTANT files are read, "
        f"use a template name instead: {', '.join(sorted(TEMPLATES))}"
    )
