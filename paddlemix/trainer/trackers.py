"""The trackers of `report_to`: whether what they need is installed.  The numbers reach them through PaddleNLP."""

from __future__ import annotations

import importlib.util
import os

from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError

_PACKAGES = {"visualdl": "visualdl", "tensorboard": "tensorboardX", "wandb": "wandb"}


def resolve_trackers(config: RunConfig) -> list[str]:
    """The trackers that a run reports to; "all" stands for those that are installed.

    Raises:
        UserError: one is not installed, or none is and all are asked for.
    """
    asked = [config.report_to] if isinstance(config.report_to, str) else list(config.report_to)
    installed = [name for name in _PACKAGES if _is_installed(name)]
    if "all" in asked:
        if not installed:
            packages = ", ".join(_PACKAGES.values())
            raise UserError(f'report_to "all": no tracker is installed; `pip install` one of {packages}, or remove it')
        return installed
    trackers = [name for name in asked if name != "none"]
    for name in trackers:
        if name not in installed:
            raise UserError(
                f'report_to "{name}" needs the package {_PACKAGES[name]}, which is not installed here; '
                f"`pip install {_PACKAGES[name]}`, or remove it from report_to (metrics.jsonl has the same numbers)"
            )
    return trackers


def _is_installed(name: str) -> bool:
    off = name == "wandb" and os.environ.get("WANDB_DISABLED", "").upper() in ("1", "ON", "YES", "TRUE")
    return not off and importlib.util.find_spec(_PACKAGES[name]) is not None
