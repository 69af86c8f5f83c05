"""Random numbers of each step, from the run's seed and the step alone: a checkpoint has none to store."""

from __future__ import annotations

from typing import Any

from paddlemix.device import set_seed
from paddlemix.trainer.paddlenlp_trainer import TrainerCallback

_SEED_STRIDE = 1_000_003  # a prime, so that neighbouring seeds do not share steps


class SeedEachStep(TrainerCallback):
    """Seeds all random numbers from (seed, step, process), so that a resumed run draws the same."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called before each optimiser step."""
        # 4096 processes at most; paddle takes seeds below 2**31.
        set_seed((args.seed * _SEED_STRIDE + state.global_step * 4096 + args.dataset_rank) % 2**31)
