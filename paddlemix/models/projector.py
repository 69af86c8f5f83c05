"""The projector: tower features to the language model's width.

Source: haotian-liu/LLaVA llava/model/multimodal_projector/builder.py (commit c121f04).
"""

from __future__ import annotations

import paddle
from paddle import nn

from paddlemix.models.configuration import projector_depth
from paddlemix.models.layers import apply_linear, linear


def build_projector(mm_projector_type: str, in_size: int, out_size: int, std: float = 0.02) -> nn.Layer:
    """Builds a projector [.., in_size] -> [.., out_size].

    A "linear" one is the layer itself and not a sequence of one, so that its weights have the reference's names.

    Args:
        mm_projector_type: "linear", "mlpNx_gelu" (N linear layers with exact GELU between) or "identity" (no weights).
        std: standard deviation of new weights.

    Raises:
        UserError: another type.
    """
    if mm_projector_type == "linear":
        return linear(in_size, out_size, std, bias=True)
    depth = projector_depth(mm_projector_type)
    layers: list[nn.Layer] = []
    for number in range(depth):
        if number:
            layers.append(nn.GELU())
        layers.append(linear(in_size if number == 0 else out_size, out_size, std, bias=True))
    return nn.Sequential(*layers)


def run_projector(projector: nn.Layer, features: paddle.Tensor) -> paddle.Tensor:
    """[..., in_size] -> [..., out_size]."""
    for layer in projector if isinstance(projector, nn.Sequential) else [projector]:
        features = apply_linear(layer, features)
    return features
