"""The table of names and shapes against the model's own parameters."""

from __future__ import annotations

from typing import Any

import pytest

from paddlemix.checkpoints.strict import check_vocabulary, expected_shapes
from paddlemix.errors import UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.llava import LlavaModel
from tests.tiny_models import tiny_llava, tiny_text


@pytest.mark.parametrize(
    "config",
    [
        tiny_llava(),
        tiny_llava(image_newline=False, mm_vision_select_layer=-1),
        tiny_llava(mm_projector_type="linear"),
        tiny_llava(mm_projector_type="mlp3x_gelu", mm_vision_select_layer=0),
        tiny_llava(text=tiny_text(hidden_size=10, num_attention_heads=5), mm_projector_type="identity"),
        tiny_llava(text=tiny_text(tie_word_embeddings=True, attention_bias=True, head_dim=10)),
        tiny_llava(text=tiny_text(attention_bias=True, attention_output_bias=False)),
        LlavaConfig(text=tiny_text()),
    ],
)
def test_the_table_is_what_the_model_is_built_of(config: Any) -> None:
    built = {name: tuple(parameter.shape) for name, parameter in LlavaModel(config).named_parameters()}
    assert expected_shapes(config) == built


def test_a_tokenizer_may_be_smaller_than_the_embedding_but_not_larger() -> None:
    check_vocabulary(31, 32, "x")
    check_vocabulary(32, 32, "x")
    with pytest.raises(UserError, match="tokenizer of x has 33 tokens, but the embedding only 32 rows"):
        check_vocabulary(33, 32, "x")
