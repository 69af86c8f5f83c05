"""Models of every family over a tensor group: the scores of one process, and its answers.

What is tested: paddlemix/parallel/tensor/model.py with paddlemix/generation and paddlemix/models/cached_decoder.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from paddlemix.models.language_presets import LANGUAGE_MODELS
from tests.parallel.cluster import Circumstances, Cluster

PROBES = "tests.parallel.tensor_families"
FAMILIES = {text.model_type for text in LANGUAGE_MODELS.values()}


@pytest.mark.usefixtures("kernels")
def test_scores_and_answers_are_those_of_one_process(
    cluster: Cluster, tokenizer_directory: Path, tmp_path: Path
) -> None:
    outcome = cluster.call(2, f"{PROBES}:compare", folder=str(tmp_path), tokenizer=str(tokenizer_directory))
    assert outcome.ok, outcome.told()
    for found in outcome.results:
        assert {name: case["gaps"] for name, case in found.items() if max(case["gaps"].values()) > 1e-5} == {}
        assert {name: case for name, case in found.items() if case["whole"] != case["split"]} == {}
    # what is drawn, too, is the same on both
    assert outcome.results[0] == outcome.results[1]


def test_each_familys_own_files_are_read_in_parts(cluster: Cluster, tokenizer_directory: Path, tmp_path: Path) -> None:
    outcome = cluster.call(2, f"{PROBES}:from_own_files", folder=str(tmp_path), tokenizer=str(tokenizer_directory))
    assert outcome.ok, outcome.told()
    for gaps in outcome.results:
        assert {LANGUAGE_MODELS[name].model_type for name in gaps} == FAMILIES
        assert {name: gap for name, gap in gaps.items() if gap > 1e-5} == {}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cards_choose_the_same_tokens(cluster: Cluster, tokenizer_directory: Path, tmp_path: Path, dtype: str) -> None:
    values = {"folder": str(tmp_path), "tokenizer": str(tokenizer_directory), "dtype": dtype}
    outcome = cluster.call(2, f"{PROBES}:on_cards", Circumstances(where="npu"), **values)
    assert outcome.ok, outcome.told()
    assert outcome.results[0] == outcome.results[1]
    assert outcome.results[0]["whole"] == outcome.results[0]["split"]
