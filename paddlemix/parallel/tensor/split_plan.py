"""Which side of each weight is split over the processes of a tensor group, and the sizes that are left for each.

    layer                              weight [in, out]          bias         adapter
    q, k, v, gate and up projection    outputs ("column")        split        A whole, B split
    o and down projection              inputs ("row")            whole        A split, B whole
    embedding, output layer            vocabulary                none         as column

Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

from __future__ import annotations

from dataclasses import replace

from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig
from paddlemix.parallel.tensor.parts import Part

# Linear layer of a decoder layer -> the axis of its weight [in, out] that is split.
AXES = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "gate_proj": 1, "up_proj": 1, "o_proj": 0, "down_proj": 0}
_UNIT = 64  # inner widths and vocabularies are cut at its multiples where they can be: nf4 has blocks of 64 inputs


def extent(size: int, degree: int, rank: int) -> tuple[int, int]:
    """First place, and the one after the last, of a process's part of an axis; parts differ by one unit at most.

    Args:
        size: of the axis, at least `degree`.
        degree: parts.
        rank: 0 to degree - 1.
    """
    unit = _UNIT if size % _UNIT == 0 and size // _UNIT >= degree else 1
    share, more = divmod(size // unit, degree)
    start = rank * share + min(rank, more)
    return start * unit, (start + share + (rank < more)) * unit


def local_sizes(config: DecoderConfig, degree: int, rank: int) -> DecoderConfig:
    """The sizes of one process's part of a decoder.

    Raises:
        UserError: see `check_degree`.
    """
    check_degree(config, degree)
    inner = extent(config.intermediate_size, degree, rank)
    vocabulary = extent(config.vocab_size, degree, rank)
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // degree,
        num_key_value_heads=config.key_value_heads // degree,
        head_dim=config.head_size,
        intermediate_size=inner[1] - inner[0],
        vocab_size=vocabulary[1] - vocabulary[0],
    )


def linear_parts(config: DecoderConfig, degree: int, rank: int) -> dict[str, Part]:
    """Linear layer of a decoder layer -> which part of its weight [in, out] a process has.

    Args:
        config: sizes of the whole.
    """
    inner = extent(config.intermediate_size, degree, rank)
    sizes = dict.fromkeys(AXES, (config.intermediate_size, *inner))
    heads = {"q_proj": config.num_attention_heads, "o_proj": config.num_attention_heads}
    heads |= dict.fromkeys(("k_proj", "v_proj"), config.key_value_heads)
    for name, count in heads.items():  # whole heads, which their number divides evenly
        size = count * config.head_size
        sizes[name] = size, rank * size // degree, (rank + 1) * size // degree
    return {
        name: Part(axis=AXES[name], start=start, stop=stop, size=size) for name, (size, start, stop) in sizes.items()
    }


def all_parts(own: Part, degree: int) -> tuple[Part, ...]:
    """What each process of a tensor group has of a weight, by rank.

    Args:
        own: what this process has of it.
    """
    # Heads are divided evenly.  A width that `extent` divides evenly has the same parts, and another one has none of
    # that size.
    share = own.stop - own.start
    is_even = share * degree == own.size
    extents = [
        (rank * share, (rank + 1) * share) if is_even else extent(own.size, degree, rank) for rank in range(degree)
    ]
    return tuple(Part(axis=own.axis, start=start, stop=stop, size=own.size) for start, stop in extents)


def vocabulary_part(config: DecoderConfig, degree: int, rank: int) -> Part:
    """Which rows of the embedding a process has."""
    start, stop = extent(config.vocab_size, degree, rank)
    return Part(axis=0, start=start, stop=stop, size=config.vocab_size)


def allowed_degrees(config: DecoderConfig) -> list[int]:
    """Degrees that a decoder can be split by: those that divide its key/value heads, and so its query heads too."""
    heads = config.key_value_heads
    return [degree for degree in range(1, heads + 1) if heads % degree == 0]


def check_degree(config: DecoderConfig, degree: int) -> None:
    """Refuses a degree by which a decoder's heads cannot be split.

    Raises:
        UserError: it does not divide the key/value heads; lists the degrees that do.
    """
    allowed = allowed_degrees(config)
    if degree not in allowed:
        raise UserError(
            f"tensor_parallel_degree (--tensor-parallel) {degree} does not divide the model's "
            f"{config.num_attention_heads} attention heads and {config.key_value_heads} key/value heads; allowed: "
            f"{', '.join(map(str, allowed))}"
        )
