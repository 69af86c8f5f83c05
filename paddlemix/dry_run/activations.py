"""What a training step keeps for its backward pass, in bytes, from sizes alone.

Follows what `models/*`, `peft/*` and `trainer/loss.py` keep, tensor by tensor; a test holds it against what paddle
allocates.  It knows no file and no device but "CPU or not".  Letters: B rows of L positions, T = B L, S of them
supervised, D width, F inner width, Q = heads x head width, N tiles of P patches, C the tower's width.

Devices of a tensor group have a part of the heads, of F and of the vocabulary each; all have the D numbers of every
position between the layers, and tower and projector.

Two moments may take most: the loss, when everything is kept and logits come on top, and the backward pass through a
decoder layer, when what the last layer kept is free again.  Under recompute a layer keeps its input alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from paddlemix.dry_run.layer_activations import decoder_layer_bytes, projector_bytes, runs_of, tower_layer_bytes
from paddlemix.dry_run.step_sizes import FLOAT32, BatchShape, Computation, LinearSize
from paddlemix.models.configuration import DecoderConfig, LlavaConfig
from paddlemix.parallel.tensor.split_plan import extent, local_sizes
from paddlemix.trainer.loss import head_rows_at_once


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes at the two moments of a step that may take most.

    Args:
        vision_tower, projector, language_model: kept of each part until the backward pass.
        shared: what all decoder layers use: rotary tables and masks.
        loss: of the output layer, on top of all these.
        backward: of the backward pass through a decoder layer, on top; `released` is free by then.
        released: kept of the last decoder layer.
        block: the largest tensor that layers make and free again.
    """

    vision_tower: int = 0
    projector: int = 0
    language_model: int = 0
    shared: int = 0
    loss: int = 0
    backward: int = 0
    released: int = 0
    block: int = 0

    @property
    def kept(self) -> int:
        """All that is kept when the loss is computed."""
        return self.vision_tower + self.projector + self.language_model + self.shared

    @property
    def working(self) -> int:
        """What the most expensive moment takes beyond `kept`."""
        return max(self.loss, self.backward - self.released)


def estimate_activations(
    config: LlavaConfig,
    linears: Mapping[str, LinearSize],
    trained: Collection[str],
    shape: BatchShape,
    computation: Computation,
) -> Activations:
    """What a forward and backward pass of one micro-batch needs besides the weights and their gradients.

    Args:
        config: sizes of the whole model.
        linears: name -> size, of every linear layer as this device has it.
        trained: names of the parameters that train; layers before the first of them keep nothing.
        shape: of the batch.
        computation: precision and place.
    """
    text = config.text
    tower = projector = 0
    before = False  # whether a gradient goes through the decoder's input
    if config.vision is not None and shape.tiles:
        # A part keeps something only from its first trained weight on: paddle records nothing below it.
        first = first_trained_layer(trained, "vision_tower.", config.num_tower_layers)
        if first is not None:
            tower = _tower_bytes(config, linears, first, shape, computation)
        if first is not None or _any(trained, "projector"):
            projector = projector_bytes(config, linears, shape, computation)
        # The decoder then needs its input's gradient, so all of its layers keep their tensors, trained or not.
        before = first is not None or _any(trained, "projector") or "image_newline" in trained
    if before or _any(trained, "language_model.embed_tokens"):
        begin = 0
    else:
        found = first_trained_layer(trained, "language_model.", text.num_hidden_layers)
        begin = text.num_hidden_layers if found is None else found
    decoder = _decoder_activations(config, linears, trained, shape, computation, begin)
    return replace(decoder, vision_tower=tower, projector=projector)


def _decoder_activations(
    config: LlavaConfig,
    linears: Mapping[str, LinearSize],
    trained: Collection[str],
    shape: BatchShape,
    computation: Computation,
    begin: int,
) -> Activations:
    """Those of the language model and its loss; layers before `begin` keep nothing."""
    text = local_sizes(config.text, computation.tensor_degree, 0)
    # Without a supervised token the output layer runs on the first position of each row, see LossModel.
    rows = shape.supervised or shape.rows
    numbers = range(begin, text.num_hidden_layers)
    layers = [decoder_layer_bytes(text, linears, number, shape, computation) for number in numbers]
    final = FLOAT32 * rows * text.hidden_size  # of the last norm
    head, loss = _loss_bytes(config, trained, rows, computation)
    if computation.tensor_degree > 1 and _any(trained, "language_model.embed_tokens"):
        head += computation.size * shape.positions * text.hidden_size  # embeddings before those of others are added
    moment = _backward_bytes(text, shape, computation)
    if computation.recompute:
        # A layer keeps its input; what it would keep exists while it is computed again, one layer at a time.
        kept = len(layers) * computation.wide * shape.positions * text.hidden_size
        backward, released = max(layers[:-1] or layers or [0]) + moment, 0
    else:
        kept = sum(layers)
        backward, released = moment, (layers[-1] if len(layers) > 1 else 0) + final
    return Activations(
        language_model=kept + final + head,
        shared=_shared_bytes(text, shape, computation),
        loss=loss,
        backward=backward,
        released=released,
        block=computation.size * shape.positions * text.intermediate_size,
    )


def first_trained_layer(trained: Collection[str], part: str, layers: int) -> int | None:
    """Number of the first layer of a part that has a trained weight or one before it; None where nothing trains.

    Args:
        part: "vision_tower." or "language_model.".
        layers: of the part.
    """
    inside = [name.removeprefix(part) for name in trained if name.startswith(part)]
    numbers = [int(name.split(".")[1]) for name in inside if name.startswith("layers.")]
    # Embeddings and what else is neither a layer nor a norm after them come before layer 0.
    if any(not name.startswith(("layers.", "norm.", "post_layernorm.")) for name in inside):
        return 0
    return min(numbers) if numbers else layers if inside else None


def _shared_bytes(text: DecoderConfig, shape: BatchShape, computation: Computation) -> int:
    """Rotary tables, for queries and for keys of another number of heads, and masks."""
    heads = {text.num_attention_heads, text.key_value_heads}
    tables = (
        2 * computation.wide * shape.positions * text.head_size * (len(heads) if computation.compiled else sum(heads))
    )
    # Packed rows:  on CPU one mask per length of a sample; elsewhere one mask over whole rows.
    if shape.runs and not computation.on_cpu:
        return tables + FLOAT32 * shape.rows * shape.length**2
    return tables + FLOAT32 * sum(length**2 for length in set(runs_of(shape, computation)))


def _loss_bytes(config: LlavaConfig, trained: Collection[str], rows: int, computation: Computation) -> tuple[int, int]:
    """(kept until the backward pass, on top while the loss is computed)."""
    width, whole, degree = config.text.hidden_size, config.text.vocab_size, computation.tensor_degree
    start, stop = extent(whole, degree, 0)
    vocabulary = stop - start
    output = "language_model.embed_tokens.weight" if config.text.tie_word_embeddings else "lm_head.weight"
    weight = computation.size * width * vocabulary if output in trained else 0
    # The C kernel adds the output layer's gradient up in its place; tied to the embeddings, that tensor has other
    # gradients too.
    added_in_place = computation.compiled and not config.text.tie_word_embeddings
    at_once = min(rows, head_rows_at_once(whole, bool(weight) and not added_in_place, computation.on_cpu))
    kept = computation.size * rows * width + weight
    # Bytes on top of the logits themselves.  In place where they are float32; else a float32 copy, and the gradient in
    # the logits' type.  A split vocabulary's softmax takes several operators, two float32 tensors at a time.
    copy = 0 if computation.size == FLOAT32 else FLOAT32 + computation.size
    logits = at_once * vocabulary * (computation.size + (2 * FLOAT32 if degree > 1 else copy))
    states = computation.size * rows * width if degree > 1 else 0
    return kept, logits + states + (weight if rows > at_once and not added_in_place else 0)


def _backward_bytes(text: DecoderConfig, shape: BatchShape, computation: Computation) -> int:
    """Of the backward pass through the feed-forward part: five tensors of its inner width (three from compiled
    kernels), one of the outer."""
    inner = 3 if computation.compiled else 5
    return shape.positions * (inner * text.intermediate_size * computation.size + text.hidden_size * computation.wide)


def _tower_bytes(
    config: LlavaConfig, linears: Mapping[str, LinearSize], first: int, shape: BatchShape, computation: Computation
) -> int:
    """Kept of the tower's layers from the first that trains on."""
    assert config.vision is not None
    layers = range(first, config.num_tower_layers)
    return sum(tower_layer_bytes(config.vision, linears, number, shape.tiles, computation) for number in layers)


def _any(names: Collection[str], part: str) -> bool:
    return any(name.startswith(part) for name in names)
