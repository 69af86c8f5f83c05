"""The recipe from a JSON file to a trained model: what changes, by how much, what is written, and going on exactly."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.files.weight_files import read_weights, write_safetensors
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.config.load import load_config
from paddlemix.config.pretraining import DEFAULTS
from paddlemix.datasets.collate import collate
from paddlemix.datasets.data_settings import DataSettings
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.datasets.order import EpochBatchSampler
from paddlemix.errors import UserError
from paddlemix.peft.lora import lora_parameters
from paddlemix.sample import IGNORE_INDEX
from paddlemix.trainer.callbacks.progress import Progress
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.trainable import part_of
from tests.tiny_world import CLIP_TOWER, LORA, World, changed, reports, template_of, weights

FREEZE_ALL_BUT_PROJECTOR = {"freeze_include": ["*llama*", "*lm_head*"], "freeze_exclude": ["*llama.mm_projector*"]}


def read(world: World, name: str, loaded: Pretrained) -> SampleDataset:
    assert loaded.processor is not None
    processor = loaded.processor
    settings = DataSettings(max_length=256, image_root=str(world.data))
    return SampleDataset([{"data_files": str(world.data / name)}], lambda template: processor, settings)


def token_losses(loaded: Pretrained, data: SampleDataset, rows: list[int]) -> np.ndarray:
    """Loss of every supervised token of some samples, one sample at a time, from full logits and in numpy."""
    losses = []
    for row in rows:
        [example] = data[row].examples
        scores = prompt_logits(loaded, data, row).astype(np.float64)
        for place, label in enumerate(example.labels):
            if label != IGNORE_INDEX:
                before = scores[place - 1]
                losses.append(np.log(np.exp(before - before.max()).sum()) + before.max() - before[label])
    return np.array(losses)


def prompt_logits(loaded: Pretrained, data: SampleDataset, row: int) -> np.ndarray:
    """[L, V] of one sample."""
    batch = collate([data[row]], loaded.model.config.tokens_per_tile)
    images = {"pixel_values": batch.pixel_values, "merge_index": batch.merge_index}
    with paddle.no_grad():
        hidden = loaded.model(
            paddle.to_tensor(batch.input_ids),
            paddle.to_tensor(batch.position_ids),
            **{name: paddle.to_tensor(value) for name, value in images.items() if value is not None},
        )
        return loaded.model.logits(hidden).numpy()[0]


def first_step(size: int, batch_size: int, seed: int) -> list[int]:
    return next(iter(EpochBatchSampler(size, batch_size, 1, seed)))


# ---- loss ----


def test_the_first_reported_loss_is_the_cross_entropy_of_its_samples(world: World, tmp_path: Path) -> None:
    loaded = load_pretrained(world.model)
    losses = token_losses(loaded, read(world, "train.json", loaded), first_step(12, 5, 3))
    for accumulation in (1, 5):
        out = tmp_path / str(accumulation)
        values = {"per_device_train_batch_size": 5 // accumulation, "gradient_accumulation_steps": accumulation}
        run_recipe(world.config(out, max_steps=1, **values))
        assert reports(out)[1] == pytest.approx(losses.mean(), rel=1e-5)


def test_the_evaluation_loss_is_per_token_over_the_whole_set(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches of 2, 2 and 1 samples with unequal numbers of tokens: a mean of means would differ."""
    loaded = load_pretrained(world.model)
    losses = token_losses(loaded, read(world, "eval.json", loaded), list(range(5)))
    with caplog.at_level(logging.INFO, logger="paddlemix"), propagated():
        results = run_recipe(world.config(tmp_path / "out", do_train=False, do_eval=True))
    assert results["eval_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert f"eval_loss {losses.mean():.4f}" in caplog.text  # an evaluation alone is told to the user too
    assert not list((tmp_path / "out").glob("*")) or not (tmp_path / "out" / "config.json").exists()


@contextlib.contextmanager
def propagated() -> Iterator[None]:
    """Lets pytest see the package's log, which otherwise goes to stderr alone."""
    logger = logging.getLogger("paddlemix")
    logger.propagate = True
    try:
        yield
    finally:
        logger.propagate = False


# ---- what trains ----


def test_four_micro_batches_of_unequal_counts_are_one_batch(world: World, tmp_path: Path) -> None:
    """A large epsilon keeps AdamW from blowing rounding up: a step is then proportional to a small gradient."""
    values = {"max_steps": 2, "adam_epsilon": 0.01, "max_grad_norm": 0.5}
    run_recipe(world.config(tmp_path / "one", per_device_train_batch_size=4, **values))
    for size, passes in ((2, 2), (1, 4)):
        out = tmp_path / f"{size}x{passes}"
        run_recipe(world.config(out, per_device_train_batch_size=size, gradient_accumulation_steps=passes, **values))
        one, other = weights(tmp_path / "one"), weights(out)
        assert max(np.abs(one[name] - other[name]).max() for name in one) < 1e-6
    moved = max(np.abs(one[name] - value).max() for name, value in weights(world.model).items())
    assert moved > 1e-5


def test_pretraining_moves_the_projector_and_not_a_bit_of_the_rest(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, **FREEZE_ALL_BUT_PROJECTOR))
    before = weights(world.model)
    assert changed(before, weights(tmp_path)) == {name for name in before if name.startswith("projector.")}


def test_full_fine_tuning_leaves_the_tower_alone_unless_asked(world: World, tmp_path: Path) -> None:
    before = weights(world.model)
    for name, values, still in (("a", {}, {"vision_tower"}), ("b", {"vision_tower": "full"}, set())):
        run_recipe(world.config(tmp_path / name, **values))
        after = weights(tmp_path / name)
        assert {part_of(key) for key in before} - {part_of(key) for key in changed(before, after)} == still


def test_the_projectors_own_rate_is_used(world: World, tmp_path: Path) -> None:
    """The first step of AdamW is as large as the rate, wherever the gradient is not tiny."""
    before = weights(world.model)
    values = {"max_steps": 1, "per_device_train_batch_size": 12, "adam_epsilon": 1e-12}
    run_recipe(world.config(tmp_path, learning_rate=0.001, mm_projector_lr=0.0001, **values))
    after = weights(tmp_path)
    for name, rate in (("projector.0.weight", 0.0001), ("lm_head.weight", 0.001)):
        assert np.median(np.abs(after[name] - before[name])) == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize("strides", [False, True])
def test_recompute_changes_nothing(world: World, tmp_path: Path, strides: bool) -> None:
    """Also where paddle gives views, which recomputation hands back without their strides."""
    before = paddle.get_flags("FLAGS_use_stride_kernel")
    paddle.set_flags({"FLAGS_use_stride_kernel": strides})
    try:
        for name, values in (("a", {}), ("b", {"recompute": True})):
            run_recipe(world.config(tmp_path / name, **values, **LORA))
    finally:
        paddle.set_flags(before)
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert max(np.abs(one[name] - other[name]).max() for name in one) < 1e-6
    assert changed(weights(world.model), one)


# ---- LoRA ----


def test_lora_at_step_0_changes_no_logit(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, max_steps=1, learning_rate=0.0, **LORA))
    base, adapted = load_pretrained(world.model), load_pretrained(tmp_path)
    assert len(list(lora_parameters(adapted.model))) == 2 * 2 * 7
    for row in (0, 3):
        one, other = (prompt_logits(loaded, read(world, "train.json", loaded), row) for loaded in (base, adapted))
        assert one.tobytes() == other.tobytes()


def test_lora_trains_its_adapters_and_the_projector_alone(world: World, adapter: Path) -> None:
    before, after = weights(world.model), weights(adapter)
    moved = changed(before, after)
    assert {name for name in moved if not name.endswith(("lora_A", "lora_B"))} == {
        name for name in before if name.startswith("projector.")
    }
    assert all(after[name].any() for name in moved if name.endswith("lora_B"))


def test_going_on_with_an_adapter_keeps_all_of_it(world: World, tmp_path: Path) -> None:
    """Its template, its settings, and weights that trained in the first stage but do not in the second."""
    first = {**LORA, "chat_template": "llava_v1", "vision_tower": "lora", "learning_rate": 0.01}
    run_recipe(world.config(tmp_path / "first", **first))
    second = {"lora_path": str(tmp_path / "first"), "projector": "frozen", "learning_rate": 0.01}
    run_recipe(world.config(tmp_path / "second", **second))
    assert template_of(tmp_path / "second") == "llava_v1"
    one, two = load_pretrained(tmp_path / "first"), load_pretrained(tmp_path / "second")
    assert one.adapter == two.adapter
    moved = changed(weights(tmp_path / "first"), weights(tmp_path / "second"))
    assert moved and all(name.endswith(("lora_A", "lora_B")) for name in moved)
    before, after = weights(world.model), weights(tmp_path / "second")
    assert {name for name in changed(before, after) if name.startswith("projector.")}  # those of the first stage


# ---- pretraining from parts ----


def test_pretraining_from_a_text_only_model_and_a_tower(world: World, tmp_path: Path) -> None:
    """Only the new projector is trained; the result is a whole model and can be fine-tuned, with its tower inside."""
    values = {
        "model_name_or_path": str(world.llama),
        "mm_vision_tower": str(CLIP_TOWER),
        "dataset": {"train": [{"data_files": str(world.data / "captions.json")}]},
    }
    texts = [f"{key}={json.dumps(value)}" for key, value in world.values(tmp_path / "start", **values).items()]
    config = load_config(None, texts, DEFAULTS)
    config.max_steps, config.learning_rate = 1, 0.0
    run_recipe(config)
    trained = load_config(None, [*texts, f"output_dir={tmp_path / 'out'}", "learning_rate=0.01"], DEFAULTS)
    run_recipe(trained)
    before, after = weights(tmp_path / "start"), weights(tmp_path / "out")
    assert changed(before, after) == {name for name in before if name.startswith("projector.")}
    text = weights(world.model)
    for name in before:
        if name.startswith(("language_model.", "lm_head.")):
            assert after[name].tobytes() == text[name].tobytes(), name
    loaded = load_pretrained(tmp_path / "out")
    assert loaded.model.config.vision is not None and loaded.model.config.mm_vision_select_layer == -2
    assert loaded.unused  # the tower's last layer is not built, but not lost either
    assert template_of(tmp_path / "out") == "plain"
    run_recipe(
        world.config(tmp_path / "tuned", model_name_or_path=str(tmp_path / "out"), chat_template="vicuna_v1", **LORA)
    )
    assert template_of(tmp_path / "tuned") == "vicuna_v1"
    assert load_pretrained(tmp_path / "tuned").processor is not None


def test_an_adapter_on_parts_brings_its_projector(world: World, tmp_path: Path) -> None:
    """The base has no projector of its own: without the adapter's it would be drawn anew with each loading."""
    values = {"model_name_or_path": str(world.llama), "mm_vision_tower": str(CLIP_TOWER), "projector": "frozen"}
    run_recipe(world.config(tmp_path, **values, **LORA))
    assert not changed(weights(tmp_path), weights(tmp_path))


def test_a_projector_file_is_started_from(world: World, tmp_path: Path) -> None:
    parts = {"model_name_or_path": str(world.llama), "mm_vision_tower": str(CLIP_TOWER)}
    run_recipe(world.config(tmp_path / "first", **parts, language_model="frozen", learning_rate=0.01))
    entries = read_weights(tmp_path / "first")
    write_safetensors(
        tmp_path / "projector.safetensors",
        {name: entry for name, entry in entries.items() if name.startswith("projector.")},
    )
    given = {"pretrain_mm_mlp_adapter": str(tmp_path / "projector.safetensors"), "learning_rate": 0.0, "max_steps": 1}
    run_recipe(world.config(tmp_path / "second", **parts, **given))
    assert not changed(weights(tmp_path / "first"), weights(tmp_path / "second"))


# ---- going on ----


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next run ends by Ctrl-C in the middle of a step, behind its report."""
    report = Progress.on_log

    def stop(self: Progress, args: Any, state: Any, control: Any, **named: Any) -> None:
        report(self, args, state, control, **named)
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "on_log", stop)


@pytest.mark.parametrize("values", [{}, {**LORA, "vision_tower": "lora", "projector": "lora"}], ids=["full", "lora"])
def test_six_steps_are_three_a_stop_and_three(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    """Bit for bit, in the middle of an epoch, with warm-up, accumulation, decay and (LoRA) dropout, and although the
    parameters of the second process have other names in paddle."""
    run = {
        "max_steps": 6,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,  # four steps an epoch
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "learning_rate": 0.01,
        "mm_projector_lr": 0.003,
        **values,
    }
    run_recipe(world.config(tmp_path / "whole", **run))
    parts = world.config(tmp_path / "parts", save_strategy="steps", save_steps=3, **run)
    interrupt_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(parts)
    assert not (tmp_path / "parts" / "config.json").exists()
    assert sorted(reports(tmp_path / "parts")) == [1, 2, 3, 4, 5]
    monkeypatch.undo()
    run_recipe(parts)
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    for key in ("loss", "learning_rate"):
        assert reports(tmp_path / "whole", key) == reports(tmp_path / "parts", key)
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(world: World, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_recipe(world.config(tmp_path / name, seed=seed, **LORA))
    assert not changed(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert changed(weights(tmp_path / "a"), weights(tmp_path / "c"))


# ---- what is written ----


def test_what_a_run_leaves(world: World, tmp_path: Path) -> None:
    """A line per report, a curve, and a configuration that gives the same run again."""
    config = world.config(tmp_path / "a", evaluation_strategy="steps", eval_steps=2, logging_steps=3)
    results = run_recipe(config)
    assert set(results) == {"train_loss", "steps"} and results["steps"] == 4
    assert sorted(reports(tmp_path / "a")) == [3, 4]  # the last step is reported though 4 is no multiple of 3
    assert sorted(reports(tmp_path / "a", "eval_loss")) == [2, 4]
    assert all(0 <= value <= 1 for value in reports(tmp_path / "a", "eval_token_accuracy").values())
    assert all(value > 0 for value in reports(tmp_path / "a", "tokens_per_second").values())
    assert (tmp_path / "a" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    again = load_config(tmp_path / "a" / "run_config.json", [f"output_dir={tmp_path / 'b'}"])
    assert not again.warnings
    run_recipe(again)
    assert not changed(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_epochs_are_counted_in_whole_steps(world: World, tmp_path: Path) -> None:
    values = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 5}
    results = run_recipe(world.config(tmp_path, **values, save_strategy="epoch", evaluation_strategy="epoch"))
    assert results["steps"] == 6
    assert sorted(reports(tmp_path, "eval_loss")) == [3, 6]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    assert reports(tmp_path, "epoch")[6] == 2.0


def test_an_earlier_run_is_overwritten_when_asked(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, save_strategy="steps", save_steps=2, **LORA))
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    run_recipe(world.config(tmp_path, overwrite_output_dir=True, max_steps=1))
    assert sorted(reports(tmp_path)) == [1]
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "lora_config.json").exists()
    assert (tmp_path / "notes.txt").exists()
    assert load_pretrained(tmp_path).adapter is None


def test_settings_without_effect_are_said(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="paddlemix"), propagated():
        run_recipe(world.config(tmp_path, max_steps=1, mm_vision_tower=str(CLIP_TOWER), prefix_tuning=True))
    assert "has its own vision tower; mm_vision_tower" in caplog.text
    assert "prefix_tuning has no effect here" in caplog.text


# ---- what is refused ----


def test_pictures_need_a_tower(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.json record 0 has an image, but .* has no vision tower; set mm_vision_"):
        run_recipe(world.config(tmp_path / "out", model_name_or_path=str(world.llama)))
    assert not (tmp_path / "out").exists()


def test_an_unpadded_layout_needs_the_newline(world: World, tmp_path: Path) -> None:
    values = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    with pytest.raises(UserError, match="needs a model with an image_newline"):
        run_recipe(world.config(tmp_path / "out", image_grid_pinpoints=[[28, 56]], **values))
    run_recipe(
        world.config(tmp_path / "new", **{**values, "mm_patch_merge_type": "spatial"}, image_grid_pinpoints=[[56, 56]])
    )


def test_a_text_only_model_trains_on_text(world: World, tmp_path: Path) -> None:
    records = json.loads((world.data / "train.json").read_text(encoding="utf-8"))
    path = tmp_path / "text.json"
    path.write_text(json.dumps([record for record in records if "image" not in record]), encoding="utf-8")
    values = {"model_name_or_path": str(world.llama), "dataset": {"train": [{"data_files": str(path)}]}}
    run_recipe(world.config(tmp_path / "out", **values))
    assert load_pretrained(tmp_path / "out").model.config.vision is None
