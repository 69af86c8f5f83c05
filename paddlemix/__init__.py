"""LLaVA on PaddlePaddle: fine-tune, chat, serve and evaluate from one JSON file.

Importing the package loads nothing: no numpy, no paddle.  The public names are looked up in their modules on first
use, so that `device.py` can set environment flags before paddle starts, and `paddlemix --help` answers at once.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_MODULE_OF = {
    "load_pretrained": "paddlemix.checkpoints.load",
    "ChatSession": "paddlemix.generation.chat",
    "GenerationSettings": "paddlemix.generation.sampling",
    "predict": "paddlemix.generation.predict",
}


# A module may define this function (PEP 562): it is asked for names that the module does not have.
def __getattr__(name: str) -> object:
    """The public name, from the module that defines it.

    Raises:
        AttributeError: the package has no such public name.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'paddlemix' has no attribute '{name}'; public names: {', '.join(_MODULE_OF)}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
