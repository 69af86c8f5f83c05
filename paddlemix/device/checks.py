"""Mistakes in the environment: values that are not read as they look, and settings that came too late.

Pure functions over given variables; each mistake says what to do.  Knows no device, only the numbers passed in.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from paddlemix.device.environment import Prepared, check_duration, is_on
from paddlemix.device.setting_row import Setting
from paddlemix.device.settings import SETTINGS, settings_of
from paddlemix.errors import UserError

# first characters that the NPU plugin reads as true; an empty text is true for it as well
_TRUE_LETTERS = "tTyY1"
# words whose first letter means what the word means; "on" is not among them: o is read as false
_PLAIN_FALSE, _PLAIN_TRUE = ("0", "false", "f", "n", "no", "off"), ("1", "true", "t", "y", "yes")
_FLAG_VALUES = ("0", "1", "true", "false")
_STRATEGIES = ("auto_growth", "naive_best_fit", "thread_local")
# Paddle's names of operators in kernels, which its lists compare with; users know those of the API.
_OLD_NAMES = {
    "matmul": "matmul_v2",
    "add": "elementwise_add",
    "subtract": "elementwise_sub",
    "multiply": "elementwise_mul",
    "divide": "elementwise_div",
    "sum": "reduce_sum",
    "mean": "reduce_mean",
}
_PREFIXES = ("FLAGS_", "ASCEND_", "CUDA_", "CUSTOM_DEVICE_", "PADDLEMIX_", "PADDLE_PG_", "NCCL_", "HCCL_")
_LAUNCHED = "FLAGS_selected_"  # which the launcher sets, for kinds that have no row too
_NEARLY = 0.93  # similarity, 0..1: one or two letters differ; the plugin's own flags are below 0.9 to each other
_VISIBLE = {"gpu": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
_LISTS = {"gpu": "nvidia-smi", "npu": "npu-smi info"}  # what lists a machine's cards


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Args:
        what: the fault, with its value.
        fix: what to do.
        serious: False where everything still works, though not as well.
    """

    what: str
    fix: str
    serious: bool = True

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


def check_values(kind: str, environment: Mapping[str, str]) -> list[Problem]:
    """The settings of a device kind whose value is invalid, or is not read as it looks.

    Args:
        environment: variables by name.
    """
    found: list[Problem] = []
    for setting in settings_of(kind):
        check = _CHECKS.get(setting.form)
        if check is not None and setting.name in environment:
            found += check(setting, environment[setting.name])
    return found


def check_names(environment: Mapping[str, str]) -> list[Problem]:
    """Variables whose name is nearly that of a setting, and which nobody reads."""
    # a call is not an environment variable, so no name can be a misspelling of it
    known = sorted({setting.name for setting in SETTINGS if setting.form != "call"})
    found: list[Problem] = []
    for name in sorted(environment.keys() - set(known)):
        # Only names with our or paddle's prefixes: the environment is full of others.
        near = difflib.get_close_matches(name, known, n=1, cutoff=_NEARLY)
        if near and name.startswith(_PREFIXES) and not name.startswith(_LAUNCHED):
            what = f"{name} is not a known setting, and {near[0]} is not set by it"
            found.append(Problem(what, f"export {near[0]} if that was meant", serious=False))
    return found


def _first_letter(setting: Setting, value: str) -> list[Problem]:
    unset = f"export {setting.name}=0 or =1, or unset it"
    if not value:
        return [Problem(f"{setting.name} is empty, and the plugin reads an empty text as true", unset)]
    # "no" and "off" begin with a letter that reads as false, so they are right by chance.
    if value.lower() in (*_PLAIN_FALSE, *_PLAIN_TRUE):
        return []
    read = "true" if value[0] in _TRUE_LETTERS else "false"
    return [
        Problem(
            f"{setting.name}={value}: the plugin reads only the first character, '{value[0]}', and takes it as {read}",
            unset,
        )
    ]


def _flag(setting: Setting, value: str) -> list[Problem]:
    if value.lower() in _FLAG_VALUES:
        return []
    what = f"{setting.name}={value}: paddle understands 0, 1, true and false, and keeps its default {setting.default}"
    return [Problem(what, f"export {setting.name}=0 or =1")]


def _switch(setting: Setting, value: str) -> list[Problem]:
    # asked with this value alone, so that there is one rule for a switch, and one text
    return _refusal(lambda: is_on(setting.name, {setting.name: value}))


def _duration(setting: Setting, value: str) -> list[Problem]:
    return _refusal(lambda: check_duration(setting, value))


def _refusal(check: Callable[[], object]) -> list[Problem]:
    """The error that `prepare_environment` would stop with, as a problem."""
    try:
        check()
    except UserError as error:
        # Errors of ours have the form "what; what to do".
        what, _, fix = str(error).partition("; ")
        return [Problem(what, fix)]
    return []


def _count(setting: Setting, value: str) -> list[Problem]:
    # OpenMP takes a list, one number per level of nesting: "4,2"
    parts = value.split(",")
    if all(part.strip().isdigit() and int(part) > 0 for part in parts):
        return []
    return [Problem(f"{setting.name}={value} is not a number of at least 1", f"export {setting.name}=4, or unset it")]


def _strategy(setting: Setting, value: str) -> list[Problem]:
    if value not in _STRATEGIES:
        what = f"{setting.name}={value} is not one of {', '.join(_STRATEGIES)}"
        return [Problem(what, "export one of these, or unset it")]
    if value == "naive_best_fit":
        what = f"{setting.name}={value} takes 92 % of a card's memory at once"
        return [Problem(what, f"export {setting.name}=auto_growth (Paddle's NPU image exports the other)", False)]
    return []


def _names(setting: Setting, value: str) -> list[Problem]:
    wrong = [name.strip() for name in value.split(",") if name.strip() in _OLD_NAMES]
    if not wrong:
        return []
    right = ", ".join(_OLD_NAMES[name] for name in wrong)
    return [Problem(f"{setting.name} names {', '.join(wrong)}, which paddle does not find there", f"write {right}")]


def _folder(setting: Setting, value: str) -> list[Problem]:
    folder = Path(value)
    if not value or (folder.is_dir() and any(folder.glob("*.so"))):  # paddle itself writes an empty one
        return []
    state = "holds no .so file" if folder.is_dir() else "is not a folder"
    what = f"{setting.name}={value} {state}, so paddle finds no NPU"
    return [Problem(what, f"name the folder of the plugin's .so file, or unset {setting.name}")]


_CHECKS: dict[str, Callable[[Setting, str], list[Problem]]] = {
    "first letter": _first_letter,
    "flag": _flag,
    "switch": _switch,
    "duration": _duration,
    "count": _count,
    "strategy": _strategy,
    "names": _names,
    "folder": _folder,
}


def check_plugin_root(environment: Mapping[str, str]) -> list[Problem]:
    """A `CUSTOM_DEVICE_ROOT` without a plugin, which nothing else would notice: paddle then has only the CPU."""
    # the CPU's settings do not have it: without its plugin a machine with an NPU looks like one without
    root = next(setting for setting in settings_of("npu") if setting.form == "folder")
    return _folder(root, environment[root.name]) if root.name in environment else []


def check_cards(kind: str, count: int, environment: Mapping[str, str]) -> list[Problem]:
    """Numbers of cards that the process does not see.

    Args:
        count: cards of that kind that it sees.
    """
    # paddle uses the first of these numbers where a device is named without one
    name = f"FLAGS_selected_{kind}s"
    chosen = [part.strip() for part in environment.get(name, "").split(",") if part.strip()]
    # Numbers count the visible cards, not those of the machine.
    wrong = [part for part in chosen if not part.isdigit() or int(part) >= count]
    if not wrong:
        return []
    return [Problem(f"{name}={environment[name]}: there is no {kind} {wrong[0]}", card_advice(kind, count))]


def no_card_left(kind: str, plugin: str, environment: Mapping[str, str]) -> Problem:
    """The problem that paddle was built for cards of a kind and sees none.

    Args:
        kind: the kind that was expected.
        plugin: name of the library that paddle loaded for it; "" for a kind that is built into paddle.
    """
    name, tool = _VISIBLE.get(kind, ""), _LISTS.get(kind, "the vendor's tool")
    loaded = f"paddle loaded {plugin}" if plugin else f"paddle was built for {kind}"
    # The usual cause: a list copied from a machine with other cards.
    if name in environment:
        what = f"{loaded}, but no card: {name}={environment[name]} leaves none of this machine's visible"
        fix = f"unset {name}, or export numbers of cards that {tool} lists (they count from 0: 0 to 7 on a host of 8)"
        return Problem(what, fix)
    looks = "".join(f"{item}, " for item in (tool, name) if item)
    return Problem(f"{loaded}, but no card", f"check {looks}and check that the container can see the driver")


def card_advice(kind: str, count: int) -> str:
    """Which cards there are, for an error about one that does not exist."""
    visible = _VISIBLE.get(kind)
    seen = f"this process sees {count} ({kind}:0{f' to {kind}:{count - 1}' if count > 1 else ''})" if count else ""
    counted = f"numbers count the cards that {visible} leaves visible" if visible else ""
    return ", ".join(part for part in (seen or f"this process sees no {kind}", counted) if part)


def check_late(
    kind: str, state: Prepared, environment: Mapping[str, str], flags: Mapping[str, object] | None = None
) -> list[Problem]:
    """Settings that were changed after paddle had been loaded.

    Args:
        state: what the environment was then.
        environment: as it is now.
        flags: paddle's own flags by name; they are what is really in force.
    """
    found: list[Problem] = []
    for setting in settings_of(kind):
        # Settings that are read at first use may still be changed.
        if setting.form == "call" or setting.when != "before paddle is imported":
            continue
        now, before, known = environment.get(setting.name), state.environment.get(setting.name), flags or {}
        if setting.name in known:
            # paddle's own value is certain; without it the two environments are compared.
            late = now is not None and _differs(now, known[setting.name])
        else:
            late = now is not None and now != before
        if late:
            what = f"{setting.name}={now} was set after paddle had been loaded, so it has no effect"
            fix = f"export {setting.name}={now} before python starts, or set it above the first import of paddle"
            found.append(Problem(what, fix))
    if not state.in_time:
        what = "paddle was imported before paddlemix, so paddlemix could set nothing for it"
        found.append(Problem(what, "import paddlemix.models, or any other part of it, above paddle", False))
    return found


def _differs(text: str, flag: object) -> bool:
    """Whether a variable differs from the value of paddle's flag of that name."""
    if isinstance(flag, bool):
        # a text that paddle does not understand is reported by `_flag`, not as late
        return text.lower() in _FLAG_VALUES and (text.lower() in ("1", "true")) != flag
    return text != str(flag)
