"""Training on the stand-in NPU: the CPU's numbers, on the device, without waiting for it more than once a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.files.weight_files import read_safetensors
from paddlemix.trainer.resuming.checkpoint_folders import OPTIMIZER_FILE
from tests.npu.cases import FINETUNE, NAMES, trainings
from tests.npu.conftest import Bench
from tests.tiny_world import LORA, changed, reports, weights

MAX_GAP = {"loss": 1e-6, "grad_norm": 1e-5}  # relative
ON_DEVICE = ["Place(npu:0)"]
_RECIPES = Path(__file__).resolve().parents[2] / "paddlemix" / "config" / "llava" / "v1_5"


def train(bench: Bench, where: str, name: str) -> Path:
    command, changes = trainings(bench.world)[name]
    return bench.train(where, name, changes, command)


@pytest.mark.parametrize("name", NAMES)
def test_losses_equal_the_cpus(bench: Bench, where: str, name: str) -> None:
    ours, theirs = train(bench, where, name), train(bench, "cpu", name)
    for key, gap in MAX_GAP.items():
        assert len(reports(ours, key)) == 4
        assert reports(ours, key) == pytest.approx(reports(theirs, key), rel=gap)


@pytest.mark.parametrize("name", NAMES)
def test_the_work_is_done_on_the_device(bench: Bench, where: str, name: str) -> None:
    train(bench, where, name)
    report = bench.outcome(where, name).report
    assert report["places"] == ON_DEVICE
    assert {"matmul", "softmax", "gather", "rsqrt"} <= set(report["step_kernels"])
    assert {"adamw", "squared_l2_norm"} <= set(report["kernels"])
    weights_in_bytes = 4 * 78_000  # about as many parameters as the world's model has
    assert report["total"]["h2d"] > (weights_in_bytes if name != "qlora" else weights_in_bytes / 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_the_device_once(bench: Bench, where: str, name: str) -> None:
    """Forward and backward pass copy nothing between host and device, once constants are there."""
    train(bench, where, name)
    report = bench.outcome(where, name).report
    assert [step["d2h_calls"] for step in report["steps"]] == [1, 1, 1]
    assert [step["d2h_calls"] for step in report["micro_steps"]] == [0] * len(report["micro_steps"])
    assert [step["h2d_calls"] for step in report["micro_steps"]][1:] == [0] * (len(report["micro_steps"]) - 1)
    assert not [kernel for kernel in report["step_kernels"] if kernel.startswith(("set_value", "masked", "nonzero"))]


RESUMED: dict[str, dict[str, Any]] = {
    "lora": {**LORA, "neftune": True, "neftune_noise_alpha": 5.0},
    "full": {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2},
    "fp16": {"fp16": True, "fp16_opt_level": "O2"},
}


@pytest.mark.parametrize(("where", "name"), [("block", "lora"), ("bare", "full"), ("bare", "fp16")])
def test_a_resumed_run_ends_with_the_same_bits(bench: Bench, where: str, name: str) -> None:
    """Dropout and noise among them, which the device draws."""
    run = {**RESUMED[name], "save_strategy": "steps", "save_steps": 2}
    whole = bench.train(where, f"resume_{name}", run)
    again = bench.train(where, f"resumed_{name}", {**run, "resume_from_checkpoint": str(whole / "checkpoint-2")})
    assert not changed(weights(whole), weights(again))
    assert {step: loss for step, loss in reports(whole).items() if step > 2} == reports(again)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("full", {"bf16": True, "fp16_opt_level": "O2"}), ("fp16", {"fp16": False, "fp16_opt_level": "O1"})],
)
def test_a_run_goes_on_in_another_precision_from_the_same_numbers(
    bench: Bench, name: str, changes: dict[str, Any]
) -> None:
    """Weights in float32 are their copies in half precision, and the other way round; none is rounded on the way.  With
    a rate of nearly 0 from the first step on they stay as they are."""
    run = {**RESUMED[name], "save_strategy": "steps", "save_steps": 2}
    before = bench.train("bare", f"resume_{name}", run) / "checkpoint-2"
    still = {"learning_rate": 1e-12, "allow_changed_recipe": True, "resume_from_checkpoint": str(before)}
    after = bench.train("bare", f"other_{name}", {**run, **changes, **still}) / "checkpoint-4"
    start, end = exact_weights(before), exact_weights(after)
    assert (
        start
        and start.keys() <= end.keys()
        and all(value.dtype == np.float32 for value in (*start.values(), *end.values()))
    )
    for weight, value in start.items():
        np.testing.assert_allclose(end[weight], value, rtol=0, atol=1e-8, err_msg=weight)


def exact_weights(checkpoint: Path) -> dict[str, np.ndarray]:
    """What trained, in float32: the optimiser's copies where there are some, else the weights."""
    states = {name: entry.read() for name, entry in read_safetensors(checkpoint / OPTIMIZER_FILE).items()}
    held = weights(checkpoint)
    names = {name.partition("|")[0] for name in states}
    return {name: states.get(f"{name}|master_weight", held[name]) for name in names}


def test_recompute_changes_nothing(bench: Bench, where: str) -> None:
    """Dropout is drawn a second time, and what was kept may be a view."""
    plain = bench.train(where, "dropout", LORA)
    again = bench.train(where, "dropout recomputed", {**LORA, "recompute": True})
    assert reports(plain, "grad_norm") == reports(again, "grad_norm")
    assert not changed(weights(plain), weights(again))


def write_recipe(bench: Bench, where: str, file: str, **changes: Any) -> Path:
    """A recipe in PaddleMIX's form with this test's paths; its results go to `out` beside it."""
    values = json.loads((_RECIPES / file).read_text(encoding="utf-8"))
    base = bench.world.values(Path("unused"))
    values |= {key: base[key] for key in ("model_name_or_path", "dataset", "image_root", "max_steps")}
    values |= {"gradient_accumulation_steps": 2, "evaluation_strategy": "no", "save_strategy": "no", **changes}
    folder = bench.root / where / f"{file} {len(changes)}"
    folder.mkdir()
    path = folder / "recipe.json"
    path.write_text(json.dumps({**values, "output_dir": str(folder / "out")}), encoding="utf-8")
    return path


@pytest.mark.parametrize("file", ["sft_argument.json", "lora_sft_argument.json"])
def test_the_device_key_is_all_that_changes(bench: Bench, file: str) -> None:
    """From the CPU to the device, with the numbers of the CPU; and the recipe as it is, in bfloat16."""
    float32 = {"bf16": False, "fp16_opt_level": "O1", "amp_master_grad": False}
    if "lora" in file:
        float32 |= {"lora_dropout": 0.0}
    runs = {
        "cpu": ("cpu", {**float32, "device": "cpu"}),
        "npu": ("block", {**float32, "device": "npu"}),
        "bfloat16": ("bare", {"device": "npu"}),
    }
    found = {}
    for name, (where, changes) in runs.items():
        path = write_recipe(bench, where, file, **changes)
        outcome = bench.run(where, FINETUNE, path)
        assert outcome.status == 0, outcome.err
        assert outcome.report["places"] == (["Place(cpu)"] if where == "cpu" else ON_DEVICE)
        found[name] = reports(path.parent / "out")
    assert found["npu"] == pytest.approx(found["cpu"], rel=MAX_GAP["loss"])
    assert found["bfloat16"] == pytest.approx(found["cpu"], rel=0.01)
