"""A projector that is missing, initialised, or in a file of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import write_safetensors
from paddlemix.checkpoints.new_projector import initialise_new_parts, lacks_projector, load_projector
from paddlemix.checkpoints.pretrained import build_model, parameter_entries
from paddlemix.checkpoints.projector_file import NEW_PARTS, read_projector_file
from paddlemix.checkpoints.source import Source
from paddlemix.errors import UserError
from tests.tiny_models import draw, tiny_llava, tiny_model, tiny_text


def new_parts() -> dict:
    entries = parameter_entries(tiny_model())
    return {name: entry for name, entry in entries.items() if name.startswith(NEW_PARTS)}


def test_a_projector_is_missing_only_if_no_weight_of_it_is_there() -> None:
    source = Source(Path("x"), "paddlemix", tiny_llava(), {}, ())
    rest = {"language_model.norm.weight": array_entry(draw(12))}
    assert lacks_projector(source, rest)
    assert not lacks_projector(source, {**rest, "projector.0.weight": array_entry(draw(10, 12))})  # a part: damaged
    text = tiny_text(hidden_size=10, num_attention_heads=5)  # of the tower's width
    without = tiny_llava(text=text, mm_projector_type="identity", image_newline=False)
    assert not lacks_projector(replace(source, config=without), rest)
    assert not lacks_projector(replace(source, config=replace(tiny_llava(), vision=None)), rest)


def test_only_the_new_parts_are_initialised() -> None:
    model = build_model(tiny_llava())
    before = {name: value.numpy() for name, value in model.named_parameters()}
    initialise_new_parts(model, "float32")
    changed = {name for name, value in model.named_parameters() if (value.numpy() != before[name]).any()}
    assert changed == {"projector.0.weight", "projector.2.weight", "image_newline"}  # biases begin as zeros


def test_a_projector_s_own_file_fills_the_model(tmp_path: Path) -> None:
    path, model = tmp_path / "projector.safetensors", build_model(tiny_llava())
    write_safetensors(path, new_parts(), {})
    assert set(read_projector_file(path)) == set(new_parts())
    load_projector(model, path)
    for name, entry in new_parts().items():
        np.testing.assert_array_equal(dict(model.named_parameters())[name].numpy(), entry.read())


def test_a_file_of_another_size_lists_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "projector.safetensors"
    parts = {**new_parts(), "projector.0.weight": array_entry(draw(10, 11))}
    del parts["projector.2.bias"], parts["image_newline"]  # LLaVA's files never have the newline vector
    write_safetensors(path, parts, {})
    with pytest.raises(UserError) as caught:
        load_projector(build_model(tiny_llava()), path)
    assert str(caught.value).endswith(
        "does not fit the model's projector: projector.0.weight is 10 x 11 there, 10 x 12 in the model; "
        "projector.2.bias is missing there, 12 in the model"
    )
