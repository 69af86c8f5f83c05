"""What an adapter needs of a layer that is stored in few bits; the layer is in `quantized_linear.py`."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import paddle


@runtime_checkable
class QuantizedBase(Protocol):
    """A linear layer whose weight is stored in fewer bits; maps [..., in] to [..., out].

    Args:
        weight_shape: (in, out).
        weight_dtype: of the original weight, and of its adapter.
        bias: [out] or None; calling the layer adds it.
    """

    weight_shape: tuple[int, int]
    weight_dtype: paddle.dtype
    bias: paddle.Tensor | None

    def __call__(self, inputs: paddle.Tensor) -> paddle.Tensor: ...

    def dequantized(self) -> paddle.Tensor:
        """[in, out] float32."""
        ...
