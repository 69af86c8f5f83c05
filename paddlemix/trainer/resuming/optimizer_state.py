"""The optimiser's tensors under our parameter names, as a checkpoint holds them; `loading_shares` reads them back.

Paddle's own names differ from process to process.  A key is `<our parameter name>|<kind>`.
"""

from __future__ import annotations

import re
from typing import Any

import paddle

from paddlemix.checkpoints.files.tensors import TensorEntry
from paddlemix.checkpoints.pretrained import tensor_entry

_MASTER = "_fp32_master_0"  # what paddle adds to a weight's name for its float32 copy
_SCALARS = re.compile(r"(.+)_(beta[12]_pow_acc|moment[12]|moment2_max)_0")


def optimizer_entries(trainer: Any) -> dict[str, TensorEntry]:
    """The optimiser's tensors as `<our parameter name>|<kind>`."""
    ours = {parameter.name: name for name, parameter in trainer.model.model.named_parameters()}
    state = trainer.optimizer.state_dict()
    entries = {}
    for key, value in state.items():
        # Anything else in the state (schedule, master weights) is stored elsewhere.
        match = _SCALARS.fullmatch(key)
        if match is not None and isinstance(value, paddle.Tensor):
            name, kind = match.groups()
            # With master weights paddle keys a moment by the master weight's name.
            entries[f"{ours[_parameter_name(name, ours)]}|{kind}"] = tensor_entry(value)
    for name, value in state.get("master_weights", {}).items():
        entries[f"{ours[name]}|master_weight"] = tensor_entry(value)
    return entries


def _parameter_name(name: str, known: dict[str, str]) -> str:
    return name if name in known else name.removesuffix(_MASTER)
