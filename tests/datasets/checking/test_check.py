"""Every record looked at: what is found, how it is counted, and that processes find the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.datasets.checking.check import CheckReport, check_files
from paddlemix.datasets.checking.good_records import check_fix_target, write_good_records
from paddlemix.datasets.checking.problem_kinds import group_problems, kind_of
from paddlemix.datasets.checking.record_checker import CheckSettings, DataFile, form_of
from paddlemix.errors import MissingFileError, UserError
from paddlemix.processors.text.tokenizer import Tokenizer
from tests.tiny import ANYRES_SPEC, make_processor, noise_picture

SHORT, LONG = [["<image>\nWhat?", "A cat."]], [["<image>\nWhat?", "A cat."], ["And?", "A dog. " * 30]]


def picture_record(number: int, **changes: Any) -> dict[str, Any]:
    return {"id": number, "image": f"{number % 3}.png", "conversations": SHORT, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures; `good.json` with 5 records and `mixed.jsonl` with 8, of which 5 are bad."""
    for number in range(3):
        noise_picture(30 + number, 20, number).save(tmp_path / f"{number}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:-300])
    (tmp_path / "good.json").write_text(json.dumps([picture_record(number) for number in range(5)]))
    mixed = [
        picture_record(10),
        picture_record(11, image="nowhere.png"),
        picture_record(12, image="away.png"),
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        picture_record(13, image="cut.png"),
        {"conversations": [["Q", ""]]},
        {"conversation": []},
        picture_record(10),
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    return tmp_path


def check(folder: Path, *names: str, **settings: Any) -> CheckReport:
    files = [DataFile(path=str(folder / name), image_root=str(folder)) for name in names]
    return check_files(files, CheckSettings(**settings))


def test_good_records(folder: Path) -> None:
    report = check(folder, "good.json")
    assert (report.records, report.num_bad, report.problems, report.is_clean) == (5, 0, [], True)
    assert report.forms == {"pairs": 5}
    assert report.duplicates == []


def test_each_bad_record_is_found_once_and_named(folder: Path) -> None:
    report = check(folder, "good.json", "mixed.jsonl")
    path = str(folder / "mixed.jsonl")
    assert (report.records, report.num_bad, report.bad[1]) == (13, 5, {1, 2, 4, 5, 6})
    assert report.forms == {"pairs": 10, "messages": 1}  # what can be read, its images apart
    assert report.duplicates == [(f"{path} record 7", f"{path} record 0")]
    assert sum(problem.count for problem in report.problems) == 5
    missing = report.problems[0]
    assert missing.kind == "image '...' does not exist"
    assert [source for source, _ in missing.records] == [f"{path} record 1", f"{path} record 2"]
    assert "nowhere.png" in missing.records[0][1] and "away.png" in missing.records[1][1]
    messages = " | ".join(message for problem in report.problems for _, message in problem.records)
    for part in ("cut.png' is broken", "the answer is empty", "conversation"):
        assert part in messages
    assert path not in messages


def test_processes_find_the_same(folder: Path) -> None:
    records = [json.loads(line) for line in (folder / "mixed.jsonl").read_text().splitlines()] * 20
    (folder / "many.json").write_text(json.dumps(records))
    alone, steps = check(folder, "many.json"), []
    files = [DataFile(path=str(folder / "many.json"), image_root=str(folder))]
    together = check_files(files, CheckSettings(workers=2), lambda done, total: steps.append((done, total)))
    assert (together.records, together.bad, together.forms) == (alone.records, alone.bad, alone.forms)
    assert together.problems == alone.problems
    assert together.duplicates == alone.duplicates
    assert steps == [(64, 160), (128, 160), (160, 160)]


def test_an_image_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paddlemix.datasets.checking import record_checker

    opened: list[str] = []
    load = record_checker.load_image

    def note(path: str, *rest: Any) -> Any:
        opened.append(path)
        return load(path, *rest)

    monkeypatch.setattr(record_checker, "load_image", note)
    check(folder, "good.json")
    check(folder, "good.json")
    assert sorted(opened) == [str(folder / f"{number}.png") for number in range(3)]


def test_images_can_be_left_alone(folder: Path) -> None:
    report = check(folder, "mixed.jsonl", open_images=False)
    assert report.bad[0] == {5, 6}


def test_only_the_first_records(folder: Path) -> None:
    report = check(folder, "good.json", "mixed.jsonl", limit=3)
    assert (report.records, report.num_bad) == (6, 2)


@pytest.mark.parametrize("open_images", [True, False])
@pytest.mark.parametrize("anyres", [True, False])
def test_lengths_are_those_of_the_processor(
    folder: Path, tokenizer: Tokenizer, anyres: bool, open_images: bool
) -> None:
    processor = make_processor(tokenizer, ANYRES_SPEC) if anyres else make_processor(tokenizer)
    files = [DataFile(path=str(folder / "good.json"), image_root=str(folder), processor=processor)]
    report = check_files(files, CheckSettings(open_images=open_images))
    if anyres and not open_images:
        assert len(report.lengths) == 0
        return
    assert report.lengths.shape == (5, 2)
    assert (report.lengths[:, 1] > (4 if anyres else 3)).all()
    assert (report.lengths[:, 0] > report.lengths[:, 1] + 20).all()


@pytest.mark.parametrize(
    ("policy", "bad", "too_long", "skipped", "measured"),
    [("truncate_turns", 0, 1, 0, 2), ("skip", 0, 1, 1, 1), ("error", 1, 0, 0, 1)],
)
def test_too_long(
    folder: Path, tokenizer: Tokenizer, policy: str, bad: int, too_long: int, skipped: int, measured: int
) -> None:
    processor = make_processor(tokenizer)
    (folder / "long.json").write_text(json.dumps([picture_record(0), picture_record(1, conversations=LONG)]))
    files = [DataFile(path=str(folder / "long.json"), image_root=str(folder), processor=processor)]
    whole = check_files(files, CheckSettings()).lengths
    limit = int(whole[0, 0])
    report = check_files(files, CheckSettings(max_length=limit, on_too_long=policy))
    assert (report.num_bad, report.too_long, report.skipped, len(report.lengths)) == (bad, too_long, skipped, measured)
    assert (report.lengths[:, 0] <= limit).all()


def test_a_first_pair_that_is_too_long_is_bad(folder: Path, tokenizer: Tokenizer) -> None:
    files = [
        DataFile(path=str(folder / "good.json"), image_root=str(folder), processor=make_processor(tokenizer)),
    ]
    report = check_files(files, CheckSettings(max_length=8))
    assert (report.num_bad, report.too_long, len(report.problems)) == (5, 0, 1)
    assert "max_length is N" in report.problems[0].kind


def test_a_template_that_cannot_write_a_record(folder: Path, tokenizer: Tokenizer) -> None:
    processor = make_processor(tokenizer, template="plain")
    (folder / "two.json").write_text(json.dumps([picture_record(0, conversations=LONG)]))
    files = [DataFile(path=str(folder / "two.json"), image_root=str(folder), processor=processor)]
    report = check_files(files, CheckSettings())
    assert report.problems[0].records[0][1].startswith("template 'plain' needs one image")


def test_a_file_that_is_no_data_does_not_hide_the_others(folder: Path) -> None:
    (folder / "broken.json").write_text("[{]")
    report = check(folder, "broken.json", "good.json")
    assert (report.records, report.num_bad, report.unreadable, report.is_clean) == (5, 0, 1, False)
    assert report.problems[0].records[0][0] == str(folder / "broken.json")
    with pytest.raises(UserError, match="cannot be read at all"):
        write_good_records(report, folder / "fixed.json")
    assert not (folder / "fixed.json").exists()


def test_no_file_can_be_read(folder: Path) -> None:
    (folder / "broken.json").write_text("[{]")
    report = check(folder, "broken.json")
    assert (report.records, report.unreadable, report.duplicates) == (0, 1, [])
    assert report.problems[0].records[0][0] == str(folder / "broken.json")


def test_a_file_that_is_missing(folder: Path) -> None:
    with pytest.raises(MissingFileError, match="none.json"):
        check(folder, "none.json")


@pytest.mark.parametrize("name", ["fixed.json", "fixed.jsonl"])
def test_good_records_are_written_unchanged(folder: Path, name: str) -> None:
    odd = {"id": "\ud800", "extra": [1e22, None, "是"], "conversations": [["Q", "A"]]}
    plain = {"id": "é", "conversations": [["问", "A"]]}
    with (folder / "mixed.jsonl").open("a") as file:
        file.write("\n" + json.dumps(odd) + "\n" + json.dumps(plain) + "\n")
    report = check(folder, "good.json", "mixed.jsonl")
    assert write_good_records(report, folder / name) == 10
    text = (folder / name).read_text(encoding="utf-8")
    assert '"问"' in text and r"\ud800" in text  # as it is, where UTF-8 can write it
    written = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    before = json.loads((folder / "good.json").read_text())
    before += [json.loads(line) for line in (folder / "mixed.jsonl").read_text().splitlines()]
    assert written == [record for number, record in enumerate(before) if number - 5 not in report.bad[1]]
    again = check(folder, name)
    assert again.is_clean


@pytest.mark.parametrize(
    ("target", "second", "message"),
    [
        ("good.json", {}, "is one of the files"),
        ("nowhere/out.json", {}, "does not exist"),
        ("out.json", {"image_root": "other"}, "differ in image_root"),
        ("out.json", {"form": "coco_vqa"}, "differ in name"),
        ("out.json", {"path": "good.json"}, "two ways"),
    ],
)
def test_what_cannot_be_fixed_in_one_file(folder: Path, target: str, second: dict[str, Any], message: str) -> None:
    files = [DataFile(path=str(folder / "good.json")), DataFile(path=str(folder / "mixed.jsonl"))]
    if "path" in second:
        files.append(files[0])
    elif second:
        files.append(DataFile(path="x.json", **second))
    with pytest.raises(UserError, match=message):
        check_fix_target(folder / target, files)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("image 'a/1.png' does not exist (looked from /x)", "image 'b.png' does not exist"),
        ("3 <image> in the questions but 2 in 'image'", "13 <image> in the questions but 0 in 'image'"),
        ("turn 3: the answer is empty", "turn 11: the answer is empty"),
        ("no key 'conversations' (keys: a); did you mean 'b'?", "no key 'conversations' (keys: c, d)"),
        ('pair 1 is ["q"], expected texts', "pair 2 is [[1], 2], expected texts"),
        ("take 1,234 tokens, max_length is 20", "take 30 tokens, max_length is 20"),
    ],
)
def test_messages_of_one_kind(first: str, second: str) -> None:
    assert kind_of(first) == kind_of(second)
    assert len(group_problems([("a", first), ("b", second), ("c", "another thing")])) == 2


@pytest.mark.parametrize(
    ("record", "form", "expected"),
    [
        ({"conversations": [["q", "a"]]}, None, "pairs"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "chatml_dataset", "from/value"),
        ({"conversations": [{"role": "user", "content": "q"}]}, None, "role/content"),
        ({"messages": []}, None, "messages"),
        ({"query": "q", "response": "a"}, None, "query"),
        ({"image": "a", "caption": "b"}, "coco_caption", "coco_caption"),
    ],
)
def test_names_of_forms(record: dict[str, Any], form: str | None, expected: str) -> None:
    assert form_of(record, form) == expected


def test_duplicates_of_unreadable_records_are_none(folder: Path) -> None:
    (folder / "lines.jsonl").write_text('{"a\n{"a\n' + json.dumps(picture_record(1)))
    report = check(folder, "lines.jsonl")
    assert (report.num_bad, report.duplicates) == (2, [])
    (problem,) = report.problems  # the record is named once, and its line
    assert problem.kind.startswith("line N: not JSON: ")
    assert [source for source, _ in problem.records] == [f"{folder}/lines.jsonl record {number}" for number in (0, 1)]
    assert [message.split(":")[0] for _, message in problem.records] == ["line 1", "line 2"]
    assert np.array_equal(report.lengths, np.zeros((0, 2)))
