"""Whether an adapter fits a model, in the words of its own file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paddlemix.checkpoints.adapters.adapter_fit import AdapterWeights, check_fit
from paddlemix.checkpoints.files.tensors import TensorEntry, array_entry, transposed
from paddlemix.errors import UserError
from paddlemix.models.llava import LlavaModel
from paddlemix.peft.settings import LoRAConfig
from tests.tiny_models import draw, tiny_llava, tiny_model, tiny_text

LAYER = "language_model.layers.0.mlp.up_proj"  # [12, 19]
FILE = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model() -> LlavaModel:
    return tiny_model()


def weights(tensors: dict[str, TensorEntry], module: str = LAYER) -> AdapterWeights:
    names = {f"{LAYER}.lora_A": f"{FILE}.lora_A.weight"}
    return AdapterWeights(Path("adapter"), LoRAConfig(r=2, modules=(module,)), tensors, names)


def lora(inner: int = 12, outer: int = 19) -> dict[str, TensorEntry]:
    return {
        f"{LAYER}.lora_A": transposed(array_entry(draw(2, inner))),
        f"{LAYER}.lora_B": transposed(array_entry(draw(outer, 2))),
    }


def test_a_fitting_adapter_passes(model: LlavaModel) -> None:
    whole = {"projector.0.bias": array_entry(draw(12)), "vision_tower.layers.9.layer_norm1.bias": array_entry(draw(10))}
    check_fit(model, weights({**lora(), **whole}), "base")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{LAYER}.lora_A": lora()[f"{LAYER}.lora_A"]}, f"1 missing: '{FILE}.lora_B.weight'"),
        (lora(inner=13), rf"'{FILE}.lora_A.weight' is \[2, 13\], its layer needs \[2, 12\]"),
        ({**lora(), "visual.proj": array_entry(draw(3))}, "layers that the base does not have: 'visual.proj'"),
        (
            {**lora(), "language_model.embed_tokens.weight": array_entry(draw(40, 12))},
            r"embed_tokens.weight' is \[40, 12\], its layer needs \[37, 12\]; its vocabulary has more rows",
        ),
    ],
)
def test_what_does_not_fit_is_listed(model: LlavaModel, tensors: dict[str, TensorEntry], message: str) -> None:
    with pytest.raises(UserError, match=f"adapter does not fit its base base: .*{message}"):
        check_fit(model, weights(tensors), "base")


def test_a_layer_that_the_model_does_not_have(model: LlavaModel) -> None:
    with pytest.raises(UserError, match="of layers that the base does not have: 'visual.qkv.lora_A'"):
        check_fit(model, weights({}, "visual.qkv"), "base")


def test_a_copy_of_a_tied_embedding_is_no_extra_weight() -> None:
    tied = tiny_model(tiny_llava(text=tiny_text(tie_word_embeddings=True)))
    rows = draw(37, 12)
    tensors = {**lora(), "language_model.embed_tokens.weight": array_entry(rows)}
    check_fit(tied, weights({**tensors, "lm_head.weight": array_entry(np.ascontiguousarray(rows.T))}), "base")
    with pytest.raises(UserError, match="does not have: 'lm_head.weight'"):
        check_fit(tied, weights({**tensors, "lm_head.weight": array_entry(draw(12, 37))}), "base")
