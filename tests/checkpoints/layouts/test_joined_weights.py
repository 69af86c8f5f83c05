"""Query, key and value joined and split: inverse of each other, in the order of InternLM2's own code."""

from __future__ import annotations

import numpy as np
import pytest

from paddlemix.checkpoints.files.tensors import array_entry, transposed
from paddlemix.checkpoints.layouts.joined_weights import join_attention, split_fused
from paddlemix.errors import UserError
from tests.tiny_models import draw, tiny_text

TEXT = tiny_text(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, intermediate_size=6)
LAYER = "language_model.layers.0"
OUTPUTS = {"q": 16, "k": 8, "v": 8}


@pytest.mark.parametrize("turned", [False, True])
def test_splitting_is_the_reverse_of_joining(turned: bool) -> None:
    """Weights as we have them, and as a torch checkpoint has them."""
    arrays = {f"{LAYER}.self_attn.{part}_proj.weight": draw(16, OUTPUTS[part], seed=ord(part)) for part in "qkv"}
    arrays |= {f"{LAYER}.self_attn.{part}_proj.bias": draw(OUTPUTS[part], seed=ord(part)) for part in "qkv"}
    arrays[f"{LAYER}.self_attn.o_proj.weight"] = draw(16, 16)
    entries = {
        name: transposed(array_entry(np.ascontiguousarray(array.T)))
        if turned and array.ndim == 2
        else array_entry(array)
        for name, array in arrays.items()
    }
    joined = join_attention(entries, TEXT)
    assert set(joined) == {
        f"{LAYER}.self_attn.{name}" for name in ("qkv_proj.weight", "qkv_proj.bias", "o_proj.weight")
    }
    again = split_fused(joined, TEXT, ("fuse_attention_qkv",))
    assert set(again) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name].read(), array, err_msg=name)


def test_each_key_value_head_has_its_queries_then_its_key_then_its_value() -> None:
    """Two groups of two query heads, heads of 4: q0 q1 k0 v0 q2 q3 k1 v1."""
    parts = {
        f"{LAYER}.self_attn.{part}_proj.bias": np.arange(OUTPUTS[part]) + 100.0 * n for n, part in enumerate("qkv")
    }
    found = join_attention({name: array_entry(array) for name, array in parts.items()}, TEXT)
    order = found[f"{LAYER}.self_attn.qkv_proj.bias"].read().reshape(8, 4)[:, 0]
    assert order.tolist() == [0, 4, 100, 200, 8, 12, 104, 204]


def test_gate_and_up_are_the_two_halves() -> None:
    joined = draw(16, 12)
    found = split_fused({f"{LAYER}.mlp.gate_up_fused_proj.weight": array_entry(joined)}, TEXT, ("fuse_attention_ffn",))
    np.testing.assert_array_equal(found[f"{LAYER}.mlp.gate_proj.weight"].read(), joined[:, :6])
    np.testing.assert_array_equal(found[f"{LAYER}.mlp.up_proj.weight"].read(), joined[:, 6:])


def test_a_width_that_is_not_that_of_the_parts_is_an_error() -> None:
    with pytest.raises(UserError, match="'.*qkv_proj.weight' is 31 wide, expected 32 from config.json"):
        split_fused({f"{LAYER}.self_attn.qkv_proj.weight": array_entry(draw(16, 31))}, TEXT, ("fuse_attention_qkv",))
