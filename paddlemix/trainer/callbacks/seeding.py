"""Random numbers of each step, from the run's seed and the step alone: a checkpoint has none to store."""

from __future__ import annotations

from typing import Any

from paddlemix.device import set_seed
from paddlemix.errors import UserError
from paddlemix.trainer.paddlenlp_trainer import TrainerCallback

MOST_PROCESSES = 4096
_SEED_STRIDE = 1_000_003  # a prime, so that neighbouring seeds do not share steps


class SeedEachStep(TrainerCallback):
    """Seeds all random numbers from (seed, step, process), so that a resumed run draws the same.

    Processes that read the same samples draw the same numbers.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuses more processes than steps leave room for: one would draw what another draws in the next step."""
        if args.dataset_world_size > MOST_PROCESSES:
            raise UserError(
                f"{args.dataset_world_size} processes that read different samples are above {MOST_PROCESSES}, the most "
                "that have random numbers of their own; start fewer and raise gradient_accumulation_steps"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called before each optimiser step."""
        # Paddle takes seeds below 2**31.
        set_seed((args.seed * _SEED_STRIDE + state.global_step * MOST_PROCESSES + args.dataset_rank) % 2**31)
