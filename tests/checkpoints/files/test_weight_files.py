"""Weight files tensor by tensor, and what a damaged file, a full disk or an exception leaves behind."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.files import directories, pickles, weight_files
from paddlemix.checkpoints.files import header as headers
from paddlemix.checkpoints.files.directories import atomic_directory, remove_directory
from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import (
    INDEX_FILE,
    NUMPY_TYPES,
    SINGLE_FILE,
    read_json,
    read_safetensors,
    read_weight_file,
    read_weights,
    write_json,
    write_safetensors,
    write_weights,
)
from paddlemix.errors import MissingFileError, UserError


def arrays(count: int = 5) -> dict[str, np.ndarray]:
    """Matrices of 24 bytes each."""
    return {f"layer.{number}": np.full((2, 3), number, dtype="float32") for number in range(count)}


def entries(values: dict[str, np.ndarray]) -> dict[str, weight_files.TensorEntry]:
    return {name: array_entry(value) for name, value in values.items()}


def contents(directory: Path) -> dict[str, str]:
    """Relative path -> text of every file below a directory, hidden ones too."""
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
@pytest.mark.parametrize("shape", [(), (0, 4), (5,), (2, 3, 4)])
def test_every_dtype_and_shape_survives_bit_for_bit(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    kind = np.dtype(NUMPY_TYPES[dtype])
    count = int(np.prod(shape))
    raw = np.random.RandomState(0).bytes(count * kind.itemsize)
    array = np.frombuffer(raw, dtype=kind).reshape(shape) if dtype != "BOOL" else np.ones(shape, dtype=bool)
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"odd": array_entry(np.ones(3, dtype="int8")), "x": array_entry(array, dtype)}, {"a": "b"})
    found = read_safetensors(path)["x"]
    assert (found.dtype, found.shape, found.num_bytes) == (dtype, shape, array.nbytes)
    assert found.read().dtype == kind
    assert found.read().tobytes() == array.tobytes()


def test_bfloat16_is_uint16_with_its_name(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w", {"x": array_entry(np.array([0x3F80], dtype="uint16"))})  # 1.0
    assert read_safetensors(tmp_path / "w")["x"].dtype == "BF16"


def test_a_transposed_view_is_written_in_its_own_order(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype="float32").reshape(2, 3)
    write_safetensors(tmp_path / "w", {"x": array_entry(matrix.T)})
    np.testing.assert_array_equal(read_safetensors(tmp_path / "w")["x"].read(), matrix.T)


def test_the_file_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy", reason="the safetensors library is not installed")
    write_safetensors(tmp_path / "w", entries(arrays()), {"format": "paddlemix"})
    found = library.load_file(tmp_path / "w")
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(("limit", "shards"), [(1, 5), (48, 3), (71, 3), (72, 2), (120, 1), (10**9, 1)])
def test_shards_hold_at_most_the_limit_and_the_index_finds_all(tmp_path: Path, limit: int, shards: int) -> None:
    write_weights(tmp_path, entries(arrays()), limit)
    names = sorted(path.name for path in tmp_path.iterdir())
    if shards == 1:
        assert names == [SINGLE_FILE]
    else:
        expected = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
        assert names == [*expected, INDEX_FILE]
        assert read_json(tmp_path / INDEX_FILE)["metadata"] == {"total_size": 120}
    found = read_weights(tmp_path)
    assert list(found) == list(arrays())
    for name, array in arrays().items():
        np.testing.assert_array_equal(found[name].read(), array)


@pytest.mark.parametrize("kept", [0, 5, 8, 40, -1])
def test_a_file_that_is_cut_short_says_so(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, entries(arrays()))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="w.safetensors' .*cut short.*copy it again"):
        read_safetensors(path)


def written_header(path: Path, header: bytes, payload: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + payload)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"{broken",
        b"\xff\xfe",
        b"[]",
        b'"text"',
        b'{"x": 3}',
        b'{"x": {"shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}',
        b'{"x": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',  # 8 bytes wanted, 4 declared
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
    ],
)
def test_a_damaged_header_says_so(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(UserError, match="damaged safetensors header.*copy it again"):
        read_safetensors(written_header(tmp_path / "w", header, b"\0" * 8))


def item(begin: int, end: int, shape: str = "[1]", dtype: str = '"F32"') -> bytes:
    return f'{{"dtype": {dtype}, "shape": {shape}, "data_offsets": [{begin}, {end}]}}'.encode()


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b'{"x": %s, "y": %s}' % (item(0, 4), item(0, 4)), "bytes 0 to 4 of 'y' overlap another tensor's"),
        (b'{"x": %s, "y": %s}' % (item(0, 8, "[2]"), item(4, 8)), "bytes 4 to 8 of 'y' overlap"),
        (b'{"x": %s}' % item(4, 8), "bytes 4 to 8 of 'x' follow bytes of no tensor"),
        (b'{"x": %s}' % item(0, 4), "4 bytes after the last tensor belong to none"),
        (b'{"x": %s, "x": %s}' % (item(0, 4), item(4, 8)), "the key 'x' occurs twice with different values"),
        (b'{"x": %s}' % item(0, 8, "[2.0]"), "'x' has no dtype or no shape"),
        (b'{"x": %s}' % item(0, 8, "[true, 2]"), "'x' has no dtype or no shape"),
        (b'{"x": %s}' % item(0, 8, "[-1, -2]"), "'x' has no dtype or no shape"),
        (b'{"x": %s}' % item(0, 8, '["2"]'), "'x' has no dtype or no shape"),
        (b'{"x": %s}' % item(0, 8, "{}"), "'x' has no dtype or no shape"),
        (b'{"x": %s}' % item(0, 8, str([1] * 200)), "'x' has no dtype or no shape"),
        (b'{"x": %s}' % item(0, 8, "[2]", "32"), "'x' has no dtype or no shape"),
        (b'{"x": %s}' % item(0, 0, "[4294967296, 4294967296]"), "bytes 0 to 0 for F32"),  # 2 ** 64 wraps to 0
        (b'{"x": %s}' % item(0, 0, "[0, 1%s]" % ("0" * 400)), "'x' has no dtype or no shape"),
        (b'{"\\ud800": %s}' % item(0, 8, "[2]"), "surrogates not allowed"),
        (b'{"x": %s}' % b'{"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8]}', "are not two whole numbers"),
        (b'{"__metadata__": {"a": 3}, "x": %s}' % item(0, 8, "[2]"), "its __metadata__ is not an object of texts"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper"),
        (b'{"x": ' + b'{"x": ' * 100 + b"1" + b"}" * 101, "nested deeper"),
        (b'{"x": 1' + b"0" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_header_that_breaks_the_format_says_how(tmp_path: Path, header: bytes, problem: str) -> None:
    """A tensor that overlaps another, or has no bytes of its own, would have wrong numbers without a word."""
    with pytest.raises(UserError, match=f"damaged safetensors header .*{problem}.*copy it again") as caught:
        read_safetensors(written_header(tmp_path / "w", header, b"\0" * 8))
    assert len(str(caught.value)) < 600


def test_a_header_of_a_million_empty_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "_MAX_TENSORS", 1000)
    for count in (1000, 1001):
        text = ",".join(f'"{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(count))
        path = written_header(tmp_path / "w", b"{%s}" % text.encode())
        if count == 1000:
            assert len(read_safetensors(path)) == 1000
        else:
            with pytest.raises(UserError, match="not an object of at most 1,000 tensors"):
                read_safetensors(path)


@pytest.mark.parametrize(("module", "name"), [(headers, "w.safetensors"), (pickles, "w.bin")])
def test_a_file_that_may_not_be_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    def closed(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / name).write_bytes(b"0" * 2000)
    monkeypatch.setattr(module, "open", closed, raising=False)
    with pytest.raises(MissingFileError, match=rf"weight file '.*{name}' cannot be read: Permission denied"):
        read_weight_file(tmp_path / name)


def test_a_file_of_another_kind_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"PK\x03\x04 a pickle of torch in a zip archive")
    with pytest.raises(UserError, match="is not a safetensors file"):
        read_safetensors(tmp_path / "w")


def test_an_unknown_dtype_names_the_known_ones(tmp_path: Path) -> None:
    header = b'{"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}'
    with pytest.raises(UserError, match="type F8_E4M3; allowed: F64, F32"):
        read_safetensors(written_header(tmp_path / "w", header, b"\0" * 4))


def test_missing_weights_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=f"no weights in .*expected {SINGLE_FILE}"):
        read_weights(tmp_path)
    with pytest.raises(MissingFileError, match="'.*gone' does not exist"):
        read_safetensors(tmp_path / "gone")


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    write_weights(tmp_path, entries(arrays()), 48)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MissingFileError, match="names the shard 'model-00002-of-00003.safetensors', which is missing"):
        read_weights(tmp_path)


def test_an_index_that_promises_what_no_shard_holds(tmp_path: Path) -> None:
    write_weights(tmp_path, entries(arrays()), 48)
    index = read_json(tmp_path / INDEX_FILE)
    index["weight_map"]["layer.9"] = "model-00001-of-00003.safetensors"
    write_json(tmp_path / INDEX_FILE, index)
    with pytest.raises(UserError, match="promises 1 tensors that no shard holds, e.g. 'layer.9'"):
        read_weights(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(UserError, match="is not a weight index"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../w.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", "a\0b", "a" * 300, "", 3, None]
)
def test_an_index_leads_out_of_no_folder(tmp_path: Path, shard: Any) -> None:
    (tmp_path / "model").mkdir()
    write_safetensors(tmp_path / "w.safetensors", entries(arrays()))
    write_json(tmp_path / "model" / INDEX_FILE, {"weight_map": dict.fromkeys(arrays(), shard)})
    with pytest.raises(UserError, match="weight_map puts 'layer.0' into .*not the name of a file beside it"):
        read_weights(tmp_path / "model")


def test_shards_without_their_index_say_so(tmp_path: Path) -> None:
    write_weights(tmp_path, entries(arrays()), 48)
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(
        MissingFileError, match="3 shards of weights, model-00001-of-00003.* without their index model.saf"
    ):
        read_weights(tmp_path)
    for name in ("pytorch_model-00001-of-00002.bin", "model_state-00001-of-00002.pdparams"):
        directory = tmp_path / name.partition("-")[0]
        directory.mkdir()
        (directory / name).write_bytes(b"")
        with pytest.raises(MissingFileError, match=rf"1 shards .* index {directory.name}\S+.index.json; copy it from"):
            read_weights(directory)


def test_json_round_trip_keeps_every_character(tmp_path: Path) -> None:
    values = {"a": [1, 2.5, None], "name": "你好 ▁"}
    write_json(tmp_path / "c.json", values)
    assert read_json(tmp_path / "c.json") == values
    assert "你好" in (tmp_path / "c.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(("values", "error"), [({"a": 1}, UserError), ({"a": object()}, TypeError)])
def test_a_failed_json_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: Any, error: type[Exception]
) -> None:
    write_json(tmp_path / "c.json", {"old": True})
    monkeypatch.setattr(weight_files.os, "fsync", full_disk)
    with pytest.raises(error):
        write_json(tmp_path / "c.json", values)
    assert contents(tmp_path) == {"c.json": '{\n  "old": true\n}\n'}


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[1]", "must hold a JSON object"), (None, "does not exist")]
)
def test_reading_what_is_no_json_object(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=f"c.json' {message}"):
        read_json(tmp_path / "c.json")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An existing directory with an old file and something worth keeping."""
    target = tmp_path / "out"
    (target / "checkpoint-1").mkdir(parents=True)
    (target / "old.txt").write_text("old")
    (target / "checkpoint-1" / "state.txt").write_text("kept")
    return target


def replace(target: Path) -> None:
    with atomic_directory(target) as temporary:
        (temporary / "new.txt").write_text("new")


OLD = {"out/old.txt": "old", "out/checkpoint-1/state.txt": "kept"}


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "deep" / "out") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a.txt").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert contents(tmp_path) == {"deep/out/inner/a.txt": "a"}
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "deep" / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_directory_and_its_name_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[str, bool]] = []
    monkeypatch.setattr(directories, "_sync", lambda path: flushed.append((path.name, (tmp_path / "out").exists())))
    replace(tmp_path / "out")
    assert flushed[0] == ("new.txt", False) and flushed[-1] == (tmp_path.name, True)
    assert len(flushed) == 3 and not flushed[1][1]  # the file, the directory, then where it was renamed


def test_an_existing_directory_is_replaced_whole(tmp_path: Path, target: Path) -> None:
    replace(target)
    assert contents(tmp_path) == {"out/new.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_removal_that_is_interrupted_leaves_nothing_under_the_name(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        remove_directory(target)
    assert not target.exists()
    [hidden] = target.parent.glob(f".{target.name}.old.*")
    monkeypatch.undo()
    remove_directory(hidden)
    assert not list(target.parent.glob(f".{target.name}*"))


def test_an_exception_inside_leaves_the_old_directory_and_nothing_else(tmp_path: Path, target: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as temporary:
        (temporary / "new.txt").write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_while_writing_leaves_the_old_directory(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files.os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"cannot write '.*out': No space left on device; free space"):
        replace(target)
    assert contents(tmp_path) == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_exchange_is_taken_back(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Steps: the old directory goes aside, the new one takes its place."""
    calls, rename = [], os.rename

    def fail_once(source: Path, place: Path) -> None:
        calls.append(place)
        if len(calls) == failing:
            full_disk()
        rename(source, place)

    monkeypatch.setattr(weight_files.os, "rename", fail_once)
    with pytest.raises(UserError, match="cannot write"):
        replace(target)
    assert contents(tmp_path) == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("write", [replace, lambda path: write_json(path / "c.json", {})])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write '.*file/out.*choose another place"):
        write(tmp_path / "file" / "out")


def test_weights_that_do_not_fit_on_the_disk_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files.os, "fsync", full_disk)
    with pytest.raises(UserError, match=f"cannot write '.*{SINGLE_FILE}': No space left on device"):
        write_weights(tmp_path, entries(arrays()), 10**9)


def test_the_header_is_aligned_and_plain_json(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w", entries(arrays(1)))
    raw = (tmp_path / "w").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length]) == {"layer.0": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def test_a_tensor_whose_numbers_are_elsewhere_is_not_written_short(tmp_path: Path) -> None:
    emptied = weight_files.TensorEntry("F32", (4, 2), lambda: np.zeros(0, np.float32))
    tensors = {"whole": array_entry(np.ones(3, np.float32)), "layer.weight": emptied}
    with pytest.raises(UserError, match=r"'layer.weight' has 0 bytes, but F32 \[4, 2\] are 32: its numbers are not"):
        write_safetensors(tmp_path / "model.safetensors", tensors)
