"""The only door to PaddleNLP: what is imported from it, and what its import must not change.

Its package loads everything it has, and with it scikit-learn, pandas, pyarrow and a web server: four seconds and 200 MB
for every run.  What the Trainer never calls is left out while it is imported, and can be imported afterwards.

Source of the defects that are mended here: PaddleNLP 3.0.0b4 on Paddle 3.3.1.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import paddle.nn.functional as functional

_LEFT_OUT = (
    *("dataaug", "datasets", "embeddings", "experimental", "mergekit", "metrics"),
    *("prompt", "seq2vec", "server", "taskflow", "trl"),
)
_DATASETS = "datasets"  # the library of this name: PaddleNLP imports it where it is installed


class _NotLoaded(types.ModuleType):
    """Stands for a module while others name what is in it; whatever they name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _LeftOut(MetaPathFinder, Loader):
    """Gives `_NotLoaded` for the parts of PaddleNLP that are left out, with all below them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> Any:
        parts = name.split(".")
        if parts[0] != "paddlenlp" or len(parts) < 2:
            return None
        # None in `sys.modules` makes `import datasets` fail as if it were not installed; undone below.
        sys.modules.setdefault(_DATASETS, None)  # type: ignore[arg-type]  # "not installed"
        return ModuleSpec(name, self, is_package=True) if parts[1] in _LEFT_OUT else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _NotLoaded(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


@contextlib.contextmanager
def _only_what_trains() -> Iterator[None]:
    """Within this block the first import of PaddleNLP loads little more than its Trainer."""
    finder = _LeftOut()
    if "paddlenlp" not in sys.modules:
        sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        if sys.modules.get(_DATASETS, finder) is None:
            del sys.modules[_DATASETS]
        # Whoever needs the parts that were left out, e.g. another library, imports the real ones afterwards.
        for name in [name for name, module in sys.modules.items() if isinstance(module, _NotLoaded)]:
            del sys.modules[name]
        package = sys.modules.get("paddlenlp")
        for name, value in list(vars(package).items()) if package else ():
            if isinstance(value, _NotLoaded) or name in ("SimpleServer", "Taskflow"):
                delattr(package, name)


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_linear = functional.linear
with warnings.catch_warnings(), _only_what_trains():
    warnings.simplefilter("ignore")
    from paddlenlp.trainer import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from paddlenlp.trainer.trainer_callback import DefaultFlowCallback, PrinterCallback, ProgressCallback
    from paddlenlp.utils.log import logger as paddlenlp_logger

functional.linear = _linear  # importing PaddleNLP replaces it with a variant for other number formats
paddlenlp_logger.set_level("WARNING")

__all__ = [
    "DefaultFlowCallback",
    "PrinterCallback",
    "ProgressCallback",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
]
