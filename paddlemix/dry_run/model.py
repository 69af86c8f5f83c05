"""The model of a run without its weights: which parameters there are, what trains, and how it is held.

The layers are the real ones, built without memory, and what trains is decided by the functions that a run uses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import paddle
from paddle import nn

from paddlemix.checkpoints.adapters.adapter import AdapterFiles
from paddlemix.config.schema import RunConfig
from paddlemix.dry_run.computation import tensor_degree
from paddlemix.dry_run.sharing import Weight
from paddlemix.dry_run.step_sizes import LinearSize
from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.layers import skip_initialisation
from paddlemix.models.llava import LlavaModel
from paddlemix.parallel.layout import Layout
from paddlemix.parallel.tensor.model import SplitLlavaModel
from paddlemix.parallel.tensor.parts import linear_part, whole_shape
from paddlemix.parallel.tensor.parts import part_of as split_of
from paddlemix.peft.dora import DoRALinear
from paddlemix.peft.linear import LoRALinear
from paddlemix.peft.lora import LoRAConfig, add_lora, linear_names
from paddlemix.peft.quantize import QuantizationConfig, prepare_quantized, quantized_linears
from paddlemix.peft.quantized_base import QuantizedBase
from paddlemix.trainer.add_training import add_training
from paddlemix.trainer.run_model import weight_dtype
from paddlemix.trainer.trainable import part_of

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class _First:
    """The first process of a tensor group that does not exist; as paddle's groups name its members."""

    nranks: int
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What an estimate needs to know of a model.

    Args:
        weights: every parameter, and the codes of quantised layers; where a tensor group computes the model together,
            the part of its first process, which is one of the largest.
        linears: name -> size of every linear layer, in the same part.
        coded, coded_at_once: weights held as codes, in all and in the largest group that is made wide together.
    """

    weights: tuple[Weight, ...]
    linears: dict[str, LinearSize]
    coded: int = 0
    coded_at_once: int = 0


def describe_model(config: RunConfig, sizes: LlavaConfig, quantization: QuantizationConfig | None) -> ModelFacts:
    """The model that a run would train.

    Args:
        config: of the run.
        sizes: of the base, its tower included.
        quantization: how the base is held.

    Raises:
        UserError: what the run's keys say of its parts does not fit the model, or its heads cannot be split by
            `tensor_parallel_degree`.
    """
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(weight_dtype(config))
    try:
        # Parameters get shapes and names but no memory; the guard leaves paddle's name counters as they were.
        with skip_initialisation(), paddle.LazyGuard(), paddle.utils.unique_name.guard():
            degree = tensor_degree(config)
            model = LlavaModel(sizes) if degree == 1 else SplitLlavaModel(sizes, Layout(tensor_group=_First(degree)))
            if quantization is not None:
                prepare_quantized(model, quantization)
            _add_training(model, config)
    finally:
        paddle.set_default_dtype(before)
    # Layers that are decoded together share a group object, which is counted once.
    groups = {id(layer.group): layer.group.numbers for layer in quantized_linears(model).values()}
    return ModelFacts(
        weights=tuple(_weights(model)),
        linears=linear_sizes(model),
        coded=sum(groups.values()),
        coded_at_once=max(groups.values(), default=0),
    )


def _add_training(model: LlavaModel, config: RunConfig) -> None:
    """As a run does it, without the adapter's weights: whatever is named as filled gets no start values."""

    def continue_adapter(earlier: AdapterFiles) -> LoRAConfig:
        add_lora(model, earlier.config, earlier.tensors().keys())
        return earlier.config

    def begin_adapter(adapter: LoRAConfig) -> None:
        # All names that any kind of adapter may have: a name that a kind lacks does no harm.
        filled = [f"{name}.{own}" for name in adapter.modules for own in ("lora_A", "lora_B")]
        starts = [f"{name}_start" for name in filled]
        add_lora(model, adapter, [*filled, *starts, *(f"{name}.lora_magnitude_vector" for name in adapter.modules)])

    add_training(model, config, continue_adapter, begin_adapter)


def _weights(model: nn.Layer) -> Iterator[Weight]:
    for name, parameter in model.named_parameters():
        count, dtype = math.prod(parameter.shape), str(parameter.dtype).rsplit(".", 1)[-1]
        yield Weight(
            name=name,
            part=part_of(name),
            count=count,
            num_bytes=count * _BYTES[dtype],
            trained=not parameter.stop_gradient,
            in_all=math.prod(whole_shape(parameter)),
            joined=split_of(parameter) is None,
        )
    # Codes are buffers, not parameters, so `named_parameters` does not list them.
    for name, layer in quantized_linears(model).items():
        count, split = math.prod(layer.weight_shape), linear_part(layer)
        yield Weight(
            name=f"{name}.weight",
            part=part_of(name),
            count=count,
            num_bytes=layer.num_bytes,
            trained=False,
            coded=True,
            in_all=count if split is None else count // (split.stop - split.start) * split.size,
        )


def linear_sizes(model: nn.Layer) -> dict[str, LinearSize]:
    """Name -> size of every linear layer of a model."""
    layers = dict(model.named_sublayers())
    return {name: _linear_size(layers[name]) for name in linear_names(model)}


def _linear_size(layer: nn.Layer) -> LinearSize:
    if isinstance(layer, LoRALinear):
        return LinearSize(
            in_features=layer.in_features,
            out_features=layer.out_features,
            rank=layer.rank,
            dropout=layer.dropout,
            dora=isinstance(layer, DoRALinear),
            quantized=layer.is_quantized,
            bias=layer.bias is not None,
        )
    if isinstance(layer, QuantizedBase):
        return LinearSize(in_features=layer.weight_shape[0], out_features=layer.weight_shape[1], quantized=True)
    in_features, out_features = layer.weight.shape
    return LinearSize(in_features=in_features, out_features=out_features, bias=layer.bias is not None)
