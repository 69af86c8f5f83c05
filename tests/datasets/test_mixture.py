"""Entries -> examples, and which of them a rank sees when: a function of seed, epoch and rank alone."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from paddlemix.datasets.mixture import EpochBatchSampler, SampleDataset
from paddlemix.errors import MissingFileError, UserError
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.tokenizer import Tokenizer
from tests.tiny import make_processor, noise_picture


@pytest.fixture
def processor_for(tokenizer: Tokenizer) -> Callable[[str | None], LlavaProcessor]:
    return lambda name: make_processor(tokenizer, template=name or "vicuna_v1")


def write(path: Path, *conversations: list[str], image: Any = None) -> str:
    records = [{"conversations": [list(pair)], **({"image": image} if image else {})} for pair in conversations]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def test_entries_follow_each_other(tmp_path: Path, processor_for: Any) -> None:
    (tmp_path / "own").mkdir()
    for index, folder in enumerate((tmp_path, tmp_path / "own")):
        noise_picture(30, 40, seed=index).save(folder / "a.png")
    entries: list[dict[str, Any]] = [
        {"data_files": write(tmp_path / "1.json", ["<image>\nQ", "red"], image="a.png"), "chat_template": "plain"},
        {
            "data_files": [
                write(tmp_path / "2.json", ["<image>\nQ", "big"], ["<image>\nQ", "cat"], image="a.png"),
                write(tmp_path / "3.json", ["Q", "mat"]),
            ],
            "image_root": str(tmp_path / "own"),
        },
    ]
    dataset = SampleDataset(entries, processor_for, image_root=str(tmp_path))
    dataset.check()
    assert len(dataset) == 4
    examples = [dataset[index] for index in range(4)]
    assert [example.source.rpartition("/")[2] for example in examples] == [
        *["1.json record 0", "2.json record 0", "2.json record 1", "3.json record 0"]
    ]
    assert [len(example.pixel_values) for example in examples] == [1, 1, 1, 0]
    np.testing.assert_array_equal(examples[1].pixel_values, examples[2].pixel_values)
    assert (examples[0].pixel_values != examples[1].pixel_values).any()  # another image_root
    plain = processor_for("plain").encode_text(dataset.samples[0].messages, [(30, 40)])
    np.testing.assert_array_equal(examples[0].input_ids, plain.input_ids)


def test_max_length_reaches_the_processor(tmp_path: Path, processor_for: Any) -> None:
    dataset = SampleDataset([{"data_files": write(tmp_path / "1.json", ["Q", "A"])}], processor_for, max_length=3)
    with pytest.raises(UserError, match=r"1.json record 0: .*max_length is 3"):
        dataset[0]


def test_bad_record_is_named(tmp_path: Path, processor_for: Any) -> None:
    path = write(tmp_path / "1.json", ["Q", "A"], ["Q", ""])
    with pytest.raises(UserError, match="1.json record 1: turn 2: the answer is empty"):
        SampleDataset([{"data_files": path}], processor_for)
    with pytest.raises(MissingFileError, match="2.json' does not exist"):
        SampleDataset([{"data_files": str(tmp_path / "2.json")}], processor_for)
    with pytest.raises(UserError, match="conversation template 'v2' is not one of"):
        SampleDataset([{"data_files": path, "chat_template": "v2"}], processor_for)


def use(dataset: SampleDataset) -> None:
    dataset[0]


@pytest.mark.parametrize("look", [SampleDataset.check, use])
def test_bad_image_is_named(tmp_path: Path, processor_for: Any, look: Callable[[SampleDataset], None]) -> None:
    path = write(tmp_path / "1.json", ["<image>", "A"], image="a.png")
    dataset = SampleDataset([{"data_files": path}], processor_for, image_root=str(tmp_path))
    with pytest.raises(MissingFileError, match=r"1.json record 0: image '.*a.png' does not exist"):
        look(dataset)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1.json record 0: image '.*a.png' is not an image"):
        look(dataset)


@pytest.mark.parametrize("look", [SampleDataset.check, use])
def test_conversation_the_template_cannot_write_is_named(
    tmp_path: Path, processor_for: Any, look: Callable[[SampleDataset], None]
) -> None:
    entry = {"data_files": write(tmp_path / "1.json", ["Q", "A"]), "chat_template": "plain"}
    with pytest.raises(UserError, match="1.json record 0: template 'plain' takes one image"):
        look(SampleDataset([entry], processor_for))


SIZES = st.integers(1, 60)
COUNTS = st.integers(1, 4)


def epoch_of(sampler: EpochBatchSampler, epoch: int) -> list[list[int]]:
    sampler.epoch = epoch
    return list(sampler)


@given(size=SIZES, batch=COUNTS, accumulation=COUNTS, world=COUNTS, epoch=st.integers(0, 3), shuffle=st.booleans())
def test_ranks_share_an_epoch(size: int, batch: int, accumulation: int, world: int, epoch: int, shuffle: bool) -> None:
    samplers = [
        EpochBatchSampler(size, batch, accumulation, seed=5, rank=rank, world_size=world, shuffle=shuffle)
        for rank in range(world)
    ]
    ranks = [epoch_of(sampler, epoch) for sampler in samplers]
    per_step = batch * accumulation * world
    steps = -(-size // per_step)
    for sampler, batches in zip(samplers, ranks, strict=True):
        assert sampler.steps_per_epoch == steps
        assert len(batches) == len(sampler) == steps * accumulation
        assert {len(rows) for rows in batches} == {batch}  # the last step is full
    together = [index for micro in zip(*ranks, strict=True) for rows in micro for index in rows]
    np.testing.assert_array_equal(together, samplers[0].order())
    assert sorted(together[:size]) == list(range(size))  # each sample once
    assert together[size:] == (together[:size] * per_step)[: len(together) - size]  # then again from the beginning


def test_last_step_is_filled_even_from_a_small_set() -> None:
    sampler = EpochBatchSampler(2, 3, accumulation=2, shuffle=False)
    assert list(sampler) == [[0, 1, 0], [1, 0, 1]]


@given(size=st.integers(2, 60), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_order_depends_on_seed_epoch_and_rank_alone(size: int, seed: int, epoch: int) -> None:
    first = EpochBatchSampler(size, 2, seed=seed, rank=1, world_size=2)
    for other in range(epoch):  # having gone through earlier epochs, partly or wholly, changes nothing
        next(iter(first))
        epoch_of(first, other)
    np.random.seed(epoch)
    expected = epoch_of(EpochBatchSampler(size, 2, seed=seed, rank=1, world_size=2), epoch)
    assert epoch_of(first, epoch) == expected == epoch_of(first, epoch)


@given(seed=st.integers(0, 1000), other=st.integers(0, 1000))
def test_other_seed_or_epoch_is_another_order(seed: int, other: int) -> None:
    assume(seed != other)
    orders = []
    for chosen, epoch in ((seed, 0), (seed, 1), (other, 0), (other, 1)):
        sampler = EpochBatchSampler(50, 1, seed=chosen)
        sampler.epoch = epoch
        orders.append(tuple(sampler.order()))
    assert len(set(orders)) == 4


def test_file_order() -> None:
    sampler = EpochBatchSampler(4, 1, rank=1, world_size=2, shuffle=False)
    assert epoch_of(sampler, 0) == epoch_of(sampler, 1) == [[1], [3]]


def test_no_sample() -> None:
    with pytest.raises(UserError, match="the data set is empty"):
        EpochBatchSampler(0, 1)


def test_sampler_goes_to_another_process() -> None:
    sampler = EpochBatchSampler(10, 2, seed=3)
    sampler.epoch = 2
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)
