"""A JSON file of somebody else: what is read, and one clear error for anything else."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from paddlemix import json_files
from paddlemix.errors import MissingFileError, UserError
from paddlemix.json_files import read_object


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"is not JSON \(line 1, column 2"),
        (b"", r"is not JSON \(line 1, column 1"),
        (b"[1]", r"must hold a JSON object, not \[1\] \(a list\)"),
        (b'{"a": "\xff"}', r"is not UTF-8 text \(byte 7\)"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 64"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested deeper than 64"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' occurs twice with different values"),
        (b'{"a": 1' + b"0" * 10_000 + b"}", "not JSON: Exceeds the limit"),
    ],
)
def test_what_is_no_declared_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_object(tmp_path / "config.json")
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_what_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": null, "b": 1, "b": 1, "c": ' + b"[" * 60 + b"]" * 60 + b"}")
    assert read_object(path).keys() == {"a", "b", "c"}
    with pytest.raises(MissingFileError, match="'.*none.json' does not exist"):
        read_object(tmp_path / "none.json")
    with pytest.raises(UserError, match="is a folder"):
        read_object(tmp_path)


def test_a_file_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long.json").write_text(json.dumps({"a": "b" * 5000}))
    with pytest.raises(UserError, match="is longer than 4,096 bytes"):
        read_object(tmp_path / "long.json", limit=4096)
    with pytest.raises(UserError, match="'/dev/zero' is longer than 4,096 bytes"):
        read_object(Path("/dev/zero"), limit=4096)
    os.mkfifo(tmp_path / "silent.json")
    monkeypatch.setattr(json_files, "_PIPE_SECONDS", 0.01)
    keeper = os.open(tmp_path / "silent.json", os.O_RDWR)  # a writer that never writes
    try:
        with pytest.raises(UserError, match="is a pipe, and nothing was written to it"):
            read_object(tmp_path / "silent.json")
    finally:
        os.close(keeper)


def test_a_pipe_is_read(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    thread = threading.Thread(target=lambda: (os.write(writer, b'{"a": 1}'), os.close(writer)))
    thread.start()
    try:
        assert read_object(Path(f"/dev/fd/{reader}")) == {"a": 1}
    finally:
        thread.join()
        os.close(reader)
