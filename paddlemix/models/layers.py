"""Building blocks that tower, projector and decoder share, and how their weights begin.

Source of the normalisation: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import paddle
from paddle import nn
from paddle.nn import functional

from paddlemix.models.kernels import cpu, cpu_library
from paddlemix.models.kernels.functions import RMSNormFunction
from paddlemix.models.kernels.fused import is_supported, selected_kernels

_initialise = True


@contextlib.contextmanager
def skip_initialisation() -> Iterator[None]:
    """Within this block new weights are zeros: for models whose weights are read from a checkpoint next."""
    global _initialise
    before, _initialise = _initialise, False
    try:
        yield
    finally:
        _initialise = before


def initialising() -> bool:
    """Whether new weights get start values, i.e. no `skip_initialisation` block is open."""
    return _initialise


def normal(std: float) -> nn.initializer.Initializer:
    """Normal weights, or zeros inside `skip_initialisation`."""
    return nn.initializer.Normal(0.0, std) if _initialise else nn.initializer.Constant(0.0)


def linear(in_features: int, out_features: int, std: float, bias: bool = False) -> nn.Linear:
    """A linear layer, weight [in_features, out_features]."""
    return nn.Linear(
        in_features,
        out_features,
        weight_attr=paddle.ParamAttr(initializer=normal(std)),
        bias_attr=paddle.ParamAttr(initializer=nn.initializer.Constant(0.0)) if bias else False,
    )


def apply_linear(layer: nn.Layer, inputs: paddle.Tensor) -> paddle.Tensor:
    """layer(inputs), a plain linear layer by `affine`."""
    return affine(inputs, layer.weight, layer.bias) if type(layer) is nn.Linear else layer(inputs)


def affine(inputs: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None) -> paddle.Tensor:
    """[..., in] times [in, out] plus [out]; where no gradient is wanted on CPU, in fewer passes."""
    if paddle.is_grad_enabled() or not cpu_library.is_supported(inputs, weight):
        return functional.linear(inputs, weight, bias)
    outputs = product(inputs, weight)
    if bias is None:
        return outputs
    return cpu.add_bias_(outputs, bias) if cpu_library.is_supported(bias) else outputs + bias


def product(inputs: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    """[..., in] times [in, out], without a gradient."""
    if cpu.supports_few_rows(math.prod(inputs.shape[:-1])) and cpu_library.is_supported(inputs, weight):
        return cpu.matmul_few(inputs, weight)
    return paddle.matmul(inputs, weight)


class RMSNorm(nn.Layer):
    """Scales the last axis to root mean square 1, in float32, then by a learned weight [size]."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))
        self.epsilon = epsilon

    def forward(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        """[..., size] -> [..., size], same dtype."""
        kernel = selected_kernels().rms_norm
        if kernel is not None and is_supported(hidden_states, self.weight):
            return kernel(hidden_states, self.weight, self.epsilon)
        return RMSNormFunction.apply(hidden_states, self.weight, self.epsilon)
