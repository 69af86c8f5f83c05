"""Sizes of a training step: its batch, how it is computed, and the linear layers that it runs through.

Without paddle, and without any formula.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32 = 4  # bytes


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
        tensor_degree: devices that compute one decoder together.
    """

    size: int = FLOAT32
    wide: int = FLOAT32
    on_cpu: bool = True
    recompute: bool = False
    compiled: bool = False
    tensor_degree: int = 1

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
