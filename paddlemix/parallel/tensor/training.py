"""Training a model that a tensor group shares: what its replicas, each in a tensor group of its own, do together.

    layout                      gradients                                    by
    tensor parallel alone       nothing is left to do                        the optimiser itself
    with data parallel          averaged over replicas after the last pass   Fleet's optimiser
    with sharding stage 1       the same, for the one that updates           Fleet's optimiser
    with sharding stage 2       the same, during the passes                  `GroupShardedStage2`

Fleet's wrapper `TensorParallel` is left out: before every pass it sends the inputs of the first process to the others,
which have them already.  The processes of a tensor group have to agree on which replica updates which weight, because
they add up some gradients then.  Paddle 3.3.1 deals weights out by their size, which here is a part's, and parts of
uneven vocabularies differ; so weights are dealt out by the size of the whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import paddle
from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import hybrid_parallel_optimizer
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer.dygraph_sharding_optimizer import (
    DygraphShardingOptimizer,
)
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_optimizer_stage2 import GroupShardedOptimizerStage2
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_stage2 import GroupShardedStage2
from paddle.distributed.fleet.utils import mix_precision_utils

from paddlemix.parallel.layout import Layout
from paddlemix.parallel.tensor.parts import whole_shape


def join_replicas(
    model: nn.Layer, optimizer: paddle.optimizer.Optimizer, layout: Layout, master_grad: str | None
) -> tuple[nn.Layer, Any]:
    """Prepares this process's part of a model for training together with its replicas.

    Args:
        model: its weights are equal in every replica.
        optimizer: over the parameters that train.
        layout: with a tensor group; stage "", "stage1" or "stage2".
        master_grad: the type of the model's weights if their gradients are to be added up in float32, else None.

    Returns:
        The model to call, and the optimiser.
    """
    wrapped: Any = optimizer
    if master_grad is not None:
        mix_precision_utils.MixPrecisionLayer(model, dtype=master_grad)
        wrapped = mix_precision_utils.MixPrecisionOptimizer(optimizer)
    if layout.data_size == 1:
        return model, wrapped
    groups = fleet.get_hybrid_communicate_group()
    if layout.stage == "stage2":
        shared = {
            "group": layout.sharding_group,
            "dp_group": groups.get_data_parallel_group(),
            "device": paddle.get_device().split(":")[0],
        }
        wrapped = _Stage2(wrapped._parameter_list, wrapped, pretrain_sync_models=False, **shared)
        return GroupShardedStage2(model, wrapped, **shared), wrapped
    with _dealt_by_whole_size():
        strategy = fleet.fleet._user_defined_strategy
        return model, hybrid_parallel_optimizer.HybridParallelOptimizer(wrapped, groups, strategy)


@contextlib.contextmanager
def _dealt_by_whole_size() -> Iterator[None]:
    """Within this block Fleet's optimiser shares states as `_Stage1` does."""
    before = hybrid_parallel_optimizer.DygraphShardingOptimizer
    hybrid_parallel_optimizer.DygraphShardingOptimizer = _Stage1
    try:
        yield
    finally:
        hybrid_parallel_optimizer.DygraphShardingOptimizer = before


class _Stage1(DygraphShardingOptimizer):
    def _partition_parameters(self) -> dict[int, list[paddle.Tensor]]:
        return dict(enumerate(dealt(self._parameter_list, self._sharding_world_size)))


class _Stage2(GroupShardedOptimizerStage2):
    def _segment_params(self) -> list[list[paddle.Tensor]]:
        return dealt(self._local_params, self.world_size)


def dealt(parameters: Sequence[paddle.Tensor], shares: int) -> list[list[paddle.Tensor]]:
    """Parameters in shares of about one size, the same on every process of a tensor group."""
    dealt: list[list[paddle.Tensor]] = [[] for _ in range(shares)]
    sizes = [0] * shares
    for parameter in sorted(parameters, key=lambda item: math.prod(whole_shape(item)), reverse=True):
        smallest = sizes.index(min(sizes))
        dealt[smallest].append(parameter)
        sizes[smallest] += math.prod(whole_shape(parameter))
    return dealt
