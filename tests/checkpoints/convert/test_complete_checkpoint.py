"""A checkpoint between two layouts: complete, checked, in the type that was asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from paddlemix.checkpoints.convert.complete_checkpoint import read_checkpoint
from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import read_json, read_weights, write_json, write_weights
from paddlemix.errors import UserError
from paddlemix.models.presets import parameter_shapes
from tests.tiny_models import GOLDEN

HF = GOLDEN / "llava_v16_llama" / "hf"


def test_every_weight_is_there_in_the_type_that_was_asked_for() -> None:
    checkpoint = read_checkpoint(HF, "bfloat16")
    wanted = parameter_shapes(checkpoint.facts.config)
    assert {name: entry.shape for name, entry in checkpoint.tensors.items() if name in wanted} == wanted
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.facts.dtype == "bfloat16" and checkpoint.facts.anyres
    assert {"bos_token_id", "eos_token_id"} <= checkpoint.facts.special_ids.keys()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(HF, tmp_path / "hf")


def test_a_missing_weight_is_an_error(copy: Path) -> None:
    tensors = {name: array_entry(np.array(entry.read())) for name, entry in read_weights(copy).items()}
    del tensors[next(name for name in tensors if name.endswith("linear_1.bias"))]
    write_weights(copy, tensors, 10**9)
    with pytest.raises(UserError, match="1 missing: projector.0.bias"):
        read_checkpoint(copy)


def test_a_quantised_model_is_not_converted(copy: Path) -> None:
    config = {"quant_method": "paddlemix", "kind": "int8"}
    write_json(copy / "config.json", {**read_json(copy / "config.json"), "quantization_config": config})
    with pytest.raises(UserError, match="is quantised; convert the model that it was made from"):
        read_checkpoint(copy)


def test_a_tokenizer_with_more_tokens_than_rows_is_an_error(copy: Path, tokenizer_directory: Path) -> None:
    shutil.copytree(tokenizer_directory, copy, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"the tokenizer of \S+ has \d+ tokens, but the embedding only \d+ rows"):
        read_checkpoint(copy)
