"""The estimate of memory: what paddle keeps of a step, what the model weighs, and published orders of LLaVA-7B."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.adapters.adapter import ADAPTER_FILE
from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.files.weight_files import write_json
from paddlemix.checkpoints.sizes import read_sizes
from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.dry_run import activations, layer_activations
from paddlemix.dry_run.activations import Activations, first_trained_layer
from paddlemix.dry_run.device import device_memory, program_bytes
from paddlemix.dry_run.layer_activations import visible_pairs
from paddlemix.dry_run.memory import estimate_memory
from paddlemix.dry_run.model import describe_model, linear_sizes
from paddlemix.dry_run.plan import DryRun, plan_run
from paddlemix.dry_run.report import report_lines
from paddlemix.dry_run.sharing import Training, Weight
from paddlemix.dry_run.step_sizes import BatchShape, Computation, LinearSize
from paddlemix.errors import MissingFileError, UserError
from paddlemix.models.attention import packed_segments
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
from paddlemix.models.kernels import attention_functions, formulas
from paddlemix.models.llava import LlavaModel
from paddlemix.models.presets import PRESETS, count_parameters
from paddlemix.peft.lora import add_lora
from paddlemix.peft.quantize import QuantizationConfig, quantize_model
from paddlemix.trainer.loss import LossModel
from paddlemix.trainer.trainable import adapter_config, plan_training, set_trainable
from tests.tiny_world import LORA, World

GIB = 1024**3
SMALL = {"lora": True, "lora_rank": 2, "lora_dropout": 0.0}
PACKED = (70, 80, 30, 40, 80, 150)
VOCABULARY, ROWS, LENGTH, TILES = 900, 3, 150, 3


def small_llava(key_value_heads: int | None = None) -> LlavaConfig:
    """Large enough that tensors of a batch outweigh paddle's own."""
    text = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
    )
    vision = VisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    return LlavaConfig(text=text, vision=vision)


def make_inputs(config: LlavaConfig, shape: BatchShape) -> dict[str, Any]:
    """A batch of the shape; every third position is trained."""
    random, positions = np.random.default_rng(0), shape.positions
    index = np.arange(positions)
    inputs = {
        "input_ids": random.integers(3, VOCABULARY, (shape.rows, shape.length)),
        "position_ids": np.tile(np.arange(shape.length), (shape.rows, 1)),
        "loss_index": 3 * np.arange(shape.supervised),
        "loss_targets": random.integers(3, VOCABULARY, shape.supervised),
    }
    if shape.tiles:
        visual = shape.tiles * config.tokens_per_tile
        index[:visual] = positions + np.arange(visual)
        inputs["merge_index"] = index
        inputs["pixel_values"] = random.standard_normal((shape.tiles, 3, 56, 56), dtype=np.float32)
    tensors = {name: paddle.to_tensor(values) for name, values in inputs.items()}
    if shape.runs:
        segments = np.concatenate([np.full(length, 1 + number % 7) for number, length in enumerate(shape.runs)])
        tensors["segment_ids"] = packed_segments(segments.reshape(shape.rows, shape.length))
    return tensors


def allocated() -> int:
    return int(paddle.base.core.host_memory_stat_current_value("Allocated", 0))


def kept_bytes(model: LlavaModel, inputs: dict[str, Any]) -> int:
    """What paddle holds between forward and backward pass."""
    trained = LossModel(model)
    trained.train()
    for _ in range(2):  # the first pass makes what stays
        gc.collect()
        before = allocated()
        total = trained(**inputs)[0]
        kept = allocated() - before
        total.backward()
        del total
        for parameter in model.parameters():
            parameter.clear_gradient(False)
    return kept


@pytest.mark.parametrize(
    ("keys", "heads", "held", "runs", "supervised"),
    [
        pytest.param({}, None, None, (), 40, id="full"),
        pytest.param({}, 2, None, (), 40, id="grouped heads"),
        pytest.param({}, None, None, (), 140, id="much supervised"),
        pytest.param({}, None, None, PACKED, 40, id="packed"),
        pytest.param({"recompute": True}, None, None, (), 40, id="recompute"),
        pytest.param({"language_model": "frozen"}, None, None, (), 40, id="pretraining"),
        pytest.param({"vision_tower": "full"}, None, None, (), 40, id="tower"),
        pytest.param({**SMALL, "vision_tower": "lora"}, None, None, (), 40, id="tower lora"),
        pytest.param(SMALL, None, None, (), 40, id="lora"),
        pytest.param({**SMALL, "lora_rank": 16}, None, None, (), 40, id="lora of high rank"),
        pytest.param({**SMALL, "lora_dropout": 0.1}, 1, None, (), 40, id="dropout"),
        pytest.param({**SMALL, "projector": "frozen"}, None, None, (), 40, id="lora alone"),
        pytest.param({**SMALL, "use_dora": True}, None, None, (), 40, id="dora"),
        pytest.param({**SMALL, "use_dora": True, "lora_rank": 16}, None, None, (), 40, id="dora of high rank"),
        pytest.param({**SMALL, "use_dora": True, "lora_dropout": 0.1}, None, None, (), 40, id="dora, dropout"),
        pytest.param({**SMALL, "pissa": True}, None, None, (), 40, id="pissa"),
        pytest.param(SMALL, None, "int8", (), 40, id="int8"),
        pytest.param({**SMALL, "lora_dropout": 0.1}, None, "nf4", (), 40, id="nf4, dropout"),
        pytest.param(
            {**SMALL, "projector": "frozen", "lora_target_modules": [r".*layers\.[23].*q_proj"]},
            *(None, None, (), 40),
            id="upper layers alone",
        ),
    ],
)
def test_kept_activations_are_what_paddle_allocates(
    form: str, keys: dict[str, Any], heads: int | None, held: str | None, runs: tuple[int, ...], supervised: int
) -> None:
    paddle.set_device("cpu")
    sizes, config = small_llava(heads), RunConfig(**keys)
    model = LlavaModel(sizes)
    if held is not None:
        quantize_model(model, QuantizationConfig(kind=held))
    plan = plan_training(model, config)
    if plan.lora_modules:
        add_lora(model, adapter_config(config, plan))
    set_trainable(model, plan, config)
    model.language_model.enable_recompute = config.recompute
    shape = BatchShape(rows=ROWS, length=LENGTH, runs=runs, tiles=TILES, supervised=supervised)
    trained = {name for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    computation = Computation(recompute=config.recompute, compiled=form == "compiled")
    estimate = activations.estimate_activations(sizes, linear_sizes(model), trained, shape, computation)
    assert estimate.kept == pytest.approx(kept_bytes(model, make_inputs(sizes, shape)), rel=0.05)


def test_constants_are_those_of_the_code() -> None:
    assert layer_activations.CAUSAL_BLOCK == formulas._CAUSAL_BLOCK
    for length in (1, 100, 191, 192, 425, 2048):
        blocks = attention_functions._causal_blocks(length, length, formulas._CAUSAL_BLOCK)
        pairs = sum((stop - start) * end for start, stop, end in blocks)
        assert visible_pairs((length,), causal=True, blocks=True) == pairs
    assert visible_pairs((3, 4), causal=False, blocks=True) == 25


def test_nothing_is_kept_below_the_first_trained_layer() -> None:
    part = "language_model."
    assert first_trained_layer({f"{part}layers.3.mlp.up_proj.weight", f"{part}layers.2.x"}, part, 8) == 2
    assert first_trained_layer({f"{part}embed_tokens.weight", f"{part}layers.2.x"}, part, 8) == 0
    assert first_trained_layer({f"{part}norm.weight"}, part, 8) == 8
    assert first_trained_layer({"projector.0.weight"}, part, 8) is None


# ---- weights and their optimiser ----

HALF = Weight(name="language_model.layers.0.a.weight", part="language_model", count=100, num_bytes=200, trained=True)
FROZEN = Weight(name="language_model.layers.0.b.weight", part="language_model", count=40, num_bytes=80, trained=False)


def language_model(training: Training) -> tuple[int, int, int, int]:
    (part,) = estimate_memory((HALF, FROZEN), Activations(), training, on_cpu=False).parts
    assert (part.count, part.trained) == (140, 100)
    return part.weights, part.gradients, part.states, part.master


def test_bytes_of_a_trained_weight() -> None:
    assert language_model(Training()) == (280, 200, 800, 0)
    assert language_model(Training(master_weights=True)) == (280, 200, 800, 400)
    assert language_model(Training(master_weights=True, float32_gradients=True)) == (280, 400, 800, 400)


def test_the_heap_counts_on_cpu_alone() -> None:
    activations = Activations(language_model=1000, loss=100, backward=700, released=500, block=10)
    here = estimate_memory((HALF,), activations, Training(), on_cpu=True, program=5)
    there = estimate_memory((HALF,), activations, Training(), on_cpu=False, program=5)
    assert here.tensors == there.tensors == 200 + 200 + 800 + 1000 + 200
    assert there.total == there.tensors + 5
    assert here.overhead > 10 and here.total == here.tensors + here.overhead + 5


@pytest.mark.parametrize(
    "keys", [{}, LORA, {**LORA, "vision_tower": "lora", "use_dora": True}, {"fp16": True, "fp16_opt_level": "O2"}]
)
def test_a_model_without_weights_has_the_numbers_of_the_real_one(keys: dict[str, Any]) -> None:
    sizes, config = small_llava(), RunConfig(**keys)
    model = LlavaModel(sizes)
    plan = plan_training(model, config)
    if plan.lora_modules:
        add_lora(model, adapter_config(config, plan))
    set_trainable(model, plan, config)
    real = {name: (parameter.size, not parameter.stop_gradient) for name, parameter in model.named_parameters()}
    facts = describe_model(config, sizes, None)
    assert {weight.name: (weight.count, weight.trained) for weight in facts.weights} == real
    assert facts.linears == linear_sizes(model)
    assert all(weight.num_bytes == weight.count * (2 if config.fp16 else 4) for weight in facts.weights)


@pytest.mark.parametrize("name", ["llava-v1.5-7b", "llava-v1.6-vicuna-13b"])
def test_published_models_have_their_numbers(name: str) -> None:
    facts = describe_model(RunConfig(), PRESETS[name], None)
    assert sum(weight.count for weight in facts.weights) == count_parameters(PRESETS[name])
    codes = describe_model(RunConfig(lora=True), PRESETS[name], QuantizationConfig(kind="nf4"))
    held = sum(weight.num_bytes for weight in codes.weights if weight.name.endswith("mlp.up_proj.base.weight"))
    numbers = sum(weight.count for weight in codes.weights if weight.name.endswith("mlp.up_proj.base.weight"))
    assert held / numbers == pytest.approx(0.516, rel=0.01)
    text = PRESETS[name].text
    layer = text.hidden_size * (4 * text.hidden_size + 3 * text.intermediate_size)
    assert (codes.coded, codes.coded_at_once) == (text.num_hidden_layers * layer, layer)
    assert (facts.coded, facts.coded_at_once) == (0, 0)


# ---- LLaVA-7B, from its sizes alone ----


def plan_7b(world: World, recipe: str, **changes: Any) -> DryRun:
    """A shipped recipe with the world's records in place of its data."""
    dataset = {"train": [{"data_files": str(world.data / "train.json")}]}
    keys: dict[str, Any] = {
        "dataset": dataset,
        "image_root": str(world.data),
        "evaluation_strategy": "no",
        "save_strategy": "no",
    }
    keys |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "output_dir": str(world.root / "none")}
    path = Path(__file__).parents[2] / "paddlemix/config/llava/v1_5" / recipe
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in {**keys, **changes}.items()}
    return plan_run(load_config(path, [f"{key}={text}" for key, text in texts.items()]), devices=1)


def test_llava_7b_takes_what_is_published(world: World) -> None:
    """Full: 16 bytes for each weight, over 100 GiB (LLaMA-Factory's table: 120 GB).  LoRA: about 20 GiB (ms-swift's
    LLaVA best practice: 21 GB)."""
    full = plan_7b(world, "sft_argument.json", amp_master_grad=False, device="gpu")
    assert 100 * GIB < full.memory.total < 125 * GIB
    assert full.steps == 12 and full.statistics is None and "max_length" in full.notes[-1]
    lora = plan_7b(world, "lora_sft_argument.json", device="gpu")
    assert 18 * GIB < lora.memory.total < 22 * GIB
    kept = plan_7b(world, "lora_sft_argument.json", device="gpu", recompute=False)
    assert kept.memory.total > 1.5 * lora.memory.total
    coded = plan_7b(world, "lora_sft_argument.json", device="gpu", quantize_base="nf4")
    assert coded.memory.total < lora.memory.total - 7 * GIB
    assert 1.5 * GIB < coded.memory.wide < 2 * GIB  # a decoder layer in bf16, half a layer twice in float32, scales
    exact = {"device": "cpu", "bf16": False, "fp16_opt_level": "O1", "quantize_base": "nf4"}
    assert plan_7b(world, "lora_sft_argument.json", **exact).memory.wide == 0


def test_a_recipe_that_no_card_holds_says_so(world: World) -> None:
    full, lora = (plan_7b(world, recipe, device="gpu") for recipe in ("sft_argument.json", "lora_sft_argument.json"))
    warnings = [[line for line in report_lines(run, None) if line.startswith("warning")] for run in (full, lora)]
    assert len(warnings[0]) == 1 and warnings[1] == []
    assert "that exceeds a card of 80.0 GiB" in warnings[0][0] and "several devices with sharding" in warnings[0][0]


# ---- what it is read from ----


def test_sizes_need_no_weights(world: World, tmp_path: Path) -> None:
    directory = tmp_path / "bare"
    directory.mkdir()
    for name in ("config.json", "processor_config.json"):
        (directory / name).write_bytes((world.model / name).read_bytes())
    found = read_sizes(BaseSpec(model=str(directory)))
    assert found.config == read_sizes(BaseSpec(model=str(world.model))).config
    assert found.processor is None and found.quantization is None


def test_a_text_model_gets_its_tower(world: World) -> None:
    found = read_sizes(BaseSpec(model=str(world.llama), tower="openai/clip-vit-large-patch14-336"))
    assert found.config.vision is not None and found.config.vision.image_size == 336
    assert found.processor is not None and found.processor.image_spec.tile_size == 336
    preset = read_sizes(BaseSpec(model="lmsys/vicuna-7b-v1.5", tower="openai/clip-vit-large-patch14-336"))
    assert preset.config == PRESETS["llava-v1.5-7b"] and "not on this machine" in preset.origin


def test_an_original_checkpoint_names_a_published_tower(tmp_path: Path) -> None:
    tower = "openai/clip-vit-large-patch14"
    values = {"model_type": "llava_llama", "mm_vision_tower": tower, "mm_projector_type": "linear", "vocab_size": 32000}
    write_json(tmp_path / "config.json", values)
    found = read_sizes(BaseSpec(model=str(tmp_path)))
    assert found.config.vision is not None and found.config.vision.image_size == 224


def test_what_has_no_sizes_is_an_error(tmp_path: Path, world: World) -> None:
    with pytest.raises(MissingFileError, match="someone/model.*llava-v1.5-7b"):
        read_sizes(BaseSpec(model="someone/model"))
    with pytest.raises(MissingFileError, match="mm_vision_tower 'someone/tower'"):
        read_sizes(BaseSpec(model=str(world.llama), tower="someone/tower"))
    write_json(tmp_path / ADAPTER_FILE, {})
    with pytest.raises(UserError, match="is an adapter"):
        read_sizes(BaseSpec(model=str(tmp_path)))


def test_the_host_tells_its_memory() -> None:
    found = device_memory("cpu")
    assert found is not None and 0 < found.free <= found.total
    assert device_memory("npu") is None
    assert program_bytes(on_cpu=True) > 100 * 1024**2


def test_low_precision_keeps_half() -> None:
    sizes = PRESETS["llava-v1.5-7b"]
    linears = {name: LinearSize(in_features=64, out_features=64) for name in _linear_names(sizes)}
    shape = BatchShape(rows=1, length=1024, tiles=1, supervised=100)
    kinds = [Computation(on_cpu=False), Computation(size=2, wide=2, on_cpu=False), Computation(size=2, on_cpu=False)]
    whole, level_2, level_1 = (
        activations.estimate_activations(sizes, linears, {"projector.0.weight"}, shape, kind).kept for kind in kinds
    )
    assert 0.5 < level_2 / whole < 0.6  # the norms stay in float32
    assert level_2 < level_1 < whole


def _linear_names(sizes: LlavaConfig) -> list[str]:
    parts = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    layers = range(sizes.text.num_hidden_layers)
    return ["projector.0", "projector.2", *(f"language_model.layers.{n}.{part}" for n in layers for part in parts)]
