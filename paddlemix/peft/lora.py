"""LoRA: low-rank updates of linear layers, added, saved and merged without the model knowing.

    y = x W + scaling * dropout(x) A B        A [in, r] random, B [r, out] zero at the start

Parameter names are the linear layer's own plus `lora_A` and `lora_B`, as in PaddleMIX and PaddleNLP.
Source: Hu et al. 2021, "LoRA"; start values as in PEFT (Kaiming uniform with a = sqrt(5)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import paddle
from paddle import nn
from paddle.nn import functional

from paddlemix.errors import UserError
from paddlemix.models.layers import initialising

_NARROW_COST = 3


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Settings of one adapter; `modules` are the full names of the adapted layers.

    Args:
        r: rank, >= 1.
        lora_alpha: scaling is lora_alpha / r.
        lora_dropout: 0..1, on the adapter's input while training.
        modules: names of the linear layers, e.g. "language_model.layers.0.self_attn.q_proj".
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"lora_rank {self.r} must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout {self.lora_dropout} must be at least 0 and below 1")

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.lora_alpha / self.r

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `lora_config_from_dict` reads them."""
        return {**asdict(self), "modules": list(self.modules), "scaling": self.scaling}


def lora_config_from_dict(values: dict[str, Any]) -> LoRAConfig:
    """Reads an adapter's settings.

    Raises:
        UserError: a key is missing or a value is not allowed.
    """
    try:
        return LoRAConfig(
            r=int(values["r"]),
            lora_alpha=float(values["lora_alpha"]),
            lora_dropout=float(values.get("lora_dropout", 0.0)),
            modules=tuple(values["modules"]),
        )
    except KeyError as error:
        raise UserError(f"the adapter's settings have no key {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"the adapter's settings cannot be understood: {error}") from error


class LoRALinear(nn.Layer):
    """A linear layer with a low-rank update; takes the weights of the layer it replaces.

    Args:
        base: weight [in, out].
        config: rank, scaling, dropout.
    """

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        in_features, out_features = base.weight.shape
        self.scaling, self.dropout = config.scaling, config.lora_dropout
        bound = 1 / math.sqrt(in_features)  # Kaiming uniform with a = sqrt(5)
        start = nn.initializer.Uniform(-bound, bound) if initialising() else nn.initializer.Constant(0.0)
        dtype = base.weight.dtype
        # Adding the update to the weight first costs a product of full size in the backward pass but saves the narrow
        # ones, which run at about a third of the rate.  In low precision the sum would lose the update's last bits.
        narrow = 3 * _NARROW_COST * config.r * (in_features + out_features)
        self._one_product = dtype == paddle.float32 and in_features * out_features <= narrow
        self.lora_A = self.create_parameter([in_features, config.r], dtype=dtype, default_initializer=start)
        self.lora_B = self.create_parameter(
            [config.r, out_features], dtype=dtype, default_initializer=nn.initializer.Constant(0.0)
        )

    def forward(self, inputs: paddle.Tensor) -> paddle.Tensor:
        """[..., in] -> [..., out]."""
        dropping = self.dropout > 0 and self.training
        if self._one_product and not dropping:
            update = paddle.matmul(self.lora_A, self.lora_B) * self.scaling
            return functional.linear(inputs, self.weight + update, self.bias)
        outputs = functional.linear(inputs, self.weight, self.bias)
        if dropping:
            inputs = functional.dropout(inputs, self.dropout, training=True)
        return outputs + paddle.matmul(paddle.matmul(inputs, self.lora_A), self.lora_B) * self.scaling

    def merged_weight(self) -> paddle.Tensor:
        """[in, out] float32: the weight of the plain linear layer that gives the same outputs."""
        product = paddle.matmul(self.lora_A.astype("float32"), self.lora_B.astype("float32"))
        return self.weight.astype("float32") + product * self.scaling


def linear_names(model: nn.Layer) -> list[str]:
    """Full names of the linear layers of a model, adapted ones included."""
    return [name for name, layer in model.named_sublayers() if isinstance(layer, (nn.Linear, LoRALinear))]


def add_lora(model: nn.Layer, config: LoRAConfig) -> None:
    """Replaces the linear layers that `config.modules` names, in place.  Outputs do not change until B is trained.

    Raises:
        UserError: a name is no linear layer of the model; nothing is replaced then.
    """
    found = [_find(model, name) for name in config.modules]
    for name, (_, _, layer) in zip(config.modules, found, strict=True):
        if not isinstance(layer, nn.Linear):
            raise UserError(f"LoRA module '{name}' is no linear layer of this model; is the adapter for another base?")
    for parent, child, layer in found:
        adapted = LoRALinear(layer, config)
        adapted.training = layer.training  # a new layer starts in training mode, where dropout acts
        setattr(parent, child, adapted)


def merge_lora(model: nn.Layer) -> int:
    """Adds every update to its weight and puts plain linear layers back, in place.

    Returns:
        Number of layers merged.
    """
    names = [name for name, layer in model.named_sublayers() if isinstance(layer, LoRALinear)]
    for name in names:
        parent, child, layer = _find(model, name)
        with paddle.no_grad():
            layer.weight.set_value(layer.merged_weight().astype(layer.weight.dtype))
        plain = nn.Linear(1, 1, bias_attr=False)
        plain.weight, plain.bias = layer.weight, layer.bias
        setattr(parent, child, plain)
    return len(names)


def lora_parameters(model: nn.Layer) -> Iterator[tuple[str, paddle.Tensor]]:
    """(name, parameter) of every `lora_A` and `lora_B`."""
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in ("lora_A", "lora_B"):
            yield name, parameter


def _find(model: nn.Layer, name: str) -> tuple[nn.Layer, str, Any]:
    *path, child = name.split(".")
    parent = model
    for part in path:
        parent = getattr(parent, part, None)
        if parent is None:
            raise UserError(f"LoRA module '{name}' does not exist in this model; is the adapter for another base?")
    return parent, child, getattr(parent, child, None)
