"""DoRA: the length of each output's weights is learned separately, the low-rank update changes their direction.

    V = W + scaling * A B        y = x V * (m / |V|)        m [out], |V| the lengths of V's columns

m begins as |W|, so that nothing changes at the start.  |V| is a constant in the backward pass.
Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5 and section 4.3.
"""

from __future__ import annotations

from typing import Any

import paddle

from paddlemix.models.kernels.formulas import linear
from paddlemix.models.kernels.linear_functions import NARROW_COST
from paddlemix.models.kernels.operators import dropout
from paddlemix.models.layers import initialising
from paddlemix.parallel.tensor.parts import mark
from paddlemix.peft.linear import LoRALinear
from paddlemix.peft.settings import LoRAConfig

_TINY = 1e-30  # a column of zeros has length 0 and magnitude 0


class DoRALinear(LoRALinear):
    """A linear layer whose weight is split into lengths and directions; see `LoRALinear` for the arguments.

    The lengths are recomputed for every input, which makes decoding token by token slow: merge the adapter for that.
    """

    OWN = (*LoRALinear.OWN, "lora_magnitude_vector")

    def __init__(self, base: Any, config: LoRAConfig, name: str = "") -> None:
        super().__init__(base, config, name)
        self.lora_magnitude_vector = self._new([self.out_features])
        if self.tensor_part is not None:  # its outputs are split, see `lora.py`: each length is of one process
            mark(self.lora_magnitude_vector, self.tensor_part.along(0))
        if initialising():  # B is zero, so V is W
            with paddle.no_grad():
                self.lora_magnitude_vector.set_value(_lengths(self.base_weight()).astype(self.adapter_dtype))

    def forward(self, inputs: paddle.Tensor) -> paddle.Tensor:
        """[..., in] -> [..., out].

        | when                                       | computed as                                        |
        |--------------------------------------------|----------------------------------------------------|
        | training with dropout                      | base on whole inputs, everything new on dropped    |
        | float32, many rows, a small layer          | one product with the merged weight                 |
        | else                                       | base and update, times the gain of each output     |
        """
        if self.dropout > 0 and self.training:
            return self._dropped(inputs)
        if self._is_added_first(inputs) and self._is_small():
            total = self._sum(self.weight)
            return linear(inputs, total * self._gain(total), self.bias)
        outputs = (self._plain(inputs, with_bias=False) + self._update(inputs)) * self._cast_gain(inputs)
        return outputs if self.bias is None else outputs + self.bias.astype(outputs.dtype)

    def _is_small(self) -> bool:
        """Whether a gradient of the weight's size costs less than products with the narrow factors."""
        size = self.in_features * self.out_features
        return size <= 3 * NARROW_COST * self.rank * (self.in_features + self.out_features)

    def merged_weight(self) -> paddle.Tensor:
        """[in, out] float32: the weight of the plain linear layer with the same outputs."""
        total = self._sum(self.base_weight())
        return total * self._gain(total)

    def _dropped(self, inputs: paddle.Tensor) -> paddle.Tensor:
        """With dropout the base layer gets whole inputs and everything new dropped ones, as in PEFT."""
        gain = self._cast_gain(inputs)
        dropped = dropout(inputs, self.dropout)
        # x W + d W (g - 1) + d A B s g: at the start g is 1 and B zero, so that dropout changes nothing yet
        change = self._plain(dropped, with_bias=False) * (gain - 1) + self._update(dropped) * gain
        return self._plain(inputs, with_bias=True) + change

    def _cast_gain(self, inputs: paddle.Tensor) -> paddle.Tensor:
        # in float32 even under autocast: a length is a sum of thousands of squares
        with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
            total = self._sum(self.base_weight())
        return self._gain(total).astype(inputs.dtype)

    def _gain(self, total: paddle.Tensor) -> paddle.Tensor:
        """[out] float32: magnitude over length, for the sum [in, out] of weight and update."""
        with paddle.no_grad():
            lengths = _lengths(total.detach())
        return self.lora_magnitude_vector.astype("float32") / lengths


def _lengths(weight: paddle.Tensor) -> paddle.Tensor:
    """[in, out] -> [out] float32: Euclidean length of each column, above 0."""
    return paddle.clip(paddle.sqrt(paddle.sum(paddle.square(weight.astype("float32")), axis=0)), min=_TINY)
