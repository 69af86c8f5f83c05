"""PiSSA: the adapter begins with the principal components of the weight, which are subtracted from the base.

    y = x (W - scaling * A0 B0) + scaling * x A B        A0 B0 the r largest components of W over the scaling; A, B
                                                         begin as A0, B0

The base keeps its weight W: A0 and B0 are stored beside A and B and subtracted with the update, so that the adapter
fits the original base in any precision and can be exported as a plain one of rank 2 r.
Source: Meng et al. 2024, "PiSSA", section 3; the scaling as in PEFT (PaddleNLP has 1: lora_alpha equal to lora_rank).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import nn

from paddlemix.errors import UserError
from paddlemix.models.kernels.operators import difference
from paddlemix.models.layers import initialising
from paddlemix.parallel.tensor.parts import mark, part_of, whole_sides
from paddlemix.peft.linear import LoRALinear
from paddlemix.peft.settings import LoRAConfig


class PiSSALinear(LoRALinear):
    """A linear layer whose principal components train; see `LoRALinear` for the arguments.

    Args:
        base: not quantised, and `config`'s rank not above either side of its weight.
    """

    OWN = (*LoRALinear.OWN, "lora_A_start", "lora_B_start")

    def __init__(self, base: nn.Linear, config: LoRAConfig, name: str = "") -> None:
        super().__init__(base, config, name)
        self.lora_A_start, self.lora_B_start = self._new(self.lora_A.shape), self._new(self.lora_B.shape)
        self.lora_A_start.stop_gradient = self.lora_B_start.stop_gradient = True
        mark(self.lora_A_start, part_of(self.lora_A))
        mark(self.lora_B_start, part_of(self.lora_B))
        if initialising():
            first, second = principal_factors(self.base_weight().numpy(), self.rank)
            # scaling * A0 B0 is to be the principal part, so each factor is divided by the scaling's root
            root = self.scaling**-0.5
            for factor, values in (("lora_A", first * root), ("lora_B", second * root)):
                tensor = paddle.to_tensor(values).astype(self.adapter_dtype)
                getattr(self, factor).set_value(tensor)
                getattr(self, f"{factor}_start").set_value(tensor)

    def factors(self) -> tuple[paddle.Tensor, paddle.Tensor]:
        """[in, 2 r] and [2 r, out], whose product is A B - A0 B0.

        It is computed as (A - A0) B + A0 (B - B0), where nothing large cancels: at the start every bit is zero.
        """
        first, second = difference(self.lora_A, self.lora_A_start), difference(self.lora_B, self.lora_B_start)
        return paddle.concat([first, self.lora_A_start], axis=1), paddle.concat([self.lora_B, second], axis=0)


def check_pissa(name: str, layer: Any, rank: int) -> None:
    """Refuses layers that have no such components.

    Args:
        name: of the layer, for messages.
        layer: linear or quantised.

    Raises:
        UserError: it is quantised, or the rank is above the smaller side of its weight.
    """
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"pissa needs the weight of '{name}' in floating point, but the base is quantised; use a base that is not, "
            "or pissa false (use_dora and rslora work on a quantised base)"
        )
    # a matrix has no more components than its smaller side
    sides = whole_sides(layer, layer.weight.shape)
    if rank > min(sides):
        raise UserError(
            f"pissa: rank {rank} is above {min(sides)}, the smaller side of '{name}' "
            f"({' x '.join(map(str, sides))}); lower lora_rank"
        )


def principal_factors(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best approximation of a matrix by a product of two narrow ones.

    By the eigenvectors of the smaller of W W^T and W^T W in float64: several times faster than a singular value
    decomposition in float32, and closer to the true one.  Signs are fixed, so that the result is the same everywhere.

    Args:
        weight: [in, out] float32.
        rank: 1..min(in, out).

    Returns:
        [in, rank] and [rank, out] float32, the root of each singular value in both.
    """
    wide = weight.astype(np.float64)
    if wide.shape[0] > wide.shape[1]:
        second, first = principal_factors(np.ascontiguousarray(weight.T), rank)
        return np.ascontiguousarray(first.T), np.ascontiguousarray(second.T)
    vectors = np.linalg.eigh(wide @ wide.T)[1][:, ::-1][:, :rank]  # [in, rank], largest first; eigh sorts upwards
    # an eigenvector's sign is arbitrary: the largest component of each is made positive
    vectors = vectors * np.where(vectors[np.abs(vectors).argmax(axis=0), np.arange(rank)] < 0, -1.0, 1.0)
    rows = vectors.T @ wide  # [rank, out], each as long as its singular value
    roots = np.sqrt(np.linalg.norm(rows, axis=1))
    # a weight of low rank has components of length 0, which stay 0
    shares = np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0)
    return (vectors * roots).astype(np.float32), (rows * shares[:, None]).astype(np.float32)
