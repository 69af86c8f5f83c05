"""What a line of the tables of other programs' names is, and how it is put into words.

Knows no name.  The tables are data in `keys.py`, `toolchain_keys.py` and `templates.py`;
`names.py` looks names up in them.
"""

from __future__ import annotations

import fnmatch
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from paddlemix.errors import cut

# A list of files may be long; the message stays readable.
_SHOWN = 300  # characters of a value that is written back
# Not a brace: the text around it is JSON.
VALUE = "$"  # in a `write`: the value that was given, as JSON


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is written here in place of another program's key.

    Args:
        write: our keys as JSON without braces, `$` for the value given: '"lora_rank": $'.
        values: shell pattern of a value -> what to write for it, "" for "leave it out"; before `write`.  A value that
            is not text is compared as JSON ("true", "4").
        says: a remark; the whole answer where there is nothing to write.
        otherwise: the remark where no value of `values` was given.
    """

    write: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    says: str = ""
    otherwise: str = ""


def same(key: str, says: str = "") -> Answer:
    """Our key of another name that accepts the same values."""
    return Answer(write=f'"{key}": {VALUE}', says=says)


def policy(part: str, frozen_when: bool = True, says: str = "") -> Answer:
    """A switch that freezes a part of the model, or trains it."""
    # `frozen_when`: LLaVA's unfreeze_mm_vision_tower has the opposite sense of the freeze_* switches
    frozen, full = f'"{part}": "frozen"', f'"{part}": "full"'
    values = {"true": frozen, "false": full} if frozen_when else {"true": full, "false": frozen}
    return Answer(values=values, says=says)


def switch(true: str, false: str = "", says: str = "") -> Answer:
    """A switch whose two states are written as other keys."""
    # false is "" by default: a switch that is off asks for nothing, so it is left out
    return Answer(values={"true": true, "false": false}, says=says)


def says(text: str) -> Answer:
    """Nothing to write: one sentence."""
    return Answer(says=text)


def each(names: str, answer: Answer) -> dict[str, Answer]:
    """The same answer for several names, which are separated by spaces."""
    return dict.fromkeys(names.split(), answer)


def of_programs(programs: list[str]) -> str:
    """Whose a name is: "LLaVA's", "transformers' and ms-swift's"."""
    owners = [f"{program}'" if program.endswith("s") else f"{program}'s" for program in programs]
    return " and ".join([", ".join(owners[:-1]), owners[-1]] if len(owners) > 1 else owners)


def explain(answer: Answer, value: object, on_command_line: bool = False) -> str:
    """An answer in words.

    Args:
        answer: of the table.
        value: what was given for the name; JSON values.
        on_command_line: whether to write `key=value` for a shell, else a line of a JSON file.

    Returns:
        E.g. 'write "lora": true' or "leave it out".
    """
    # `chosen`  what the message says
    #   None      the values that the table knows, since this one is not among them
    #   ""        leave it out
    #   text      what to write
    chosen, remark = choose(answer, value), answer.says
    # The value is none of those listed: all cases are shown, so that the reader can pick one.
    if chosen is None:
        words, remark = _cases(answer, on_command_line), answer.otherwise or answer.says
    else:
        words = f"write {_spell(chosen, value, on_command_line)}" if chosen else "leave it out"
    return f"{words} ({remark})" if words and remark else words or remark


def _cases(answer: Answer, on_command_line: bool) -> str:
    """What to write for each value that an answer knows."""
    written = [
        f"{_spell(text, None, on_command_line)} for {case}" for case, text in answer.values.items() if text and case
    ]
    dropped = [case for case, text in answer.values.items() if not text and case]
    parts = [f"write {', '.join(written)}"] if written else []
    return ", ".join([*parts, f"leave it out for {', '.join(dropped)}"] if dropped else parts)


def keys_written(answer: Answer) -> set[str]:
    """The keys of ours that an answer names."""
    # parsed with null as the value: only the names are wanted
    return {key for text in (answer.write, *answer.values.values()) for key in _parsed(text, None)}


def explain_flag(answer: Answer, value: str | None) -> str:
    """As `explain`, of a flag: what is written are flags of ours, the value is text, None where there is none."""
    chosen, remark = choose(answer, "" if value is None else value), answer.says
    if chosen is None:
        words = ", ".join(f"{text} for {case}" for case, text in answer.values.items() if text and case)
        words, remark = f"write {words}" if words else "", answer.otherwise or answer.says
    else:
        # Pasted into a shell as it is shown.
        written = chosen.replace(VALUE, "..." if value is None else shlex.quote(value))
        words = f"write {written}" if chosen else "leave it out"
    return f"{words} ({remark})" if words and remark else words or remark


def choose(answer: Answer, value: object) -> str | None:
    """What to write for a value; "" to leave the name out, None where the answer does not say for this value."""
    # true and "true", 4 and "4" are the same here: a shell script cannot tell them apart
    text = value if isinstance(value, str) else json.dumps(value)
    # the first pattern that matches: "*zero2*offload*" comes before "*zero2*" in the tables
    for pattern, written in answer.values.items():
        # Lower case on both sides: shells and YAML write True, true and TRUE.
        if fnmatch.fnmatchcase(text.lower(), pattern.lower()):
            return written
    return answer.write or None


def knows_value(answer: Answer, value: object) -> bool:
    """Whether a value is one of those that an answer lists, not only let through by it."""
    # Without `write`, which accepts every value.
    return choose(replace(answer, write=""), value) is not None


def _spell(written: str, value: object, on_command_line: bool) -> str:
    if not on_command_line:
        return written.replace(VALUE, cut(json.dumps(value, ensure_ascii=False), _SHOWN))
    # key=value takes plain text without JSON's quotes; the shell's own quoting is added instead
    pairs = _parsed(written, value).items()
    return " ".join(
        shlex.quote(f"{key}={item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)}")
        for key, item in pairs
    )


def _parsed(written: str, value: object) -> dict[str, Any]:
    # Entries are stored as JSON without braces, so they are valid by construction.
    found: dict[str, Any] = json.loads("{" + written.replace(VALUE, json.dumps(value)) + "}")
    return found
