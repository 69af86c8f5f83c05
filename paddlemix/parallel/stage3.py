"""Sharding stage 3: each process holds a slice of every large weight, and the whole of one only while a layer runs.

Paddle's `GroupShardedStage3` does it by hooks of the layers: before a layer runs, and before its backward pass, its
weights are gathered; afterwards they are dropped again.  What is mended here, in Paddle 3.3.1:

    needs the whole model on every card before it slices it     a weight may be read from its file just then
    frozen weights stay whole after the first backward pass     dropped once the layer's gradient has passed
    copies every weight to the host and back                    sliced where it is
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle
from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_stage3 import GroupShardedStage3
from paddle.distributed.fleet.utils import mix_precision_utils

from paddlemix.parallel import deferred
from paddlemix.parallel.deferred import reader_of
from paddlemix.parallel.layout import Layout
from paddlemix.parallel.shares import SLICE, adamw_of, has_master


def shard_weights(
    model: nn.Layer, optimizer: paddle.optimizer.Optimizer, layout: Layout, master_grad: str | None
) -> tuple[Stage3, Any]:
    """Slices a model over the processes of a sharding group.

    Args:
        model: its weights are equal in every process; large ones may be deferred, see `parallel.deferred`.
        optimizer: over the parameters that train.
        master_grad: the type of the model's weights if their gradients are to be added up in float32, else None.

    Returns:
        The model to call in its place, and the optimiser.
    """
    wrapped: Any = optimizer
    if master_grad is not None:
        mix_precision_utils.MixPrecisionLayer(model, dtype=master_grad)
        wrapped = mix_precision_utils.MixPrecisionOptimizer(optimizer)
    return Stage3(model, wrapped, layout), wrapped


class Stage3(GroupShardedStage3):
    """A model whose large weights are sliced; see `shard_weights`."""

    def __init__(self, model: nn.Layer, optimizer: Any, layout: Layout) -> None:
        super().__init__(
            model,
            optimizer,
            group=layout.sharding_group,
            device=paddle.get_device().split(":")[0],
            segment_size=deferred.LARGE,
            pretrain_sync_models=False,
            dp_group=fleet.get_hybrid_communicate_group().get_data_parallel_group(),
        )

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the model's."""
        self.drop_weights()
        return self._layer(*inputs, **named)

    def _update_params_slice(self) -> None:
        """Before the optimiser's step: the gradients of slices become those that it reads."""
        self.drop_weights()
        super()._update_params_slice()

    def drop_weights(self) -> None:
        """Drops the weights that are whole, or on their way, outside of a layer's passes."""
        for params in self._trainable_params.values():
            for param in params:
                if param.name in self._task_flow.full_param:
                    self._drop(param)

    def _drop(self, param: Any) -> None:
        """Leaves this process's slice of a gathered weight."""
        whole, task = self._task_flow.full_param.pop(param.name)
        if param.status == "all":
            start, end = self._param2buffer[param.name][self._rank]
            param.fw_storage = whole._slice(start, end).detach().clone()
            param._clear_data()
            param.status, param.use_count = "part", 0
        elif task is not None:  # asked for ahead of a layer that did not run
            task.wait()

    @paddle.no_grad()
    def _param_storage(self, param: Any, buffer_size: int) -> None:
        """Leaves this process's slice of a weight; `buffer_size` is its size with padding."""
        start, end = self._param2buffer[param.name][self._rank]
        size, read = param._numel(), reader_of(param)
        part = min(start, size), min(end, size)
        if read is None:
            padding = paddle.zeros([end - start - (part[1] - part[0])], dtype=param.dtype)
            # The last processes may have nothing but padding.
            has_piece = part[0] < part[1]
            pieces = [param.detach().reshape([-1])[part[0] : part[1]], padding] if has_piece else [padding]
            param.fw_storage = paddle.concat(pieces)
        else:  # the rest of it is never in this process
            param.fw_storage = paddle.zeros([end - start], dtype=param.dtype)
            read(param.fw_storage, part)
            param.deferred = None
        param.fw_storage.name = SLICE + param.name
        param.status = "part"
        if param.trainable and has_master(adamw_of(self._optim), param):
            master = param.fw_storage.astype("float32")
            master.name = param.name
            self._optim._master_weights[param.fw_storage.name] = master
        param._clear_data()

    def _register_forward_all_hooks(self, sub_layer: nn.Layer, task_flow: Any) -> None:
        super()._register_forward_all_hooks(sub_layer, task_flow)
        frozen = [param for param in self._trainable_params[id(sub_layer)] if not param.trainable]
        if frozen:
            sub_layer.register_forward_pre_hook(lambda _, inputs: self._drop_after_backward(inputs, frozen))

    def _drop_after_backward(self, inputs: Sequence[Any], frozen: list[Any]) -> None:
        """Drops frozen weights when the gradients of their layer's inputs are complete: the layer has used them then.

        Layers below the first trained weight have no backward pass, and nothing to drop.
        """

        def drop(_: paddle.Tensor) -> None:
            for param in frozen:
                if param.name in self._task_flow.full_param:
                    param.use_count -= 1
                    if param.use_count <= 0:
                        self._drop(param)

        if paddle.is_grad_enabled():
            for value in inputs:
                if isinstance(value, paddle.Tensor) and not value.stop_gradient:
                    value.register_hook(drop)
