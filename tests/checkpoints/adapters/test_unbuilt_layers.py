"""An adapter's part in tower layers that no model builds."""

from __future__ import annotations

import numpy as np

from paddlemix.checkpoints.adapters.unbuilt_layers import unbuilt_with_adapter
from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.peft.settings import LoRAConfig
from tests.tiny_models import draw

LAYER = "vision_tower.layers.9.mlp.fc1"


def test_an_update_is_added_and_a_whole_weight_replaces() -> None:
    """W + alpha / r A B with the layer's own rank and alpha."""
    plain, first, second = draw(5, 7, seed=1), draw(5, 2, seed=2), draw(2, 7, seed=3)
    config = LoRAConfig(r=4, lora_alpha=8, modules=(LAYER,), rank_pattern={LAYER: 2}, alpha_pattern={LAYER: 6})
    adapter = {f"{LAYER}.lora_A": array_entry(first), f"{LAYER}.lora_B": array_entry(second)}
    adapter[f"{LAYER}.bias"] = array_entry(draw(7, seed=4))
    unused = {f"{LAYER}.weight": array_entry(plain), f"{LAYER}.bias": array_entry(draw(7, seed=5))}
    found = unbuilt_with_adapter(unused, adapter, config, [LAYER])
    assert set(found) == set(unused)
    np.testing.assert_allclose(found[f"{LAYER}.weight"].read(), plain + 3 * first @ second, atol=1e-5)
    np.testing.assert_array_equal(found[f"{LAYER}.bias"].read(), draw(7, seed=4))


def test_a_layer_without_both_matrices_keeps_its_weight() -> None:
    unused = {f"{LAYER}.weight": array_entry(draw(5, 7))}
    found = unbuilt_with_adapter(unused, {f"{LAYER}.lora_A": array_entry(draw(5, 2))}, LoRAConfig(r=2), [LAYER])
    assert found[f"{LAYER}.weight"] is unused[f"{LAYER}.weight"]
