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
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.parallel.shares import adamw_of, make_states, states_of
from paddlemix.trainer.resuming.checkpoint_folders import (
    OPTIMIZER_FILE,
    OPTIMIZER_INDEX,
    has_optimizer,
    optimizer_files,
)
from paddlemix.trainer.resuming.loading_shares import load_optimizer, load_weights
from paddlemix.trainer.resuming.optimizer_state import optimizer_entries


class Pair(nn.Layer):
    """Two layers, of which a step may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(2, 2)


def trainer_of(layer: nn.Layer, layout: Layout = ALONE) -> Any:
    schedule = paddle.optimizer.lr.LambdaDecay(0.1, lambda step: 1.0)
    optimizer = paddle.optimizer.AdamW(schedule, parameters=layer.parameters(), multi_precision=True)
    return SimpleNamespace(
        model=SimpleNamespace(model=layer), optimizer=optimizer, lr_scheduler=schedule, layout=layout
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


@pytest.mark.parametrize(("both", "of_earlier_version"), [(True, False), (False, False), (False, True)])
def test_a_restored_optimiser_makes_the_same_steps(tmp_path: Path, both: bool, of_earlier_version: bool) -> None:
    """Also where a weight had no gradient before: its state begins at the first, and earlier versions left it out."""
    first, second = trainer_of(Pair()), trainer_of(Pair())
    step(first, both)
    kinds = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")
    names = ("used.weight", "used.bias", "idle.weight", "idle.bias")
    assert list(optimizer_entries(first)) == [f"{name}|{kind}" for name in names for kind in kinds]
    checkpoint = saved(tmp_path, first)
    if of_earlier_version:
        states = {key: entry for key, entry in optimizer_entries(first).items() if key.startswith("used.")}
        write_safetensors(checkpoint / OPTIMIZER_FILE, states)
    load_weights(second.model.model, checkpoint, ALONE)
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
        load_weights(wider, checkpoint, ALONE)
    more.new = nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"has no weight 'new.weight', which trains in this run"):
        load_weights(more, checkpoint, ALONE)
    for parameter in more.new.parameters():
        parameter.stop_gradient = True  # frozen weights come from the base
    load_weights(more, checkpoint, ALONE)


def states(trainer: Any, name: str) -> dict[str, np.ndarray]:
    parameter = dict(trainer.model.model.named_parameters())[name]
    return {kind: value.numpy() for kind, value in states_of(adamw_of(trainer.optimizer), parameter).items()}


class Precisions(nn.Layer):
    """Weights of two numbers in several precisions."""

    def __init__(self) -> None:
        super().__init__()
        for name, dtype in (("a", "bfloat16"), ("b", "bfloat16"), ("c", "float32")):
            setattr(self, name, self.create_parameter([2], dtype=dtype))


def test_master_weights_follow_the_precision_of_the_run(tmp_path: Path) -> None:
    """Float32 numbers survive the resumed run's precision, whichever file has them."""
    exact, rounded = array_entry(np.array([1.0 + 2**-20, -3.0], np.float32)), array_entry(np.ones(2, np.float32))
    keys = ("a|moment1", "a|master_weight", "b|moment1", "c|master_weight")
    write_safetensors(tmp_path / OPTIMIZER_FILE, dict.fromkeys(keys, exact))
    write_safetensors(tmp_path / SINGLE_FILE, {"a": rounded, "b": exact, "c": rounded})
    trainer = trainer_of(Precisions())
    load_weights(trainer.model.model, tmp_path, ALONE)
    load_optimizer(trainer, tmp_path)
    for value in (states(trainer, "a")["master_weight"], states(trainer, "b")["master_weight"], trainer.model.model.c):
        np.testing.assert_array_equal(np.asarray(value), exact.read())
    assert "master_weight" not in states(trainer, "c")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_slice_gets_its_own_numbers_and_zeros_after_the_end(tmp_path: Path, rank: int, dtype: str) -> None:
    """As stage3 holds a weight of 6 numbers in two processes: 4 here, 2 and padding there."""
    full = trainer_of(Pair())
    step(full, both=True)
    checkpoint = saved(tmp_path, full)
    layout = Layout(world_size=2, rank=rank, stage="stage3", sharding_group=SimpleNamespace(nranks=2, rank=rank))
    trainer = trainer_of(Pair(), layout)
    weight = trainer.model.model.used.weight
    weight.fw_storage = paddle.full([4], 7.0, dtype)
    make_states(trainer.optimizer, weight)
    load_weights(trainer.model.model, checkpoint, layout)
    load_optimizer(trainer, checkpoint)
    found, whole = states(trainer, "used.weight"), states(full, "used.weight")
    expected = {"fw_storage": full.model.model.used.weight.numpy(), **whole}
    values = {"fw_storage": weight.fw_storage.astype("float32").numpy(), **found}
    for kind in ("moment1", "moment2", "fw_storage"):
        padded = np.concatenate([expected[kind].reshape(-1), np.zeros(2, np.float32)])[4 * rank : 4 * rank + 4]
        np.testing.assert_allclose(
            values[kind], padded, rtol=0.01 if kind == "fw_storage" and dtype != "float32" else 0
        )
    np.testing.assert_array_equal(found["beta1_pow_acc"], whole["beta1_pow_acc"])
    if dtype == "bfloat16":  # the exact numbers of the float32 run
        padded = np.concatenate([expected["fw_storage"].reshape(-1), np.zeros(2, np.float32)])[4 * rank : 4 * rank + 4]
        np.testing.assert_array_equal(found["master_weight"], padded)
    np.testing.assert_array_equal(trainer.model.model.used.bias.numpy(), full.model.model.used.bias.numpy())


def test_states_are_loaded_where_they_are_held(tmp_path: Path) -> None:
    """Of stage1 and stage2, each weight's in one process."""
    full = trainer_of(Pair())
    step(full, both=True)
    checkpoint = saved(tmp_path, full)
    layout = Layout(world_size=2, rank=1, stage="stage1", sharding_group=SimpleNamespace(nranks=2, rank=1))
    trainer = trainer_of(Pair(), layout)
    parameters = dict(trainer.model.model.named_parameters())
    holders = {parameter.name: int(name.startswith("used")) for name, parameter in parameters.items()}
    trainer.optimizer = SimpleNamespace(_param2rank=holders, _inner_opt=trainer.optimizer)
    load_optimizer(trainer, checkpoint)
    for name in parameters:
        found, whole = states(trainer, name), states(full, name)
        assert found.keys() == (whole.keys() if name.startswith("used") else set())
        for kind, value in found.items():
            np.testing.assert_array_equal(value, whole[kind])


def test_a_state_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(Pair())
    step(trainer, both=True)
    checkpoint = saved(tmp_path, trainer)
    entries = {**optimizer_files(checkpoint), "used.bias|moment3": array_entry(np.zeros(2, np.float32))}
    write_safetensors(checkpoint / OPTIMIZER_FILE, {key: array_entry(np.array(e.read())) for key, e in entries.items()})
    with pytest.raises(UserError, match="used.bias' of .* has the optimiser's state 'moment3', which this run"):
        load_optimizer(trainer_of(Pair()), checkpoint)
