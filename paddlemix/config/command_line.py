"""The command line of a training command, and the text of its `--help`.

Knows the keys, not their meaning: values stay text, `load_config` reads and checks them.
"""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from paddlemix.config.foreign.names import foreign_key, keys_meant
from paddlemix.config.keys import KeySpec
from paddlemix.config.schema import SPECS
from paddlemix.config.values import parse_any
from paddlemix.errors import UserError, cut, did_you_mean
from paddlemix.paths import user_path

# `key=value`; a path has a slash or a dot before any equals sign.
_ASSIGNMENT = re.compile(r"\w+=")
_BOOLEAN_WORDS = ("true", "false", "0", "1")
_TYPE_NAMES = {
    "bool": "true or false",
    "int": "whole number",
    "float": "number",
    "str": "text",
    "list[str]": "list of texts",
    "list": "list",
    "dict": "object",
}
_WIDTH = 100
_MOST_DIGITS = 6  # of a number of devices


def split_dry_run(argv: list[str]) -> tuple[list[str], bool, int | None]:
    """Takes `--dry-run`, and a `--devices N` with it, out of a command line.

    Returns:
        The other arguments; whether the run is a dry one; N, None if it is not given.

    Raises:
        UserError: N is missing or is not a number of devices.
    """
    if "--dry-run" not in argv and "--dry_run" not in argv:
        return argv, False, None
    # Taken out before keys are parsed: it is not a key, and no file can set it.
    rest = [item for item in argv if item not in ("--dry-run", "--dry_run")]
    place = next((number for number, item in enumerate(rest) if item.partition("=")[0] == "--devices"), None)
    if place is None:
        return rest, True, None
    flag, equals, text = rest.pop(place).partition("=")
    # the flag was just removed, so its value has moved to the flag's own place
    if not equals:
        text = rest.pop(place) if place < len(rest) else ""
    # the length is checked before `int`, which raises on a text of more than 4,300 digits
    if not text.isdecimal() or len(text) > _MOST_DIGITS or int(text) < 1:
        raise UserError(f"command line: {flag} '{cut(text, 40)}' is not a number of devices; give 1 or more")
    return rest, True, int(text)


@dataclass(frozen=True)
class Fault:
    """Something wrong with a command line.

    Args:
        message: what, and what to do.
        keys: of ours that are not reported as missing, since this would have set them.
    """

    message: str
    keys: frozenset[str] = frozenset()


def parse_command_line(
    argv: list[str], prog: str, description: str, faults: list[Fault] | None = None
) -> tuple[Path | None, list[str]]:
    """The configuration file and the keys that a command line names.

    Args:
        argv: the arguments without the program's name: at most one file, `key=value`, `--key value`, `--key=value`;
            `--key` alone for true, `--key a b c` for a list of texts; a dash in a key counts as an underscore.
        prog: the command as the user types it.
        description: what it does, one sentence.
        faults: receives a second file, unknown flags and flags without a value, for `load_config` to report together
            with all other faults; None raises them.

    Returns:
        The file (None if flags set everything) and "key=value" texts in the order given.

    Raises:
        UserError: nothing given; without `faults`, everything it would receive.
        SystemExit: with status 0, after printing the help that `-h` or `--help` asked for.
    """
    # before anything is parsed: help is wanted most when the rest of the line is wrong
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(_format_usage(prog, description) + "\n\n" + format_help() + "\n")
        raise SystemExit(0)
    path: Path | None = None
    overrides: list[str] = []
    found: list[Fault] = []
    rest = list(argv)
    # what an item is, in this order:
    #   --name ...   a flag; it takes its values off the front of `rest`
    #   word=...     a key; `runs/a=b.json` and `./a=b.json` do not begin with a word and =, so they are files
    #   first other  the configuration file
    #   any further  a fault
    while rest:
        item = rest.pop(0)
        if item.startswith("--"):
            # A flag may take several of the following words, so it removes them itself.
            taken = _take_flag(item[2:], rest, path is None)
            if isinstance(taken, Fault):
                found.append(taken)
            else:
                overrides.append(taken)
        elif _ASSIGNMENT.match(item):
            overrides.append(item)
        elif path is None:
            path = user_path(item, "the configuration file")
        else:
            found.append(Fault(f"'{item}' is a second file after '{path}'; give one, and keys as key=value"))
    if path is None and not overrides and not found:
        raise UserError(f"{prog}: name a configuration file (CONFIG.json); `{prog} --help` lists its keys")
    if faults is not None:
        faults += found
    elif found:
        raise UserError("\n".join(f"command line: {fault.message}" for fault in found))
    return path, overrides


def format_help() -> str:
    """Every key by group: type, default, unit, range or choices, and its purpose."""
    blocks = []
    for group, specs in groupby(SPECS.values(), key=lambda spec: spec.group):
        title = f"{group} (accepted, without effect)" if group == "compatibility" else group
        blocks.append("\n".join([title, *(line for spec in specs for line in _format_key(spec))]))
    return "\n\n".join(blocks)


def _format_usage(prog: str, description: str) -> str:
    return (
        f"usage: {prog} CONFIG.json [key=value ...]\n\n{description}\n\n"
        "CONFIG.json holds one object with the keys below; key=value and --key value after it override the file.\n"
        "--dry-run does not train: it prints parameters, steps, token statistics and the memory of each device;\n"
        "with --devices N: as if N devices shared the data."
    )


def _format_key(spec: KeySpec) -> Iterator[str]:
    kinds = " or ".join(_TYPE_NAMES[kind] for kind in spec.kinds if kind != "None")
    facts = [kinds + (f", {spec.unit}" if spec.unit else ""), f"default {json.dumps(spec.default)}"]
    if spec.choices:
        facts.append("one of " + ", ".join(choice or '""' for choice in spec.choices))
    facts += [f"{side} {bound}" for side, bound in (("min", spec.min), ("max", spec.max)) if bound is not None]
    if spec.status == "ignored" and spec.group != "compatibility":
        facts.append("without effect")
    yield from textwrap.wrap(f"{spec.name}: {'; '.join(facts)}", _WIDTH, initial_indent="  ", subsequent_indent=" " * 6)
    yield from textwrap.wrap(spec.help, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _take_flag(flag: str, rest: list[str], may_be_file: bool) -> str | Fault:
    """One `--flag` as "key=value", or what is wrong with it; takes its values off the front of `rest`.

    Args:
        may_be_file: whether no configuration file was named yet: see `_values_of_unknown`.
    """
    name, equals, text = flag.partition("=")
    name = name.replace("-", "_")
    # The values of an unknown flag are taken too: as words of their own each would be reported as a second file.
    # A flag without any is a switch of that program, so its answer is looked up for true.
    if name not in SPECS:
        given = text if equals else " ".join(_values_of_unknown(name, rest, may_be_file)) or "true"
        foreign = foreign_key(name, parse_any(given), on_command_line=True)
        message = foreign or f"--{flag} is not a known key{did_you_mean(name, SPECS)}"
        return Fault(message, frozenset(keys_meant(name)))
    if equals:
        return f"{name}={text}"
    kinds = SPECS[name].kinds
    # `--bf16` alone is true, `--bf16 false` is false; any other word belongs to what follows.
    if "bool" in kinds:
        return f"{name}={rest.pop(0) if rest and rest[0].lower() in _BOOLEAN_WORDS else 'true'}"
    values = _take_values(rest, 1 if "list[str]" not in kinds else len(rest))
    if not values:
        return Fault(f"--{name} needs a value after it", frozenset([name]))
    # several words become one JSON text; a list that is written as JSON already stays as it is
    if "list[str]" in kinds and not values[0].startswith("["):
        return f"{name}={json.dumps(values, ensure_ascii=False)}"
    return f"{name}={values[0]}"


def _values_of_unknown(name: str, rest: list[str], may_be_file: bool) -> list[str]:
    """The words that a flag which is not ours takes off `rest`: all but the configuration file, where that is next.

    A `.json` after a name that nobody has is the configuration file, whether it exists or not; after another program's
    switch, or after such a flag's first word, only if it exists: `--fsdp_config fsdp.json` has a file of its own.
    """
    # first word after the flag                                         what the flag takes
    #   a .json, and no program of the tables has the flag              nothing
    #   a .json that exists, and the flag has no counterpart of ours    nothing
    #   anything else, the configuration file already named             all words up to the next flag
    #   anything else, the flag's counterpart is `dataset`              all words: its .json files are data
    #   anything else                                                   words up to the first .json that exists
    meant = keys_meant(name)
    first = rest[0] if rest and may_be_file and not meant else ""
    if first.endswith(".json") and (os.path.isfile(first) or not foreign_key(name, first)):
        return []
    recipe = next((place for place, item in enumerate(rest) if place and _is_recipe(item)), len(rest))
    return _take_values(rest, recipe if may_be_file and "dataset" not in meant else len(rest), True)


def _is_recipe(item: str) -> bool:
    return item.endswith(".json") and os.path.isfile(item)


def _take_values(rest: list[str], most: int, of_unknown: bool = False) -> list[str]:
    """The next items up to the next flag or `key=value`, of a known key or of any; they are taken off `rest`.

    A word that is a key's name, as the last one of `--finetuning_type lora` is, is a value.
    """
    values: list[str] = []
    while rest and len(values) < most and not rest[0].startswith("--"):
        # `a=b` ends the values of a known flag only where `a` is a key: texts and patterns may contain = too.
        # A single dash does not end them, so negative numbers are values.
        name, equals, _ = rest[0].partition("=")
        # `--finetuning_type lora lora_rank=4`: the second one is an assignment, the first a value.
        if equals and (name in SPECS or (of_unknown and _ASSIGNMENT.match(rest[0]))):
            break
        values.append(rest.pop(0))
    return values
