"""What a training step keeps for its backward pass, in bytes, from sizes alone.

Follows what `models/*`, `peft/*` and `trainer/loss.py` keep, tensor by tensor; a test holds it against what paddle
allocates.  Knows no paddle, no file and no device but "CPU or not".  Shapes: B rows of L positions, T = B L, S of them
supervised, D width, F inner width, Q = heads x head width, N tiles of P patches, C the tower's width.

Kept of a decoder layer, numbers of D, Q and F per position and one probability per head and visible pair:

    input norm     D in float32 and its output D        attention  q, k, v and output: 4 Q
    second norm    D in float32 and its output D        feed-forward  gate, up and their product: 3 F

In the last layer all but the first norm, q, k, v and the output are of the S supervised positions.  Under recompute a
layer keeps its input alone.  With compiled kernels no probability is kept, and an input of plain linear layers behind a
norm or gate neither.  What is added by adapters stands at `_adapter_bytes`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig, projector_depth

FLOAT32 = 4
CAUSAL_BLOCK = 128  # as in models/attention.py
NARROW_COST = 3  # as in models/kernels/functions.py
LOGITS_AT_ONCE, LOGITS_WITHOUT_GRADIENT, LOGITS_OFF_CPU = 2**24, 2**22, 2**26  # as in trainer/loss.py


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Sizes of a micro-batch.

    Args:
        rows, length: B and L, padding included.
        runs: lengths of the samples and the padding, where rows are packed; empty where each row is one sample.
        tiles: N.
        supervised: S.
    """

    rows: int
    length: int
    runs: tuple[int, ...] = ()
    tiles: int = 0
    supervised: int = 0

    @property
    def positions(self) -> int:
        """T."""
        return self.rows * self.length


@dataclass(frozen=True, kw_only=True)
class Computation:
    """How numbers are computed.

    Args:
        size: bytes of a product's result, 4 or 2.
        wide: bytes of the sums between layers: 4 under autocast with float32 weights, else `size`.
        on_cpu: attention is computed in causal blocks and, for packed rows, sample by sample.
        recompute: decoder layers are computed again in the backward pass.
        compiled: on CPU, by the kernels of models/kernels/cpu.py.
    """

    size: int = FLOAT32
    wide: int = FLOAT32
    on_cpu: bool = True
    recompute: bool = False
    compiled: bool = False

    @property
    def autocast(self) -> bool:
        """Whether products work on copies of lower precision."""
        return self.size < self.wide


@dataclass(frozen=True, kw_only=True)
class LinearSize:
    """A linear layer of the model.

    Args:
        in_features, out_features: of its weight.
        rank: of its adapter; 0 where it has none.
        dropout: the adapter's.
        dora: its adapter is DoRA's.
        quantized: its weight is held in few bits; it then keeps no inputs of its own.
        bias: whether it has one.
    """

    in_features: int
    out_features: int
    rank: int = 0
    dropout: float = 0.0
    dora: bool = False
    quantized: bool = False
    bias: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is a product with its weight and no more."""
        return not (self.rank or self.quantized or self.bias)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes at the two moments of a step that may take most.

    Args:
        vision_tower, projector, language_model: kept of each part until the backward pass.
        shared: what all decoder layers use: rotary tables and masks.
        loss: of the output layer, besides, where all of these are there.
        backward: of the backward pass through a decoder layer, besides; `released` are gone by then.
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
        """What the dearest moment takes beyond `kept`."""
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
        config: sizes.
        linears: name -> size, of every linear layer.
        trained: names of the parameters that train; what lies before the first of them keeps nothing.
        shape: of the batch.
        computation: precision and place.
    """
    text = config.text
    tower = projector = 0
    before = False  # whether a gradient goes through the decoder's input
    if config.vision is not None and shape.tiles:
        first = first_trained_layer(trained, "vision_tower.", config.num_tower_layers)
        if first is not None:
            tower = _tower_bytes(config, linears, first, shape, computation)
        if first is not None or _any(trained, "projector"):
            projector = _projector_bytes(config, linears, shape, computation)
        before = first is not None or _any(trained, "projector") or "image_newline" in trained
    if before or _any(trained, "language_model.embed_tokens"):
        begin = 0
    else:
        found = first_trained_layer(trained, "language_model.", text.num_hidden_layers)
        begin = text.num_hidden_layers if found is None else found
    return _with_decoder(config, linears, trained, shape, computation, (begin, tower, projector))


def _with_decoder(
    config: LlavaConfig,
    linears: Mapping[str, LinearSize],
    trained: Collection[str],
    shape: BatchShape,
    computation: Computation,
    known: tuple[int, int, int],
) -> Activations:
    begin, tower, projector = known
    text = config.text
    rows = shape.supervised or shape.rows
    layers = [
        _layer_bytes(text, linears, number, shape, computation) for number in range(begin, text.num_hidden_layers)
    ]
    final = FLOAT32 * rows * text.hidden_size  # of the last norm
    head = _loss_bytes(config, trained, rows, computation)
    whole = max(layers[:-1] or layers or [0])
    moment = _backward_bytes(text, shape, computation)
    block = computation.size * shape.positions * text.intermediate_size
    if computation.recompute:
        kept = len(layers) * computation.wide * shape.positions * text.hidden_size
        return Activations(
            vision_tower=tower,
            projector=projector,
            language_model=kept + final + head[0],
            shared=_shared_bytes(text, shape, computation),
            loss=head[1],
            backward=whole + moment,
            block=block,
        )
    return Activations(
        vision_tower=tower,
        projector=projector,
        language_model=sum(layers) + final + head[0],
        shared=_shared_bytes(text, shape, computation),
        loss=head[1],
        backward=moment,
        released=(layers[-1] if len(layers) > 1 else 0) + final,
        block=block,
    )


def first_trained_layer(trained: Collection[str], part: str, layers: int) -> int | None:
    """Number of the first layer of a part that has a trained weight or one before it; None where nothing trains.

    Args:
        part: "vision_tower." or "language_model.".
        layers: of the part.
    """
    inside = [name.removeprefix(part) for name in trained if name.startswith(part)]
    numbers = [int(name.split(".")[1]) for name in inside if name.startswith("layers.")]
    if any(not name.startswith(("layers.", "norm.", "post_layernorm.")) for name in inside):
        return 0
    return min(numbers) if numbers else layers if inside else None


def visible_pairs(runs: Collection[int], causal: bool, blocks: bool) -> int:
    """Pairs of query and key whose probability is kept.

    Args:
        runs: lengths of sequences that are computed by themselves.
        blocks: only the blocks below the diagonal are computed.
    """
    if not (causal and blocks):
        return sum(length * length for length in runs)
    return sum(_block_pairs(length) for length in runs)


def _block_pairs(length: int) -> int:
    count = max(1, round(length / CAUSAL_BLOCK))
    stops = [length * number // count for number in range(count + 1)]
    if count == 1:
        return length * length
    return sum((stop - start) * stop for start, stop in zip(stops, stops[1:], strict=False))


def _runs(shape: BatchShape, computation: Computation) -> tuple[int, ...]:
    """Sequences whose attention is computed by itself."""
    return shape.runs if shape.runs and computation.on_cpu else (shape.length,) * shape.rows


def _layer_bytes(
    text: DecoderConfig, linears: Mapping[str, LinearSize], number: int, shape: BatchShape, computation: Computation
) -> int:
    """Kept of a decoder layer."""
    size, positions, width = computation.size, shape.positions, text.hidden_size
    is_last = number == text.num_hidden_layers - 1
    rows = (shape.supervised or positions) if is_last else positions
    name = f"language_model.layers.{number}"
    kept = FLOAT32 * (positions + rows) * (width + 1)  # the norms' own: states and scale
    kept += 2 * size * rows * text.intermediate_size  # gate and up
    kept += _attention_bytes(text, linears[f"{name}.self_attn.o_proj"], is_last, shape, computation)
    groups = (
        (positions, True, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        (rows, False, ("self_attn.o_proj",)),
        (rows, True, ("mlp.gate_proj", "mlp.up_proj")),
        (rows, True, ("mlp.down_proj",)),
    )
    for count, is_behind, parts in groups:
        group = [linears[f"{name}.{part}"] for part in parts]
        if not (computation.compiled and is_behind and all(item.plain for item in group)):
            kept += _input_bytes(group, count, computation)
    return kept


def _attention_bytes(
    text: DecoderConfig, output: LinearSize, is_last: bool, shape: BatchShape, computation: Computation
) -> int:
    """Kept of a decoder layer's attention, the input of its `output` layer not counted."""
    size, wide, positions = computation.size, computation.wide, shape.positions
    queries, keys = (heads * text.head_size for heads in (text.num_attention_heads, text.key_value_heads))
    if computation.compiled:
        return size * positions * (queries + 2 * keys)
    kept = positions * queries * (2 * wide + 2 * size)  # q and k after the rotation, v, output
    if keys < queries:  # k and v before they are repeated for every head
        kept += positions * keys * (wide + size)
    kept += text.num_attention_heads * visible_pairs(_runs(shape, computation), True, computation.on_cpu) * size
    if not (is_last or (shape.runs and computation.on_cpu)):  # the next layer's input is the output that is kept here
        kept -= _shared_input_bytes(output, positions, computation)
    return kept


def _shared_input_bytes(item: LinearSize, rows: int, computation: Computation) -> int:
    """What `_input_bytes` counts of an input that is kept before the layer already."""
    return computation.size * rows * item.in_features if _keeps_input(item) else 0


def _keeps_input(item: LinearSize) -> bool:
    return not item.quantized or (item.rank > 0 and not (item.dropout and item.dora))


def _input_bytes(group: list[LinearSize], rows: int, computation: Computation) -> int:
    """Kept of the linear layers that share an input [rows, in]."""
    plain = [item for item in group if _keeps_input(item)]
    copies = len(plain) if computation.autocast else min(len(plain), 1)
    kept = copies * rows * group[0].in_features * computation.size
    if computation.autocast:  # weights are products' inputs too, and here they are copies
        kept += sum(computation.size * item.in_features * item.out_features for item in group if not item.quantized)
    return kept + sum(_adapter_bytes(item, rows, computation) for item in group if item.rank)


def _adapter_bytes(item: LinearSize, rows: int, computation: Computation) -> int:
    """Kept for an adapter: nothing where weight and update are added first (for DoRA on small weights their sum, and
    that times the gain), else what enters the second product; with dropout the dropped inputs and their mask; for DoRA
    what is multiplied by the gain."""
    both, weight = item.in_features + item.out_features, item.in_features * item.out_features
    may_be_added = computation.size == FLOAT32 and not (item.dropout or item.quantized)
    if may_be_added and rows >= weight / (NARROW_COST * both):
        if not item.dora:
            return 0
        if weight <= 3 * NARROW_COST * item.rank * both:
            return 2 * FLOAT32 * weight
    kept = computation.size * rows * item.rank
    if item.dropout:  # which inputs are left, and these themselves where they are not made again
        kept += (computation.size + 1 if item.dora or computation.autocast else 1) * rows * item.in_features
    if item.dora:
        kept += computation.size * rows * item.out_features * (2 if item.dropout else 1)
    return kept


def _shared_bytes(text: DecoderConfig, shape: BatchShape, computation: Computation) -> int:
    """Rotary tables, for queries and for keys of another number of heads, and masks."""
    heads = {text.num_attention_heads, text.key_value_heads}
    tables = (
        2 * computation.wide * shape.positions * text.head_size * (len(heads) if computation.compiled else sum(heads))
    )
    if shape.runs and not computation.on_cpu:
        return tables + FLOAT32 * shape.rows * shape.length**2
    return tables + FLOAT32 * sum(length**2 for length in set(_runs(shape, computation)))


def _loss_bytes(config: LlavaConfig, trained: Collection[str], rows: int, computation: Computation) -> tuple[int, int]:
    """(kept until the backward pass, besides while the loss is computed)."""
    width, vocabulary = config.text.hidden_size, config.text.vocab_size
    output = "language_model.embed_tokens.weight" if config.text.tie_word_embeddings else "lm_head.weight"
    weight = computation.size * width * vocabulary if output in trained else 0
    added_in_place = computation.compiled and not config.text.tie_word_embeddings
    numbers = LOGITS_AT_ONCE if weight and not added_in_place else LOGITS_WITHOUT_GRADIENT
    numbers = numbers if computation.on_cpu else LOGITS_OFF_CPU
    at_once = min(rows, max(1, numbers // vocabulary))
    kept = computation.size * rows * width + weight
    logits = at_once * vocabulary * (computation.size + (0 if computation.compiled else FLOAT32))
    return kept, logits + (weight if rows > at_once and not added_in_place else 0)


def _backward_bytes(text: DecoderConfig, shape: BatchShape, computation: Computation) -> int:
    """Of the backward pass through the feed-forward part: five tensors of its inner width (three from compiled
    kernels), one of the outer."""
    inner = 3 if computation.compiled else 5
    return shape.positions * (inner * text.intermediate_size * computation.size + text.hidden_size * computation.wide)


def _projector_bytes(
    config: LlavaConfig, linears: Mapping[str, LinearSize], shape: BatchShape, computation: Computation
) -> int:
    """The linear layers' inputs and, for each GELU between them, its own."""
    rows, depth = shape.tiles * config.tokens_per_tile, projector_depth(config.mm_projector_type)
    names = ["projector"] if "projector" in linears else [f"projector.{2 * number}" for number in range(depth)]
    kept = sum(_input_bytes([linears[name]], rows, computation) for name in names)
    return kept + computation.size * rows * config.text.hidden_size * max(depth - 1, 0)


def _tower_bytes(
    config: LlavaConfig, linears: Mapping[str, LinearSize], first: int, shape: BatchShape, computation: Computation
) -> int:
    """Kept of the tower's layers from the first that trains on."""
    assert config.vision is not None
    layers = range(first, config.num_tower_layers)
    return sum(_tower_layer_bytes(config.vision, linears, number, shape.tiles, computation) for number in layers)


def _tower_layer_bytes(
    vision: VisionConfig, linears: Mapping[str, LinearSize], number: int, tiles: int, computation: Computation
) -> int:
    """Norms and layer scales keep their input, attention q, k, v, output and probabilities, the activation its input
    (and sigmoid)."""
    size, length = computation.size, vision.num_patches + 1
    rows, width = tiles * length, vision.hidden_size
    name = f"vision_tower.layers.{number}"
    kept = 2 * computation.wide * rows * width + 4 * size * rows * width
    kept += 2 * computation.wide * rows * width if vision.qk_normalization else 0
    kept += 2 * size * rows * width if vision.layer_scale is not None else 0
    if not computation.compiled:
        kept += size * tiles * vision.num_attention_heads * length * length
        kept -= _shared_input_bytes(linears[f"{name}.self_attn.out_proj"], rows, computation)
    else:
        kept -= size * rows * width  # the output is its next layer's input alone
    kept += size * rows * vision.intermediate_size * (2 if vision.hidden_act == "quick_gelu" else 1)
    groups = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("mlp.fc1",),
        ("mlp.fc2",),
    )
    return kept + sum(
        _input_bytes([linears[f"{name}.{part}"] for part in parts], rows, computation) for parts in groups
    )


def _any(names: Collection[str], part: str) -> bool:
    return any(name.startswith(part) for name in names)
