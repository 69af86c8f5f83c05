"""The layer that replaces a linear layer under an adapter.

    y = x W + scaling * dropout(x) A B        A [in, r] random, B [r, out] zero at the start

Parameter names are the linear layer's own plus `lora_A` and `lora_B`, as in PaddleMIX and PaddleNLP.
Source: Hu et al. 2021, "LoRA"; start values as in PEFT (Kaiming uniform with a = sqrt(5)).
"""

from __future__ import annotations

import math
from typing import Any

import paddle
from paddle import nn

from paddlemix.models.kernels.formulas import linear
from paddlemix.models.kernels.functions import as_type
from paddlemix.models.kernels.linear_functions import NARROW_COST, DroppedLowRankFunction, LowRankLinearFunction
from paddlemix.models.kernels.operators import difference, on_cpu
from paddlemix.models.layers import initialising
from paddlemix.parallel.tensor.parts import linear_part, whole_sides
from paddlemix.peft.quantized_base import QuantizedBase
from paddlemix.peft.settings import LoRAConfig
from paddlemix.peft.split_adapters import dropping_of, split_factors


class LoRALinear(nn.Layer):
    """A linear layer with a low-rank update.

    Args:
        base: a linear layer, weight [in, out], whose weight becomes this layer's; or a `QuantizedBase`, which becomes
            its sublayer `base`.
        config: rank, scaling, dropout.
        name: of the replaced layer in the model, for the patterns of `config`.

    Inside `skip_initialisation` the adapter's weights are zeros.
    """

    OWN: tuple[str, ...] = ("lora_A", "lora_B")

    def __init__(self, base: Any, config: LoRAConfig, name: str = "") -> None:
        super().__init__()
        self.is_quantized = isinstance(base, QuantizedBase)
        if self.is_quantized:
            self.base = base
            in_features, out_features = base.weight_shape
        else:
            self.weight = base.weight
            in_features, out_features = base.weight.shape
        self.bias = base.bias
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.scaling, self.dropout = config.rank_of(name), config.scaling_of(name), config.lora_dropout
        self.adapter_dtype = base.weight_dtype if self.is_quantized else base.weight.dtype
        # In low precision the sum of weight and update would lose the update's last bits.
        self._sums_are_exact = not self.is_quantized and self.adapter_dtype == paddle.float32
        # For few rows, e.g. of one decoded token, the product of A and B costs more than those with the inputs.
        self._least_rows = in_features * out_features / (NARROW_COST * (in_features + out_features))
        self.tensor_part = linear_part(base)
        whole_in = whole_sides(base, (in_features, out_features))[0]
        bound = 1 / math.sqrt(whole_in)  # Kaiming uniform with a = sqrt(5)
        start = nn.initializer.Uniform(-bound, bound) if initialising() else nn.initializer.Constant(0.0)
        self.lora_A = self._new([whole_in, self.rank], start)
        self.lora_B = self._new([self.rank, out_features])
        split_factors(self)

    def _new(self, shape: list[int], start: nn.initializer.Initializer | None = None) -> paddle.Tensor:
        start = start or nn.initializer.Constant(0.0)
        return self.create_parameter(shape, dtype=self.adapter_dtype, default_initializer=start)

    def forward(self, inputs: paddle.Tensor) -> paddle.Tensor:
        """[..., in] -> [..., out].

        | base, rows, dropout                     | gradient | computed as                               |
        |-----------------------------------------|----------|-------------------------------------------|
        | float32, many rows, none                | no       | x (W + s A B), one product                |
        | float32, many rows or on a card, none   | yes      | the same, by a function with its own pass |
        | any other without dropout               | any      | x W + s (x A) B                           |
        | training with dropout                   | yes      | x W + s dropout(x) A B, mask not stored   |
        """
        dropping = self.dropout > 0 and self.training
        if self._is_added_first(inputs) and not dropping:
            if not paddle.is_grad_enabled():  # the same product as of the layer without an adapter
                return linear(inputs, self._sum(self.weight), self.bias)
            outputs = LowRankLinearFunction.apply(inputs, self.weight, *self.factors(), self.scaling)
            return outputs if self.bias is None else outputs + self.bias
        outputs = self._plain(inputs, with_bias=True)
        if dropping:
            dropping = dropping_of(self.dropout, self.tensor_part)
            return outputs + DroppedLowRankFunction.apply(inputs, *self.factors(), self.scaling, dropping)
        return outputs + self._update(inputs)

    def factors(self) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Two matrices [in, k] and [k, out] whose product, times the scaling, is the update of the weight."""
        return self.lora_A, self.lora_B

    def merged_weight(self) -> paddle.Tensor:
        """[in, out] float32: the weight of the plain linear layer with the same outputs."""
        return self._sum(self.base_weight())

    def base_weight(self) -> paddle.Tensor:
        """[in, out] float32: the weight without the adapter."""
        return self.base.dequantized() if self.is_quantized else self.weight.astype("float32")

    def _is_added_first(self, inputs: paddle.Tensor) -> bool:
        # under autocast the products are in low precision, and the sum with them
        if not self._sums_are_exact or paddle.amp.is_autocast_enabled():
            return False
        # Processes that share gradients send them in the order of their graphs, which must not depend on the data.
        in_one_way = paddle.is_grad_enabled() and not on_cpu(inputs)
        return in_one_way or inputs.size >= self._least_rows * self.in_features

    def _plain(self, inputs: paddle.Tensor, with_bias: bool) -> paddle.Tensor:
        """The base layer's outputs."""
        if not self.is_quantized:
            return linear(inputs, self.weight, self.bias if with_bias else None)
        outputs = self.base(inputs)  # with the bias, which is taken off again where it must be added last
        return outputs if with_bias or self.bias is None else difference(outputs, self.bias.astype(outputs.dtype))

    def _update(self, inputs: paddle.Tensor) -> paddle.Tensor:
        """What the adapter adds to the base layer's outputs."""
        # the factors are in the type of the weight, inputs may be in another where the base is quantised
        first, second = (as_type(factor, inputs.dtype) if self.is_quantized else factor for factor in self.factors())
        narrow = paddle.matmul(inputs, first)  # [..., in] -> [..., r]
        if on_cpu(inputs):
            return paddle.matmul(narrow, second) * self.scaling
        return paddle.matmul(narrow * self.scaling, second)

    def _sum(self, weight: paddle.Tensor) -> paddle.Tensor:
        """A weight [in, out] with the update added, in the weight's dtype."""
        first, second = (as_type(factor, weight.dtype) for factor in self.factors())
        return weight + paddle.matmul(first, second) * self.scaling
