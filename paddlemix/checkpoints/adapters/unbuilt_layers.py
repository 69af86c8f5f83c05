"""What an adapter holds for tower layers that are not built, because none of their features is read.

Outputs do not depend on them; a merged model still gets the weights that merging in the other program would produce.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import paddle
from paddle import nn

from paddlemix.checkpoints.files.tensors import TensorEntry, Tensors, converted
from paddlemix.peft.lora import add_lora
from paddlemix.peft.settings import MAGNITUDE, WEIGHTS, LoRAConfig, is_adapter_weight


def unbuilt_with_adapter(
    unused: Tensors, tensors: Tensors, config: LoRAConfig, modules: Collection[str]
) -> dict[str, TensorEntry]:
    """The weights of unbuilt layers, with an adapter's replacing them or added to them, computed when they are read.

    Args:
        unused: of the base.
        tensors: the adapter's weights for layers that are not built, under our names.
        config: the adapter's settings.
        modules: unbuilt layers that it adapts.
    """
    # weights that trained whole replace the base's; then LoRA is added, as in any merge
    whole = {name: entry for name, entry in tensors.items() if not is_adapter_weight(name)}
    result = {**unused, **whole}
    for module in modules:
        plain, parts = result.get(f"{module}.weight"), [f"{module}.{part}" for part in WEIGHTS]
        if plain is not None and all(part in tensors for part in parts):
            result[f"{module}.weight"] = _sum(plain, tensors, config, module)
    return result


def _sum(plain: TensorEntry, tensors: Tensors, config: LoRAConfig, module: str) -> TensorEntry:
    rank, alpha = config.rank_of(module), config.alpha_of(module)
    # its own rank and scaling, with the patterns resolved: the layer has another name here
    own = replace(config, modules=("layer",), r=rank, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})

    def read() -> np.ndarray:
        # a layer of the usual kind computes the sum, so that DoRA and rsLoRA need no second formula here
        holder = nn.Layer()
        holder.layer = nn.Linear(*plain.shape, bias_attr=False)
        with paddle.no_grad():
            holder.layer.weight.set_value(np.ascontiguousarray(converted(plain, "F32").read()))
            add_lora(holder, own)
            for part in (*WEIGHTS, MAGNITUDE):
                if f"{module}.{part}" in tensors:
                    values = converted(tensors[f"{module}.{part}"], "F32").read()
                    getattr(holder.layer, part).set_value(np.ascontiguousarray(values))
            return holder.layer.merged_weight().numpy()

    return TensorEntry("F32", plain.shape, read)
