"""Every weight accounted for: the names and shapes that sizes call for, against what a checkpoint holds.

Knows shapes only; needs no model and no paddle.  A test holds the table against the model's own parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from paddlemix.checkpoints.files.tensors import Tensors
from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig, projector_depth

Shape = tuple[int, ...]
_MAX_LISTED = 8
_TOWER_LAYERS = "vision_tower.layers."


def expected_shapes(config: LlavaConfig) -> dict[str, Shape]:
    """Name -> shape of every weight that a model of these sizes is built of, under our names, linear ones [in, out]."""
    shapes = dict(_decoder(config.text))
    width = config.text.hidden_size
    if config.vision is not None:
        shapes |= dict(_tower(config.vision, config.num_tower_layers))
        depth, type_ = projector_depth(config.mm_projector_type), config.mm_projector_type
        for number in range(depth):
            name = "projector" if type_ == "linear" else f"projector.{2 * number}"
            shapes |= _linear(name, config.vision.hidden_size if number == 0 else width, width, bias=True)
    if config.image_newline:
        shapes["image_newline"] = (width,)
    if not config.text.tie_word_embeddings:
        shapes |= _linear("lm_head", width, config.text.vocab_size)
    return shapes


def _linear(name: str, inner: int, outer: int, bias: bool = False) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (inner, outer)}
    return {**weight, f"{name}.bias": (outer,)} if bias else weight


def _decoder(text: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    width, inner, bias = text.hidden_size, text.intermediate_size, text.attention_bias
    queries, keys = text.num_attention_heads * text.head_size, text.key_value_heads * text.head_size
    yield "language_model.embed_tokens.weight", (text.vocab_size, width)
    for number in range(text.num_hidden_layers):
        layer = f"language_model.layers.{number}"
        for name, outer in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield from _linear(f"{layer}.self_attn.{name}", width, outer, bias).items()
        yield from _linear(f"{layer}.self_attn.o_proj", queries, width, text.output_bias).items()
        yield from _linear(f"{layer}.mlp.gate_proj", width, inner).items()
        yield from _linear(f"{layer}.mlp.up_proj", width, inner).items()
        yield from _linear(f"{layer}.mlp.down_proj", inner, width).items()
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
    yield "language_model.norm.weight", (width,)


def _tower(vision: VisionConfig, num_layers: int) -> Iterator[tuple[str, Shape]]:
    width, patch = vision.hidden_size, vision.patch_size
    yield "vision_tower.class_embedding", (width,)
    yield "vision_tower.patch_embedding", (width, vision.num_channels, patch, patch)
    if vision.patch_bias:
        yield "vision_tower.patch_bias", (width,)
    yield "vision_tower.position_embedding", (vision.num_patches + 1, width)
    if vision.outer_norms:
        yield from _norm("vision_tower.pre_layernorm", width)
    for number in range(num_layers):
        layer = f"{_TOWER_LAYERS}{number}"
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from _linear(f"{layer}.self_attn.{name}", width, width, bias=vision.qkv_bias).items()
        yield from _linear(f"{layer}.self_attn.out_proj", width, width, bias=True).items()
        yield from _linear(f"{layer}.mlp.fc1", width, vision.intermediate_size, bias=True).items()
        yield from _linear(f"{layer}.mlp.fc2", vision.intermediate_size, width, bias=True).items()
        vectors = ["self_attn.q_norm", "self_attn.k_norm"] if vision.qk_normalization else []
        vectors += [] if vision.layer_scale is None else ["layer_scale1", "layer_scale2"]
        for name in vectors:
            yield f"{layer}.{name}.weight", (width,)
        for name in ("layer_norm1", "layer_norm2"):
            yield from _norm(f"{layer}.{name}", width, vision.norm_type)


def _norm(name: str, width: int, norm_type: str = "layer_norm") -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    if norm_type == "layer_norm":
        yield f"{name}.bias", (width,)


def check_weights(
    expected: Mapping[str, Shape], tensors: Tensors, source: str, may_miss: Callable[[str], bool] = lambda name: False
) -> set[str]:
    """Compares a checkpoint's weights with those that are called for.

    Args:
        expected: name -> shape.
        tensors: under our names.
        source: for messages.
        may_miss: whether a weight may be absent, e.g. that of a new projector.

    Returns:
        Names of the tower weights that belong to layers behind the selected one: kept, but not built.

    Raises:
        UserError: lists every missing, extra and misshapen weight.
    """
    unused = {name for name in tensors if _behind_selection(name, expected)}
    tied = {"lm_head.weight"} - expected.keys()
    kinds = {
        "missing": sorted(name for name in expected.keys() - tensors.keys() if not may_miss(name)),
        "extra": sorted(tensors.keys() - expected.keys() - unused - tied),
        "misshapen": [
            f"{name} is {list(tensors[name].shape)}, expected {list(expected[name])}"
            for name in sorted(expected.keys() & tensors.keys())
            if tuple(tensors[name].shape) != tuple(expected[name])
        ],
    }
    faults = [_list(kind, names) for kind, names in kinds.items() if names]
    if faults:
        raise UserError(f"the weights of {source} do not fit its config.json: {'; '.join(faults)}")
    return unused


def _behind_selection(name: str, expected: Mapping[str, Shape]) -> bool:
    """Whether a weight is of a tower layer that is not built, or of the norm behind the last."""
    if name.startswith(_TOWER_LAYERS):
        layer = name[len(_TOWER_LAYERS) :].partition(".")[0]
        return layer.isdecimal() and f"{_TOWER_LAYERS}{layer}.layer_norm1.weight" not in expected
    return name in ("vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias")


def _list(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:_MAX_LISTED])}{more}"


def check_vocabulary(num_tokens: int, vocab_size: int, source: str) -> None:
    """A tokenizer may know fewer ids than the embedding has rows, never more.

    Raises:
        UserError: it knows more.
    """
    if num_tokens > vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {num_tokens} tokens, but the embedding only {vocab_size} rows: they do not "
            "belong together; copy the tokenizer files that came with the weights"
        )
