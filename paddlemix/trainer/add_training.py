"""What makes a model trainable: an adapter where one is asked for, and the marks on what trains.

It knows no data.  A run and its dry run decide by the same function; they differ in how an adapter's layers come into
the model, with weights or without.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from paddle import nn

from paddlemix.checkpoints.adapters.adapter import AdapterFiles, AdapterSettings, adapter_files, read_adapter
from paddlemix.checkpoints.adapters.base_check import base_digests, base_mark
from paddlemix.checkpoints.adapters.base_places import base_reference
from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.files.joint_writing import DirectoryFiles
from paddlemix.checkpoints.identity.declared_identity import computed_values
from paddlemix.checkpoints.load import apply_adapter
from paddlemix.checkpoints.pretrained import Pretrained, model_files
from paddlemix.checkpoints.projector_file import NEW_PARTS
from paddlemix.config.schema import RunConfig
from paddlemix.log import process_rank
from paddlemix.parallel.layout import Layout
from paddlemix.parallel.replicas import check_replicas
from paddlemix.peft.lora import LoRAConfig, add_lora
from paddlemix.peft.split_adapters import check_new_adapter
from paddlemix.trainer.run import ModelFiles
from paddlemix.trainer.trainable import (
    adapter_config,
    check_adapter_keys,
    plan_of_adapter,
    plan_training,
    set_trainable,
)


def add_training(
    model: nn.Layer,
    config: RunConfig,
    continue_adapter: Callable[[AdapterFiles], LoRAConfig],
    begin_adapter: Callable[[LoRAConfig], None],
) -> LoRAConfig | None:
    """Adds an adapter where asked for and marks what trains.

        lora_path set               that adapter's layers, through `continue_adapter`
        some part's policy is lora  new layers, through `begin_adapter`
        else                        no adapter

    Args:
        continue_adapter: adds an earlier adapter's layers to the model; returns its settings as they were applied.
        begin_adapter: adds a new adapter's layers to the model.

    Returns:
        The adapter's settings, None without one.

    Raises:
        UserError: keys contradict the earlier adapter, name what the model does not have, leave nothing to train, or
            ask for an adapter that a tensor group cannot begin.
    """
    plan, adapter = plan_training(model, config), None
    if config.lora_path:
        earlier = read_adapter(Path(config.lora_path))
        check_adapter_keys(config, earlier.config)
        adapter = continue_adapter(earlier)
        # Whatever the keys say of its parts: the layers that the adapter has are trained through it.
        plan = plan_of_adapter(plan, earlier.config.modules, earlier.config.bias)
    elif plan.lora_modules:
        adapter = adapter_config(config, plan)
        check_new_adapter(model, adapter)
        begin_adapter(adapter)
    set_trainable(model, plan, config)
    return adapter


def add_training_to_run(config: RunConfig, spec: BaseSpec, loaded: Pretrained) -> tuple[ModelFiles, dict[str, str]]:
    """As `add_training`, with weights.

    Args:
        spec: what `loaded` was put together from.
        loaded: gets the adapter, in place.

    Returns:
        A function that returns the result's files, and the digests of an adapter's base.
    """
    model = loaded.model
    mark = base_mark(loaded)  # before an adapter's layers hide the base's names
    # A projector that was begun beside the base is in no file, so the adapter has to carry it.
    carried = {name for name, _ in model.named_parameters() if loaded.begun and name.startswith(NEW_PARTS)}

    def continue_adapter(earlier: AdapterFiles) -> LoRAConfig:
        applied = apply_adapter(loaded, earlier).adapter
        assert applied is not None
        carried.update(earlier.tensors().keys())
        return applied

    adapter = loaded.adapter = add_training(model, config, continue_adapter, lambda new: add_lora(model, new))
    if adapter is None:

        def whole_files(place: Path, layout: Layout) -> DirectoryFiles:
            check_replicas(dict(model.named_parameters()), layout)
            return model_files(loaded, layout)

        return whole_files, {}
    digests = base_digests(loaded) if process_rank() == 0 else {}  # this process writes them

    def result_files(place: Path, layout: Layout) -> DirectoryFiles:
        check_replicas(dict(model.named_parameters()), layout)
        # Computed when they are written: the base's place is stored relative to the adapter's.
        reference, values = base_reference(spec, place), computed_values(model.config)
        settings = AdapterSettings(adapter, reference, mark, frozenset(carried), digests, values)
        return adapter_files(model, loaded.processor, settings, layout)

    return result_files, digests
