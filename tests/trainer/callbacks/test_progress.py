"""What the user sees: the report before the first step, each line's numbers, trackers, and a bar where there is one."""

from __future__ import annotations

import io
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import paddle
import pytest
from paddle import nn

from paddlemix.errors import UserError
from paddlemix.processors.text.example_text import Style
from paddlemix.trainer.batches.dataloader import PositionCounts
from paddlemix.trainer.callbacks.meters import Meters, StepReport
from paddlemix.trainer.callbacks.progress import describe_report, shows_bar
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.reports import trackers
from paddlemix.trainer.reports.start import describe_sample
from paddlemix.trainer.reports.trackers import TrackedArguments, resolve_trackers
from tests.tiny_world import LORA, World, reports

KEYS = {"grad_norm", "tokens_per_second", "image_token_share", "padding_share", "memory_gib", "eta_seconds"}


def lines_of(output_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / name).read_text(encoding="utf-8").splitlines()]


# ---- reports ----


def test_every_report_has_every_number(world: World, tmp_path: Path) -> None:
    run_recipe(world.config(tmp_path, logging_steps=2))
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    assert [line["epoch"] for line in lines] == [0.3333, 0.6667]  # two of six steps, then four
    for line in lines:
        assert line.keys() == {"step", "epoch", "loss", "learning_rate"} | KEYS
        assert line["grad_norm"] > 0 and line["memory_gib"] > 0 and line["tokens_per_second"] > 0
        assert 0 < line["image_token_share"] < 1 and 0 <= line["padding_share"] < 1
    assert lines[0]["eta_seconds"] >= 0 and lines[1]["eta_seconds"] == 0


def test_shares_are_those_of_the_reported_steps(world: World, tmp_path: Path) -> None:
    """Single rows have no padding; every image of the world takes four tokens."""
    run_recipe(world.config(tmp_path, per_device_train_batch_size=1, max_steps=12))
    assert set(reports(tmp_path, "padding_share").values()) == {0.0}
    shares = list(reports(tmp_path, "image_token_share").values())
    assert sum(share == 0 for share in shares) == 3  # every fourth record is text only


class Clock:
    """A clock that tests set."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("paddlemix.trainer.callbacks.meters.time", clock)
    return clock


def test_speed_leaves_pauses_out_and_the_time_left_does_not(clock: Clock) -> None:
    state: dict[str, Any] = {"tokens": 1000.0, "positions": PositionCounts()}
    meters = Meters(tokens_seen=lambda: state["tokens"], positions=lambda: state["positions"], take_norm=lambda: None)
    report = StepReport(meters, "cpu")
    report.start(step=10, last_step=20)
    clock.now = 2.0
    with report.pause():
        clock.now = 8.0
    clock.now, state["tokens"], state["positions"] = 10.0, 1400.0, PositionCounts(500, 400, 100)
    values = report.values(step=12)
    assert "grad_norm" not in values
    assert values["tokens_per_second"] == 400 / 4
    assert (values["image_token_share"], values["padding_share"]) == (0.25, 0.2)
    assert values["eta_seconds"] == 8 * 10 / 2
    clock.now = 11.0
    assert report.values(step=13)["tokens_per_second"] == 0


def test_a_report_in_one_line() -> None:
    values = {"loss": 1.5, "learning_rate": 2e-4, "grad_norm": 0.123456, "tokens_per_second": 4321.0}
    values |= {"image_token_share": 0.756, "padding_share": 0.1, "memory_gib": 12.34}
    assert describe_report(values) == "loss 1.5000 lr 2.00e-04 norm 0.123 4321 tok/s image 76% pad 10% 12.3 GiB"
    del values["grad_norm"]
    assert "norm" not in describe_report(values)


def test_a_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert shows_bar(None) is shown
        assert shows_bar(False) and not shows_bar(True)


# ---- gradient norm ----


def layer_with_gradients(scale: float) -> nn.Layer:
    paddle.seed(0)
    layer = nn.Linear(5, 4)
    (layer(paddle.ones([3, 5])).square().sum() * scale).backward()
    return layer


def test_a_recipe_for_several_cards_measures_the_norm_on_one(world: World, tmp_path: Path) -> None:
    """And so stops where a gradient is no number: nothing is shared there."""
    norms = []
    for sharding in ("", "stage2"):
        out = tmp_path / (sharding or "plain")
        run_recipe(world.config(out, max_steps=2, sharding=sharding))
        norms.append(reports(out, "grad_norm"))
    assert norms[0] == norms[1] and sorted(norms[0]) == [1, 2]


# ---- before the first step ----


def test_a_run_begins_with_its_parts_and_a_sample(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("paddlemix"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="paddlemix"):
        run_recipe(world.config(tmp_path, max_steps=1, **LORA))
    text = caplog.text
    assert "vision_tower            27744 parameters,             0 trained" in text
    assert "training data: 12 samples" in text
    assert "train.json record 0): 99 tokens, 4 of them visual, 22 trained" in text
    assert "What is the colour of the big bus? ASSISTANT:[[ It is red.</s>]]" in text
    assert "\x1b" not in text


class OneSample:
    """A data set whose first sample is left out."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return self.data[index] if index else types.SimpleNamespace(examples=())

    def processor_of(self, index: int) -> Any:
        return self.data.processor_of(index)


def test_a_sample_that_is_left_out_is_not_shown(world: World, tmp_path: Path) -> None:
    from paddlemix.checkpoints.load import load_pretrained
    from paddlemix.trainer.run_data import read_samples

    loaded = load_pretrained(world.model)
    assert loaded.processor is not None
    data = read_samples(world.config(tmp_path), "train", loaded.processor, True)
    first, *rest = describe_sample(OneSample(data), Style.coloured())  # type: ignore[arg-type]
    assert "record 1)" in first
    assert any("\x1b[32m" in line for line in rest)


# ---- trackers ----


def test_visualdl_gets_the_numbers_and_no_secret(world: World, tmp_path: Path) -> None:
    visualdl = pytest.importorskip("visualdl")
    run_recipe(world.config(tmp_path, report_to=["visualdl"], wandb_api_key="a-secret", max_steps=2))
    [path] = (tmp_path / "logs").glob("vdlrecords.*.log")
    reader = visualdl.LogReader(file_path=str(path))
    wanted = {f"train/{key}" for key in KEYS | {"loss", "learning_rate"}}
    assert wanted <= set(reader.get_tags()["scalar"])
    found = {item.id: item.value for item in reader.get_data("scalar", "train/loss")}
    assert found == pytest.approx(reports(tmp_path), rel=1e-6)
    assert all(b"a-secret" not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_tensorboard_gets_the_numbers(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for its package, which the development environment does not have."""
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            self.log_dir = log_dir

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def add_text(self, name: str, text: str) -> None:
            assert "a-secret" not in text

        def flush(self) -> None: ...

        def close(self) -> None: ...

    module: Any = types.ModuleType("tensorboardX")
    module.SummaryWriter = SummaryWriter
    module.__spec__ = types.SimpleNamespace(name="tensorboardX")
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    run_recipe(world.config(tmp_path, report_to="tensorboard", wandb_api_key="a-secret", max_steps=2))
    losses = {step: value for name, value, step in written if name == "train/loss"}
    assert losses == pytest.approx(reports(tmp_path))
    assert {name for name, _, _ in written} >= {f"train/{key}" for key in KEYS}


def test_wandb_can_be_switched_off_alone(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    config = world.config(tmp_path, report_to="all")
    every = resolve_trackers(config)
    assert "wandb" in every and len(every) > 1
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert resolve_trackers(config) == [name for name in every if name != "wandb"]


def test_a_tracker_that_is_not_installed_is_refused_at_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda name: False)
    for name in ("visualdl", "tensorboard", "wandb"):
        with pytest.raises(UserError, match=f'report_to "{name}" needs the package .*pip install'):
            run_recipe(world.config(tmp_path / "out", report_to=[name]))
    with pytest.raises(UserError, match="no tracker is installed"):
        run_recipe(world.config(tmp_path / "out", report_to="all"))
    assert not (tmp_path / "out").exists()
    assert resolve_trackers(world.config(tmp_path / "out", report_to="none")) == []


def test_all_means_those_that_are_there(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda name: name == "visualdl")
    assert resolve_trackers(world.config(tmp_path, report_to="all")) == ["visualdl"]


def test_arguments_are_written_without_secrets(tmp_path: Path) -> None:
    values = TrackedArguments(output_dir=str(tmp_path), wandb_api_key="a-secret", device="cpu").to_dict()
    assert "a-secret" not in str(values) and values["output_dir"] == str(tmp_path)
