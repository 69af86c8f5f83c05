"""The processes of a run: how they find each other, before anything is read, and how they train one model together.

PaddleNLP's `TrainingArguments` does it: making them starts the process group, and Fleet where something is shared.
This comes first because a process that waits for another one's model or data would reach the limit for joining, which
is 15 minutes.  What our Trainer does itself is switched off in them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import paddle.distributed as dist
from paddle.distributed import fleet

from paddlemix.config.schema import RunConfig, trainer_keys
from paddlemix.launch.process_rules import check_starter
from paddlemix.parallel.collectives import together
from paddlemix.parallel.layout import ALONE, Layout, Stage
from paddlemix.parallel.stage3 import shard_weights
from paddlemix.parallel.tensor.training import join_replicas
from paddlemix.trainer.paddlenlp_trainer import Trainer, TrainingArguments
from paddlemix.trainer.reports.trackers import TrackedArguments

Processes = tuple[TrainingArguments, Layout]


def begin_processes(config: RunConfig, device: str) -> Processes:
    """Joins the processes of a run; returns when all have come.

    Args:
        config: checked, `report_to` among it.
        device: as paddle names it, and set.

    Returns:
        PaddleNLP's view of the run, and which process this is.

    Raises:
        UserError: see `check_starter`.
    """
    check_starter(os.environ)
    with _groups_in_turn() if device == "cpu" else contextlib.nullcontext():
        arguments = TrackedArguments(**_argument_values(config, device))
    layout = _layout(arguments)
    # Zeroed gradients would stay in memory while the next activations are made.  Stages 2 and 3 clear their own.
    arguments.release_grads = layout.stage not in ("stage2", "stage3")
    return arguments, layout


def _argument_values(config: RunConfig, device: str) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(config, name) for name in trainer_keys()}
    if not config.sharding:
        # PaddleNLP would make groups of that many processes all the same, and add up no gradient over them.
        values |= {"sharding_parallel_degree": -1, "sharding_degree": -1}
    return values | {
        "device": device.split(":")[0],
        "remove_unused_columns": False,
        "load_best_model_at_end": False,
        "unified_checkpoint": False,
        "recompute": False,
        "evaluation_strategy": config.resolved_evaluation_strategy,
        "resume_from_checkpoint": None,
        "ignore_load_lr_and_optim": False,  # PaddleNLP would start counting steps at 0
        "overwrite_output_dir": True,
        # Every trained weight has a gradient, also in a batch of texts alone; looking for those without one takes time.
        "ddp_find_unused_parameters": bool(config.ddp_find_unused_parameters),
        "logging_dir": config.logging_dir or os.path.join(str(config.output_dir), "logs"),
    }


@contextlib.contextmanager
def _groups_in_turn() -> Iterator[None]:
    """Within this block groups of more than two processes are not connected anew, and others one after the other.

    Paddle's groups on CPU (gloo) lose connections while they are made, "Connection refused": one in ten with four
    processes, one in three where two groups are made at once.  The group of all processes is connected once, before
    them; Fleet asks for it again under several names.
    """
    new_group = dist.new_group

    def made_in_turn(ranks: list[int] | None = None, **named: Any) -> Any:
        everybody = dist.get_world_size()
        is_everybody = ranks is None or len(ranks) == everybody > 2
        group = dist.get_group(0) if is_everybody else new_group(ranks, **named)
        dist.barrier()
        return group

    dist.new_group = made_in_turn
    try:
        yield
    finally:
        dist.new_group = new_group


def _layout(arguments: TrainingArguments) -> Layout:
    if arguments.world_size == 1:
        return ALONE
    # PaddleNLP empties `sharding` where one process would share with itself.
    asked = {option.value for option in arguments.sharding}
    stages: list[Stage] = ["stage1", "stage2", "stage3"]
    stage: Stage = next((name for name in stages if name in asked), "")
    is_split = arguments.tensor_parallel_degree > 1
    return Layout(
        world_size=arguments.world_size,
        rank=dist.get_rank(),
        data_size=arguments.dataset_world_size,
        data_rank=arguments.dataset_rank,
        stage=stage,
        sharding_group=fleet.get_hybrid_communicate_group().get_sharding_parallel_group() if stage else None,
        tensor_group=fleet.get_hybrid_communicate_group().get_model_parallel_group() if is_split else None,
    )


class SharingTrainer(Trainer):
    """PaddleNLP's loop over a model that several processes may train together.

        layout                       what is trained
        one process                  the model itself
        data parallel                `paddle.DataParallel`, by PaddleNLP
        sharding stages 1 and 2      with Fleet's optimiser or `GroupShardedStage2`, by PaddleNLP
        sharding stage 3             `parallel.stage3.Stage3`
        tensor parallel              see `parallel.tensor.training`

    Attributes:
        layout: which process of the run this is.
    """

    layout: Layout = ALONE
    optimizer: Any

    def _wrap_model(self, model: Any, training: bool = True) -> Any:
        """PaddleNLP's stage 3 needs the whole model on every card first, and keeps frozen weights there; its tensor
        parallelism is for its own layers, and needs a card."""
        is_split = self.layout.tensor_degree > 1
        if self.layout.stage != "stage3" and not is_split:
            return super()._wrap_model(model, training)
        master_grad = self.amp_dtype if self.args.amp_master_grad else None
        with together():  # with stage 3 weights may be read only now
            share = join_replicas if is_split else shard_weights
            model, self.optimizer = share(model, self.optimizer, self.layout, master_grad)
        return model

    def share_weights(self, steps: int) -> None:
        """Slices the model as training does first, where stage 3 shares it and nothing is left to train.

        Args:
            steps: of the whole run.
        """
        if self.layout.stage == "stage3":
            self.create_optimizer_and_scheduler(steps)
            self.model_wrapped = self._wrap_model(self.model)
