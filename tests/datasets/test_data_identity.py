"""What records and pictures hold, and what differs in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paddlemix.datasets import data_identity
from paddlemix.datasets.data_identity import (
    UNKNOWN,
    Pictures,
    describe_records,
    hashed,
    picture_blocks,
    record_digests,
    states_of,
)
from paddlemix.datasets.records.record_file import open_records

RECORDS = [{"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}]} for n in range(5)]


def test_record_digests_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*RECORDS, RECORDS[1]]))
    records = open_records(path)
    found = record_digests(records, "0" * 32)
    assert found[1] == found[5] and len(set(found.tolist())) == 5
    monkeypatch.setattr(type(records), "raw", None)  # not read again
    assert record_digests(records, "0" * 32).tolist() == found.tolist()
    monkeypatch.undo()
    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "cache"))
    kept = next((tmp_path / "cache" / "digests").glob("records-*.npy"))
    for damage in (b"", kept.read_bytes()[:-3], b"nothing"):
        kept.write_bytes(damage)
        assert record_digests(records, "0" * 32).tolist() == found.tolist()


def test_how_a_record_is_written_does_not_count(tmp_path: Path) -> None:
    found = []
    for number, text in enumerate(
        (json.dumps(RECORDS), json.dumps(RECORDS, indent=3), "\n".join(json.dumps(r, sort_keys=True) for r in RECORDS))
    ):
        (tmp_path / f"{number}.json").write_text(text)
        found.append(record_digests(open_records(tmp_path / f"{number}.json"), f"written {number}").tolist())
    assert found[0] == found[1] == found[2] and len(set(found[0])) == 5


def test_describe_records() -> None:
    then = np.array([1, 2, 3, 4, 5, 6, 7, 8], np.uint64)
    for now, said in (
        ([1, 2, 9, 4, 5, 6, 7, 8], "record 2 of t"),
        ([9, 2, 9, 4, 5, 6, 7, 9], "records 0, 2, 7 of t"),
        ([11, 12, 13, 14, 15, 16, 17, 8], "records 0, 1, 2, 3, 4 and 2 more of t"),
        ([1, 3, 2, 4, 5, 6, 7, 8], "t (the same records in another order from record 1 on)"),
        ([1, 2, 3], "t (it has 3 records instead of 8 and differs from record 3 on)"),
        ([2, 3, 4, 5, 6, 7, 8], "t (it has 7 records instead of 8 and differs from record 0 on)"),
        (then.tolist(), ""),
    ):
        assert describe_records("t", then, np.array(now, np.uint64)) == said
    assert describe_records("t", None, then) == "t"


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(tmp_path / name) for name in ("a", "b", "c")]
    for path in paths[:2]:
        Path(path).write_bytes(path[-1].encode())
    paths += ["", paths[0]]
    first = hashed(paths, states_of(paths, Pictures.unknown(5)))
    assert first.digests[0] == first.digests[4] != first.digests[1]
    assert (first.digests[2:4] == UNKNOWN).all() and (first.states[2:4] == UNKNOWN).all()
    monkeypatch.setattr(data_identity, "file_digests", lambda paths, *_: ["f" * 32] * len(paths))
    assert hashed(paths, states_of(paths, first)).digests.tolist() == first.digests.tolist()  # nothing is read again
    os.utime(paths[1], ns=(1, 1))
    again = hashed(paths, states_of(paths, first))
    assert again.digests[1] == 2**64 - 1 and again.digests[0] == first.digests[0]


def test_pictures_come_in_blocks() -> None:
    class ThreeEach(SimpleNamespace):
        def __len__(self) -> int:
            return 400

    data: Any = ThreeEach(image_files=lambda index: [f"{index}.{number}" for number in range(3)])
    blocks = list(picture_blocks(data))
    assert [len(block) for block in blocks] == [513, 513, 174]  # a stop is looked for between them
    assert sum(blocks, []) == [f"{index}.{number}" for index in range(400) for number in range(3)]


def test_parts() -> None:
    pictures = Pictures(np.arange(1, 5, dtype=np.uint64), np.arange(11, 15, dtype=np.uint64))
    assert pictures.part(1, 2).digests.tolist() == [2, 3]
    assert pictures.part(3, 3).states.tolist() == [14, 0, 0]
    assert pictures.part(9, 2).digests.tolist() == [0, 0]
    assert Pictures.joined([pictures.part(0, 1), pictures.part(3, 1)]).digests.tolist() == [1, 4]
    assert Pictures.joined([]).digests.dtype == np.uint64
