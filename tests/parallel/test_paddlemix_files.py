"""PaddleMIX's files with sharding start as they are, but for their paths, on as many stand-in NPUs as they name.

Source: PaddleMIX paddlemix/config/llava, v1_5/lora_sft_argument_stage2.json (commit 023a3fe), the stage3 file beside it
and pretrain_7b_benchmark.json (commit 3f8543a).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.files.weight_files import write_json
from tests.config.test_recipes import ITS_LORA_FILE
from tests.parallel.cluster import Cluster
from tests.parallel.curves import losses_and_weights
from tests.tiny_world import World

# PaddleNLP switches a sharding of degree 1 off, so that this is tensor parallelism alone.
STAGE_3 = {"sharding": "stage3", "tensor_parallel_degree": 8, "sharding_parallel_degree": 1}
STAGE_2 = {"sharding": "stage2", "tensor_parallel_degree": 1, "sharding_parallel_degree": 8}
ITS_PRETRAINING_FILE = {
    "freeze_include": ["*llama*", "*lm_head*"],
    "freeze_exclude": ["*llama.mm_projector*"],
    "mixtoken": False,
    "overwrite_output_dir": True,
    "recompute": True,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 1,
    "eval_accumulation_steps": 1,
    "group_by_modality_length": False,
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_steps": 100,
    "evaluation_strategy": "no",
    "save_strategy": "no",
    "max_length": 2048,
    "bf16": True,
    "fp16_opt_level": "O2",
    "amp_master_grad": 1,
    "do_train": True,
    "do_eval": False,
    "skip_memory_metrics": False,
    "disable_tqdm": True,
    "save_total_limit": 1,
    "eval_steps": 120,
    **STAGE_2,
    "benchmark": True,
}
ENTRY = {"name": "chatml_dataset"}
FILES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "lora": ("tools.supervised_finetune", {**ITS_LORA_FILE, **STAGE_2}, {"train": "train", "eval": "eval"}),
    "lora in parts": (
        "tools.supervised_finetune",
        {**ITS_LORA_FILE, **STAGE_3},
        {"train": "train", "eval": "eval"},
    ),
    "pretraining": ("examples.llava.pretrain", ITS_PRETRAINING_FILE, {"train": "captions"}),
}
_STEP = 8 * 16  # captions of one step
# 12 records once, by eight replicas or one; a step's captions three times.
STEPS = {"lora": 2, "lora in parts": 12, "pretraining": 3}


def as_it_is(world: World, folder: Path, name: str, **changes: Any) -> Path:
    """The file with our paths, and the device that its users give; `changes` to its keys."""
    _, values, splits = FILES[name]
    data = {}
    for split, file in splits.items():
        records = json.loads((world.data / f"{file}.json").read_text(encoding="utf-8"))
        write_json(folder / f"{split}.json", (records * _STEP)[:_STEP] if file == "captions" else records)
        data[split] = [{**ENTRY, "data_files": str(folder / f"{split}.json")}]
    paths = {"model_name_or_path": str(world.model), "dataset": data, "image_root": str(world.data)}
    path = folder / "recipe.json"
    write_json(path, {**values, **paths, "output_dir": str(folder / "out"), "device": "npu", **changes})
    return path


@pytest.mark.parametrize(
    "name", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora in parts", "pretraining"))]
)
def test_eight_processes_train(cluster: Cluster, uneven_world: World, tmp_path: Path, name: str) -> None:
    outcome = cluster.run(8, FILES[name][0], as_it_is(uneven_world, tmp_path, name), where="npu", limit=600)
    assert outcome.ok, outcome.told()
    assert sorted(losses_and_weights(tmp_path / "out").losses) == list(range(1, STEPS[name] + 1))


def test_with_fewer_the_error_names_the_key(cluster: Cluster, world: World, tmp_path: Path) -> None:
    outcome = cluster.run(2, FILES["lora"][0], as_it_is(world, tmp_path, "lora"), where="npu")
    assert outcome.statuses == [2, 2], outcome.told()
    assert "sharding_parallel_degree 8" in outcome.logs[0] and not (tmp_path / "out").exists(), outcome.told()


def test_its_tensor_parallelism_starts_on_as_many_as_are_there(cluster: Cluster, world: World, tmp_path: Path) -> None:
    name, key = "lora in parts", "tensor_parallel_degree"
    outcome = cluster.run(2, FILES[name][0], as_it_is(world, tmp_path, name), where="npu")
    assert outcome.statuses == [2, 2] and not (tmp_path / "out").exists(), outcome.told()
    assert f"{key} 8 does not divide the 2 processes" in outcome.logs[0]
    assert "start 8 processes" in outcome.logs[0] and f"set {key} to one of: 1, 2" in outcome.logs[0]
    outcome = cluster.run(2, FILES[name][0], as_it_is(world, tmp_path, name, **{key: 2}), where="npu")
    assert outcome.ok, outcome.told()
    assert len(losses_and_weights(tmp_path / "out").losses) == STEPS[name]


def test_heads_that_cannot_be_split_are_said_before_weights_are_read(
    cluster: Cluster, world: World, tmp_path: Path
) -> None:
    outcome = cluster.run(8, FILES["lora in parts"][0], as_it_is(world, tmp_path, "lora in parts"), where="npu")
    assert outcome.statuses == [2] * 8 and not (tmp_path / "out").exists(), outcome.told()
    assert (
        "tensor_parallel_degree (--tensor-parallel) 8 does not divide the model's 4 attention heads" in outcome.logs[0]
    ), outcome.told()
    assert "allowed: 1, 2" in outcome.logs[0]
