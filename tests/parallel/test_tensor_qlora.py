"""Runs with quantised bases over a tensor group: curves, checkpoints and results are those of one process."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.files.weight_files import read_weights
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained, build_model, save_model
from paddlemix.models.kernels import cpu_library
from paddlemix.parallel.layout import ALONE
from paddlemix.peft.quantize import QuantizationConfig, quantize_model
from tests.npu.cases import LORA_WITHOUT_DROPOUT
from tests.parallel.cluster import Cluster, Outcome
from tests.parallel.curves import Gaps, gaps, losses_and_weights
from tests.parallel.tensor_families import Pair
from tests.parallel.tensor_families import _batch as answers
from tests.parallel.tensor_families import _prompts as make_prompts
from tests.parallel.tensor_families import _scores as scores
from tests.parallel.tensor_files import begin
from tests.tiny_models import randomise
from tests.tiny_world import World

MAX_GAP = 1e-5
BASE = {"adam_epsilon": 1e-4, "max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
QLORA = {**BASE, **LORA_WITHOUT_DROPOUT, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def models(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose parts have whole nf4 blocks, as `plain`, and quantised as `nf4`."""
    root, processor = tmp_path_factory.mktemp("models"), load_pretrained(world.model).processor
    sizes = load_pretrained(world.model).model.config
    text = replace(sizes.text, hidden_size=128, intermediate_size=192)
    model = randomise(build_model(replace(sizes, text=text)), seed=5)
    save_model(Pretrained(model, processor, root / "plain"), root / "plain")
    quantize_model(model, QuantizationConfig(kind="nf4"))
    save_model(Pretrained(model, processor, root / "nf4"), root / "nf4")
    return root


def train(cluster: Cluster, recipe: Path, ranks: int) -> Outcome:
    keys = ["tensor_parallel_degree=2"] if ranks == 2 else []
    return cluster.run(ranks, "tools.supervised_finetune", recipe, *keys)


def apart(one: Path, other: Path) -> Gaps:
    return gaps(losses_and_weights(one), losses_and_weights(other))


def test_qlora_is_resumed_by_one_process(cluster: Cluster, world: World, models: Path, tmp_path: Path) -> None:
    """Two steps by two processes, two more by one: the curve and the weights of four by one, and the same base."""
    values = {**QLORA, "quantize_base": "nf4", "model_name_or_path": str(models / "plain")}
    phases = [(tmp_path / "whole", 1, 4), (tmp_path / "parts", 2, 2), (tmp_path / "parts", 1, 4)]
    for folder, ranks, steps in phases:
        outcome = train(cluster, world.recipe(folder, **{**values, "max_steps": steps}), ranks)
        assert outcome.ok, outcome.told()
    differences = apart(tmp_path / "whole" / "out", tmp_path / "parts" / "out")
    assert max(differences.loss, differences.weight) < MAX_GAP, differences


def test_a_quantised_model_is_whole_in_the_result(cluster: Cluster, world: World, models: Path, tmp_path: Path) -> None:
    """Its codes are those of its base, byte for byte; what trained is what one process trains."""
    values = {**BASE, "language_model": "frozen", "projector": "full", "model_name_or_path": str(models / "nf4")}
    for name, ranks in (("whole", 1), ("parts", 2)):
        outcome = train(cluster, world.recipe(tmp_path / name, **values), ranks)
        assert outcome.ok, outcome.told()
    differences = apart(tmp_path / "whole" / "out", tmp_path / "parts" / "out")
    assert max(differences.loss, differences.weight) < MAX_GAP, differences
    base, result = read_weights(models / "nf4"), read_weights(tmp_path / "parts" / "out")
    assert base.keys() == result.keys() and sum("weight_scale_codes" in name for name in base) == 14
    for name, entry in base.items():
        if "projector" not in name:
            assert entry.read().tobytes() == result[name].read().tobytes(), name


def answer(models: str) -> dict[str, Any]:
    """What quantised models say as a whole and over the tensor group: largest gaps of scores, and answers of both."""
    layout, found = begin(), {}
    for name, kind in (("plain", "nf4"), ("plain", "int8"), ("nf4", None)):
        pair = Pair(*(load_pretrained(f"{models}/{name}", quantize=kind, layout=each) for each in (ALONE, layout)))
        prompts = make_prompts(pair.whole.processor)
        for way in ("C", "operators") if kind is None else ("C",):
            with contextlib.nullcontext() if way == "C" else cpu_library.switched_off():
                whole, split = scores(pair.whole, prompts), scores(pair.split, prompts)
                gap = max(float(np.abs(whole[part] - split[part]).max()) for part in ("all", "prompt", "step"))
                said = [answers(loaded, prompts, every_way=False) for loaded in (pair.whole, pair.split)]
            found[f"{name} {kind} {way}"] = [gap / float(np.abs(whole["all"]).max()), *said]
    return found


def test_answers_are_those_of_one_process(cluster: Cluster, models: Path) -> None:
    outcome = cluster.call(2, "tests.parallel.test_tensor_qlora:answer", models=str(models))
    assert outcome.ok, outcome.told()
    for result in outcome.results:
        assert len(result) == 4
        for case, (gap, whole, split) in result.items():
            assert gap < MAX_GAP and whole == split, (case, gap, whole, split)


def test_blocks_that_are_cut_are_refused(cluster: Cluster, world: World, tmp_path: Path) -> None:
    """By all processes alike, and nothing is written."""
    outcome = train(cluster, world.recipe(tmp_path, **QLORA, quantize_base="nf4"), 2)
    assert outcome.statuses == [2, 2], outcome.told()
    advice = 'use int8 (quantize_base "int8", --load-8bit), or a tensor_parallel_degree (--tensor-parallel) of 1'
    assert f"(32 inputs; 4 layers in all); {advice}" in outcome.logs[0]
    assert not (tmp_path / "out").exists()
