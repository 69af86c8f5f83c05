"""The optimiser's tensors under our parameter names, as a checkpoint holds them; `loading_shares` reads them back.

Paddle's own names differ from process to process.  A key is `<our parameter name>|<kind>`.
"""

from __future__ import annotations

from typing import Any

from paddlemix.checkpoints.files.tensors import TensorEntry
from paddlemix.checkpoints.pretrained import whole_entry
from paddlemix.parallel.whole import whole_states


def optimizer_entries(trainer: Any) -> dict[str, TensorEntry]:
    """The optimiser's tensors as `<our parameter name>|<kind>`, whole, whatever processes hold of them."""
    parameters = dict(trainer.model.model.named_parameters())
    states = whole_states(parameters, trainer.optimizer, trainer.layout)
    return {key: whole_entry(tensor) for key, tensor in states}
