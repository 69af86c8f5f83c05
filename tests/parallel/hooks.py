"""What tests do to single processes of a run before their command begins, see `tests.parallel.rank.Hook`."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.moments import Moment, watch


def at_touch(**moment: Any) -> None:
    """Sends itself a signal at a touch of files; `moment` has the fields of `tests.moments.Moment`."""
    watch(Moment(**moment))


def file_limit(largest: int) -> None:
    """No file of this process grows beyond `largest` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))


def signal_in_step(step: int, number: int) -> None:
    """Sends itself a signal in an optimiser step (1 is the first), before its first forward pass."""
    before_step(step, lambda: os.kill(os.getpid(), number))


def wait_in_step(step: int, until: str) -> None:
    """Waits in a step until a file exists that another process or the test makes."""

    def wait() -> None:
        while not Path(until).exists():
            time.sleep(0.01)

    before_step(step, wait)


def file_in_step(step: int, path: str) -> None:
    """Makes a file when a step begins."""
    before_step(step, Path(path).touch)


def slice_weights(largest: int) -> None:
    """Sharding stage 3 slices every weight of more than `largest` numbers: a tiny model's too."""
    from paddlemix.parallel import deferred

    assert largest < deferred.LARGE  # the name that is read
    deferred.LARGE = largest


def nan_loss(step: int) -> None:
    """The loss of all micro-batches of a step is NaN."""
    from paddlemix.trainer.loss import LossModel

    forward, factor = LossModel.forward, [1.0]

    def poisoned(model: Any, *arguments: Any, **named: Any) -> Any:
        loss_sum, right = forward(model, *arguments, **named)
        return loss_sum * factor[0], right

    LossModel.forward = poisoned
    before_step(step, lambda: factor.__setitem__(0, math.nan))
    before_step(step + 1, lambda: factor.__setitem__(0, 1.0))


def nan_gradient(step: int) -> None:
    """The gradient of the loss is NaN in a step, the loss itself is not."""
    import paddle

    from paddlemix.trainer.loss import LossModel

    forward, spoils = LossModel.forward, [False]

    def spoilt(model: Any, *arguments: Any, **named: Any) -> Any:
        loss_sum, right = forward(model, *arguments, **named)
        return (loss_sum + paddle.sqrt(loss_sum * 0.0) * 0.0 if spoils[0] else loss_sum), right

    LossModel.forward = spoilt
    before_step(step, lambda: spoils.__setitem__(0, True))
    before_step(step + 1, lambda: spoils.__setitem__(0, False))


def before_step(step: int, action: Callable[[], Any]) -> None:
    """Calls `action` when a step begins (1 is the first), before its first forward pass."""
    from paddlemix.trainer.callbacks.seeding import SeedEachStep

    begin = SeedEachStep.on_step_begin

    def acted(callback: Any, arguments: Any, state: Any, *others: Any, **named: Any) -> None:
        if state.global_step + 1 == step:
            action()
        begin(callback, arguments, state, *others, **named)

    SeedEachStep.on_step_begin = acted
