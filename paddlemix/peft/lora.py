"""Adapters of linear layers, added, listed and merged without the model knowing.

What an adapted layer computes is in `linear.py`, `dora.py` and `pissa.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import nullcontext
from typing import Any

import paddle
from paddle import nn

from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.models.layers import skip_initialisation
from paddlemix.parallel.tensor.parts import linear_part, mark_linear
from paddlemix.peft.dora import DoRALinear
from paddlemix.peft.linear import LoRALinear
from paddlemix.peft.pissa import PiSSALinear, check_pissa
from paddlemix.peft.quantized_base import QuantizedBase
from paddlemix.peft.settings import LoRAConfig, is_adapter_weight
from paddlemix.peft.split_adapters import check_part

__all__ = ["LoRAConfig", "LoRALinear", "add_lora", "linear_names", "lora_parameters", "merge_lora", "quantized_layers"]


def linear_names(model: nn.Layer) -> list[str]:
    """Full names of the linear layers of a model, adapted and quantised ones included."""
    names = []
    inside: tuple[str, ...] = ()  # layers inside a quantised or adapted one are not layers of the model
    for name, layer in model.named_sublayers():
        if isinstance(layer, (nn.Linear, LoRALinear, QuantizedBase)) and not name.startswith(inside):
            names.append(name)
            inside = (*inside, f"{name}.") if not isinstance(layer, nn.Linear) else inside
    return names


def quantized_layers(model: nn.Layer) -> Iterator[tuple[str, QuantizedBase]]:
    """(name, layer) of every quantised layer; inside an adapted one it is named "....q_proj.base"."""
    for name, layer in model.named_sublayers():
        if isinstance(layer, QuantizedBase):
            yield name, layer


def add_lora(model: nn.Layer, config: LoRAConfig, filled: Collection[str] = ()) -> None:
    """Replaces the linear layers that `config.modules` names, in place.  Outputs do not change until it is trained.

    Args:
        filled: names of parameters that the caller sets afterwards; a layer whose own are all among them gets no start
            values, which take long to compute for PiSSA.

    Raises:
        UserError: a name is not a linear layer of the model, PiSSA cannot begin from its weight, or the adapter's kind
            needs more of it than a process of a tensor group has; nothing is then replaced.
    """
    # everything is checked before anything is replaced
    found = [_find(model, name) for name in config.modules]
    # settings allow only one of the two
    kind = DoRALinear if config.use_dora else PiSSALinear if config.pissa else LoRALinear
    begins = not set(filled).issuperset(_own_names(kind, config.modules))
    for name, (_, _, layer) in zip(config.modules, found, strict=True):
        if not isinstance(layer, (nn.Linear, QuantizedBase)):
            raise UserError(
                f"LoRA module '{name}' is not a linear layer of this model; is the adapter for another base?"
            )
        if config.pissa:
            check_pissa(name, layer, config.rank_of(name))
        check_part(name, layer, config, begins)
    if config.pissa and begins:
        logger.info("PiSSA: computing the principal components of %d weights", len(found))
    # an adapter that is loaded brings all its numbers: none are computed first
    for name, (parent, child, layer) in zip(config.modules, found, strict=True):
        is_filled = set(_own_names(kind, (name,))) <= set(filled)
        with skip_initialisation() if is_filled else nullcontext():
            adapted = kind(layer, config, name)
        adapted.training = layer.training  # a new layer starts in training mode, where dropout acts
        setattr(parent, child, adapted)


def merge_lora(model: nn.Layer) -> int:
    """Adds every update to its weight and puts plain linear layers back, in place; quantised ones become float32.

    Returns:
        Number of layers merged.
    """
    names = [name for name, layer in model.named_sublayers() if isinstance(layer, LoRALinear)]
    for name in names:
        parent, child, layer = _find(model, name)
        plain = nn.Linear(1, 1, bias_attr=False)  # its tiny weight is replaced: nothing large is allocated twice
        with paddle.no_grad():
            merged = layer.merged_weight()
            if layer.is_quantized:
                plain.weight = plain.create_parameter(merged.shape, dtype="float32")
                plain.weight.set_value(merged)
            else:
                layer.weight.set_value(merged.astype(layer.weight.dtype))
                plain.weight = layer.weight
        plain.bias, plain.training = layer.bias, layer.training
        part = linear_part(layer)
        if part is not None:
            mark_linear(plain, part)
        setattr(parent, child, plain)
    return len(names)


def lora_parameters(model: nn.Layer) -> Iterator[tuple[str, paddle.Tensor]]:
    """(name, parameter) of every weight that is an adapter's own, start values included."""
    for name, parameter in model.named_parameters():
        if is_adapter_weight(name):
            yield name, parameter


def _own_names(kind: type[LoRALinear], modules: Collection[str]) -> Iterator[str]:
    return (f"{module}.{own}" for module in modules for own in kind.OWN)


def _find(model: nn.Layer, name: str) -> tuple[nn.Layer, str, Any]:
    *path, child = name.split(".")
    parent = model
    for part in path:
        parent = getattr(parent, part, None)
        if parent is None:
            raise UserError(f"LoRA module '{name}' does not exist in this model; is the adapter for another base?")
    return parent, child, getattr(parent, child, None)
