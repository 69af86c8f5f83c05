"""Whether the weights that every process of a tensor group holds whole are still the same on all of them.

Norms, tower, projector and some halves of adapters are trained by each process for itself, from gradients that were
made equal.  If the weights ever differ, by a fault of a card, each process trains another model, and no loss shows it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import paddle

from paddlemix.errors import UserError
from paddlemix.parallel.collectives import gathered_objects
from paddlemix.parallel.layout import Layout
from paddlemix.parallel.tensor.parts import part_of


def check_replicas(parameters: Mapping[str, paddle.Tensor], layout: Layout) -> None:
    """Compares the trained weights that a tensor group does not split; called by every process.

    Args:
        parameters: of the model, by our names.

    Raises:
        UserError: on every process, if a weight differs between processes of a tensor group; names both.
    """
    if layout.tensor_degree == 1:
        return
    own = {
        name: _checksum(parameter)
        for name, parameter in parameters.items()
        if not parameter.stop_gradient and part_of(parameter) is None
    }
    every = gathered_objects(own)
    for rank, found in enumerate(every):
        first = rank - rank % layout.tensor_degree  # of the group of this rank
        differing = [name for name, checksum in every[first].items() if found.get(name) != checksum]
        if differing:
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise UserError(
                f"the weight '{differing[0]}'{more} of process {rank} is not that of process {first}, though both "
                "trained it from the same gradients: one of their devices may be at fault"
            )


def _checksum(parameter: paddle.Tensor) -> int:
    return zlib.crc32(np.ascontiguousarray(parameter.detach().numpy()).reshape(-1).view(np.uint8).data)
