"""LLaVA: tower, projector and decoder, joined by one gather.

The place of each visual feature was decided in numpy (`datasets/collate.py`); this file has no grid logic, no loop over
samples and no host synchronisation.  Source: Liu et al. 2023, "Visual Instruction Tuning" and LLaVA-1.5.
"""

from __future__ import annotations

import paddle
from paddle import nn

from paddlemix.models.configuration import LlavaConfig, projector_depth
from paddlemix.models.decoder import Decoder
from paddlemix.models.kernels import formulas
from paddlemix.models.kernels.operators import take_rows
from paddlemix.models.kv_cache import KVCache
from paddlemix.models.layers import apply_linear, between_hooks, linear, normal
from paddlemix.models.vision import VisionTower


class LlavaModel(nn.Layer):
    """A LLaVA model, or its language model alone where the configuration has no tower.

    Args:
        config: sizes.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        text = config.text
        # Names of parts are those of the weights in a checkpoint of ours.
        if config.vision is not None:
            self.vision_tower = VisionTower(
                config.vision, config.num_tower_layers, config.mm_vision_select_feature == "cls_patch"
            )
            self.projector = build_projector(
                config.mm_projector_type, config.vision.hidden_size, text.hidden_size, text.initializer_range
            )
        if config.image_newline:
            start = normal(text.hidden_size**-0.5)  # Source: LLaVA llava_arch.py, randn / sqrt(width)
            self.image_newline = self.create_parameter([text.hidden_size], default_initializer=start)
        self.language_model = Decoder(text)
        if not text.tie_word_embeddings:  # else the embedding is the output layer, and there is no second weight
            self.lm_head = linear(text.hidden_size, text.vocab_size, text.initializer_range)

    def forward(
        self,
        input_ids: paddle.Tensor,
        position_ids: paddle.Tensor,
        segment_ids: paddle.Tensor | None = None,
        pixel_values: paddle.Tensor | None = None,
        merge_index: paddle.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> paddle.Tensor:
        """Hidden states of a batch; arguments as in `paddlemix.sample.Batch`.

        Args:
            segment_ids: only needed for packed or left-padded rows.
            cache: positions seen before; these are added to it.

        Returns:
            [B, L, D]; `logits` turns them into scores.
        """
        embeds = self.embed(input_ids, pixel_values, merge_index)
        return self.language_model(embeds, position_ids, segment_ids, cache)

    def embed(
        self,
        input_ids: paddle.Tensor,
        pixel_values: paddle.Tensor | None = None,
        merge_index: paddle.Tensor | None = None,
        tile_features: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """What the decoder reads, [B, L, D]; arguments as in `paddlemix.sample.Batch`, `pixel_values` or
        `tile_features`."""
        # A frozen tower's features may come from disk instead.
        if pixel_values is not None:
            tile_features = self.vision_tower(pixel_values)
        return self.merge(input_ids, None if tile_features is None else self.project(tile_features), merge_index)

    def encode_images(self, pixel_values: paddle.Tensor) -> paddle.Tensor:
        """Tiles [N, 3, H, W] -> projected features [N * P, D]."""
        return self.project(self.vision_tower(pixel_values))

    def project(self, tile_features: paddle.Tensor) -> paddle.Tensor:
        """The tower's features [N, P, C] -> [N * P, D]."""
        features = run_projector(self.projector, tile_features)  # [N, P, D]
        # Tiles are one list of rows: which sample a tile belongs to is only in `merge_index`.
        return features.reshape([-1, features.shape[-1]])

    def merge(
        self, input_ids: paddle.Tensor, features: paddle.Tensor | None, merge_index: paddle.Tensor | None
    ) -> paddle.Tensor:
        """Token embeddings with visual features in their places.

        Args:
            input_ids: int64 [B, L].
            features: [R, D] or None without image.
            merge_index: int64 [B * L] into concat(token embeddings [B*L], features [R], newline [1]).

        Returns:
            [B, L, D].

        Raises:
            ValueError: only one of `features` and `merge_index` is given.
        """
        embeds = self.language_model.embed_tokens(input_ids)
        if features is None and merge_index is None:
            return embeds
        if features is None or merge_index is None:
            raise ValueError("visual features and merge_index go together: give both or neither")
        batch, length, width = embeds.shape
        # One gather from [tokens | features | newline] and no scatter, whose in-place writes differ between devices.
        rows = [embeds.reshape([-1, width]), features.astype(embeds.dtype)]
        if self.config.image_newline:
            rows.append(self.image_newline.astype(embeds.dtype).unsqueeze(0))
        return take_rows(paddle.concat(rows), merge_index).reshape([batch, length, width])

    @property
    def output_layer(self) -> nn.Layer:
        """The layer whose weight `logits` multiplies by: the embedding where the two are tied."""
        return self.language_model.embed_tokens if self.config.text.tie_word_embeddings else self.lm_head

    def logits(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        """[..., D] -> scores over the vocabulary [..., V]."""
        return between_hooks(self.output_layer, self.scores, hidden_states)

    def scores(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        """As `logits`, for use between the hooks of `output_layer`, see `between_hooks`."""
        layer = self.output_layer
        if self.config.text.tie_word_embeddings:
            return paddle.matmul(hidden_states, layer.weight, transpose_y=True)
        return (
            formulas.linear(hidden_states, layer.weight, layer.bias)
            if type(layer) is nn.Linear
            else layer.forward(hidden_states)
        )

    def output_weights(self) -> list[paddle.Tensor]:
        """The parameters that `logits` reads."""
        if self.config.text.tie_word_embeddings:
            return [self.language_model.embed_tokens.weight]
        return list(self.lm_head.parameters())


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
        if number:  # at odd places of the sequence, so that linear layers are 0, 2, ... as in the reference
            layers.append(nn.GELU())
        layers.append(linear(in_size if number == 0 else out_size, out_size, std, bias=True))
    return nn.Sequential(*layers)


def run_projector(projector: nn.Layer, features: paddle.Tensor) -> paddle.Tensor:
    """[..., in_size] -> [..., out_size]."""
    # layer by layer, so that plain linear layers take the fast way of `apply_linear`
    for layer in projector if isinstance(projector, nn.Sequential) else [projector]:
        features = apply_linear(layer, features)
    return features
