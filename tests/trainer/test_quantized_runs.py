"""Runs on a base that is quantised while it is read: XTuner's recipe at tiny size, from the keys to a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.config.load import load_config
from paddlemix.errors import UserError
from paddlemix.peft.lora import merge_lora, quantized_layers
from paddlemix.peft.quantize import quantization_of
from paddlemix.trainer.callbacks.progress import Progress
from paddlemix.trainer.recipe import run_recipe
from tests.tiny_world import LORA, World, changed, reports, weights

XTUNER = {**LORA, "vision_tower": "lora", "vision_lora_rank": 2, "vision_lora_alpha": 4, "learning_rate": 0.01}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_learns_and_the_adapter_remembers_it(world: World, tmp_path: Path, kind: str) -> None:
    evaluation = {"evaluation_strategy": "steps", "eval_steps": 20}
    run_recipe(world.config(tmp_path / "out", quantize_base=kind, max_steps=20, **XTUNER, **evaluation))
    losses = reports(tmp_path / "out")
    assert losses[20] < losses[1] - 1
    loaded = load_pretrained(tmp_path / "out")
    declared = quantization_of(loaded.model)
    assert declared is not None and declared.kind == kind
    assert all(name.startswith("language_model.") for name, _ in quantized_layers(loaded.model))
    assert len(list(quantized_layers(loaded.model))) == 2 * 7
    assert merge_lora(loaded.model) == 2 * 7 + 3 * 6
    assert quantization_of(loaded.model) is None
    again = world.config(tmp_path / "again", do_train=False, do_eval=True, lora_path=str(tmp_path / "out"))
    again.quantize_base = kind
    assert run_recipe(again)["eval_loss"] == pytest.approx(reports(tmp_path / "out", "eval_loss")[20], rel=1e-5)


def test_a_stopped_run_on_codes_goes_on_bit_for_bit(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"quantize_base": "nf4", "max_steps": 4, **XTUNER}
    run_recipe(world.config(tmp_path / "whole", **run))
    parts = world.config(tmp_path / "parts", save_strategy="steps", save_steps=2, **run)
    report = Progress.on_log

    def stop(self: Progress, args: Any, state: Any, control: Any, **named: Any) -> None:
        report(self, args, state, control, **named)
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "on_log", stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(parts)
    monkeypatch.undo()
    run_recipe(parts)
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["quantize_base=nf4"], "holds the language model in codes, which do not train; set lora true"),
        (["quantize_base=int8", "lora=true", "pissa=true"], "contradicts pissa"),
        (["quantize_base=int4", "lora=true"], "quantize_base.*int8.*nf4"),
    ],
)
def test_what_contradicts_a_quantised_base(keys: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, ["model_name_or_path=m", "output_dir=o", *keys])
    allowed = ["quantize_base=nf4", "language_model=frozen"]
    assert load_config(None, ["model_name_or_path=m", "output_dir=o", *allowed]).quantize_base == "nf4"
