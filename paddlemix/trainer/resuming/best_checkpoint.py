"""Which checkpoint is the best: the metric that decides, what counts as better, and where that checkpoint is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError, did_you_mean

ANSWER_METRICS = ("exact_match", "rouge_l")  # measured with eval_with_do_generation
METRICS = (
    "loss",
    "token_accuracy",
    *ANSWER_METRICS,
)  # that may decide which checkpoint is best; reported as eval_loss, ...


def best_metric(config: RunConfig) -> str:
    """The metric that decides which checkpoint is best, e.g. "eval_loss".

    Raises:
        UserError: `metric_for_best_model` is not one that the run's evaluations measure.
    """
    name = config.metric_for_best_model or "loss"
    if name.removeprefix("eval_") in ANSWER_METRICS and not config.eval_with_do_generation:
        raise UserError(f"metric_for_best_model='{name}' is only measured with eval_with_do_generation true; set it")
    if name.removeprefix("eval_") not in METRICS:
        raise UserError(
            f"metric_for_best_model='{name}' is not one of {', '.join(METRICS)}{did_you_mean(name, METRICS)}"
        )
    return f"eval_{name.removeprefix('eval_')}"


def is_better(config: RunConfig, value: float, best: float, threshold: float = 0.0) -> bool:
    """Whether a value of the best-model metric beats another by more than `threshold`."""
    # A loss is better when smaller, every other metric when larger, unless the key says otherwise.
    greater = config.greater_is_better
    if greater is None:
        greater = not best_metric(config).endswith("loss")
    return value - best > threshold if greater else best - value > threshold


def best_checkpoint(trainer: Any) -> Path | None:
    """Where the best checkpoint is now; None while there is none.

    The state remembers a path.  The run's folder may have been renamed since, or be named from another working
    directory: what the run itself wrote is found in its folder by name.
    """
    recorded = trainer.state.best_model_checkpoint
    if not recorded:
        return None
    here = Path(trainer.config.output_dir) / Path(recorded).name
    return here if here.name in trainer.own_checkpoints else Path(recorded)


def note_best(trainer: Any, metrics: dict[str, float] | None, target: Path) -> None:
    if not metrics:
        return
    key, best = best_metric(trainer.config), trainer.state.best_metric
    if not math.isfinite(metrics[key]):  # nothing would ever be better than NaN
        return
    if best is None or is_better(trainer.config, metrics[key], best):
        trainer.state.best_metric, trainer.state.best_model_checkpoint = metrics[key], str(target)
