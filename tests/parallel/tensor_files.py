"""Run on every process of a tensor group: what is written of split models, and read back into them."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from paddlemix.checkpoints.adapters.adapter import AdapterSettings, adapter_files
from paddlemix.checkpoints.adapters.base_check import base_digests, base_mark
from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.files.joint_writing import DirectoryFiles, write_files
from paddlemix.checkpoints.files.shards import shard_files
from paddlemix.checkpoints.files.weight_files import INDEX_FILE, write_index
from paddlemix.checkpoints.load import load_base, load_pretrained
from paddlemix.checkpoints.pretrained import (
    Pretrained,
    build_model,
    fill_model,
    model_files,
    parameter_entries,
    tensor_entry,
)
from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
from paddlemix.parallel import whole
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.parallel.replicas import check_replicas
from paddlemix.parallel.tensor.parts import part_of
from paddlemix.peft.lora import add_lora, linear_names
from paddlemix.peft.settings import LoRAConfig
from paddlemix.trainer.resuming.checkpoint_folders import OPTIMIZER_INDEX
from paddlemix.trainer.resuming.loading_shares import load_optimizer, load_weights
from paddlemix.trainer.resuming.optimizer_state import optimizer_entries

# Parts are uneven, and in units of one: 51 tokens, 27 inner numbers.
TEXT = DecoderConfig(
    vocab_size=51,
    hidden_size=24,
    intermediate_size=27,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
)
VISION = VisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)


def begin() -> Layout:
    """Joins the processes as one tensor group."""
    dist.init_parallel_env()
    size, rank = dist.get_world_size(), dist.get_rank()
    return Layout(world_size=size, rank=rank, tensor_group=dist.get_group(0))


def part_in(parameter: Any, whole: Any) -> np.ndarray:
    """This process's part of a whole array."""
    part = part_of(parameter)
    return np.ascontiguousarray(whole if part is None else part.cut(whole))


def trainer_of(model: Any, layout: Layout) -> Any:
    """What saving and loading read of a Trainer; the last norm does not train."""
    model.language_model.norm.weight.stop_gradient = True
    trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    optimizer = paddle.optimizer.AdamW(0.01, parameters=trained)
    return SimpleNamespace(model=SimpleNamespace(model=model), optimizer=optimizer, layout=layout)


def step(trainer: Any, gradients: dict[str, np.ndarray]) -> None:
    """One step with given gradients; a weight without one has none."""
    for name, parameter in trainer.model.model.named_parameters():
        if name in gradients and not parameter.stop_gradient:
            parameter.grad = paddle.to_tensor(part_in(parameter, gradients[name]))
    trainer.optimizer.step()
    trainer.optimizer.clear_grad()


def checkpoint_files(trainer: Any) -> DirectoryFiles:
    """Weights and states in small shards, so that every process writes several."""
    weights = shard_files("model", parameter_entries(trainer.model.model, layout=trainer.layout), 4000)
    states = shard_files("optimizer", optimizer_entries(trainer), 9000)

    def write_indices(directory: Path) -> None:
        write_index(directory / INDEX_FILE, weights)
        write_index(directory / OPTIMIZER_INDEX, states)

    return DirectoryFiles([*weights, *states], [write_indices])


def random_model(dtype: str) -> Any:
    text = replace(TEXT, tie_word_embeddings=dtype == "bfloat16")
    model = build_model(LlavaConfig(text=text, vision=VISION), dtype)
    random = np.random.RandomState(3)
    for _, parameter in model.named_parameters():
        parameter.set_value(paddle.to_tensor(0.1 * random.randn(*parameter.shape)).astype(dtype))
    return model


def write_and_read(folder: str, dtype: str) -> list[int]:
    """A model with its optimiser's states, written by all as `folder`/joint and by each process alone, and read back.

    Returns:
        Who wrote each file.
    """
    layout, joint = begin(), Path(folder) / "joint"
    alone = Path(folder) / f"alone-{layout.rank}"
    alone.mkdir(parents=True)
    joint.mkdir(exist_ok=True)
    dist.barrier()
    model = random_model(dtype)
    entries = {name: tensor_entry(parameter) for name, parameter in model.named_parameters()}
    split = build_model(model.config, dtype, layout=layout)
    fill_model(split, entries, "a test")
    random = np.random.RandomState(4)
    one, shared = trainer_of(model, ALONE), trainer_of(split, layout)
    if dtype == "float32":
        drawn = {name: random.randn(*parameter.shape) for name, parameter in model.named_parameters()}
        gradients = {name: value.astype("float32") for name, value in drawn.items() if "k_proj" not in name}
        step(one, gradients)
        step(shared, gradients)
    write_files(alone, checkpoint_files(one), ALONE)
    held, whole._AT_ONCE = watch_gathered(), 500  # most weights in several pieces
    writers = write_files(joint, checkpoint_files(shared), layout, lambda path: layout.rank)
    _check_read_back(joint, one, layout, dtype)
    return {"writers": list(writers.values()), "held": held}


def watch_gathered() -> list[int]:
    """From now on this list gets, as a piece of all parts is gathered, how many such exist already."""
    references: list[weakref.ref[Any]] = []
    counts: list[int] = []
    gather = whole._one_after_the_other

    def counted(own: paddle.Tensor, group: Any) -> paddle.Tensor:
        counts.append(sum(reference() is not None for reference in references))
        found = gather(own, group)
        references.append(weakref.ref(found))
        return found

    whole._one_after_the_other = counted
    return counts


def _check_read_back(checkpoint: Path, expected: Any, layout: Layout, dtype: str) -> None:
    again = trainer_of(build_model(expected.model.model.config, dtype, layout=layout), layout)
    load_weights(again.model.model, checkpoint, layout)
    load_optimizer(again, checkpoint)
    wholes = dict(expected.model.model.named_parameters())
    for name, parameter in again.model.model.named_parameters():
        assert (parameter.numpy() == part_in(parameter, wholes[name].numpy())).all(), name
        for kind, states in again.optimizer._accumulators.items():
            found, wanted = states.get(parameter.name), expected.optimizer._accumulators[kind].get(wholes[name].name)
            if wanted is not None:
                value = wanted.numpy() if kind.startswith("beta") else part_in(parameter, wanted.numpy())
                assert found is not None and (found.numpy() == value).all(), (name, kind)


def write_adapter(folder: str, model: str) -> None:
    """A base, and it with an adapter: written by all as `folder`/joint..., and by each process alone; then loaded."""
    layout, out = begin(), Path(folder)
    loaded = {kind: load_base(BaseSpec(model=model), layout=kind) for kind in (ALONE, layout)}
    marks = {base_mark(base) for base in loaded.values()}
    assert len(marks) == 1, "the fingerprint is that of the whole base"
    assert base_digests(loaded[ALONE]) == base_digests(loaded[layout])
    for kind, name in ((ALONE, f"alone-{layout.rank}"), (layout, "joint")):
        (out / f"{name}-model").mkdir(exist_ok=True)
        (out / name).mkdir(exist_ok=True)
        dist.barrier()
        base = loaded[kind]
        write_files(out / f"{name}-model", model_files(base, kind, 20_000), kind)
        add_lora_with_numbers(base, base_of=loaded[ALONE])
        settings = AdapterSettings(base.adapter, {"model": model}, next(iter(marks)), digests=base_digests(base))
        write_files(out / name, adapter_files(base.model, base.processor, settings, kind), kind)
    again = load_pretrained(out / "joint", layout=layout)
    wholes = dict(loaded[ALONE].model.named_parameters())
    for name, parameter in again.model.named_parameters():
        assert (parameter.numpy() == part_in(parameter, wholes[name].numpy())).all(), name


def add_lora_with_numbers(base: Pretrained, base_of: Pretrained) -> None:
    """Adds LoRA everywhere in the decoder with the same numbers in every layout, and trains the projector whole."""
    names = tuple(name for name in linear_names(base.model) if name.startswith("language_model"))
    base.adapter = LoRAConfig(r=3, lora_alpha=6, modules=names)
    paddle.seed(5)
    add_lora(base.model, base.adapter)
    random = np.random.RandomState(6)
    for name, parameter in base_of.model.named_parameters():
        if "lora_B" in name and base is base_of:
            parameter.set_value((0.1 * random.randn(*parameter.shape)).astype("float32"))
    wholes = dict(base_of.model.named_parameters())
    for name, parameter in base.model.named_parameters():
        parameter.stop_gradient = not ("lora_" in name or name.startswith("projector"))
        if "lora_B" in name:
            parameter.set_value(part_in(parameter, wholes[name].numpy()))


def drift() -> list[str]:
    """What the check says of equal weights, of a frozen one that differs, and of a trained one that differs."""
    layout = begin()
    model = random_model("float32")
    split = build_model(model.config, layout=layout)
    fill_model(split, {name: tensor_entry(parameter) for name, parameter in model.named_parameters()}, "a test")
    weights = dict(split.named_parameters())
    frozen, trained = weights["vision_tower.layers.0.mlp.fc1.bias"], weights["language_model.norm.weight"]
    frozen.stop_gradient = True
    found = []
    for changed in (None, frozen, trained):
        if changed is not None and layout.rank == 1:
            changed.set_value(changed * (1 + 2**-22))  # the last bits
        try:
            check_replicas(weights, replace(layout))
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found
