"""The estimate of a model that a tensor group computes together, against what its processes hold.

(paddlemix.dry_run.model, paddlemix.dry_run.activations, paddlemix.dry_run.sharing)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from paddlemix.config.schema import RunConfig
from paddlemix.dry_run.activations import _loss_bytes
from paddlemix.dry_run.computation import computation_of, training_of
from paddlemix.dry_run.model import describe_model
from paddlemix.dry_run.sharing import JOINED_AT_ONCE, Training, Weight, exchanged_afterwards, own_names
from paddlemix.dry_run.step_sizes import BatchShape, Computation
from paddlemix.errors import UserError
from paddlemix.models.kernels import cpu_library
from paddlemix.models.presets import PRESETS, count_parameters
from paddlemix.parallel.layout import Layout
from paddlemix.parallel.tensor import split_vocabulary
from paddlemix.parallel.tensor.split_plan import vocabulary_part
from paddlemix.trainer import loss
from paddlemix.trainer.steps import partial_gradients
from tests.dry_run.test_memory import LENGTH, ROWS, SMALL, TILES, small_llava
from tests.parallel.cluster import Cluster

SHAPE = BatchShape(rows=ROWS, length=LENGTH, tiles=TILES, supervised=40)
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "recompute": {"recompute": True},
    "tower": {"vision_tower": "full"},
    "lora": SMALL,
    "dropout": {**SMALL, "lora_dropout": 0.1},
}


def kept_in_parts() -> dict[str, tuple[int, int]]:
    """Run on both processes: kind -> what paddle keeps, and the estimate of it."""
    import paddle.distributed as dist

    from paddlemix.dry_run.activations import estimate_activations
    from paddlemix.dry_run.model import linear_sizes
    from paddlemix.parallel.layout import Layout
    from paddlemix.parallel.tensor.model import SplitLlavaModel
    from paddlemix.peft.lora import add_lora
    from paddlemix.trainer.trainable import adapter_config, plan_training, set_trainable
    from tests.dry_run.test_memory import kept_bytes, make_inputs

    dist.init_parallel_env()
    layout = Layout(world_size=2, rank=dist.get_rank(), tensor_group=dist.get_group(0))
    found, sizes = {}, small_llava()
    for kind, keys in KINDS.items():
        config = RunConfig(tensor_parallel_degree=2, **keys)
        model = SplitLlavaModel(sizes, layout)
        plan = plan_training(model, config)
        if plan.lora_modules:
            add_lora(model, adapter_config(config, plan))
        set_trainable(model, plan, config)
        model.language_model.enable_recompute = config.recompute
        trained = {name for name, parameter in model.named_parameters() if not parameter.stop_gradient}
        computation = computation_of(config, on_cpu=True)
        estimate = estimate_activations(sizes, linear_sizes(model), trained, SHAPE, computation)
        found[kind] = kept_bytes(model, make_inputs(sizes, SHAPE)), estimate.kept
    return found


def test_kept_activations_are_what_each_process_allocates(cluster: Cluster) -> None:
    outcome = cluster.call(2, f"{__name__}:kept_in_parts")
    assert outcome.ok, outcome.told()
    for found in outcome.results:
        assert {kind: estimate for kind, (_, estimate) in found.items()} == {
            kind: pytest.approx(kept, rel=0.05) for kind, (kept, _) in found.items()
        }


@pytest.mark.parametrize("keys", [{}, {**SMALL, "vision_tower": "lora"}], ids=["full", "lora"])
def test_each_device_has_its_part_and_the_report_all_numbers(keys: dict[str, Any]) -> None:
    sizes = small_llava(2)
    sizes = replace(sizes, text=replace(sizes.text, vocab_size=901))
    whole = {item.name: item for item in describe_model(RunConfig(**keys), sizes, None).weights}
    part = describe_model(RunConfig(tensor_parallel_degree=2, **keys), sizes, None).weights
    assert {item.name: (item.in_all, item.trained) for item in part} == {
        name: (item.count, item.trained) for name, item in whole.items()
    }
    shares = {item.name: item.count / whole[item.name].count for item in part}
    assert shares["lm_head.weight"] == shares["language_model.embed_tokens.weight"] == 451 / 901
    inside = "language_model.layers.3."
    if keys:
        column, row = f"{inside}self_attn.k_proj", f"{inside}mlp.down_proj"
        assert [shares[f"{column}.{own}"] for own in ("weight", "lora_A", "lora_B")] == [0.5, 1, 0.5]
        assert [shares[f"{row}.{own}"] for own in ("weight", "lora_A", "lora_B")] == [0.5, 0.5, 1]
    else:
        assert shares[f"{inside}mlp.gate_proj.weight"] == shares[f"{inside}self_attn.o_proj.weight"] == 0.5
    assert {share for name, share in shares.items() if not name.startswith(("language_model", "lm_head"))} == {1}
    joined = {item.name for item in part if item.joined}
    assert f"{inside}input_layernorm.weight" in joined and "language_model.norm.weight" in joined


def test_a_published_model_is_divided() -> None:
    sizes = PRESETS["llava-v1.5-7b"]
    found = [
        describe_model(RunConfig(tensor_parallel_degree=degree), sizes, None).weights for degree in (1, 2, 4, 8, 32)
    ]
    assert {sum(item.in_all for item in weights) for weights in found[1:]} == {count_parameters(sizes)}
    decoder = [sum(w.count for w in weights if w.part == "language_model") for weights in found]
    assert [round(decoder[0] / count, 2) for count in decoder] == [1, 2, 4, 7.88, 29.72]  # 172 blocks of 64
    with pytest.raises(
        UserError, match=r"tensor_parallel_degree \(--tensor-parallel\) 3 does not divide.*allowed: 1, 2, 4, 8, 16, 32"
    ):
        describe_model(RunConfig(tensor_parallel_degree=3), sizes, None)


def weight(count: int, joined: bool) -> Weight:
    return Weight(
        name=f"language_model.{joined}", part="language_model", count=count, num_bytes=2 * count, trained=True,
        joined=joined,
    )  # fmt: skip


def test_gradients_of_what_all_hold_are_made_one_in_messages() -> None:
    weights = weight(1000, joined=False), weight(10, joined=True)
    alone, two = Training(tensor_degree=2), Training(tensor_degree=2, devices=2)
    assert exchanged_afterwards(weights, Training(devices=2)) == 0
    assert exchanged_afterwards(weights, alone) == 2 * 4 * 10
    assert exchanged_afterwards(weights, two) == 2020  # all of them, in a piece that is free again by then
    large = weight(JOINED_AT_ONCE, joined=True), weight(JOINED_AT_ONCE + 8, joined=True), *weights
    assert exchanged_afterwards(large, alone) == 2 * 4 * (JOINED_AT_ONCE + 8)
    assert JOINED_AT_ONCE == partial_gradients._AT_ONCE


def test_devices_of_a_group_agree_on_who_has_which_states() -> None:
    """By the sizes of whole weights, in stage 2 as well; the fullest device counts by its parts."""
    sizes = {"a": (60, 30), "b": (50, 25), "c": (50, 50), "d": (40, 20)}
    weights = [replace(weight(part, joined=False), name=name, in_all=whole) for name, (whole, part) in sizes.items()]
    for stage in (1, 2):
        training = Training(tensor_degree=2, devices=2, sharding_stage=stage, sharding_degree=2)
        assert own_names(weights, training) == {"b", "c"}


@pytest.mark.parametrize(
    ("keys", "devices", "expected"),
    [({}, 8, (0, 4)), ({"sharding": "stage2"}, 8, (2, 1)), ({"sharding": "stage1"}, 2, (0, 1))],
)
def test_a_group_of_devices_counts_once(keys: dict[str, Any], devices: int, expected: tuple[int, int]) -> None:
    training = training_of(RunConfig(tensor_parallel_degree=2, **keys), devices)
    assert (training.stage, training.replicas) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_dora": True}, "DoRA needs all inputs of '.*o_proj'.* set lora_target_modules to"),
        ({"pissa": True}, "pissa begins with the components of the whole weight"),
    ],
)
def test_adapters_that_cannot_begin_in_parts_are_refused_before_the_run(keys: dict[str, Any], message: str) -> None:
    sizes = small_llava()
    describe_model(RunConfig(**SMALL, **keys), sizes, None)
    with pytest.raises(UserError, match=message):
        describe_model(RunConfig(tensor_parallel_degree=2, **SMALL, **keys), sizes, None)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_take_what_the_loss_allocates(dtype: str, degree: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits, and what the softmax makes of them; a card computes it as a CPU does without C."""
    import paddle

    sizes = small_llava()
    sizes = replace(sizes, text=replace(sizes.text, vocab_size=4000))
    rows, part = 100, vocabulary_part(sizes.text, degree, 0)
    monkeypatch.setattr("paddle.distributed.all_reduce", lambda *arguments, **named: None)
    monkeypatch.setattr("paddle.distributed.all_gather", lambda parts, own, group: parts.extend([own, own]))
    targets = paddle.arange(rows)
    memory = paddle.base.core
    with cpu_library.switched_off():
        for _ in range(2):  # the first makes constants that stay
            before = memory.host_memory_stat_current_value("Allocated", 0)
            memory.host_memory_stat_reset_peak_value("Allocated", 0)
            logits = paddle.zeros([rows, part.stop - part.start], dtype=dtype)
            if degree == 1:
                found = loss._cross_entropy(logits, targets)
            else:
                found = split_vocabulary.cross_entropy(logits, targets, part, Layout(tensor_group=object()))
            highest = memory.host_memory_stat_peak_value("Allocated", 0) - before
            del logits, found
    size = 4 if dtype == "float32" else 2
    computation = Computation(size=size, wide=size, on_cpu=False, tensor_degree=degree)
    states = size * rows * sizes.text.hidden_size if degree > 1 else 0  # copied before
    assert _loss_bytes(sizes, set(), rows, computation)[1] - states == pytest.approx(highest, rel=0.02)
