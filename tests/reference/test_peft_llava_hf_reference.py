"""PEFT's adapters of llava-hf models in ours and back: logits, merged weights, the merged model in transformers.

Run by `make reference`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.merging import write_merged
from paddlemix.checkpoints.source import Source
from tests.peft_cases import CASES, GAP, our_logits, with_base
from tests.reference.peft_llava_hf import adapted_model, loaded, merged_directory, plain_model, save, their_logits

pytestmark = pytest.mark.reference


@pytest.mark.parametrize("name", CASES)
def test_logits_and_merged_weights_are_pefts(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = adapted_model(case)
    wanted, plain = their_logits(model), their_logits(plain_model())
    assert np.abs(wanted - plain).max() > 50 * GAP
    adapter = with_base(save(model, case, tmp_path / "adapter"))
    found = load_pretrained(adapter)
    np.testing.assert_allclose(our_logits(found.model), wanted, atol=GAP, rtol=0)
    (tmp_path / "merged").mkdir()
    write_merged(found, tmp_path / "merged", "float32")
    ours = Source.open(tmp_path / "merged").tensors()
    theirs = Source.open(merged_directory(model, tmp_path / "theirs")).tensors()
    assert ours.keys() == theirs.keys()
    for key, entry in theirs.items():
        np.testing.assert_allclose(ours[key].read(), entry.read(), atol=5e-6, err_msg=key)


def test_the_old_names_are_those_that_peft_reads(tmp_path: Path) -> None:
    """The spelling that `peft_cases.respelt` writes is the one that transformers maps to its present names."""
    case = CASES["lora_old_names"]
    model = adapted_model(case)
    adapter = save(model, case, tmp_path)
    np.testing.assert_allclose(their_logits(loaded(adapter)), their_logits(model), atol=1e-6, rtol=0)
