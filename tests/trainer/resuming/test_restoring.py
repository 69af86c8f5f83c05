"""What a checkpoint says of a run beside its tensors, read back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paddle
import pytest

from paddlemix.checkpoints.files.weight_files import write_json
from paddlemix.trainer.resuming import restoring
from paddlemix.trainer.resuming.checkpoint_folders import STATE_FILE


@pytest.mark.parametrize("fresh", [False, True])
def test_schedule_and_loss_scale_go_on_unless_the_run_begins_them_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    loaded = list[str]()
    for name in ("load_weights", "load_optimizer"):
        monkeypatch.setattr(restoring, name, lambda *_, name=name: loaded.append(name))
    schedule = paddle.optimizer.lr.LambdaDecay(0.5, lambda step: 1.0 / (1 + step))
    scales = dict[str, Any]()
    trainer = SimpleNamespace(
        model=SimpleNamespace(model=None),
        layout=None,
        exchange=SimpleNamespace(),
        config=SimpleNamespace(output_dir=str(tmp_path), ignore_load_lr_and_optim=fresh),
        lr_scheduler=schedule,
        do_grad_scaling=True,
        scaler=SimpleNamespace(load_state_dict=scales.update),
    )
    state = {
        "global_step": 3,
        "schedule": {"last_epoch": 3, "last_lr": 0.25},
        "scaler": {"scale": [2048.0], "incr_count": 2},
        "tokens_seen": 77,
        "own_checkpoints": ["checkpoint-3"],
    }
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    write_json(checkpoint / STATE_FILE, state)
    assert restoring.load_training_state(trainer, checkpoint) == 3
    assert (trainer.exchange.tokens_seen, trainer.own_checkpoints) == (77, ["checkpoint-3"])
    assert loaded == ["load_weights"] + ["load_optimizer"] * (not fresh)
    assert (schedule.last_epoch, schedule()) == ((0, 0.5) if fresh else (3, 0.125))  # the rate is this run's
    assert {key: value.tolist() for key, value in scales.items()} == ({} if fresh else state["scaler"])
