"""Adapters of layers that a tensor group splits: what cannot be, and what dropout draws.

| adapter          | outputs are split ("column")        | inputs are split ("row")                            |
|------------------|-------------------------------------|-----------------------------------------------------|
| LoRA, rsLoRA     | A whole, B a part                   | A a part, B whole                                   |
| DoRA             | its lengths a part                  | refused: a length is a sum over all inputs          |
| PiSSA, new       | refused: it needs the whole weight  | refused                                             |
| PiSSA, continued | start values as A and B             | start values as A and B                             |
| dropout          | of inputs that all processes have   | one mask of all inputs, of which each takes a part  |
"""

from __future__ import annotations

from typing import Any

from paddle import nn

from paddlemix.errors import UserError
from paddlemix.models.kernels.operators import Dropping
from paddlemix.models.layers import initialising
from paddlemix.parallel.tensor.parts import Part, linear_part, mark, mark_partial
from paddlemix.parallel.tensor.split_plan import AXES
from paddlemix.peft.settings import LoRAConfig


def check_part(name: str, layer: nn.Layer, config: LoRAConfig, begins: bool) -> None:
    """Refuses what needs more of a weight than the part of it that a process of a tensor group has.

    Args:
        layer: that gets an adapter.
        begins: whether the adapter gets start values that are computed from weights.

    Raises:
        UserError: DoRA on a layer whose inputs are split, or a new PiSSA on any that is.
    """
    part = linear_part(layer)
    if part is None:
        return
    # A length of DoRA is a sum over all inputs of an output, and components are those of the whole weight.
    if config.use_dora and part.axis == 0:
        columns = "|".join(kind for kind, axis in AXES.items() if axis == 1)
        new = f'set lora_target_modules to "language_model.*({columns})" or use_dora false (rslora works)'
        raise UserError(
            f"DoRA needs all inputs of '{name}', which tensor parallelism splits; "
            f"{new if begins else 'merge the adapter (paddlemix merge-lora)'}, or use a tensor_parallel_degree "
            "(--tensor-parallel) of 1"
        )
    if config.pissa and begins:
        raise UserError(
            f"pissa begins with the components of the whole weight of '{name}', which tensor parallelism splits; "
            "set pissa false (rslora works), or begin the adapter with tensor_parallel_degree 1 and continue it with "
            "lora_path"
        )


def check_new_adapter(model: nn.Layer, config: LoRAConfig) -> None:
    """Refuses a new adapter that a tensor group cannot begin or train; of a model that nobody splits, none.

    Raises:
        UserError: see `check_part`.
    """
    layers = dict(model.named_sublayers())
    for name in config.modules:
        check_part(name, layers[name], config, begins=True)


def split_factors(layer: Any) -> None:
    """Leaves this process's parts of a new adapter's factors, and marks them; nothing where the layer is whole.

    Args:
        layer: a `LoRALinear` whose A is whole: drawn whole, a part has the numbers of one process.
    """
    part = layer.tensor_part
    if part is None:
        return
    first, second = layer.lora_A, layer.lora_B
    if part.axis == 1:
        mark_partial(first)
        mark(second, part)
        return
    layer.lora_A = layer._new([layer.in_features, layer.rank])
    if initialising():
        layer.lora_A.set_value(part.cut(first))
    mark(layer.lora_A, part)
    mark_partial(second)


def dropping_of(rate: float, part: Part | None) -> Dropping:
    """What the dropout of an adapter draws.

    Args:
        part: of the layer's weight [in, out]; None for the whole.
    """
    return Dropping(rate) if part is None or part.axis == 1 else Dropping(rate, part.size, part.start)
