"""Packages of the extra `[eval]`, imported where a metric or a file needs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from paddlemix.errors import UserError

# module -> package
_PACKAGES = {"openpyxl": "openpyxl", "pyarrow": "pyarrow", "rouge_score": "rouge-score", "sacrebleu": "sacrebleu"}


def import_extra(module: str, purpose: str) -> ModuleType:
    """A module of an optional package.

    Args:
        module: e.g. "rouge_score.rouge_scorer".
        purpose: what needs it, begins the error.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = _PACKAGES[module.split(".")[0]]
        raise UserError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}): pip install 'paddlemix[eval]'"
        ) from error
