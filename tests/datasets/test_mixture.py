"""Entries -> rows: which records, read how, and what is left out."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.datasets.data_settings import DataSettings
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.errors import MissingFileError, UserError
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.text.tokenizer import Tokenizer
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
    dataset = SampleDataset(entries, processor_for, DataSettings(image_root=str(tmp_path)))
    dataset.check()
    assert len(dataset) == 4
    examples = [example for index in range(4) for example in dataset[index].examples]
    assert [example.source.rpartition("/")[2] for example in examples] == [
        *["1.json record 0", "2.json record 0", "2.json record 1", "3.json record 0"]
    ]
    assert [len(example.pixel_values) for example in examples] == [1, 1, 1, 0]
    np.testing.assert_array_equal(examples[1].pixel_values, examples[2].pixel_values)
    assert (examples[0].pixel_values != examples[1].pixel_values).any()  # another image_root
    plain = processor_for("plain").encode_text(dataset.sample(0).messages, [(30, 40)])
    np.testing.assert_array_equal(examples[0].input_ids, plain.input_ids)


def test_max_length_reaches_the_processor(tmp_path: Path, processor_for: Any) -> None:
    entry = {"data_files": write(tmp_path / "1.json", ["Q", "A"])}
    dataset = SampleDataset([entry], processor_for, DataSettings(max_length=3))
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
    dataset = SampleDataset([{"data_files": path}], processor_for, DataSettings(image_root=str(tmp_path)))
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
    with pytest.raises(UserError, match="1.json record 0: template 'plain' needs one image"):
        look(SampleDataset([entry], processor_for))


def skipping(**settings: Any) -> DataSettings:
    return DataSettings(on_bad_sample="skip", max_bad_fraction=0.5, **settings)


def test_bad_records_are_left_out(tmp_path: Path, processor_for: Any) -> None:
    path = write(tmp_path / "1.json", ["Q", "one"], ["Q", ""], ["Q", "three"])
    dataset = SampleDataset([{"data_files": path}], processor_for, skipping())
    assert [dataset.sample(index).source.rpartition(" ")[2] for index in range(len(dataset))] == ["0", "2"]
    [(source, reason)] = dataset.unreadable
    assert source.endswith("1.json record 1") and "the answer is empty" in reason
    dataset.check()


def test_too_many_bad_records(tmp_path: Path, processor_for: Any) -> None:
    path = write(tmp_path / "1.json", ["Q", ""], ["Q", ""], ["Q", "three"])
    with pytest.raises(UserError, match="2 of 3 samples cannot be used, max_bad_fraction 0.5 allows 1"):
        SampleDataset([{"data_files": path}], processor_for, skipping())


def test_bad_records_outside_the_split_do_not_count(tmp_path: Path, processor_for: Any) -> None:
    path = write(tmp_path / "1.json", ["Q", ""], ["Q", "two"], ["Q", "three"])
    dataset = SampleDataset([{"data_files": path, "split": "[1:]"}], processor_for, skipping())
    assert len(dataset) == 2 and not dataset.unreadable


def test_a_bad_image_is_left_out_when_its_turn_comes(tmp_path: Path, processor_for: Any) -> None:
    path = write(tmp_path / "1.json", ["<image>", "A"], image="a.png")
    dataset = SampleDataset([{"data_files": path}], processor_for, skipping(image_root=str(tmp_path)))
    row = dataset[0]
    assert row.examples == () and row.skipped[0].index == 0 and not row.skipped[0].too_long
    assert "1.json record 0: image" in row.skipped[0].reason
    assert dataset.measure(0) == (0, 0)
    with pytest.raises(UserError, match="1 of 1 samples cannot be used"):
        dataset.check()


@pytest.mark.parametrize("policy", ["truncate_turns", "skip", "error"])
def test_too_long(tmp_path: Path, processor_for: Any, policy: str) -> None:
    path = tmp_path / "1.json"
    path.write_text(json.dumps([{"conversations": [["How many?", "It is red."], ["How many?", "It is red."]]}]))
    whole = SampleDataset([{"data_files": str(path)}], processor_for).measure(0)[0]
    settings = DataSettings(max_length=whole - 1, on_too_long=policy)
    dataset = SampleDataset([{"data_files": str(path)}], processor_for, settings)
    if policy == "error":
        with pytest.raises(UserError, match="1.json record 0"):
            dataset[0]
        return
    row = dataset[0]
    if policy == "skip":
        assert not row.examples and row.skipped[0].too_long
        assert dataset.measure(0) == (0, 0)
    else:
        assert len(row.examples[0].input_ids) == dataset.measure(0)[0] < whole


def test_measured_is_encoded(tmp_path: Path, processor_for: Any) -> None:
    noise_picture(30, 40, seed=1).save(tmp_path / "a.png")
    entries = [
        {"data_files": write(tmp_path / "1.json", ["<image>\nQ", "red"], image="a.png")},
        {"data_files": write(tmp_path / "2.json", ["How many?", "two"])},
    ]
    dataset = SampleDataset(entries, processor_for, DataSettings(image_root=str(tmp_path)))
    for index in range(2):
        [example] = dataset[index].examples
        assert dataset.measure(index) == (len(example.input_ids), len(example.image_index))
    assert dataset.words.tolist()[0] > 0 > dataset.words.tolist()[1]


def test_fingerprint(tmp_path: Path, processor_for: Any) -> None:
    path = write(tmp_path / "1.json", ["Q", "one"], ["Q", "two"])

    def mark(settings: DataSettings | None = None, **entry: Any) -> str:
        return SampleDataset([{"data_files": path, **entry}], processor_for, settings).fingerprint

    marks = [mark(), mark(DataSettings(max_length=9)), mark(split="[:1]"), mark(chat_template="mpt")]
    assert len(set(marks)) == 4
    assert mark() == marks[0]
    write(tmp_path / "1.json", ["Q", "one"], ["Q", "another"])
    assert mark() != marks[0]


def test_a_data_set_goes_to_another_process(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "1.json", ["Q", "one"], ["Q", "two"])
    processor = make_processor(tokenizer, template="vicuna_v1")
    dataset = SampleDataset([{"data_files": path}], lambda name: processor)
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy[1].examples[0].input_ids, dataset[1].examples[0].input_ids)
