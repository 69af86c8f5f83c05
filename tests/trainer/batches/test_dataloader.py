"""Micro-batches for the trainer: order, the counts of a whole step, going on in the middle, worker processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.datasets.batches import LoadingSettings, RowDataset
from paddlemix.datasets.data_settings import DataSettings
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.datasets.order import EpochBatchSampler
from paddlemix.datasets.packing import PackedDataset, pack_rows
from paddlemix.errors import UserError
from paddlemix.models.attention import SegmentLengths
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.sample import Row
from paddlemix.trainer.batches.dataloader import BatchLoader, Inputs, PositionCounts
from paddlemix.trainer.batches.device_copies import on_device
from tests.rows import NumberedRows, build_example
from tests.tiny import make_processor
from tests.tiny_world import World

SETTINGS = LoadingSettings(tokens_per_tile=4)


def dataset(world: World, tokenizer: Tokenizer, path: Path | None = None) -> SampleDataset:
    files = str(path or world.data / "train.json")
    processor = make_processor(tokenizer)
    settings = DataSettings(max_length=256, image_root=str(world.data))
    return SampleDataset([{"data_files": files}], lambda template: processor, settings)


def loader(data: RowDataset, settings: LoadingSettings = SETTINGS, **changes: Any) -> BatchLoader:
    values = {"batch_size": 2, "accumulation": 2, "seed": 7, **changes}
    return BatchLoader(data, EpochBatchSampler(len(data), **values), settings)


def assert_same(first: Inputs, second: Inputs) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, paddle.Tensor):
            assert value.dtype == second[key].dtype
            assert value.numpy().tobytes() == second[key].numpy().tobytes(), key
        else:
            assert value == second[key], key


def test_every_micro_batch_knows_the_tokens_of_its_whole_step(world: World, tokenizer: Tokenizer) -> None:
    data = dataset(world, tokenizer)
    batches = list(loader(data))
    assert len(batches) == len(loader(data)) == 6
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert first is not None and second is not None
        own = len(first["loss_index"]), len(second["loss_index"])
        assert first["num_supervised"] == second["num_supervised"] == sum(own)
    assert len({len(batch["loss_index"]) for batch in batches if batch}) > 1
    sources = [source for batch in batches if batch for source in batch["sources"]]
    assert sorted(sources) == sorted(data.sample(index).source for index in range(len(data)))


class Told:
    """The other processes, of whom there are none: notes what they would be told."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    def data_failed(self, error: Exception) -> None:
        self.errors.append(error)


def test_with_other_processes_the_next_steps_tokens_are_known_before_a_step_ends(
    world: World, tokenizer: Tokenizer
) -> None:
    data, told = dataset(world, tokenizer), Told()
    alone = [batch["num_supervised"] for batch in loader(data) if batch]
    batches = BatchLoader(data, EpochBatchSampler(len(data), 2, 2, 7), SETTINGS, told)
    for number, batch in enumerate(batches):
        assert batch is not None and batch["num_supervised"] == alone[number]
        ends = number % 2 == 1
        if ends:
            assert list(batches.upcoming) == alone[number + 1 : number + 2]
    assert not batches.upcoming and not told.errors


def test_other_processes_are_told_in_time_that_the_next_steps_data_failed(
    world: World, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data, told = dataset(world, tokenizer, with_a_cut_picture(world, tmp_path)), Told()
    batches = BatchLoader(data, EpochBatchSampler(len(data), 1, 2, 7), SETTINGS, told)
    seen = []
    with pytest.raises(UserError, match="record 8"):
        for _ in batches:
            seen.append(list(batches.upcoming))
    assert len(seen) % 2 == 0 and seen[-1] == [-1] and len(told.errors) == 1


@pytest.mark.parametrize("failing", [2, 3])  # the first and the second micro-batch of the second step
def test_other_processes_are_not_told_of_an_error_that_was_not_announced(
    monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """They are in the step already: an answer to what is told would never come."""
    copies = iter(range(8))

    def copy(arrays: dict[str, np.ndarray]) -> dict[str, paddle.Tensor]:
        if next(copies) == failing:
            raise MemoryError("no memory for a batch")
        return on_device(arrays)

    monkeypatch.setattr("paddlemix.trainer.batches.dataloader.on_device", copy)
    data, told = NumberedRows(np.array([3, 4, 5, 6, 7, 8])), Told()
    batches = BatchLoader(data, EpochBatchSampler(len(data), 1, 2, 7), SETTINGS, told)
    seen = 0
    with pytest.raises(MemoryError, match="for a batch"):
        for _ in batches:
            seen += 1
    assert seen == failing and not told.errors


def test_text_only_batches_have_no_picture_and_tokens_exclude_padding(world: World, tokenizer: Tokenizer) -> None:
    data = dataset(world, tokenizer)
    batches = [batch for batch in loader(data, batch_size=1, accumulation=1) if batch]
    assert {"pixel_values" in batch for batch in batches} == {True, False}
    assert not any("segment_ids" in batch for batch in batches)
    pair = next(batch for batch in loader(data, accumulation=1) if batch)
    lengths = [len(data[index].examples[0].input_ids) for index in next(iter(EpochBatchSampler(12, 2, 1, 7)))]
    assert lengths[0] != lengths[1]
    assert pair["num_tokens"] == sum(lengths)


def test_epochs_differ_and_repeat(world: World, tokenizer: Tokenizer) -> None:
    data = dataset(world, tokenizer)
    first, again = loader(data), loader(data)
    epochs = [[batch["sources"] for batch in first if batch] for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs == [[batch["sources"] for batch in again if batch] for _ in range(2)]


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 7])
def test_going_on_at_a_step_gives_the_rest(world: World, tokenizer: Tokenizer, step: int) -> None:
    """An epoch is three steps of two micro-batches."""
    data = dataset(world, tokenizer)
    undisturbed, resumed = loader(data), loader(data)
    wanted = [batch for _ in range(4) for batch in undisturbed]
    resumed.start_at(step)
    found = [batch for _ in range(4 - step // 3) for batch in resumed]
    skipped = step % 3 * 2
    assert found[:skipped] == [None] * skipped
    for one, other in zip(wanted[2 * step :], found[skipped:], strict=True):
        assert one is not None and other is not None
        assert_same(one, other)


def with_a_cut_picture(world: World, folder: Path) -> Path:
    """The training data with a picture in record 8 whose header is whole and whose pixels are not."""
    records = json.loads((world.data / "train.json").read_text(encoding="utf-8"))
    cut = folder / "cut.png"
    cut.write_bytes(world.picture.read_bytes()[:200])
    records[8]["image"] = str(cut)
    path = folder / "train.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_worker_processes_give_the_same_batches_and_errors(world: World, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = with_a_cut_picture(world, tmp_path)
    messages, batches = [], []
    for workers in (0, 2):
        data = dataset(world, tokenizer, path)
        found: list[Inputs] = []
        with pytest.raises(UserError) as caught:
            found.extend(
                batch
                for batch in loader(data, LoadingSettings(4, num_workers=workers), batch_size=1, accumulation=1)
                if batch
            )
        messages.append(str(caught.value))
        batches.append(found)
    assert messages[0] == messages[1]
    assert f"{path} record 8: image '{tmp_path / 'cut.png'}' is broken" in messages[0] and "\n" not in messages[0]
    assert len(batches[0]) == list(np.concatenate(list(EpochBatchSampler(12, 1, 1, 7)))).index(8)
    for one, other in zip(*batches, strict=True):
        assert_same(one, other)


def test_packed_rows_bring_their_segments(world: World, tokenizer: Tokenizer) -> None:
    data = dataset(world, tokenizer)
    lengths = np.array([data.measure(index)[0] for index in range(len(data))])
    packed = PackedDataset(data, pack_rows(lengths, 256, 0))
    sources = []
    for inputs in loader(packed, batch_size=1, accumulation=1):
        assert inputs is not None
        members = len(inputs["sources"])
        assert isinstance(inputs.get("segment_ids"), SegmentLengths if members > 1 else type(None))
        if members > 1:
            assert len(inputs["segment_ids"].lengths) == members
            assert sum(inputs["segment_ids"].lengths) == inputs["input_ids"].size
        sources += inputs["sources"]
    assert len(set(sources)) == 12


def test_what_is_left_out_travels_with_its_batch() -> None:
    found = list(loader(NumberedRows(np.array([3, 0, 4, 0])), batch_size=1, accumulation=2))
    assert sorted(skip.index for inputs in found if inputs for skip in inputs["skipped"]) == [1, 3]


def test_positions_are_counted_as_they_are_handed_out() -> None:
    class Images:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Row:
            return Row((build_example(5 + index, 1, index),))

    batches = loader(Images(), batch_size=2, accumulation=1)
    assert batches.counts == PositionCounts() and batches.counts.padding_share == 0
    visual = 0
    for inputs in batches:
        assert inputs is not None
        visual += int((inputs["merge_index"] >= inputs["input_ids"].size).sum())
    counts = batches.counts
    assert counts.tokens == 5 + 6 + 7 + 8 and counts.visual == visual > 0
    assert counts.positions >= 2 * (8 + 6)
    assert counts.padding_share == pytest.approx(1 - counts.tokens / counts.positions)
    assert counts.visual_share == pytest.approx(visual / counts.tokens)
    assert counts.since(PositionCounts(10, 8, 2)) == PositionCounts(counts.positions - 10, 18, visual - 2)
