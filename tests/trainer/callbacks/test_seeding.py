"""Seeds of steps: the same for the same step, another for every other seed, step and process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from paddlemix.errors import UserError
from paddlemix.trainer.callbacks import seeding


def test_every_step_of_every_process_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(seeding, "set_seed", seeds.append)
    callback = seeding.SeedEachStep()
    places = [(seed, step, rank) for seed in (0, 1, 42) for step in (0, 1, 9_999) for rank in (0, 1, 7)]
    for seed, step, rank in places * 2:
        args, state = SimpleNamespace(seed=seed, dataset_rank=rank), SimpleNamespace(global_step=step)
        callback.on_step_begin(args, state, None)
    assert seeds[: len(places)] == seeds[len(places) :]
    assert len(set(seeds)) == len(places) and all(0 <= seed < 2**31 for seed in seeds)


def test_a_step_is_seeded_as_it_always_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints store no random state: another formula would change what a resumed run draws."""
    seeds: list[int] = []
    monkeypatch.setattr(seeding, "set_seed", seeds.append)
    for seed, step, rank in ((0, 0, 0), (1, 2, 3), (2**31 - 1, 5, 0)):
        args, state = SimpleNamespace(seed=seed, dataset_rank=rank), SimpleNamespace(global_step=step)
        seeding.SeedEachStep().on_step_begin(args, state, None)
    assert seeds == [0, 1_008_198, 2_146_504_125] and all(isinstance(seed, int) for seed in seeds)


def test_more_processes_than_seeds_of_a_step_are_refused() -> None:
    callback = seeding.SeedEachStep()
    callback.on_train_begin(SimpleNamespace(dataset_world_size=4096), None, None)
    with pytest.raises(UserError, match="4097 processes that read different samples are above 4096"):
        callback.on_train_begin(SimpleNamespace(dataset_world_size=4097), None, None)
