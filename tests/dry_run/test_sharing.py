"""What each of several devices holds, against arithmetic and against what runs allocate on stand-in NPUs.

(paddlemix.dry_run.sharing, paddlemix.dry_run.computation)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained, build_model, save_model
from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.dry_run.activations import Activations
from paddlemix.dry_run.computation import training_of
from paddlemix.dry_run.memory import MemoryEstimate, estimate_memory
from paddlemix.dry_run.plan import DryRun, plan_run
from paddlemix.dry_run.report import report_lines
from paddlemix.dry_run.sharing import PIECE, Training, Weight, buffers_in_passes, own_names
from paddlemix.models.configuration import DecoderConfig
from paddlemix.parallel.deferred import LARGE as SLICED
from tests.parallel.cluster import Circumstances, Cluster
from tests.tiny_world import World

LARGE = 2 * SLICED


def weight(name: str, count: int = LARGE, trained: bool = True, **more: Any) -> Weight:
    """In bfloat16."""
    number = f"language_model.layers.{name}.a.weight"
    return Weight(name=number, part="language_model", count=count, num_bytes=2 * count, trained=trained, **more)


FOUR = tuple(weight(str(number)) for number in range(4))
FROZEN, SMALL, CODES = weight("4", trained=False), weight("5", 4), weight("6", trained=False, coded=True)


def of_stage(stage: int, **more: Any) -> Training:
    """On four devices, with master weights."""
    values = {"devices": 4, "sharding_stage": stage, "sharding_degree": 4, "master_weights": True, **more}
    return Training(**values)


def bytes_of(estimate: MemoryEstimate) -> tuple[int, int, int, int]:
    (part,) = estimate.parts
    return part.weights, part.gradients, part.states, part.master


def test_each_stage_shares_more() -> None:
    found = [bytes_of(estimate_memory(FOUR, Activations(), of_stage(stage), on_cpu=False)) for stage in range(4)]
    shares = [(4, 4, 4, 4), (4, 4, 1, 1), (4, 1, 1, 1), (1, 1, 1, 1)]  # of four weights
    sizes = (2, 2, 8, 4)  # bytes a number of weights, gradients, states and master weights
    assert found == [tuple(LARGE * size * share for size, share in zip(sizes, row, strict=True)) for row in shares]


def test_stage_3_slices_large_weights_alone() -> None:
    weights = (FROZEN, SMALL, CODES)
    held = bytes_of(estimate_memory(weights, Activations(), of_stage(3), on_cpu=False))
    assert held == (LARGE // 2 + 8 + 2 * LARGE, 8, 32, 16)


def test_a_device_holds_whole_parameters_in_stages_1_and_2() -> None:
    sizes = (1, 5, 3, 6)
    weights = [weight(str(number), size) for number, size in enumerate(sizes)]
    two = {"devices": 2, "sharding_degree": 2}
    sorted_first = own_names(weights, of_stage(1, **two))  # 6 and 1 against 5 and 3
    in_order = own_names(weights, of_stage(2, **two))  # 1 and 3 against 5, then 6 to the first
    assert sorted_first == {weights[1].name, weights[2].name}
    assert in_order == {weights[0].name, weights[2].name, weights[3].name}
    assert own_names([*weights, FROZEN], Training()) == {item.name for item in weights}


def test_replicas_hold_their_gradients_twice() -> None:
    """While activations exist where each backward pass sends them, else afterwards, in their place."""
    activations = Activations(language_model=10 * LARGE, loss=7)

    def tensors(**values: Any) -> int:
        training = Training(devices=2, accumulates=False, **values)
        return estimate_memory(FOUR, activations, training, on_cpu=False).tensors - activations.kept - 7

    alone = estimate_memory(FOUR, activations, Training(accumulates=False), on_cpu=False).tensors - activations.kept - 7
    assert alone == 4 * LARGE * (2 + 8)  # the gradients come when activations go
    assert tensors() == alone + 2 * 4 * LARGE * 2
    # The 7 bytes of the loss are free by then.
    assert tensors(recompute=True) == alone + 4 * LARGE * (2 + 2) - 10 * LARGE - 7
    assert tensors(tensor_degree=2) == tensors(recompute=True)
    assert tensors(float32_gradients=True) == alone + 4 * LARGE * (4 + 4 - 2) - 10 * LARGE + 2 * 4 * LARGE - 7
    replicas = Training(devices=4, accumulates=False, sharding_stage=1, sharding_degree=2)
    assert (replicas.replicas, of_stage(1).replicas, Training(devices=4).replicas) == (2, 1, 4)


def test_buffers_of_the_stages() -> None:
    assert buffers_in_passes(FOUR, of_stage(1)) == 0
    assert buffers_in_passes(FOUR, of_stage(2)) == 3 * LARGE * 2
    huge = tuple(weight(str(number), 8 * PIECE) for number in range(4))
    assert buffers_in_passes(huge, of_stage(2, float32_gradients=True)) == 3 * PIECE * 4 + 8 * PIECE * (2 + 4)
    # the weight in use with its gradient, and the next
    assert buffers_in_passes(FOUR, of_stage(3)) == 3 * LARGE * 2
    assert buffers_in_passes((FROZEN, CODES, SMALL), of_stage(3)) == 2 * LARGE * 2


@pytest.mark.parametrize(
    ("keys", "devices", "expected"),
    [
        ({}, 8, (0, 1, 8)),
        ({"sharding": "stage2"}, 8, (2, 8, 1)),
        ({"sharding": "stage3", "sharding_parallel_degree": 8}, 16, (3, 8, 2)),
        ({"sharding": "stage1"}, 1, (0, 1, 1)),
    ],
)
def test_what_a_recipe_spreads(keys: dict[str, Any], devices: int, expected: tuple[int, int, int]) -> None:
    training = training_of(RunConfig(**keys), devices)
    degree = training.sharding_degree if training.stage else 1
    assert (training.stage, degree, training.replicas) == expected


def peak_of_run(recipe: str, overrides: list[str]) -> int:
    """Run on every process: the most that paddle's tensors took of the device, bytes."""
    import paddle

    from paddlemix.trainer.recipe import run_recipe

    run_recipe(load_config(Path(recipe), overrides))
    card = int(paddle.device.get_device().partition(":")[2])
    return int(paddle.base.core.device_memory_stat_peak_value("Allocated", card))


@pytest.fixture(scope="module")
def wide(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 32,000 tokens, so that weights outweigh activations, as in models that need several cards."""
    base = load_pretrained(world.model)
    text = DecoderConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    sizes = replace(base.model.config, text=text)
    directory = tmp_path_factory.mktemp("wide") / "model"
    save_model(Pretrained(build_model(sizes, initialise=True), base.processor, directory), directory)
    return directory


HALF = ["bf16=true", "fp16_opt_level=O2", "amp_master_grad=true"]


SLOW = [
    ["sharding=stage1", *HALF],
    HALF,
    ["sharding=stage2", *HALF],
    ["sharding=stage3"],
    ["sharding=stage3", "lora=true"],
]
CASES = [
    [],
    ["sharding=stage2"],
    ["sharding=stage3", *HALF],
    *(pytest.param(keys, marks=pytest.mark.slow) for keys in SLOW),
]


@pytest.mark.parametrize("keys", CASES, ids=lambda keys: ",".join(keys) or "data parallel")
def test_the_estimate_is_what_a_device_holds(
    cluster: Cluster, world: World, wide: Path, tmp_path: Path, keys: list[str]
) -> None:
    plan = compare_with_run(cluster, world.recipe(tmp_path, model_name_or_path=str(wide), max_steps=6), keys, 2)
    says = any("on their way between devices" in line for line in report_lines(plan, None))
    assert says == (plan.memory.communication > 0)


def compare_with_run(cluster: Cluster, recipe: Path, keys: list[str], devices: int) -> DryRun:
    # Runs are an epoch long: a few steps may have none of the long rows.
    keys = [*keys, "per_device_train_batch_size=1", "device=npu", "save_strategy=no"]
    how = Circumstances(where="npu")
    outcome = cluster.call(devices, f"{__name__}:peak_of_run", how, recipe=str(recipe), overrides=keys)
    assert outcome.ok, outcome.told()
    plan = plan_run(load_config(recipe, keys), devices=devices)
    assert plan.memory.tensors == pytest.approx(max(outcome.results), rel=0.15)
    return plan


SPLIT = [
    (2, ["lora=true"]),
    (4, ["sharding=stage2", *HALF]),
    *(
        pytest.param(devices, keys, marks=pytest.mark.slow)
        for devices, keys in [
            (2, []),
            (2, HALF),
            (2, ["recompute=true"]),
            (2, ["lora=true", "quantize_base=int8"]),
            (4, []),
            (4, ["sharding=stage1"]),
        ]
    ),
]


@pytest.mark.parametrize(("devices", "keys"), SPLIT, ids=str)
def test_the_estimate_is_what_a_device_of_a_tensor_group_holds(
    cluster: Cluster, world: World, wide: Path, tmp_path: Path, devices: int, keys: list[str]
) -> None:
    recipe = world.recipe(tmp_path, model_name_or_path=str(wide), max_steps=24 // devices)
    plan = compare_with_run(cluster, recipe, ["tensor_parallel_degree=2", *keys], devices)
    assert plan.replicas == devices // 2
    lines = list(report_lines(plan, None))
    assert any(", tensor parallel 2" in line for line in lines)
    groups = f"x {devices // 2} group{'s' if devices > 2 else ''} of 2 devices)"
    assert any(line.startswith("steps: ") and line.endswith(groups) for line in lines)
