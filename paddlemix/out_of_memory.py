"""Running out of memory as an error that says what was being done and what takes less.

    with out_of_memory_explained("training", ["max_length 2048 -> a smaller one"]):
        ...

Knows no device and no configuration: the caller says what helps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from paddlemix.errors import UserError

# Parts of allocators' messages, lower case. The last two come from devices of a plugin, such as an Ascend NPU: 2 is the
# plugin interface's "failed", which a full device returns; the other is ACL's own code for it.
# Sources: Paddle's phi/backends/custom/custom_device.cc and device_ext.h; Ascend's ACL error codes.
_SIGNS = (
    "resourceexhausted",
    "out of memory",
    "bad_alloc",
    "cannot allocate memory",
    "customdevice error, the error code is : 2.",
    "the error code is : 207001",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Paddle, numpy or Python says that memory of host or device ran out."""
    if isinstance(error, MemoryError):
        return True
    text = " ".join(str(error).lower().split())
    # A UserError about "memory" in a user's text, or a KeyError, is not one: only the types that allocators raise.
    return isinstance(error, RuntimeError | OSError) and any(sign in text for sign in _SIGNS)


@contextlib.contextmanager
def out_of_memory_explained(doing: str | Callable[[], str], remedies: Iterable[str]) -> Iterator[None]:
    """Turns an exception that means "out of memory" into a message for the user; others pass through.

    Args:
        doing: what happens inside, e.g. "training", or a function that returns it once memory has run out.
        remedies: what takes less memory, the cheapest first.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        what = doing if isinstance(doing, str) else doing()
        reason = _shortened(str(error).strip() or type(error).__name__)
        raise UserError(
            f"memory ran out while {what} ({reason}). What takes less, the cheapest first: {'; '.join(remedies)}"
        ) from error


def _shortened(reason: str, most: int = 160) -> str:
    words = " ".join(reason.split())
    return words if len(words) <= most else f"{words[:most]} ..."
