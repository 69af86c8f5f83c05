"""Answering with a model whose weights are split over several processes: one leads, the others follow.

The first process of a tensor group reads questions and pictures, chooses every token and writes the answers, as a
single process does.  Whatever it computes with the model's weights it tells the others first, with all that goes in,
and they compute their parts of it.  So no two processes can decide differently.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from paddlemix.models.llava import LlavaModel
from paddlemix.parallel.messages import Channel

LOAD, BEGIN = "load", "begin"  # messages; the others are names of an `IncrementalModel`'s methods
_LEADER = "_tensor_leader"  # of a model


class Leader:
    """What the first process tells the others about a model.

    Args:
        channel: to them.

    Attributes:
        is_over: an error broke off what all were computing, so nothing more can be computed with the model.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._newest: Callable[[], object | None] = lambda: None
        self.is_over = False

    @contextlib.contextmanager
    def told(self, owner: object, name: str, *values: Any) -> Iterator[None]:
        """Tells the others to compute what the block computes; Ctrl-C waits until the block ends.

        Args:
            owner: whose state it changes.  The others hold only the state of the one that began last.
            name: see `follow`.
            values: what goes in.

        Raises:
            OtherProcessError: one of the others has ended.
            RuntimeError: an earlier error broke off a computation, or another owner has begun in the meantime.
        """
        if self.is_over and name == BEGIN:  # whoever cleans up after the error is not disturbed
            yield
            return
        if self.is_over:
            raise RuntimeError("the other processes of the tensor group were left in the middle of a computation")
        if name == BEGIN:
            self._newest = weakref.ref(owner)
        elif self._newest() is not owner:
            raise RuntimeError("of a model in several processes only the conversation that began last can be continued")
        with interrupts_held():
            try:
                self._channel.send((name, values))
                yield
            except BaseException as error:
                self.is_over = True
                if isinstance(error, RuntimeError):  # a sum with one that has ended is an error of the network
                    self._channel.check_others()
                raise


def lead(model: LlavaModel, channel: Channel) -> None:
    """Makes every `IncrementalModel` of this model tell the others what it computes."""
    setattr(model, _LEADER, Leader(channel))


def leader_of(model: LlavaModel) -> Leader | None:
    """None where a model computes alone, or its processes all do the same by themselves, as in a training."""
    found: Leader | None = getattr(model, _LEADER, None)
    return found


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt at the end of this block and not within it."""
    # Only the main thread hears of signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])
