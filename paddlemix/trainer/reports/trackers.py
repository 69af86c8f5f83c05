"""The trackers of `report_to`: whether what they need is installed, and what of a run they receive.

The numbers reach them through PaddleNLP.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from paddlemix.config.schema import SPECS, RunConfig
from paddlemix.errors import UserError
from paddlemix.trainer.paddlenlp_trainer import TrainingArguments

_PACKAGES = {"visualdl": "visualdl", "tensorboard": "tensorboardX", "wandb": "wandb"}
_SECRETS = {name for name, spec in SPECS.items() if spec.secret}


class TrackedArguments(TrainingArguments):
    """PaddleNLP's arguments, as trackers write them into their files: without secrets."""

    def to_dict(self) -> dict[str, Any]:
        """Every argument that is not a secret; PaddleNLP's leaves tokens out, but not keys."""
        # Trackers upload their arguments, often to a page that others see.
        return {name: value for name, value in super().to_dict().items() if name not in _SECRETS}


def resolve_trackers(config: RunConfig) -> list[str]:
    """The trackers that a run reports to; "all" means those that are installed.

    Raises:
        UserError: one is not installed, or none is and all are asked for.
    """
    # A text or a list, as transformers takes it.
    asked = [config.report_to] if isinstance(config.report_to, str) else list(config.report_to)
    # Only looked up, not imported: wandb alone takes seconds.
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
    # The switch that users of transformers know.
    off = name == "wandb" and os.environ.get("WANDB_DISABLED", "").upper() in ("1", "ON", "YES", "TRUE")
    return not off and importlib.util.find_spec(_PACKAGES[name]) is not None
