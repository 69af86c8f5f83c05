"""A linear layer whose weight is stored in few bits and decoded, some outputs at a time, whenever it is used.

Plain Paddle operators (cast, gather, product), so that one layer serves CPU, GPU and NPU; on a CPU kernels in C replace
them where possible, and multiply few rows by the codes themselves.  Neither pass keeps the decoded weight: the backward
pass decodes it again.  Off the CPU `wide_weights.py` decodes it, with those of other layers.  Formats are in
`quantized_weight.py`; knows no model.

Source: Dettmers et al. 2023, "QLoRA".
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from paddlemix.models.kernels.functions import as_type, product_type
from paddlemix.models.kernels.operators import on_cpu
from paddlemix.parallel.tensor.parts import Part, whole_sides
from paddlemix.peft import cpu_products
from paddlemix.peft.quantized_weight import NF4_BLOCK, QuantizedWeight, padded_size
from paddlemix.peft.weight_parts import scale_places, split_arrays
from paddlemix.peft.wide_weights import WideGroup, block_scales, four_levels

# Of the decoded weight that exist at once on a CPU; smaller pieces cost more calls, larger ones leave the cache.
_WIDE_BYTES = 8 * 1024**2


class QuantizedLinear(nn.Layer):
    """A linear layer that stores its weight as codes; they are buffers, never trained, and keep their types.

    It begins without codes: `fill` or `store` sets them.

    Args:
        kind: one of `quantized_weight.KINDS`.
        weight_shape: (in, out) of what is held here.
        bias: [out], that of the layer it replaces.
        dtype: of the weight that it replaces, and of an adapter on the layer.
        part: which part of a weight [in, out] is held here, see `weight_parts`; None: all of it.

    Attributes:
        group: layers whose weights are decoded together off the CPU; at first this layer alone.
        whole_shape: (in, out) of the weight.
        arrays: those of the whole weight, by name.
        scale_places: of the nf4 blocks that are held here.
    """

    def __init__(
        self,
        kind: str,
        weight_shape: tuple[int, int],
        bias: paddle.Tensor | None = None,
        dtype: paddle.dtype = paddle.float32,
        part: Part | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.weight_shape, self.bias, self.weight_dtype = kind, weight_shape, bias, dtype
        self.group, self.tensor_part = WideGroup([self]), part
        self.whole_shape = whole_sides(self, weight_shape)
        self.arrays, self.scale_places = split_arrays(kind, self.whole_shape), scale_places(self.whole_shape, part)
        self._rows = _ROWS.get(kind, _half_rows)

    @property
    def filled(self) -> bool:
        """Whether all codes are set."""
        return all(name in self._buffers for name in self.arrays)

    @property
    def num_bytes(self) -> int:
        """Bytes of what is held here of the weight, without the bias."""
        shapes = ((held.dtype.itemsize, held.shape(self.tensor_part)) for held in self.arrays.values())
        return sum(size * math.prod(shape) for size, shape in shapes)

    def store(self, name: str, array: np.ndarray) -> None:
        """Sets one of the arrays of `quantized_weight.stored_arrays`.

        Args:
            array: of the whole weight; a layer with a part of it keeps its own.

        Raises:
            ValueError: there is no such array, or its type or shape differs.
        """
        expected = self.arrays.get(name)
        if expected is None or (expected.dtype, expected.whole) != (array.dtype, array.shape):
            raise ValueError(f"array '{name}' is {array.dtype} {list(array.shape)}, expected {expected}")
        array = expected.cut(array, self.tensor_part)
        if self.kind == "nf4" and name == "weight_codes":
            array = np.ascontiguousarray(array).view(np.int16)  # four weights are looked up at once
        codes = paddle.to_tensor(np.ascontiguousarray(array))
        codes.no_sync = True  # read from the same file by every process; gloo and NCCL cannot send int16
        self.register_buffer(name, codes)
        self.group.forget()

    def stored(self, name: str) -> np.ndarray:
        """One of the arrays, as `store` accepts it, or what is held here of it."""
        return self._buffers[name].numpy().view(self.arrays[name].dtype)

    def fill(self, weight: QuantizedWeight) -> None:
        """Sets all codes.

        Args:
            weight: whole.

        Raises:
            ValueError: the weight is of another kind or shape.
        """
        if (weight.kind, weight.shape) != (self.kind, self.whole_shape):
            raise ValueError(f"{weight.kind} {weight.shape} does not fit a layer of {self.kind} {self.whole_shape}")
        for name, array in weight.arrays.items():
            self.store(name, array)

    def forward(self, inputs: paddle.Tensor) -> paddle.Tensor:
        """[..., in] -> [..., out]."""
        in_features, out_features = self.weight_shape
        outputs = _Product.apply(inputs.reshape([-1, in_features]), self)
        outputs = outputs.reshape([*inputs.shape[:-1], out_features])
        return outputs if self.bias is None else outputs + self.bias.astype(outputs.dtype)

    def dequantized(self) -> paddle.Tensor:
        """[in, out] float32: the weight of the plain linear layer with the same outputs."""
        # | codes are                  | decoded by                          |
        # |----------------------------|-------------------------------------|
        # | on a CPU, kernels in C     | one call                            |
        # | on another device          | the way of `wide_weights.py`        |
        # | on a CPU without kernels   | paddle's operators, piece by piece  |
        in_features, out_features = self.weight_shape
        with paddle.no_grad():
            if cpu_products.can_decode(self.kind, self._buffers):
                rows = paddle.empty([out_features, in_features], dtype="float32")
                cpu_products.decode_(rows, self.kind, self._buffers, self.scale_places)
            elif not on_cpu(next(iter(self._buffers.values()))):
                rows = WideGroup([self]).made(paddle.float32)[0] if self.kind in _ROWS else self.wide(paddle.float32)
            else:
                rows = paddle.concat([rows for _, rows in self.wide_rows(paddle.float32, scaled=True)])
            return rows.transpose([1, 0])

    def wide(self, dtype: paddle.dtype) -> paddle.Tensor:
        """[out, in] off the CPU, decoded together with those of its group; valid until another group is decoded."""
        if self.kind in _ROWS:
            return self.group.weight(self, dtype)
        return as_type(self.weight_values, dtype)

    def wide_rows(self, dtype: Any, scaled: bool) -> Iterator[tuple[slice, paddle.Tensor]]:
        """(outputs, their weights [n, in]), piece by piece; each is valid until the next.

        Args:
            dtype: of the pieces.
            scaled: False leaves out the factors that `output_scale` applies to the outputs.
        """
        in_features, out_features = self.weight_shape
        step = min(max(_WIDE_BYTES // (4 * padded_size(in_features)), 1), out_features)
        compiled = cpu_products.can_decode(self.kind, self._buffers)
        rows = None
        for start in range(0, out_features, step):
            outputs = slice(start, min(start + step, out_features))
            if not compiled:
                rows = self._rows(self, outputs, scaled)
            else:
                if rows is None or outputs.stop - start < step:
                    rows = paddle.empty([outputs.stop - start, in_features], dtype="float32")
                cpu_products.decode_(rows, self.kind, self._buffers, self.scale_places, start, scaled)
            yield outputs, rows.astype(dtype)

    def output_scale(self) -> paddle.Tensor | None:
        """float32 [out] if a kind has one factor per output, which is cheaper on the outputs than on the weight."""
        return self.weight_scale if self.kind == "int8" else None

    def _apply(self, func: Any, device: Any, dtype: Any, blocking: Any, include_sublayers: bool = True) -> None:
        """`Layer.to`: moves to a device, but codes and scales keep their types."""
        super()._apply(func, device, None, blocking, include_sublayers)
        self.weight_dtype = self.weight_dtype if dtype is None else dtype
        self.group.forget()


class _Product(PyLayer):
    """inputs [n, in] x weight [in, out]; the gradient is that of the inputs alone."""

    @staticmethod
    def forward(ctx: Any, inputs: paddle.Tensor, layer: QuantizedLinear) -> paddle.Tensor:
        ctx.layer, ctx.dtype = layer, inputs.dtype
        # | inputs                                | product                                            |
        # |---------------------------------------|----------------------------------------------------|
        # | few rows, float32, CPU, kernels in C  | with the codes themselves                          |
        # | off the CPU                           | with the whole decoded weight, shared by its group |
        # | anything else                         | piece by piece, each decoded and dropped           |
        if cpu_products.is_faster(layer.kind, layer._buffers, inputs):
            return cpu_products.product(layer.kind, layer._buffers, layer.scale_places, inputs)
        if not on_cpu(inputs):
            return paddle.matmul(inputs, layer.wide(product_type(inputs)), transpose_y=True)
        scale = _scale_outside(layer, inputs)
        wide = layer.wide_rows(inputs.dtype, scaled=scale is None)
        outputs = [paddle.matmul(inputs, rows, transpose_y=True) for _, rows in wide]
        joined = outputs[0] if len(outputs) == 1 else paddle.concat(outputs, axis=-1)
        return joined if scale is None else joined * scale

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        if not on_cpu(grad):
            return as_type(paddle.matmul(grad, ctx.layer.wide(grad.dtype)), ctx.dtype)
        scale = _scale_outside(ctx.layer, grad)
        if scale is not None:
            grad = grad * scale
        wide = ctx.layer.wide_rows(grad.dtype, scaled=scale is None)
        # outputs are cut into pieces, so the inputs' gradient is a sum over them: in float32, rounded once
        parts = (paddle.matmul(grad[:, outputs], rows).astype("float32") for outputs, rows in wide)
        return functools.reduce(operator.add, parts).astype(ctx.dtype)


def _scale_outside(layer: QuantizedLinear, values: paddle.Tensor) -> paddle.Tensor | None:
    """The factors of the outputs, if they may be applied after the product: in float16 unscaled codes exceed the range.
    Kernels in C scale while they decode."""
    if cpu_products.can_decode(layer.kind, layer._buffers):
        return None
    return layer.output_scale() if values.place.is_cpu_place() and values.dtype == paddle.float32 else None


def _int8_rows(layer: QuantizedLinear, outputs: slice, scaled: bool) -> paddle.Tensor:
    """float32 [n, in]."""
    codes = layer.weight_codes[outputs].astype("float32")
    return codes * layer.weight_scale[outputs].unsqueeze(-1) if scaled else codes


def _nf4_rows(layer: QuantizedLinear, outputs: slice, scaled: bool) -> paddle.Tensor:
    """float32 [n, in]."""
    in_features = layer.weight_shape[0]
    blocks, count = padded_size(in_features) // NF4_BLOCK, outputs.stop - outputs.start
    scales = block_scales(layer, outputs)
    codes = layer.weight_codes[outputs]
    index = codes.flatten().astype("int32") + 2**15
    levels = paddle.gather(four_levels(str(codes.place)), index).reshape([count * blocks, NF4_BLOCK])
    rows = (levels * scales).reshape([count, blocks * NF4_BLOCK])
    return rows if blocks * NF4_BLOCK == in_features else rows[:, :in_features]


def _half_rows(layer: QuantizedLinear, outputs: slice, scaled: bool) -> paddle.Tensor:
    """[n, in] as it is stored."""
    return layer.weight_values[outputs]


_ROWS = {"int8": _int8_rows, "nf4": _nf4_rows}
