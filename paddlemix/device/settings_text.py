"""The settings of a device as text: those in force, before a run starts, and the table of `docs/devices.md`.

Reports only; mistakes are found in `checks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from paddlemix.device.checks import Problem, check_cards, check_late, check_names, check_plugin_root, check_values
from paddlemix.device.choice import device_count, kind_of
from paddlemix.device.environment import InForce, Prepared, current_environment, in_force, prepared
from paddlemix.device.settings import SETTINGS, settings_of
from paddlemix.device.settings_of_processes import PROCESS_SETTINGS
from paddlemix.log import logger

_SOURCES = {"user": "yours", "ours": "set here", "default": "default"}


def report_settings(device: str) -> None:
    """Logs what paddle reads from the environment for a device, and warns of mistakes in it.

    Args:
        device: as paddle names it.
    """
    kind, state, environment = kind_of(device), prepared(), current_environment()
    logger.info("environment for %s: %s", kind, describe(in_force(kind, state, environment)) or "defaults")
    for problem in environment_problems(kind, state, environment):
        logger.warning(str(problem))


def describe(settings: list[InForce]) -> str:
    """The settings that are not defaults: "OMP_NUM_THREADS=4 (yours), KMP_BLOCKTIME=1 (set here)"."""
    return ", ".join(
        f"{found.setting.name}={found.value} ({_SOURCES[found.source]})"
        for found in settings
        if found.source != "default" and found.setting.form != "call"
    )


def environment_problems(kind: str, state: Prepared, environment: Mapping[str, str]) -> list[Problem]:
    """Everything that is wrong with the settings of a device kind.

    Args:
        state: see `paddlemix.device.environment.prepared`.
        environment: of this process, now.
    """
    found = (
        check_values(kind, environment)
        + check_names(environment)
        + check_late(kind, state, environment, _own_flags(kind))
    )
    # A wrong CUSTOM_DEVICE_ROOT is why the device is the CPU.
    if kind == "cpu":
        return found + check_plugin_root(environment)
    return found + check_cards(kind, device_count(kind), environment)


def _own_flags(kind: str) -> dict[str, object]:
    """Paddle's flags among a kind's settings, as they are in force; a plugin's flags cannot be queried."""
    import paddle

    flags: dict[str, object] = {}
    for setting in settings_of(kind):
        # Forms that paddle itself parses; a plugin's flags are unknown to get_flags.
        if setting.name.startswith("FLAGS_") and setting.form in ("flag", "strategy"):
            flags |= paddle.get_flags(setting.name)
    return flags


def settings_table(kinds: tuple[str, ...], processes: bool = False) -> str:
    """Rows of some device kinds as a Markdown table, as `docs/devices.md` and `docs/scaling.md` show them.

    Args:
        processes: those about several processes; else all others.
    """
    lines = ["| setting | value | otherwise | to be set | why |", "|---|---|---|---|---|"]
    for setting in SETTINGS:
        # A table per set of kinds, so that settings for all devices are listed once.
        if setting.kinds != kinds or (setting in PROCESS_SETTINGS) != processes:
            continue
        value = "not set" if setting.value is None else f"`{setting.value.format(cores='number of cores')}`"
        value += f", on {setting.only}" if setting.only else ""
        if setting.several is not None:
            value = f"`{setting.several}`" if processes else f"{value}; `{setting.several}` with several processes"
        if setting.upstream is not None:
            value += "; PaddleMIX too" if setting.upstream == setting.value else f"; PaddleMIX: `{setting.upstream}`"
        lines.append(f"| `{setting.name}` | {value} | {setting.default} | {setting.when} | {setting.reason} |")
    return "\n".join(lines)
