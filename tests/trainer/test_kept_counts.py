"""Every key of a run is compared on resuming or said to be free; what was left out is counted once and rightly."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from paddlemix.checkpoints.files.weight_files import write_json
from paddlemix.config.schema import SPECS
from paddlemix.datasets.data_settings import DataSettings
from paddlemix.errors import UserError
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.sample import Skip
from paddlemix.trainer.reports import skipped
from paddlemix.trainer.reports.skipped import SKIPPED_FILE, SkipLog
from paddlemix.trainer.resuming.checkpoint_folders import PROGRESS_FILE, STATE_FILE, saved_recipe
from paddlemix.trainer.resuming.same_recipe import PROCESSES_KEY, check_same_recipe, recipe_values
from paddlemix.trainer.run_data import TrainingRows
from tests.tiny_world import World

# Keys whose change makes no step compute something else. A model is told by its weights, not by where it is.
FREE = {
    *("model_name_or_path", "use_flash_attention", "mm_vision_tower", "pretrain_mm_mlp_adapter", "image_root"),
    *("pad_to_multiple_of", "pad_tiles_to_multiple_of", "max_image_bytes", "max_image_pixels", "image_timeout"),
    *("image_retries", "cache_vision_features", "vision_cache_dir", "vision_cache_gb", "allow_local_network"),
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "do_train", "do_eval", "recompute", "device"),
    *("per_device_eval_batch_size", "optim", "flatten_param_grads", "offload_optim", "scale_loss"),
    *("evaluation_strategy", "eval_steps", "eval_accumulation_steps", "max_evaluate_steps", "eval_with_do_generation"),
    *("max_new_tokens", "minimum_eval_times", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("early_stopping_patience", "early_stopping_threshold", "save_strategy", "save_steps", "save_total_limit"),
    *("ignore_save_lr_and_optim", "ignore_load_lr_and_optim", "allow_changed_recipe", "ignore_data_skip"),
    *("skip_data_intervals", "dataloader_num_workers"),
}


def other(name: str, value: Any) -> Any:
    """A value of the key's type that is not the given one."""
    if isinstance(value, bool) or SPECS[name].kinds[0] == "bool":
        return not value
    if isinstance(value, int | float):
        return value + 1
    return ["another"] if SPECS[name].kinds[0].startswith("list") else "another"


KEYS = [
    name
    for name, spec in SPECS.items()
    if spec.status == "used" and spec.group in ("model", "lora", "data", "training") and name not in FREE
]


@pytest.mark.parametrize("name", KEYS)
def test_each_key_that_decides_a_step_is_compared(world: World, tmp_path: Path, name: str) -> None:
    config = world.config(tmp_path, lr_scheduler_type="cosine")
    saved = json.loads(json.dumps(recipe_values(config)))
    check_same_recipe(tmp_path, saved, config)
    changed = {**saved, name: other(name, getattr(config, name))}
    counted = name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    with pytest.raises(UserError, match=f"with other settings: {'global batch .*' * counted}{name} "):
        check_same_recipe(tmp_path, changed, config)


def test_free_keys_are_free(world: World, tmp_path: Path) -> None:
    assert SPECS.keys() >= FREE and not FREE & recipe_values(world.config(tmp_path)).keys()


@pytest.mark.parametrize("name", ["num_train_epochs", "max_steps"])
def test_a_constant_rate_may_end_later(world: World, tmp_path: Path, name: str) -> None:
    config = world.config(tmp_path)  # its rate is constant
    saved = recipe_values(config)
    check_same_recipe(tmp_path, {**saved, name: saved[name] + 1}, config)


def resumed_by(world: World, before: tuple[int, int, int], now: tuple[int, int, int], **keys: Any) -> None:
    """Compares runs of (samples at once, passes, processes)."""
    factors = ("per_device_train_batch_size", "gradient_accumulation_steps")
    saved, config = (
        world.config(Path("out"), **dict(zip(factors, run, strict=False)), **keys) for run in (before, now)
    )
    check_same_recipe(Path("checkpoint-2"), recipe_values(saved, before[2]), config, now[2])


@pytest.mark.parametrize("now", [(2, 4, 1), (1, 4, 2), (4, 2, 1), (1, 1, 8), (1, 2, 4)])
def test_the_samples_of_a_step_may_be_shared_out_anew(world: World, now: tuple[int, int, int]) -> None:
    resumed_by(world, (2, 2, 2), now)
    with pytest.raises(UserError, match="other settings: seed"):
        check_same_recipe(
            Path("checkpoint-2"),
            {**recipe_values(world.config(Path("out")), 2), "seed": 9},
            world.config(Path("out")),
            2,
        )


@pytest.mark.parametrize(
    ("now", "advice"),
    [
        ((2, 2, 1), "with 1 process set gradient_accumulation_steps 4"),
        ((2, 2, 4), "with 4 processes set gradient_accumulation_steps 1"),
        ((3, 1, 2), "with 2 processes set per_device_train_batch_size 2 and gradient_accumulation_steps 2"),
        ((1, 1, 3), "only a number of processes that divides 8 can make that"),
    ],
)
def test_another_number_of_samples_per_step_is_refused_with_the_values_to_set(
    world: World, now: tuple[int, int, int], advice: str
) -> None:
    with pytest.raises(UserError) as caught:
        resumed_by(world, (2, 2, 2), now)
    expected = f"-> {now[0] * now[1] * now[2]} (per_device_train_batch_size {now[0]} x "
    assert (
        "global batch 8 (per_device_train_batch_size 2 x gradient_accumulation_steps 2 x 2 processes)"
        in f"{caught.value}"
    )
    assert expected in f"{caught.value}" and advice in f"{caught.value}"
    resumed_by(world, (2, 2, 2), now, allow_changed_recipe=True)


def test_means_of_micro_batches_keep_their_size(world: World) -> None:
    """They weigh a token by its company, so that other micro-batches of the same step are another loss."""
    means = {"loss_reduction": "micro_batch"}
    resumed_by(world, (2, 2, 2), (2, 4, 1), **means)
    with pytest.raises(UserError, match="other settings: per_device_train_batch_size 2 -> 4"):
        resumed_by(world, (2, 2, 2), (4, 2, 1), **means)
    with pytest.raises(UserError, match="set per_device_train_batch_size 2 and gradient_accumulation_steps 4"):
        resumed_by(world, (2, 2, 2), (4, 4, 1), **means)


def test_processes_of_an_earlier_version_are_counted_from_its_samples(world: World, tmp_path: Path) -> None:
    recipe = {name: value for name, value in recipe_values(world.config(tmp_path)).items() if name != PROCESSES_KEY}
    write_json(tmp_path / STATE_FILE, {"recipe": recipe})
    assert saved_recipe(tmp_path) == recipe  # nothing counts them: each factor is compared
    with pytest.raises(UserError, match="other settings: per_device_train_batch_size 2 -> 1"):
        check_same_recipe(tmp_path, recipe, world.config(tmp_path, per_device_train_batch_size=1), 2)
    write_json(tmp_path / PROGRESS_FILE, {"global_step": 3, "consumed_samples": 3 * 2 * 4})
    assert saved_recipe(tmp_path) == {**recipe, PROCESSES_KEY: 4}


# ---- what is left out ----


@dataclass
class _Samples:
    """As much of a data set as a `SkipLog` looks at."""

    size: int
    settings: DataSettings
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.size


def skip_log(folder: Path, size: int = 20, most: float = 0.1, unreadable: int = 0, layout: Layout = ALONE) -> SkipLog:
    samples = _Samples(size - unreadable, DataSettings(max_bad_fraction=most))
    samples.unreadable += [(f"record {number}", "no JSON") for number in range(unreadable)]
    return SkipLog(folder, TrainingRows(rows=cast(Any, samples), samples=cast(Any, samples)), layout)


def test_too_long_is_not_bad(tmp_path: Path) -> None:
    log = skip_log(tmp_path)
    log.start(resumed=False)
    log.add(Skip(index, "too long", True) for index in range(20))  # all of them
    assert log.count == 20


def test_the_last_bad_one_that_is_allowed(tmp_path: Path) -> None:
    log = skip_log(tmp_path, unreadable=1)
    log.start(resumed=False)
    log.add([Skip(3, "too long", True), Skip(4, "no picture", False), Skip(4, "no picture", False)])
    assert log.count == 3
    with pytest.raises(UserError, match=r"3 of 20 samples cannot be used, max_bad_fraction 0.1 allows 2"):
        log.add([Skip(5, "no picture", False)])


def test_the_bad_ones_before_a_stop_count_after_it(tmp_path: Path) -> None:
    first = skip_log(tmp_path, unreadable=1)
    first.start(resumed=False)
    first.add([Skip(3, "too long", True), Skip(4, "no picture", False)])
    lines = (tmp_path / SKIPPED_FILE).read_text(encoding="utf-8")
    again = skip_log(tmp_path, unreadable=1)
    again.start(resumed=True)
    assert again.count == 3
    again.add([Skip(4, "no picture", False), Skip(6, "too long", True)])  # 4 is met again
    assert (tmp_path / SKIPPED_FILE).read_text(encoding="utf-8").startswith(lines)
    assert again.count == 4
    with pytest.raises(UserError, match=r"3 of 20 samples cannot be used"):
        again.add([Skip(5, "no picture", False)])


def test_what_was_too_long_before_a_stop_is_not_bad_after_it(tmp_path: Path) -> None:
    first = skip_log(tmp_path)
    first.start(resumed=False)
    first.add(Skip(index, "too long", True) for index in range(10))
    again = skip_log(tmp_path)
    again.start(resumed=True)
    again.add([Skip(11, "no picture", False), Skip(12, "no picture", False)])
    assert again.count == 12


def test_several_processes_know_the_same_and_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = [skip_log(tmp_path, layout=Layout(world_size=2, rank=rank)) for rank in (1, 0)]
    for log in logs:
        log.start(resumed=False)
    # 4 is met by both, as at the end of an epoch; 2 of 20 may be bad
    met = [[Skip(7, "no picture", False), Skip(4, "no picture", False)], [Skip(4, "no picture", False)]]
    for log, own in zip(logs, met, strict=True):
        log.add(own)
        log.add(own)
    assert [len(log.waiting) for log in logs] == [2, 1] and not (tmp_path / SKIPPED_FILE).exists()
    monkeypatch.setattr(skipped, "gathered_objects", lambda own: met)
    for log in logs:
        log.share()
        log.check()
    lines = (tmp_path / SKIPPED_FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["index"] for line in lines] == [7, 4]
    monkeypatch.setattr(skipped, "gathered_objects", lambda own: [[], [Skip(9, "cut short", False)]])
    for log in logs:
        log.add(met[0])  # known
        assert not log.waiting and log.count == 2
        log.share()
        with pytest.raises(UserError, match="3 of 20 samples cannot be used.*the first: cut short"):
            log.check()


def test_what_cannot_be_written_at_the_start_ends_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process alone writes: the others would go on into training."""
    log = skip_log(tmp_path)
    log._left_out = [Skip(3, "no picture", False)]
    agreed: list[bool] = []

    @contextlib.contextmanager
    def together() -> Iterator[None]:
        agreed.append(False)
        yield
        agreed[-1] = (tmp_path / SKIPPED_FILE).is_file()

    monkeypatch.setattr("paddlemix.trainer.reports.skipped.together", together)
    log.start(resumed=False)
    assert agreed == [False, True]  # written within the second block
