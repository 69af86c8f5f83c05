"""What one layer keeps for its backward pass, in bytes: of the decoder, of the projector and of the vision tower.

Letters as in `activations.py`.  Kept of a decoder layer, numbers of D, Q and F per position and one probability per
head and visible pair:

    input norm     D in float32 and its output D        attention  q, k, v and output: 4 Q
    second norm    D in float32 and its output D        feed-forward  gate, up and their product: 3 F

In the last layer all but the first norm, q, k, v and the output are of the S supervised positions.  With compiled
kernels no probability is kept, and neither is the input of plain linear layers after a norm or gate.  What adapters add
is in `_adapter_bytes`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from paddlemix.dry_run.step_sizes import FLOAT32, BatchShape, Computation, LinearSize
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig, projector_depth
from paddlemix.models.kernels.linear_functions import NARROW_COST

CAUSAL_BLOCK = 128  # as in models/kernels/formulas.py, which a test compares


def visible_pairs(runs: Collection[int], causal: bool, blocks: bool) -> int:
    """Pairs of query and key whose probability is kept.

    Args:
        runs: lengths of sequences that are computed one by one.
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


def runs_of(shape: BatchShape, computation: Computation) -> tuple[int, ...]:
    """Lengths of the sequences whose attention is computed one by one."""
    return shape.runs if shape.runs and computation.on_cpu else (shape.length,) * shape.rows


def decoder_layer_bytes(
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
    # Linear layers in groups that share an input, which is kept once. After a norm or a gate the compiled kernels
    # compute the input again from what the norm or gate keeps, if no adapter, bias or code needs it as it was.
    for count, follows_norm, parts in groups:
        group = [linears[f"{name}.{part}"] for part in parts]
        if not (computation.compiled and follows_norm and all(item.plain for item in group)):
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
    kept += text.num_attention_heads * visible_pairs(runs_of(shape, computation), True, computation.on_cpu) * size
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
    # Under autocast each layer casts the shared input for itself.
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


def projector_bytes(
    config: LlavaConfig, linears: Mapping[str, LinearSize], shape: BatchShape, computation: Computation
) -> int:
    """The linear layers' inputs and, for each GELU between them, its own."""
    rows, depth = shape.tiles * config.tokens_per_tile, projector_depth(config.mm_projector_type)
    names = ["projector"] if "projector" in linears else [f"projector.{2 * number}" for number in range(depth)]
    kept = sum(_input_bytes([linears[name]], rows, computation) for name in names)
    return kept + computation.size * rows * config.text.hidden_size * max(depth - 1, 0)


def tower_layer_bytes(
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
