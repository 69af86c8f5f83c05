"""State of a device and the host besides tensors: random generators and the memory in use."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from paddlemix.log import logger


@dataclass(frozen=True)
class RandomState:
    """Generators of this process.

    Args:
        python, numpy: as their libraries return them.
        host: of paddle's CPU generator.
        devices: of every card of the current device's kind; empty on CPU.
    """

    python: Any
    numpy: Any
    host: Any
    devices: list[Any]


def set_seed(seed: int) -> None:
    """Seeds Python, numpy and paddle (host and device generators)."""
    import numpy as np
    import paddle

    random.seed(seed)
    # numpy accepts 32 bits, paddle 63.
    np.random.seed(seed % 2**32)
    paddle.seed(seed)


def random_state() -> RandomState:
    """The state of all generators.  Paddle's own function omits the host's while a device computes."""
    import numpy as np
    import paddle

    # paddle's own function returns the cards' generators only while a card is current.
    devices = [] if paddle.get_device() == "cpu" else paddle.get_rng_state()
    host = paddle.base.core.default_cpu_generator().get_state()
    return RandomState(random.getstate(), np.random.get_state(), host, devices)


def restore_random_state(state: RandomState) -> None:
    """Restores all generators.

    Args:
        state: of `random_state`, taken while a device of the same kind was current.
    """
    import numpy as np
    import paddle

    random.setstate(state.python)
    np.random.set_state(state.numpy)
    paddle.base.core.default_cpu_generator().set_state(state.host)
    # Empty on CPU, which has no generators of cards.
    if state.devices:
        paddle.set_rng_state(state.devices)


def peak_memory_bytes(device: str) -> int:
    """Largest memory use so far in bytes: of the device if paddle counts it, else of this process; 0 when unknown."""
    import paddle

    if not device.startswith("cpu"):
        try:
            # Plugins may lack the counter, or raise on being asked.
            return int(paddle.device.max_memory_allocated())
        except (AttributeError, ValueError, RuntimeError):
            logger.debug("no memory figures on %s", device)
            return 0
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
