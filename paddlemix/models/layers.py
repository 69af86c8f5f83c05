"""Building blocks that tower, projector and decoder share, and how their weights begin.

Source of the normalisation: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import nn

from paddlemix.models.kernels import formulas

_initialise = True


@contextlib.contextmanager
def skip_initialisation() -> Iterator[None]:
    """Within this block new weights are zeros: for models whose weights are read from a checkpoint next."""
    global _initialise
    # Random numbers take long to draw, and a checkpoint would overwrite them.
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


# Forward hooks may be what makes a layer's weights whole for as long as it runs: several processes that share one model
# hold parts of them.  So a layer that has hooks is called, or its weights are used between its hooks.


def apply_linear(layer: nn.Layer, inputs: paddle.Tensor) -> paddle.Tensor:
    """layer(inputs), [..., in] -> [..., out]."""
    # A call of a layer costs as much as a small product; one with an adapter or quantised weights is called.
    return formulas.linear(inputs, layer.weight, layer.bias) if _is_open(layer) else layer(inputs)


def between_hooks(layer: nn.Layer, compute: Callable[[paddle.Tensor], Any], inputs: paddle.Tensor) -> Any:
    """compute(inputs) in place of layer.forward(inputs), between the layer's forward hooks, as if it had been called.

    Args:
        compute: may use the layer's weights, and `layer.forward`, but not call the layer.

    Returns:
        What `compute` returns, a tensor or a tuple of some, as the hooks pass it on.
    """
    for hook in list(layer._forward_pre_hooks.values()):
        changed = hook(layer, (inputs,))
        inputs = inputs if changed is None else changed[0]
    return after_hooks(layer, inputs, compute(inputs))


def after_hooks(layer: nn.Layer, inputs: paddle.Tensor, outputs: Any) -> Any:
    """What a layer's forward hooks make of its outputs."""
    for hook in list(layer._forward_post_hooks.values()):
        changed = hook(layer, (inputs,), outputs)
        outputs = outputs if changed is None else changed
    return outputs


def _is_open(layer: nn.Layer) -> bool:
    """Whether a layer is a plain linear one whose weight may be used without calling it."""
    return type(layer) is nn.Linear and not layer._forward_pre_hooks and not layer._forward_post_hooks


class RMSNorm(nn.Layer):
    """Scales the last axis to root mean square 1, in float32, then by a learned weight [size]."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))
        self.epsilon = epsilon

    def forward(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """[..., size] -> [..., size], same dtype."""
        return formulas.rms_norm(hidden, self.weight, self.epsilon)

    # The formula of a block is attn(norm(x)).  If norm(x) were computed at once, training on CPU would keep it next to
    # x for the gradients of the linear layers; a `DeferredNorm` lets them compute it again.
    def deferred(self, hidden: paddle.Tensor) -> DeferredNorm:
        """norm(hidden), left to the linear layers that read it."""
        return DeferredNorm(self, hidden)


@dataclass(frozen=True)
class DeferredNorm:
    """norm(hidden), not computed yet: together with the linear layers that read it, training keeps one tensor less.

    Args:
        norm: the layer.
        hidden: [..., size].
    """

    norm: RMSNorm
    hidden: paddle.Tensor

    def linears(self, *layers: nn.Layer) -> list[paddle.Tensor]:
        """Linear layers of norm(hidden), [..., out] each."""
        # Only plain products: a layer with an adapter, a bias or quantised weights has a forward pass of its own.
        matrices = [layer.weight for layer in layers if _is_product(layer)]
        norm, hidden = self.norm, self.hidden
        if len(matrices) == len(layers) and formulas.supports_rms_norm_linears(hidden, norm.weight, matrices):
            return formulas.rms_norm_linears(hidden, norm.weight, norm.epsilon, matrices)
        normed = norm(hidden)
        return [apply_linear(layer, normed) for layer in layers]

    def computed(self, first: int = 0) -> paddle.Tensor:
        """norm(hidden) of the positions from `first` on, of hidden [B, L, size]."""
        part = self.hidden[:, first:].contiguous() if first else self.hidden  # recomputation loses a view's strides
        return self.norm(part)


def swiglu_linear(layer: nn.Layer, gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """A linear layer of silu(gate) * up, [..., in] -> [..., out]."""
    if _is_product(layer) and formulas.supports_swiglu_linear(gate, up, layer.weight):
        return formulas.swiglu_linear(gate, up, layer.weight)
    return apply_linear(layer, formulas.swiglu(gate, up))


def _is_product(layer: nn.Layer) -> bool:
    """Whether a layer is the product with its weight and nothing else."""
    return _is_open(layer) and layer.bias is None
