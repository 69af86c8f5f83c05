"""What a run cannot be made of: one clear error each, status 2, before any step and before anything is written.

Broken data files and records are in tests/tools/test_errors.py and tests/datasets/test_broken.py.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import save_model
from paddlemix.dry_run.plan import plan_run
from paddlemix.errors import MissingFileError, UserError
from paddlemix.launch.process_rules import check_devices
from paddlemix.tools import supervised_finetune
from paddlemix.tools.common.command import run_command
from paddlemix.trainer.checks import check_flat_buffers, check_steps
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.resuming.same_recipe import check_same_recipe, recipe_values
from tests.tiny_world import LORA, World


def error_of(capsys: pytest.CaptureFixture[str], recipe: Path, steps: int = 0) -> str:
    """The one line behind `error: ` with which the command ends after so many steps."""
    assert run_command(supervised_finetune.main, [str(recipe)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert captured.err.count(" loss ") - captured.err.count("the loss ") == steps
    assert captured.err.count("error: ") == 1
    message = captured.err.partition("error: ")[2].rstrip("\n")
    assert "\n" not in message
    return message


EPOCHS = {"max_steps": -1, "num_train_epochs": 2}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "learning rate as text": (
        {"learning_rate": "2e-4"},
        "learning_rate: expected a number, got text '2e-4'; remove the quotes",
    ),
    "learning rate no number": (
        {"learning_rate": float("nan")},
        "learning_rate: NaN is not a number",
    ),
    "evaluation without data": (
        {"dataset": {"train": [{"data_files": "train.json"}]}, "evaluation_strategy": "steps"},
        'dataset.eval is missing; evaluation_strategy "steps" needs at least one entry',
    ),
    "early stopping without evaluation": (
        {"early_stopping_patience": 2},
        "early_stopping_patience needs evaluations; set evaluation_strategy",
    ),
    "warm-up as long as the run": (
        {**EPOCHS, "max_steps": 0, "warmup_steps": 12},
        "warmup_steps 12: the run's steps are 12 (12 rows / 2 per step = 6 per epoch, x 2 epochs), so the rate would "
        "never reach learning_rate; lower warmup_steps, set warmup_ratio",
    ),
    "less than a step": (
        {"max_steps": -1, "num_train_epochs": 0.1},
        "num_train_epochs 0.1: the run's steps are 0 (12 rows / 2 per step = 6 per epoch, x 0.1 epochs); raise it",
    ),
    "batch larger than the data": (
        {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3},
        "a step needs 15 rows (per_device_train_batch_size 5 x gradient_accumulation_steps 3 x 1 processes), but the "
        "training data has 12; lower one of them or add data",
    ),
    "no batch": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
    "output below a file": ({"output_dir": "{file}/out"}, "cannot be made: {file} is a file; choose another folder"),
    "output is a file": ({"output_dir": "{file}"}, "output_dir '{file}' is a file; name a folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_clear_error(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], begun: Path, case: str
) -> None:
    values, message = WRONG[case]
    (tmp_path / "file").write_text("", encoding="utf-8")
    if "output_dir" in values:
        values = {"output_dir": values["output_dir"].format(file=tmp_path / "file")}
    found = error_of(capsys, world.recipe(tmp_path, **values))
    assert message.format(file=tmp_path / "file") in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "recipe.json"]
    assert not begun.exists()


def test_an_adapter_for_another_base(
    world: World, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(world.config(tmp_path / "tuned", learning_rate=0.1))
    capsys.readouterr()
    values = {"model_name_or_path": str(tmp_path / "tuned"), "lora_path": str(adapter)}
    found = error_of(capsys, world.recipe(tmp_path, **values))
    assert f"the adapter {adapter} was trained on another base than {tmp_path / 'tuned'}" in found
    assert not (tmp_path / "out").exists()


def test_a_folder_that_may_not_be_written(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    if os.access(closed, os.W_OK):
        pytest.skip("the superuser may write everywhere")
    found = error_of(capsys, world.recipe(tmp_path, output_dir=str(closed / "out")))
    assert f"cannot be written: no permission in {closed}" in found


def test_a_resumed_run_with_another_recipe_lists_the_keys(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = {"save_strategy": "steps", "save_steps": 2}
    run_recipe(world.config(tmp_path / "out", **{**every, "max_steps": 2}))
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    found = error_of(capsys, world.recipe(tmp_path, **every, seed=4, weight_decay=0.1, logging_steps=2))
    assert f"{tmp_path / 'out' / 'checkpoint-2'} was saved by a run with other settings: " in found
    assert "seed 3 -> 4" in found and "weight_decay 0.0 -> 0.1" in found and "logging_steps" not in found
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("part", "value"), [("lm_head.weight", "loss"), ("projector.0.weight", "gradient's norm")])
def test_weights_that_are_no_numbers(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], begun: Path, part: str, value: str
) -> None:
    """They are finite in the files, else loading would refuse them, but too large to compute with.  Two samples without
    an image come first: their blank image passes the projector, and adds nothing to the loss."""
    broken = load_pretrained(world.model)
    weight = dict(broken.model.named_parameters())[part]
    values = np.where(np.arange(weight.size).reshape(weight.shape) % 2 == 0, 3e38, -3e38).astype(np.float32)
    weight.set_value(paddle.to_tensor(values))
    save_model(broken, tmp_path / "model")
    found = error_of(capsys, world.recipe(tmp_path, model_name_or_path=str(tmp_path / "model"), **LORA))
    assert f"the {value} of step 1 is nan in the batch of " in found and "train.json record " in found
    assert "inspect these samples" in found
    assert not (tmp_path / "out" / "lora_config.json").exists()
    assert begun.exists()  # a launcher keeps the logs, although the status is that of bad input


def test_boxes_that_are_no_numbers(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON as Python writes it can hold NaN."""
    record = {"image": "images/0.png", "objects": {"ref": ["bus"], "bbox": [[float("nan"), 1, 2, 3]]}}
    record |= {"messages": [{"role": "user", "content": "<image>Where is the <ref-object>?"}]}
    record["messages"].append({"role": "assistant", "content": "<bbox>"})
    (tmp_path / "data.json").write_text(json.dumps([record] * 2), encoding="utf-8")
    found = error_of(capsys, world.recipe(tmp_path, dataset={"train": [{"data_files": str(tmp_path / "data.json")}]}))
    assert "data.json record 0" in found
    assert not (tmp_path / "out").exists()


# ---- several processes ----


# changes, processes, device -> what the error says, "" where the run may begin
LAYOUTS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"sharding_parallel_degree": 3}, 8, "gpu:0", r"sharding_parallel_degree 3 .* 8 processes.*: 1, 2, 4, 8, or -1"),
    (
        {"sharding_degree": 8},
        2,
        "npu:0",
        "sharding_degree 8 does not divide the 2 processes of this run; allowed: 1, 2",
    ),
    ({"sharding_parallel_degree": 3}, 6, "npu:0", ""),
    ({"sharding_parallel_degree": 8}, 8, "npu:0", ""),  # PaddleMIX's file for eight cards
    ({"sharding_parallel_degree": 8}, 1, "cpu", ""),  # which is tried on one: only a warning
    ({}, 2, "cpu", 'sharding "stage2" needs accelerators.*"stage1"'),
    ({"sharding": "stage1"}, 2, "cpu", ""),
    ({"sharding_parallel_degree": 1}, 2, "cpu", ""),  # no sharding, as for PaddleNLP
    ({"offload_optim": True}, 2, "npu:0", "offload_optim cannot be used"),
    ({"bf16": True, "amp_master_grad": True, "sharding_parallel_degree": 2}, 4, "npu:0", "degree to -1, or .*stage1"),
    ({"bf16": True, "amp_master_grad": True, "sharding_parallel_degree": 4}, 4, "npu:0", ""),
    ({"tensor_parallel_degree": 8}, 2, "npu:0", "tensor_parallel_degree 8 .* 2 processes .*start 8 .* one of: 1, 2$"),
    ({"tensor_parallel_degree": 2}, 1, "cpu", "tensor_parallel_degree 2 .* 1 process of .*one of: 1$"),
    ({"sharding": "", "tensor_parallel_degree": 2}, 4, "cpu", ""),
    ({"tensor_parallel_degree": 4}, 4, "cpu", ""),  # one model, so that nothing is shared
    ({"tensor_parallel_degree": 4, "sharding_parallel_degree": 4}, 8, "npu:0", "4 .* the 2 models of .*: 1, 2, or -1"),
    (
        {"bf16": True, "amp_master_grad": True, "tensor_parallel_degree": 2, "sharding_parallel_degree": 2},
        4,
        "npu:0",
        "",
    ),
]


@pytest.mark.parametrize(("changes", "processes", "device", "said"), LAYOUTS)
def test_processes_that_cannot_be_split(
    world: World, tmp_path: Path, changes: dict[str, Any], processes: int, device: str, said: str
) -> None:
    config = world.config(tmp_path, **{"sharding": "stage2", **changes})
    with pytest.raises(UserError, match=said) if said else nullcontext():
        check_devices(config, processes, device)


@pytest.mark.parametrize(
    ("device", "said"),
    [("gpu:0", "is for npu alone, this run computes on gpu:0"), ("npu:0", "no coalesce_tensor in bfloat16")],
)
def test_flat_buffers_are_refused_on_every_device(world: World, tmp_path: Path, device: str, said: str) -> None:
    check_flat_buffers(world.config(tmp_path), device)
    with pytest.raises(UserError, match=f"flatten_param_grads true .*{said}.*; leave it out"):
        check_flat_buffers(world.config(tmp_path, flatten_param_grads=True), device)


def test_a_step_of_all_processes(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path)
    check_steps(config, 12, 6)
    with pytest.raises(UserError, match=r"a step needs 16 rows \(.* 2 x .* 1 x 8 processes\), .* data has 12"):
        check_steps(config, 12, 8)


def test_a_long_warm_up_of_a_run_cut_short_is_only_said(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(world.config(tmp_path / "out", max_steps=1, warmup_steps=100))
    assert "warmup_steps 100 exceeds the run's 1 steps: the rate never stops rising" in capsys.readouterr().err
    assert read_json(tmp_path / "out" / "run_config.json")["warmup_steps"] == 100


def test_missing_data_is_said_before_a_model_is_looked_for(world: World, tmp_path: Path) -> None:
    entry = {"data_files": ["mine.json", "https://host/a.json"], "about": "conversations"}
    values = {"dataset": {"train": [entry], "eval": [{"data_files": "b.json"}]}, "evaluation_strategy": "epoch"}
    config = world.config(tmp_path / "out", model_name_or_path="no/where", **values)
    for run in (run_recipe, plan_run):
        with pytest.raises(MissingFileError) as caught:
            run(config)
        first, second = str(caught.value).split("\n")
        assert first.startswith("data file 'mine.json' does not exist (looked in ")
        assert first.endswith("; check dataset.data_files; dataset.train expects there conversations")
        assert second.startswith("data file 'b.json' does not exist")
    assert not (tmp_path / "out").exists()


def test_a_remark_about_data_is_no_other_recipe(world: World, tmp_path: Path) -> None:
    saved = recipe_values(world.config(tmp_path))
    entries = {split: [{**entry, "about": "x"} for entry in saved["dataset"][split]] for split in saved["dataset"]}
    check_same_recipe(tmp_path, saved, world.config(tmp_path, dataset=entries))


def test_a_run_of_nothing_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to do: do_train is false and no evaluation is asked for"):
        run_recipe(world.config(tmp_path / "out", do_train=False))


@pytest.mark.parametrize("named", ["absolute", "below image_root"])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_run_does_not_write_among_its_pictures(world: World, tmp_path: Path, named: str, split: str) -> None:
    """One of them has the name of the loss curve."""
    picture = tmp_path / "pics" / "pp" / "loss.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(world.picture.read_bytes())
    data = {"data_files": str(tmp_path / "named.json")}
    if named == "absolute":
        address = str(picture)
    else:
        address, data["image_root"] = "pp/loss.png", str(tmp_path / "pics")
    rows = [{"image": address, "conversations": [["<image>\nQ", "A"]]}] * 4
    (tmp_path / "named.json").write_text(json.dumps(rows), encoding="utf-8")
    dataset = world.values(tmp_path)["dataset"] | {split: [data]}
    keys = {"dataset": dataset, "overwrite_output_dir": True, "evaluation_strategy": "epoch"}
    folder = picture.parent if named == "below image_root" else tmp_path / "pics"
    with pytest.raises(UserError, match=f"'{folder}' holds pictures that .*named.json names, in '{picture.parent}'"):
        run_recipe(world.config(folder, **keys))
    if split == "train":
        notes = plan_run(world.config(folder, **keys)).notes
        assert any(f"the run would stop: output_dir '{folder}' holds pictures" in note for note in notes)
    assert [path for path in (tmp_path / "pics").rglob("*") if path.is_file()] == [picture]
    assert picture.read_bytes() == world.picture.read_bytes()


def test_a_run_does_not_write_where_a_link_to_a_picture_leads(world: World, tmp_path: Path) -> None:
    picture, link = tmp_path / "out" / "loss.png", tmp_path / "pics" / "a.png"
    for path in (picture, link):
        path.parent.mkdir()
    picture.write_bytes(world.picture.read_bytes())
    link.symlink_to(picture)
    rows = [{"conversations": [["Q", "A"]]}, {"image": "a.png", "conversations": [["<image>\nQ", "A"]]}] * 2
    (tmp_path / "named.json").write_text(json.dumps(rows), encoding="utf-8")
    data = {"data_files": str(tmp_path / "named.json"), "image_root": str(link.parent)}
    config = world.config(tmp_path / "out", dataset={"train": [data]}, overwrite_output_dir=True)
    with pytest.raises(UserError, match=f"named.json names: the link '{link}' leads to '{picture}'"):
        run_recipe(config)
    assert picture.read_bytes() == world.picture.read_bytes()
