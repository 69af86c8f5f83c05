"""The arguments of a command: argparse, but all faults are reported at once, and another program's flag with ours.

A dash and an underscore in a flag are the same.  Flags are not abbreviated: `--model` is ms-swift's, not the beginning
of `--model-path`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from paddlemix.config.foreign.flags import FOREIGN_WORDS, SWITCHES, WORD_LISTS, foreign_flag
from paddlemix.errors import UserError, did_you_mean


class _Refused(Exception):
    """The error with which argparse would end the process."""


class CommandParser(argparse.ArgumentParser):
    """A parser whose `parse_args` raises all faults of a command line as one `UserError`.

    Args:
        command: as `paddlemix --help` lists it.
        doc: of the command's module; its first line is shown by `--help`.
    """

    def __init__(self, command: str, doc: str | None) -> None:
        super().__init__(description=next(iter((doc or "").splitlines()), ""), allow_abbrev=False, exit_on_error=False)
        self._command = command

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's.

        Raises:
            UserError: unknown flags, missing ones and wrong values, one per line.
            SystemExit: with status 0, after the help.
        """
        argv, faults = self._separate(list(sys.argv[1:] if args is None else args))
        # argparse would stop at the first missing flag.
        required = [action for action in self._actions if action.required]
        for action in required:  # so that a missing flag hides no other fault
            action.required = False
        try:
            found, more, wrong = self._parse_known(argv, namespace)
        finally:
            for action in required:
                action.required = True
        faults += more
        # if a word without a flag was wrong, nothing was parsed that could say what is missing
        missing = [_name(action) for action in required if found and getattr(found, action.dest, None) is None]
        said = "\n".join(faults)
        missing = [name for name in missing if name not in wrong and f"write {name} " not in said]
        if missing:
            faults.append(f"{', '.join(missing)} must be given")
        if faults:
            raise UserError("\n".join([*dict.fromkeys(faults), f"`{self.prog} --help` lists the arguments"]))
        return found

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print."""
        raise _Refused(message)

    def _separate(self, argv: list[str]) -> tuple[list[str], list[str]]:
        """Removes unknown flags and their values from a command line.

        Returns:
            The rest, with flags in our spelling; a fault for each unknown one.
        """
        known: list[str] = []
        faults: list[str] = []
        has_words = any(not action.option_strings for action in self._actions)
        while argv:
            item = argv.pop(0)
            flag, equals, text = item.partition("=")
            option = self._spelt_here(flag) if item.startswith("--") else item
            if option is not None:
                known.append(option + equals + text if item.startswith("--") else item)
                continue
            name = flag[2:].replace("-", "_")
            most = len(argv) if name in WORD_LISTS else 1
            # An unknown flag's values go with it; otherwise they would be reported as stray words.
            if equals or name in SWITCHES or (has_words and not foreign_flag(self._command, name, None)):
                most = 0
            words = _take_words(argv, most)
            faults.append(self._unknown(flag, name, text if equals else " ".join(words) if words else None))
        return known, faults

    def _unknown(self, flag: str, name: str, value: str | None) -> str:
        foreign = foreign_flag(self._command, name, value)
        options = [option for action in self._actions for option in action.option_strings]
        return f"{flag} is {foreign}" if foreign else f"{flag} is not a known flag{did_you_mean(flag, options)}"

    def _spelt_here(self, flag: str) -> str | None:
        """A flag of ours as declared, whether dash or underscore was written; None for an unknown one."""
        options = (option for action in self._actions for option in action.option_strings)
        return next((option for option in options if option.replace("_", "-") == flag.replace("_", "-")), None)

    def _parse_known(self, argv: list[str], namespace: Any) -> tuple[Any, list[str], set[str]]:
        """What argparse makes of flags that it knows.

        Returns:
            The namespace, the faults, and the flags with a wrong value: each is removed, and the rest parsed again.
        """
        faults: list[str] = []
        wrong: set[str] = set()
        while True:
            try:
                found, words = super().parse_known_args(argv, namespace)
            # argparse stops at the first fault: the flag is removed and the rest parsed again.
            except (argparse.ArgumentError, _Refused) as error:
                names = (getattr(error, "argument_name", None) or "").split("/")
                faults.append(str(error).removeprefix("argument "))
                # The fault is not about a flag that can be removed: parsing again would not end.
                if not _remove(argv, names):
                    return None, faults, wrong
                wrong |= set(names)
                continue
            return found, [*faults, *self._strays(words)], wrong

    def _strays(self, words: list[str]) -> list[str]:
        """The faults of words without a flag before them; LLaMA-Factory writes `name=value` there."""
        faults: list[str] = []
        plain: list[str] = []
        for word in words:
            name, equals, text = word.partition("=")
            foreign = foreign_flag(self._command, name, text) if equals else ""
            (faults if foreign else plain).append(f"{word} is {foreign}" if foreign else f"'{word}'")
        if plain:
            hint = FOREIGN_WORDS.get(self._command)
            faults.append(f"{', '.join(plain)}: no flag before it" + (f" ({hint})" if hint else ""))
        return faults


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def _take_words(argv: list[str], most: int) -> list[str]:
    """Removes and returns the words up to the next flag, at most `most` of them."""
    words: list[str] = []
    while argv and len(words) < most and not argv[0].startswith("--"):
        words.append(argv.pop(0))
    return words


def _remove(argv: list[str], options: list[str]) -> bool:
    """Removes the last of some flags, with its value; returns whether there was one."""
    # The last one: argparse lets it win, so it is the one that was wrong.
    for place in reversed(range(len(argv))):
        flag, equals, _ = argv[place].partition("=")
        if flag in options:
            has_value = not equals and place + 1 < len(argv) and not argv[place + 1].startswith("--")
            del argv[place : place + 1 + has_value]
            return True
    return False
