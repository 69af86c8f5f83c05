"""What one process of a run of several does in `benchmarks/scaling.py`.

The functions are called by name in processes that `tests.parallel.cluster` forks.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def timed(recipe: str, overrides: list[str], silent: bool) -> list[float]:
    """Seconds of each step but the first two, of a run with one pass per step.

    Args:
        silent: gradients and weights are not exchanged; the result is then no training, only the time without it.
    """
    from paddlemix.trainer.trainer import LlavaTrainer

    begun: list[float] = []
    step = LlavaTrainer.training_step

    def watched(*arguments: Any, **named: Any) -> Any:
        begun.append(time.perf_counter())
        return step(*arguments, **named)

    LlavaTrainer.training_step = watched  # type: ignore[method-assign]
    if silent:
        _silence()
    _run(recipe, overrides)
    return [end - start for start, end in zip(begun[2:], begun[3:], strict=False)]


def ran(recipe: str, overrides: list[str]) -> dict[str, float]:
    """Numbers that train, those that stage 3 slices, and positions of all steps, after a run of which the stand-in
    counts the collectives."""
    from paddlemix.models.llava import LlavaModel
    from paddlemix.parallel.deferred import LARGE

    seen: dict[str, float] = {"positions": 0.0}
    build, embed = LlavaModel.__init__, LlavaModel.embed

    def remembered(model: Any, *arguments: Any) -> None:
        build(model, *arguments)
        sizes = {name: parameter.size for name, parameter in model.named_parameters()}
        seen["sliced"] = float(sum(size for size in sizes.values() if size > LARGE))
        seen["trained"] = float(sum(size for name, size in sizes.items() if not name.startswith("vision_tower.")))

    def counted(model: Any, input_ids: Any, *arguments: Any, **named: Any) -> Any:
        seen["positions"] += input_ids.size
        return embed(model, input_ids, *arguments, **named)

    LlavaModel.__init__ = remembered  # type: ignore[method-assign]
    LlavaModel.embed = counted  # type: ignore[method-assign]
    _run(recipe, overrides)
    return seen


def _run(recipe: str, overrides: list[str]) -> None:
    from paddlemix.config.load import load_config
    from paddlemix.trainer.recipe import run_recipe

    run_recipe(load_config(Path(recipe), overrides))


def _silence() -> None:
    """Takes out what a step exchanges: DataParallel's sums, stage 1's sums and new weights, sums of a tensor group."""
    import paddle

    from paddlemix.parallel.tensor import block_edges

    def alone(model: Any, *inputs: Any, **named: Any) -> Any:
        return model._layers(*inputs, **named)  # the reducer is not prepared, so its hooks send nothing

    def nothing(*arguments: Any, **named: Any) -> Any:
        return SimpleNamespace(wait=lambda: None)  # stage 1 waits for what it has begun

    def own(tensor: Any, layout: Any) -> Any:
        return tensor.contiguous()

    block_edges.summed = own
    paddle.DataParallel.forward = alone
    paddle.distributed.reduce = nothing
    paddle.distributed.broadcast = nothing
