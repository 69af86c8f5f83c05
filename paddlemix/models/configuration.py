"""Sizes of the parts of a model, as data.

Field names are those of the checkpoints' own `config.json`; which file they were read from is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from paddlemix.errors import UserError
from paddlemix.models.rotary import Rope, check_rope_scaling

ConfigType = TypeVar("ConfigType", "DecoderConfig", "VisionConfig")
_MLP_PROJECTOR = re.compile(r"mlp([1-9]\d*)x_gelu")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Llama-style decoder.  What a checkpoint leaves out is as in transformers' LlamaConfig, which leaves it out.

    How the families spell and default these values is in `paddlemix.checkpoints.layouts.families`.

    Args:
        model_type: the family whose files it came from; decides how it is written again and nothing that is computed.
        vocab_size: rows of the embedding.
        hidden_size: width D.
        intermediate_size: width of the gated feed-forward part.
        num_hidden_layers: layers.
        num_attention_heads: query heads H; `num_key_value_heads` K divides it.
        head_dim: width E of a head, even; None means hidden_size / num_attention_heads.
        rms_norm_eps, rope_theta: as in the paper; `max_position_embeddings` is the longest sequence trained on.
        rope_scaling: None, or what `check_rope_scaling` allows.
        attention_bias: query, key, value and output projection have a bias; `attention_output_bias` is for the last of
            these, if it differs.
        sliding_window: positions that a token sees, its own included; None for all before it.
        tie_word_embeddings: the output layer is the embedding.
        initializer_range: standard deviation of new weights.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        # What cannot be computed is refused here, where the names are those of the file that the user wrote.
        if self.num_attention_heads % self.key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.key_value_heads}"
            )
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                "give head_dim"
            )
        # Rotary positions turn pairs: the two halves of a head.
        if self.head_size % 2:
            raise UserError(f"head width {self.head_size} is odd; rotary positions need an even head_dim")
        if self.hidden_act != "silu":
            raise UserError(f"hidden_act '{self.hidden_act}' is not supported in the language model; allowed: silu")
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling, self.head_size)
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"sliding_window {self.sliding_window} is neither null nor at least 1")

    @property
    def key_value_heads(self) -> int:
        """K; as many as query heads if the checkpoint does not say."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """E."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def output_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def rope(self) -> Rope:
        """How positions turn queries and keys."""
        return Rope(
            head_size=self.head_size,
            theta=self.rope_theta,
            scaling=self.rope_scaling,
            context=self.max_position_embeddings,
        )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A vision transformer: CLIP by default, InternViT with other values.

    Args:
        hidden_size: width C.
        image_size, patch_size: pixels; patches per tile P = (image_size // patch_size) ** 2.
        norm_type: "layer_norm" or "rms_norm", of the two norms in a layer.
        qkv_bias: whether query, key and value have a bias; other linear layers have one.
        qk_normalization: RMS norms of queries and keys over all heads together, before they are split.
        layer_scale: start value of the learned scale after attention and feed-forward part; None for no scale.
        outer_norms: CLIP's norms before the first layer and after the last; the latter is never built.
        patch_bias: whether the patch embedding has a bias.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    norm_type: str = "layer_norm"
    qkv_bias: bool = True
    qk_normalization: bool = False
    layer_scale: float | None = None
    outer_norms: bool = True
    patch_bias: bool = False

    def __post_init__(self) -> None:
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise UserError(f"vision hidden_act '{self.hidden_act}' is not one of quick_gelu, gelu")
        if self.norm_type not in ("layer_norm", "rms_norm"):
            raise UserError(f"vision norm_type '{self.norm_type}' is not one of layer_norm, rms_norm")
        if self.num_patches < 1:
            raise UserError(f"vision image_size {self.image_size} is smaller than patch_size {self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"vision hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )

    @property
    def num_patches(self) -> int:
        """P, without the class token."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """A vision tower, a projector and a language model; without `vision`, the language model alone.

    Args:
        text: the decoder.
        vision: the tower, None for a text-only model.
        mm_projector_type: "linear", "mlpNx_gelu" or "identity".
        mm_vision_select_layer: index into the tower's hidden states, where 0 is the embedding and -1 the last layer.
        mm_vision_select_feature: "patch", or "cls_patch" to keep the class token.
        image_newline: whether the model has the learned end-of-row vector of LLaVA-1.6.
    """

    text: DecoderConfig = field(default_factory=DecoderConfig)
    vision: VisionConfig | None = None
    mm_projector_type: str = "mlp2x_gelu"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    image_newline: bool = False

    def __post_init__(self) -> None:
        projector_depth(self.mm_projector_type)
        if self.mm_vision_select_feature not in ("patch", "cls_patch"):
            raise UserError(
                f"mm_vision_select_feature '{self.mm_vision_select_feature}' is not one of patch, cls_patch"
            )
        if self.vision is not None:
            self._check_tower(self.vision)

    def _check_tower(self, vision: VisionConfig) -> None:
        # Hidden state 0 is the embedding, so that a tower of n layers has n + 1 of them, counted from either end.
        total = vision.num_hidden_layers
        if not 0 <= self.num_tower_layers <= total:
            raise UserError(
                f"mm_vision_select_layer {self.mm_vision_select_layer} is outside the tower's {total} layers; "
                f"allowed: {-total - 1} to {total}"
            )
        if self.mm_projector_type == "identity" and vision.hidden_size != self.text.hidden_size:
            raise UserError(
                f"mm_projector_type 'identity' needs equal widths; the tower has {vision.hidden_size}, the language "
                f"model {self.text.hidden_size}"
            )

    @property
    def num_tower_layers(self) -> int:
        """Tower layers up to the selected hidden state; later ones are neither built nor run."""
        assert self.vision is not None
        # -1 is the last of n + 1 hidden states, which all n layers compute; -2 needs n - 1 of them.
        selected = self.mm_vision_select_layer
        return selected if selected >= 0 else self.vision.num_hidden_layers + 1 + selected

    @property
    def tokens_per_tile(self) -> int:
        """Feature rows that the tower returns for one tile."""
        assert self.vision is not None
        return self.vision.num_patches + int(self.mm_vision_select_feature == "cls_patch")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as `from_dict` reads them."""
        values = asdict(self)
        values["text_config"] = values.pop("text")
        values["vision_config"] = values.pop("vision")
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlavaConfig:
        """Reads what `to_dict` wrote; keys that are not fields are ignored."""
        vision = values.get("vision_config")
        # `text` and `vision` are stored under the names of transformers' configurations.
        own = {item.name for item in fields(cls)} - {"text", "vision"}
        return cls(
            text=pick_fields(DecoderConfig, values["text_config"]),
            vision=pick_fields(VisionConfig, vision) if vision is not None else None,
            **{key: value for key, value in values.items() if key in own},
        )


def pick_fields(config_class: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
    """Builds a configuration from those keys of a `config.json` that are its fields."""
    # a null of the file is the default
    names = {item.name for item in fields(config_class)}
    return config_class(**{key: value for key, value in values.items() if key in names and value is not None})


def projector_depth(mm_projector_type: str) -> int:
    """Linear layers of a projector: 0 for "identity", 1 for "linear", N for "mlpNx_gelu".

    Raises:
        UserError: another type.
    """
    if mm_projector_type == "identity":
        return 0
    if mm_projector_type == "linear":
        return 1
    match = _MLP_PROJECTOR.fullmatch(mm_projector_type)
    if match is None:
        raise UserError(f"mm_projector_type '{mm_projector_type}' is not one of linear, mlpNx_gelu (N >= 1), identity")
    return int(match.group(1))
