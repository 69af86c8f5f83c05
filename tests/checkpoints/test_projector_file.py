"""A projector's own file under the names of each program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import write_safetensors
from paddlemix.checkpoints.projector_file import read_projector_file
from paddlemix.errors import UserError
from tests.tiny_models import draw

MATRIX = draw(10, 12)  # ours, [in, out]


@pytest.mark.parametrize(
    ("name", "turned"),
    [
        ("projector.0.weight", False),
        ("llama.mm_projector.0.weight", False),
        ("model.mm_projector.0.weight", True),
        ("base_model.model.model.mm_projector.0.weight", True),
        ("model.multi_modal_projector.linear_1.weight", True),
        ("multi_modal_projector.linear_1.weight", True),
        ("model.0.weight", True),
    ],
)
def test_every_program_s_name_is_known(tmp_path: Path, name: str, turned: bool) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {name: array_entry(np.ascontiguousarray(MATRIX.T) if turned else MATRIX)}, {})
    found = read_projector_file(path)
    assert list(found) == ["projector.0.weight"]
    np.testing.assert_array_equal(found["projector.0.weight"].read(), MATRIX)


def test_a_weight_of_no_program_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"resampler.query": array_entry(MATRIX)}, {})
    with pytest.raises(UserError, match="holds 1 weights that a .* checkpoint does not have: resampler.query"):
        read_projector_file(path)


def test_a_checkpoint_of_xtuner_s_training_says_how_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "iter_500.pth"
    path.touch()
    with pytest.raises(UserError, match="not a projector's file; '.*' is a checkpoint of XTuner's training"):
        read_projector_file(path)
