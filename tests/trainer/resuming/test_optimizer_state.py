"""The optimiser's state by our names: written, read into another process's optimiser, and begun where it is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

from paddlemix.checkpoints.files.shards import index_values, shard_files
from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import SINGLE_FILE, write_json, write_safetensors
from paddlemix.checkpoints.pretrained import tensor_entry
from paddlemix.errors import UserError
from paddlemix.trainer.resuming import optimizer_state
from paddlemix.trainer.resuming.checkpoint_folders import (
    OPTIMIZER_FILE,
    OPTIMIZER_INDEX,
    has_optimizer,
    optimizer_files,
)
from paddlemix.trainer.resuming.optimizer_state import load_optimizer, optimizer_entries
from paddlemix.trainer.resuming.restoring import load_weights


class Pair(nn.Layer):
    """Two layers, of which a step may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(2, 2)


def trainer_of(layer: nn.Layer) -> Any:
    schedule = paddle.optimizer.lr.LambdaDecay(0.1, lambda step: 1.0)
    optimizer = paddle.optimizer.AdamW(schedule, parameters=layer.parameters())
    config = SimpleNamespace(adam_beta1=0.9, adam_beta2=0.999)
    return SimpleNamespace(
        model=SimpleNamespace(model=layer), optimizer=optimizer, lr_scheduler=schedule, config=config
    )


def step(trainer: Any, both: bool) -> None:
    layer = trainer.model.model
    hidden = layer.used(paddle.arange(6, dtype="float32").reshape([2, 3]))
    (layer.idle(hidden) if both else hidden).square().sum().backward()
    trainer.optimizer.step()
    trainer.optimizer.clear_grad()


def saved(folder: Path, trainer: Any) -> Path:
    folder.mkdir(exist_ok=True)
    weights = {name: tensor_entry(value) for name, value in trainer.model.model.named_parameters()}
    write_safetensors(folder / SINGLE_FILE, weights)
    write_safetensors(folder / OPTIMIZER_FILE, optimizer_entries(trainer))
    return folder


@pytest.mark.parametrize("both", [True, False])
def test_a_restored_optimiser_makes_the_same_steps(tmp_path: Path, both: bool) -> None:
    """Also where a weight had no gradient before: its state begins at the first."""
    first, second = trainer_of(Pair()), trainer_of(Pair())
    step(first, both)
    keys = optimizer_entries(first).keys()
    assert all(key.startswith(("used.", "idle.") if both else "used.") for key in keys)
    assert {key.split("|")[1] for key in keys} == {"moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc"}
    checkpoint = saved(tmp_path, first)
    load_weights(second.model.model, checkpoint)
    load_optimizer(second, checkpoint)
    for trainer in (first, second):
        step(trainer, both=True)
    for name, value in first.model.model.named_parameters():
        np.testing.assert_array_equal(value.numpy(), dict(second.model.model.named_parameters())[name].numpy())


def test_states_in_shards_are_those_of_one_file(tmp_path: Path) -> None:
    trainer = trainer_of(Pair())
    step(trainer, both=True)
    checkpoint = saved(tmp_path / "one", trainer)
    shards = tmp_path / "shards"
    shards.mkdir()
    assert has_optimizer(checkpoint) and not has_optimizer(shards)
    files = shard_files("optimizer", optimizer_entries(trainer), 40)
    for file in files:
        write_safetensors(shards / file.name, file.tensors)
    assert len(files) > 2 and not has_optimizer(shards)  # shards without their index are not whole
    write_json(shards / OPTIMIZER_INDEX, index_values(files))
    assert has_optimizer(shards)
    one, several = optimizer_files(checkpoint), optimizer_files(shards)
    assert list(one) == list(several)
    for key, entry in one.items():
        np.testing.assert_array_equal(entry.read(), several[key].read())


def test_a_state_of_a_weight_that_is_not_here_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(Pair())
    step(trainer, both=True)
    checkpoint, other = saved(tmp_path, trainer), trainer_of(nn.Linear(3, 2))
    with pytest.raises(UserError, match=r"state of 'idle\.bias', which this run does not have"):
        load_optimizer(other, checkpoint)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    checkpoint, wider, more = saved(tmp_path, trainer_of(Pair())), Pair(), Pair()
    wider.idle = nn.Linear(2, 5)
    with pytest.raises(UserError, match=r"idle.weight is \[2, 2\], the run's is \[2, 5\]"):
        load_weights(wider, checkpoint)
    more.new = nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"has no weight 'new.weight', which trains in this run"):
        load_weights(more, checkpoint)
    for parameter in more.new.parameters():
        parameter.stop_gradient = True  # frozen weights come from the base
    load_weights(more, checkpoint)


def test_master_weights_follow_the_precision_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 numbers survive the resumed run's precision, whichever file has them."""
    exact = np.array([1.0 + 2**-20, -3.0], np.float32)
    parameters = {name: paddle.zeros([2], dtype) for name, dtype in (("a", "bfloat16"), ("b", "bfloat16"))}
    parameters["c"] = paddle.zeros([2], "float32")
    saved = {key: array_entry(exact) for key in ("a|moment1", "a|master_weight", "b|moment1", "c|master_weight")}
    rounded = array_entry(np.ones(2, np.float32))
    monkeypatch.setattr(optimizer_state, "saved_weights", lambda checkpoint: {"a": rounded, "b": array_entry(exact)})
    masters = optimizer_state._master_weights(saved, parameters, tmp_path)
    assert masters.keys() == {parameters["a"].name, parameters["b"].name}
    for value in (*masters.values(), parameters["c"]):
        np.testing.assert_array_equal(value.numpy(), exact)
