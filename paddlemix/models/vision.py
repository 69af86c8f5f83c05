"""The vision tower: a CLIP or InternViT vision transformer up to the selected hidden state.

Layers after the selected one and the final norm have no part in LLaVA; they are neither built nor run.  Whatever a
family lacks is an identity, so that `forward` has no branch for it.
Sources: Radford et al. 2021, "CLIP", numbers checked against transformers' CLIPVisionModel; Chen et al. 2023,
"InternVL", section 3.2, and InternVisionModel of OpenGVLab/InternVL.
"""

from __future__ import annotations

import paddle
from paddle import nn
from paddle.nn import functional

from paddlemix.models.attention import attend
from paddlemix.models.configuration import VisionConfig
from paddlemix.models.kernels import formulas
from paddlemix.models.kernels.threads import map_rows
from paddlemix.models.layers import RMSNorm, apply_linear, linear, normal

# "quick_gelu" is the sigmoid approximation that CLIP was trained with
_ACTIVATIONS = {"quick_gelu": formulas.quick_gelu, "gelu": functional.gelu}
_NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": RMSNorm}


class LayerScale(nn.Layer):
    """Multiplies every channel by a learned number (Touvron et al. 2021, "Going deeper with Image Transformers")."""

    def __init__(self, size: int, start: float) -> None:
        super().__init__()
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(start))

    def forward(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """[..., size] -> [..., size]."""
        return hidden * self.weight


class VisionAttention(nn.Layer):
    """Self-attention over the patches of a tile."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.heads = config.num_attention_heads
        self.q_proj = linear(width, width, std, bias=config.qkv_bias)
        self.k_proj = linear(width, width, std, bias=config.qkv_bias)
        self.v_proj = linear(width, width, std, bias=config.qkv_bias)
        normalised = config.qk_normalization
        self.q_norm = RMSNorm(width, config.layer_norm_eps) if normalised else nn.Identity()
        self.k_norm = RMSNorm(width, config.layer_norm_eps) if normalised else nn.Identity()
        self.out_proj = linear(width, width, std, bias=True)

    def forward(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """[N, P+1, C] -> [N, P+1, C]."""
        tiles, length, width = hidden.shape
        shape = [tiles, length, self.heads, width // self.heads]
        queries, keys, values = (apply_linear(layer, hidden) for layer in (self.q_proj, self.k_proj, self.v_proj))
        states = (self.q_norm(queries), self.k_norm(keys), values)
        # InternViT normalises over all heads together, before they are split.
        queries, keys, values = (part.reshape(shape) for part in states)
        return apply_linear(self.out_proj, attend(queries, keys, values))


class VisionMLP(nn.Layer):
    """Feed-forward part."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.fc1 = linear(config.hidden_size, config.intermediate_size, config.initializer_range, bias=True)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, config.initializer_range, bias=True)

    def forward(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """[N, P+1, C] -> [N, P+1, C]."""
        return apply_linear(self.fc2, self.activation(apply_linear(self.fc1, hidden)))


class VisionLayer(nn.Layer):
    """Attention and feed-forward part, each after a norm and added to its input."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        norm, width, scale = _NORMS[config.norm_type], config.hidden_size, config.layer_scale
        self.layer_norm1 = norm(width, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_scale1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.layer_norm2 = norm(width, config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.layer_scale2 = nn.Identity() if scale is None else LayerScale(width, scale)

    def forward(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """[N, P+1, C] -> [N, P+1, C]."""
        hidden = hidden + self.layer_scale1(self.self_attn(self.layer_norm1(hidden)))
        return hidden + self.layer_scale2(self.mlp(self.layer_norm2(hidden)))


class VisionTower(nn.Layer):
    """Tiles to patch features.

    Args:
        config: sizes of the whole tower.
        num_layers: layers to build and run, see `LlavaConfig.num_tower_layers`.
        keep_class_token: return the class token's features before the patches'.
    """

    def __init__(self, config: VisionConfig, num_layers: int, keep_class_token: bool) -> None:
        super().__init__()
        self.config, self.keep_class_token = config, keep_class_token
        width, start = config.hidden_size, normal(config.initializer_range)
        self.class_embedding = self.create_parameter([width], default_initializer=start)
        self.patch_embedding = self.create_parameter(
            [width, config.num_channels, config.patch_size, config.patch_size], default_initializer=start
        )
        self.patch_bias = self.create_parameter([width], is_bias=True) if config.patch_bias else None
        self.position_embedding = self.create_parameter([config.num_patches + 1, width], default_initializer=start)
        self.pre_layernorm = nn.LayerNorm(width, config.layer_norm_eps) if config.outer_norms else nn.Identity()
        self.layers = nn.LayerList([VisionLayer(config) for _ in range(num_layers)])

    def forward(self, pixel_values: paddle.Tensor) -> paddle.Tensor:
        """Features of the selected hidden state.

        Args:
            pixel_values: [N, 3, H, W] normalised, H = W = `image_size`.

        Returns:
            [N, P, C], or [N, P+1, C] with the class token first.
        """
        if self._trains():
            return self._encode(pixel_values)
        # In training a tile's features do not depend on its neighbours, not even in the last bit: those that were kept
        # on disk equal those that are computed.
        return map_rows(self._encode, pixel_values, reproducible=self.training)

    def _trains(self) -> bool:
        return paddle.is_grad_enabled() and any(not weight.stop_gradient for weight in self.parameters())

    def _encode(self, pixel_values: paddle.Tensor) -> paddle.Tensor:
        hidden = self.pre_layernorm(self._embed(pixel_values))
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden if self.keep_class_token else hidden[:, 1:]

    def _embed(self, pixel_values: paddle.Tensor) -> paddle.Tensor:
        # An image size that is not a multiple of the patch leaves a margin, which a convolution would not reach either.
        tiles, channels = pixel_values.shape[:2]
        patch, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        cut = pixel_values[:, :, : side * patch, : side * patch]
        cells = cut.reshape([tiles, channels, side, patch, side, patch])
        # [N, 3, side, p, side, p] -> [N, P, 3 * p * p]
        cells = cells.transpose([0, 2, 4, 1, 3, 5]).reshape([tiles, side * side, channels * patch * patch])
        kernel = self.patch_embedding.reshape([self.config.hidden_size, -1])
        # A convolution whose stride is its kernel is one product of the cut patches.
        patches = paddle.matmul(cells.astype(kernel.dtype), kernel, transpose_y=True)
        if self.patch_bias is not None:
            patches = patches + self.patch_bias
        # The class token is first; `forward` leaves it out again unless it was asked for.
        first = self.class_embedding.reshape([1, 1, -1]).expand([tiles, 1, -1])
        return paddle.concat([first, patches], axis=1) + self.position_embedding
