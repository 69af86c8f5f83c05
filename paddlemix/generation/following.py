"""The other processes of a tensor group: they compute what the first one tells, see `leading.py`."""

from __future__ import annotations

import signal
from collections.abc import Callable

import numpy as np
import paddle

from paddlemix.generation.incremental import IncrementalModel
from paddlemix.generation.leading import BEGIN, LOAD
from paddlemix.models.llava import LlavaModel
from paddlemix.parallel.messages import Channel

_NO_SCORES = np.zeros((0, 0), dtype=np.float32)


class _Following(IncrementalModel):
    """Computes scores with the others, and reads none: the first process chooses."""

    def _scores(self, hidden: paddle.Tensor) -> np.ndarray:
        self._model.logits(hidden)
        return _NO_SCORES


def follow(channel: Channel, load: Callable[[], LlavaModel]) -> None:
    """Does what the first process tells, until it ends.

    Args:
        channel: from it.
        load: returns this process's part of the model, in evaluation mode; called when the first one loads its own.
    """
    # A terminal's Ctrl-C, and a launcher's, is for the process that decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    model: LlavaModel | None = None
    own: IncrementalModel | None = None
    for name, values in channel.messages():
        if name == LOAD:
            model = load()
            channel.report_ready()
        elif name == BEGIN:
            assert model is not None
            own = _Following(model)
        else:
            getattr(own, name)(*values)
