"""A device without enough memory: the error says what was being done and which keys take less."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained, build_model, save_model
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
from tests.npu.conftest import Bench
from tests.npu.test_answers import CHAT, PREDICT
from tests.tiny import PATCH, TILE

MIB = 8  # of device memory


@pytest.fixture(scope="module")
def large(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 7.5 MiB in float32."""
    world = load_pretrained(bench.world.model)
    text = DecoderConfig(
        vocab_size=world.model.config.text.vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = VisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=PATCH,
    )
    model = build_model(LlavaConfig(text=text, vision=vision, mm_vision_select_layer=-1), initialise=True)
    directory = tmp_path_factory.mktemp("large") / "model"
    save_model(Pretrained(model, world.processor, directory), directory)
    return directory


def test_loading(bench: Bench, large: Path) -> None:
    arguments = ["--model-path", large, "--device", "npu", "--dtype", "float32", "--max-new-tokens", 4]
    outcome = bench.run("bare", CHAT, *arguments, memory=2, stdin="How many?\n")
    assert outcome.status == 2
    assert f"memory ran out while loading {large} on npu:0 (" in outcome.err
    assert "--dtype bfloat16" in outcome.err and "--load-4bit" in outcome.err


def test_training(bench: Bench, large: Path, where: str, tmp_path: Path) -> None:
    recipe = bench.world.recipe(tmp_path, device="npu", model_name_or_path=str(large))
    outcome = bench.run(where, "tools.supervised_finetune", recipe, memory=2 * MIB)
    assert outcome.status == 2, outcome.err
    assert "memory ran out while training on npu:0, in step 1 (" in outcome.err
    assert "per_device_train_batch_size 2 -> 1, with gradient_accumulation_steps 1 -> 2" in outcome.err
    assert "recompute false -> true" in outcome.err and "lora false -> true" in outcome.err
    assert "Traceback" not in outcome.err


def test_answering(bench: Bench, large: Path, tmp_path: Path) -> None:
    files = ["--input", bench.world.data / "train.json", "--image-root", bench.world.data, "--output", tmp_path / "a"]
    flags = ["--device", "npu", "--dtype", "float32", "--batch-size", 12, "--max-new-tokens", 4]
    outcome = bench.run("bare", PREDICT, "--model-path", large, *files, *flags, memory=MIB)
    assert outcome.status == 2, outcome.err
    assert f"memory ran out while answering with {large} on npu:0 (" in outcome.err
    assert "--batch-size 12 -> a smaller one" in outcome.err
