"""The unpickler alone: what it builds, and what it refuses to build."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.files.pickled_tensors import FileRange, NumpyArray
from paddlemix.checkpoints.files.unpickler import RestrictedUnpickler
from paddlemix.errors import UserError


def unpickled(content: bytes) -> Any:
    return RestrictedUnpickler(io.BytesIO(content), Path("x.bin"), {}, mapped=False).load()


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_plain_values_and_dicts_are_built() -> None:
    value = {"a": [1, 2.5, None], "b": {"c": (True, "text", b"bytes")}}
    for protocol in range(6):
        assert unpickled(pickle.dumps(value, protocol)) == value


def test_any_other_name_is_an_error_that_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"'x.bin' wants to use builtins.print, which no weight file needs"):
        unpickled(pickle.dumps({"a": Runs()}))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("value", "message"),
    [({3: 1}, "not a text but a int"), ({("a",): 1}, "not a text but a tuple"), ({1, 2}, "a set")],
)
def test_keys_are_texts_and_there_are_no_sets(value: Any, message: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=message):
        unpickled(pickle.dumps(value, 4))


def test_more_bytes_than_the_file_has_are_not_allocated() -> None:
    with pytest.raises(EOFError):
        unpickled(b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"abc.")


@pytest.mark.parametrize(("count", "kept"), [(16, bytes), (4096, FileRange)])
def test_large_contents_stay_in_the_file(tmp_path: Path, count: int, kept: type) -> None:
    path, array = tmp_path / "x.pdparams", np.arange(count, dtype="float32")
    path.write_bytes(pickle.dumps({"a": array}, 2 if count < 100 else 3))
    with open(path, "rb") as file:
        found = RestrictedUnpickler(file, path, {}, mapped=True).load()["a"]
    assert isinstance(found, NumpyArray) and isinstance(found.state[4], kept)
    np.testing.assert_array_equal(found.entry().read(), array)
