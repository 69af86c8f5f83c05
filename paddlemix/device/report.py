"""What a run says about its device before it starts: settings in force, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping

from paddlemix.device.checks import Problem, check_cards, check_late, check_names, check_plugin_root, check_values
from paddlemix.device.choice import device_count, kind_of
from paddlemix.device.environment import InForce, Prepared, current_environment, in_force, prepared
from paddlemix.device.settings import settings_of
from paddlemix.log import logger

_SOURCES = {"user": "yours", "ours": "set here", "default": "default"}


def report_settings(device: str) -> None:
    """Logs what paddle reads from the environment for a device, and warns of what is wrong there.

    Args:
        device: as paddle names it.
    """
    kind, state, environment = kind_of(device), prepared(), current_environment()
    logger.info("environment for %s: %s", kind, describe(in_force(kind, state, environment)) or "defaults")
    for problem in environment_problems(kind, state, environment):
        logger.warning(str(problem))


def describe(settings: list[InForce]) -> str:
    """The settings that somebody made: "OMP_NUM_THREADS=4 (yours), KMP_BLOCKTIME=1 (set here)"."""
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
    if kind == "cpu":
        return found + check_plugin_root(environment)
    return found + check_cards(kind, device_count(kind), environment)


def _own_flags(kind: str) -> dict[str, object]:
    """Paddle's flags among a kind's settings as they are in force; a plugin's cannot be asked for."""
    import paddle

    flags: dict[str, object] = {}
    for setting in settings_of(kind):
        if setting.name.startswith("FLAGS_") and setting.form in ("flag", "strategy"):
            flags |= paddle.get_flags(setting.name)
    return flags
