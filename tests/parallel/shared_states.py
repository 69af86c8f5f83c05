"""Run on every process: the states of small models in every stage, gathered, against those of one process alone."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.fleet.utils import mix_precision_utils
from paddle.distributed.sharding import group_sharded_parallel

from paddlemix.checkpoints.files.joint_writing import DirectoryFiles, write_files
from paddlemix.checkpoints.files.shards import shard_files
from paddlemix.checkpoints.pretrained import parameter_entries, whole_entry
from paddlemix.parallel import whole
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.parallel.whole import whole_states

SEGMENT = 64  # numbers above which stage3 slices a weight


class Model(nn.Layer):
    """A wide layer, a frozen one, and one that is too small to be sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.frozen, self.small = nn.Linear(12, 11), nn.Linear(11, 9), nn.Linear(9, 3)
        for parameter in self.frozen.parameters():
            parameter.stop_gradient = True

    def forward(self, inputs: paddle.Tensor) -> paddle.Tensor:
        return self.small(self.frozen(paddle.tanh(self.wide(inputs))))


def begin(degree: int) -> Any:
    """Joins the processes, `degree` of which share at a time; returns their sharding group."""
    replicas = int(os.environ["PADDLE_TRAINERS_NUM"]) // degree
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": replicas, "mp_degree": 1, "pp_degree": 1, "sharding_degree": degree}
    fleet.init(is_collective=True, strategy=strategy)
    return fleet.get_hybrid_communicate_group().get_sharding_parallel_group()


def trained(stage: str, group: Any, half: bool) -> tuple[Any, Any]:
    """A model and its optimiser after two steps, wrapped as PaddleNLP does it.

    Args:
        stage: "" for one process alone.
        half: bfloat16 weights with float32 gradients.
    """
    paddle.seed(7)
    model = Model()
    trains = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    optimizer: Any = paddle.optimizer.AdamW(0.01, epsilon=1e-4, parameters=trains, multi_precision=half)
    if half:
        model, optimizer = paddle.amp.decorate(model, optimizer, level="O2", dtype="bfloat16", master_grad=False)
        mix_precision_utils.MixPrecisionLayer(model, dtype="bfloat16")
        optimizer = mix_precision_utils.MixPrecisionOptimizer(optimizer)
    wrapped: Any = model
    if stage == "stage1":
        wrapped, optimizer = fleet.distributed_model(model), fleet.distributed_optimizer(optimizer)
    elif stage:
        level = {"stage2": "os_g", "stage3": "p_g_os"}[stage]
        more = {"segment_size": SEGMENT} if stage == "stage3" else {}
        replicas = fleet.get_hybrid_communicate_group().get_data_parallel_group()
        wrapped, optimizer, _ = group_sharded_parallel(model, optimizer, level, group=group, dp_group=replicas, **more)
    inputs = paddle.linspace(-1.0, 1.0, 24).reshape([2, 12]).astype(model.wide.weight.dtype)
    for _ in range(2):
        wrapped(inputs).astype("float32").sum().backward()
        optimizer.step()
        optimizer.clear_grad()
    return model, optimizer


def files_of(model: Any, optimizer: Any, layout: Layout) -> DirectoryFiles:
    """Weights and states in small shards, so that every process writes several."""
    states = whole_states(dict(model.named_parameters()), optimizer, layout)
    weights = shard_files("model", parameter_entries(model, layout=layout), 400)
    return DirectoryFiles([*weights, *shard_files("optimizer", {key: whole_entry(item) for key, item in states}, 900)])


def write_cases(folder: str, cases: list[list[Any]], degree: int) -> dict[str, list[Any]]:
    """Writes each case (stage, half) as `folder`/stage-half, and the same of one process as ...-alone.

    Args:
        degree: processes that share one copy; further ones hold another copy.

    Returns:
        Case -> {name of each file: who wrote it}, and the most gathered tensors alive at once.
    """
    group, told = begin(degree), {}
    alive = watch_gathered()
    for stage, half in cases:
        layout = Layout(
            world_size=dist.get_world_size(),
            rank=dist.get_rank(),
            data_size=dist.get_world_size(),
            data_rank=dist.get_rank(),
            stage=stage,
            sharding_group=group,
        )
        name = f"{stage}-{half}"
        alone = Path(folder) / (f"{name}-alone" if layout.rank == 0 else f"{name}-alone-{layout.rank}")
        for directory in (alone, Path(folder) / name):
            directory.mkdir(parents=True, exist_ok=True)
        write_files(alone, files_of(*trained("", None, half), ALONE))
        alive.clear()
        files = files_of(*trained(stage, group, half), layout)
        writers = write_files(Path(folder) / name, files, layout, lambda path: dist.get_rank())
        told[name] = [writers, max(alive, default=0)]
    return told


def watch_gathered() -> list[int]:
    """From now on this list gets, each time when a tensor is gathered, how many gathered ones exist already."""
    held: list[weakref.ref[Any]] = []
    counts: list[int] = []
    joined, from_holder = whole._joined, whole._from_holder

    def count(tensor: paddle.Tensor) -> paddle.Tensor:
        counts.append(sum(reference() is not None for reference in held))
        held.append(weakref.ref(tensor))
        return tensor

    def counted_from_holder(tensor: paddle.Tensor, holder: int, layout: Layout) -> paddle.Tensor:
        found = from_holder(tensor, holder, layout)
        return found if holder == layout.sharding_rank else count(found)  # the holder's is of its own share

    whole._joined, whole._from_holder = lambda *arguments: count(joined(*arguments)), counted_from_holder
    return counts
