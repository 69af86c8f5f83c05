"""A model whose language model's linear layers are stored in few bits.

    quantize_model(model, QuantizationConfig(kind="nf4"))      # in place, layer by layer

Tower, projector, embeddings and output layer stay as they are.  The layer is in `quantized_linear.py`, formats are in
`quantized_weight.py`; how a checkpoint is quantised while it is read is in `checkpoints/quantized.py`.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from dataclasses import dataclass
from typing import Any

from paddle import nn

from paddlemix.errors import UserError
from paddlemix.parallel.tensor.parts import linear_part, whole_sides
from paddlemix.parallel.tensor.split_plan import allowed_degrees, linear_parts
from paddlemix.peft.linear import LoRALinear
from paddlemix.peft.quantized_linear import QuantizedLinear
from paddlemix.peft.quantized_weight import NF4_BLOCK, check_kind, quantize_weight
from paddlemix.peft.weight_parts import falls_on_blocks
from paddlemix.peft.wide_weights import WideGroup

QUANT_METHOD = "paddlemix"  # of `quantization_config` in config.json
_PART = "language_model."  # tower, projector and output layer are small or sensitive: they stay as they are
_DECODER_LAYER = re.compile(r".*\.layers\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the linear layers of a language model are stored.

    Args:
        kind: "int8", "nf4", "bfloat16" or "float16", see `quantized_weight`.
        skip: patterns (`fnmatch`) of full layer names that stay as they are, e.g. "*.down_proj".
    """

    kind: str
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_kind(self.kind)

    def to_dict(self) -> dict[str, Any]:
        """The value of `quantization_config` in config.json."""
        return {"quant_method": QUANT_METHOD, "kind": self.kind, "skip": list(self.skip)}


def quantizable_names(model: nn.Layer, skip: tuple[str, ...] = ()) -> list[str]:
    """Full names of the linear layers that `quantize_model` replaces.

    Raises:
        UserError: a pattern of `skip` matches none of them, or the model is already quantised or has an adapter.
    """
    for layer in model.sublayers():
        if isinstance(layer, QuantizedLinear):
            raise UserError(f"the model is already quantised ({layer.kind}); use the one that it was made from")
        if isinstance(layer, LoRALinear):
            raise UserError("the model has an adapter; quantise it before adding one, or merge the adapter first")
    names = [name for name, layer in model.named_sublayers() if name.startswith(_PART) and isinstance(layer, nn.Linear)]
    # a pattern without a match is a typo: the layer it was to spare would be quantised
    for pattern in skip:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"skip: '{pattern}' matches no linear layer of the language model (they are named like "
                f"{names[0] if names else 'none'})"
            )
    return [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)]


def quantize_model(model: nn.Layer, config: QuantizationConfig) -> int:
    """Replaces the language model's linear layers in place, one at a time.

    Returns:
        Number of layers replaced.

    Raises:
        UserError: the model is already quantised, a pattern matches nothing, or a weight cannot be quantised.
    """
    names = quantizable_names(model, config.skip)
    for name in names:
        parent, child, layer = _find(model, name)
        shape = tuple(layer.weight.shape)
        try:
            weight = quantize_weight(layer.weight.numpy(), config.kind)
        except UserError as error:
            raise UserError(f"'{name}.weight' cannot be quantised: {error}") from error
        # replaced before the next is quantised, so that one float weight at most exists beside its codes
        replacement = _replace(parent, child, QuantizedLinear(config.kind, shape, layer.bias, layer.weight.dtype))
        replacement.fill(weight)
    _join_groups(model)
    return len(names)


def prepare_quantized(model: nn.Layer, config: QuantizationConfig) -> int:
    """Replaces the same layers by ones without codes, to be filled from a checkpoint.

    A layer that has a part of a weight is replaced by one that keeps this part of its codes, see `weight_parts`.

    Returns:
        Number of layers replaced.

    Raises:
        UserError: see `quantize_model`; or the parts of a tensor group end inside blocks of nf4.
    """
    # the layer is lazy: its weight's shape is known, its memory was never allocated
    names = quantizable_names(model, config.skip)
    if config.kind == "nf4":
        _check_blocks(model, names)
    for name in names:
        parent, child, layer = _find(model, name)
        shape, dtype = tuple(layer.weight.shape), layer.weight.dtype
        _replace(parent, child, QuantizedLinear(config.kind, shape, layer.bias, dtype, linear_part(layer)))
    _join_groups(model)
    return len(names)


def _check_blocks(model: Any, names: list[str]) -> None:
    """Refuses parts of inputs that end inside a block of nf4."""
    layers = dict(model.named_sublayers())
    split = [name for name in names if linear_part(layers[name]) is not None]
    if not split:
        return
    sizes, degree = model.config.text, model.layout.tensor_degree

    def cut(degree: int) -> list[str]:
        # The parts of all processes, so that all of them raise the same.
        plans = [linear_parts(sizes, degree, rank) for rank in range(degree)]
        kinds = {kind for plan in plans for kind, part in plan.items() if not falls_on_blocks(part)}
        return [name for name in split if name.rpartition(".")[2] in kinds]

    found = cut(degree)
    if found:
        inputs = whole_sides(layers[found[0]], layers[found[0]].weight.shape)[0]
        fitting = ", ".join(str(other) for other in allowed_degrees(sizes) if not cut(other))
        raise UserError(
            f"nf4 has blocks of {NF4_BLOCK} inputs, and tensor parallelism of degree {degree} cuts those of "
            f"'{found[0]}' ({inputs} inputs; {len(found)} layers in all); use int8 "
            '(quantize_base "int8", --load-8bit), or '
            f"a tensor_parallel_degree (--tensor-parallel) of {fitting}"
        )


def _join_groups(model: nn.Layer) -> None:
    """One group per decoder layer: its linear layers are used in quick succession."""
    # off the CPU each group is decoded together, see `wide_weights.py`; layers outside any decoder layer stay alone
    groups: dict[str, list[QuantizedLinear]] = {}
    for name, layer in quantized_linears(model).items():
        found = _DECODER_LAYER.match(name)
        groups.setdefault(found[0] if found else name, []).append(layer)
    for layers in groups.values():
        group = WideGroup(layers)
        for layer in layers:
            layer.group = group


def quantization_of(model: nn.Layer) -> QuantizationConfig | None:
    """How a model is stored, so that another can be prepared alike; None if no layer is quantised."""
    found = quantized_linears(model)
    if not found:
        return None
    # plain linear layers of the language model were spared by `skip`, here by their full names
    plain = (name for name, layer in model.named_sublayers() if isinstance(layer, nn.Linear))
    skip = tuple(name for name in plain if name.startswith(_PART))
    return QuantizationConfig(kind=next(iter(found.values())).kind, skip=skip)


def quantized_linears(model: nn.Layer) -> dict[str, QuantizedLinear]:
    """Full name -> layer, for every quantised layer of a model."""
    return {name: layer for name, layer in model.named_sublayers() if isinstance(layer, QuantizedLinear)}


def _replace(parent: nn.Layer, child: str, layer: nn.Layer) -> Any:
    layer.training = getattr(parent, child).training
    setattr(parent, child, layer)
    return layer


def _find(model: nn.Layer, name: str) -> tuple[nn.Layer, str, Any]:
    *path, child = name.split(".")
    parent = functools.reduce(getattr, path, model)
    return parent, child, getattr(parent, child)
