"""A file of answers after every kind of end: nothing lost, nothing doubled, nothing mixed."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from paddlemix.errors import UserError
from paddlemix.generation.answer_file import AnswerFile, beside, is_complete
from paddlemix.generation.answer_header import Asked

ASKED = Asked([0, 1], ["", ""], lambda places: [])
HEADER = {"model": "m", "temperature": 0.0, "stop": ("a",)}


def open_file(path: Path, numbers: range = range(4), **more: Any) -> AnswerFile:
    return AnswerFile(path, {**HEADER, **more.pop("header", {})}, numbers, **more)


def answer(number: int, **more: Any) -> dict[int, dict[str, Any]]:
    """A line as `predict` writes it."""
    line = {"question_id": number, "prompt": "?", "text": f"答 {number}\n\u2028", "answer_id": "a", "model_id": "m"}
    return {number: {**line, "metadata": {}, **more}}


def texts(path: Path) -> list[tuple[int, str | None]]:
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return [(line["question_id"], line.get("error")) for line in lines]


def test_answers_come_out_in_order(tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.jsonl"
    file = open_file(out)
    assert file.missing == [0, 1, 2, 3]
    for number in (2, 0, 3, 1):
        file.add(answer(number))
    assert not out.exists()
    file.finish()
    assert texts(out) == [(number, None) for number in range(4)]
    assert json.loads(out.read_text().split("\n")[2])["text"] == "答 2\n\u2028"
    assert sorted(path.name for path in out.parent.iterdir()) == ["a.jsonl", "a.jsonl.run.json"]
    assert is_complete(out, HEADER) and not is_complete(out, {**HEADER, "model": "n"})


@pytest.mark.parametrize("torn", [b"", b"1", b"1\t", b'1\t{"question_id": 1, "te', b'1\t{"question_id": 1}'])
def test_a_half_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    out = tmp_path / "a.jsonl"
    file = open_file(out, range(10, 13))
    file.add({**answer(12), **answer(10)})
    del file  # as a killed process would leave it
    with open(beside(out, "partial"), "ab") as partial:
        partial.write(torn)
    file = open_file(out, range(10, 13))
    assert file.missing == [11]
    with pytest.raises(UserError, match="1 questions of .* have no answer yet"):
        file.finish()
    file.add(answer(11))
    file.finish()
    assert texts(out) == [(10, None), (11, None), (12, None)]


def test_errors_are_lines_and_are_asked_again(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    file = open_file(out, range(3))
    file.add({**answer(0), **answer(1, error="no image"), **answer(2)})
    assert file.num_failed == 1
    file.finish()
    assert texts(out)[1] == (1, "no image")
    file = open_file(out, range(3))
    assert file.missing == [1]
    del file  # killed: the complete file of before is still there
    assert texts(out)[1] == (1, "no image")
    file = open_file(out, range(3))
    file.add(answer(1))
    assert file.num_failed == 0
    file.finish()
    assert texts(out) == [(0, None), (1, None), (2, None)]


def test_a_complete_file_has_nothing_missing(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    file = open_file(out, range(1))
    file.add(answer(0))
    file.finish()
    before = out.read_bytes()
    file = open_file(out, range(1))
    assert file.missing == []
    file.finish()
    assert out.read_bytes() == before


def test_killed_between_the_file_and_the_end_of_the_partial_one(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    file = open_file(out, range(1))
    file.add(answer(0))
    partial = beside(out, "partial").read_bytes()
    file.finish()
    beside(out, "partial").write_bytes(partial)
    assert not is_complete(out, HEADER)
    file = open_file(out, range(1))
    file.finish()
    assert texts(out) == [(0, None)] and is_complete(out, HEADER)


def test_other_arguments_are_refused_with_their_names(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    open_file(out).add(answer(0))
    with pytest.raises(UserError, match=r'model "m" \(now "n"\); temperature 0.0 \(now 0.5\).*--overwrite'):
        open_file(out, header={"model": "n", "temperature": 0.5})
    with pytest.raises(UserError, match=r"seed null \(now 1\)"):
        open_file(out, header={"seed": 1})
    assert open_file(out).missing == [1, 2, 3]
    assert open_file(out, header={"model": "n"}, overwrite=True).missing == [0, 1, 2, 3]


def test_a_file_of_somebody_else_stays(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("mine\n")
    for _ in range(2):
        with pytest.raises(UserError, match="exists and was not written by this command"):
            open_file(out)
    assert out.read_text() == "mine\n" and [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    file = open_file(out, range(1), overwrite=True)
    file.add(answer(0))
    file.finish()
    assert texts(out) == [(0, None)]


def test_a_start_that_was_killed_while_it_wrote_its_header(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    beside(out, "run.json").write_text('{"mod')
    assert open_file(out).missing == [0, 1, 2, 3]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    file = open_file(out)
    with pytest.raises(UserError, match="another process writes .*a.jsonl; wait for it"):
        open_file(out)
    del file
    open_file(out)


def test_damage_is_not_passed_over(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    open_file(out).add(answer(0))
    partial = beside(out, "partial")
    for damage in (b"x\t{}\n", b"7\t{}\n", b"1\t{\n", b"1\t3\n", b"1\t" + b"[" * 100_000 + b"\n"):
        whole = partial.read_bytes()
        partial.write_bytes(damage + whole)
        with pytest.raises(UserError, match="partial is damaged at byte 0"):
            open_file(out)
        partial.write_bytes(whole)


@pytest.mark.parametrize("call", ["write", "fsync", "open", "replace"])
@pytest.mark.parametrize("state", ["new", "overwritten", "begun", "complete"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, call: str
) -> None:
    """Any call of a kind may be the first that fails, until none is left: no empty or half file stays."""
    out = tmp_path / "folder" / "a.jsonl"
    if state != "new":
        open_file(out, range(2), asked=ASKED).add(answer(0))
    if state in ("overwritten", "complete"):
        file = open_file(out, range(2), asked=ASKED)
        file.add(answer(1))
        file.finish()
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    original, calls = getattr(os, call), 0
    for fails in range(20):

        def full(*given: Any, limit: int = fails, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*given, **named)

        calls, overwrite = 0, state == "overwritten"
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                file = open_file(out, range(2), asked=ASKED, overwrite=overwrite)
                break
            except UserError as error:
                assert re.search("cannot (write|be written).*: No space left on device", str(error).replace("\n", " "))
        after = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert after == before or (overwrite and not after)
    assert 0 < fails < 20 or call in ("write", "fsync", "replace")
    assert file.missing == {"new": [0, 1], "overwritten": [0, 1], "begun": [1], "complete": []}[state]


def test_an_answer_that_cannot_be_kept_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.jsonl"
    write = os.write

    def half(descriptor: int, data: Any) -> int:
        if len(data) > 10:
            return write(descriptor, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = open_file(out, range(2))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot write .*a.jsonl': No space left"):
        patch.setattr(os, "write", half)
        file.add(answer(0))
    assert beside(out, "partial").read_bytes() == b""
    file.abandon()
    assert not list(tmp_path.iterdir())
    file = open_file(out, range(2))
    file.add(answer(1))
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(os, "write", half)
        file.add(answer(0))
    file.abandon()
    assert open_file(out, range(2)).missing == [0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write .*a.jsonl.*: Permission denied"):
        open_file(tmp_path / "a.jsonl")


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*a.jsonl"):
        open_file(tmp_path / "file" / "a.jsonl")


def test_earlier_lines_of_all_questions(tmp_path: Path) -> None:
    lines = [json.dumps(line).encode() for line in (answer(5)[5], answer(6, error="x")[6])]
    file = open_file(tmp_path / "a.jsonl", range(5, 7), earlier=lines)
    assert file.missing == [6]


@pytest.mark.parametrize(
    "damage",
    [
        *({key: None} for key in ("question_id", "prompt", "text", "answer_id", "model_id", "metadata")),
        *({"text": 3}, {"metadata": []}, {"error": {}}, {"reference": 1}, {"question_id": 12}),
    ],
)
def test_a_line_that_is_none_of_ours_is_asked_again(
    tmp_path: Path, damage: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A key that is gone, one of another kind, the line of another question; `None` takes the key out."""
    out = tmp_path / "a.jsonl"
    asked = Asked([10, 11, 12], [""] * 3, lambda places: [])
    file = open_file(out, range(10, 13), asked=asked)
    file.add({**answer(10), **answer(11), **answer(12)})
    file.finish()
    whole = out.read_bytes().split(b"\n")
    line = {key: value for key, value in {**answer(11)[11], **damage}.items() if value is not None}
    out.write_bytes(b"\n".join([whole[0], json.dumps(line).encode(), *whole[2:]]))
    with caplog.at_level("WARNING", logger="paddlemix"):
        file = open_file(out, range(10, 13), asked=asked)
    assert file.missing == [11, 12] and "damaged after line 1 of 3" in caplog.text
    file.add({**answer(11), **answer(12)})
    file.finish()
    assert out.read_bytes().split(b"\n") == whole


def test_a_picture_that_was_away_for_a_while_is_still_told_from_another(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"

    def asked(digest: str) -> Asked:
        return Asked([0, 1], [digest, ""], lambda places: [f"{place}.png" for place in places])

    open_file(out, range(2), asked=asked("first")).add(answer(0))
    open_file(out, range(2), asked=asked("")).add(answer(1))  # the disk with the pictures is not there
    with pytest.raises(UserError, match="about pictures that were replaced since: 0.png"):
        open_file(out, range(2), asked=asked("other"))
    open_file(out, range(2), asked=asked("first")).finish()


def test_a_line_that_was_taken_out_moves_no_other(tmp_path: Path) -> None:
    out, asked = tmp_path / "a.jsonl", Asked([0, 1, 2], [""] * 3, lambda places: [])
    file = open_file(out, range(3), asked=asked)
    file.add({**answer(0), **answer(1), **answer(2)})
    file.finish()
    whole = out.read_bytes().split(b"\n")
    out.write_bytes(b"\n".join([whole[0], *whole[2:]]))
    assert open_file(out, range(3), asked=asked).missing == [1, 2]
