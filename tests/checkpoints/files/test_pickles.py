"""Pickled weight files: read as they are, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.convert.export_adapter import write_torch
from paddlemix.checkpoints.files.pickles import read_paddle, read_torch
from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import read_weight_file
from paddlemix.errors import MissingFileError, UserError

FLOATS = np.arange(12, dtype="<f4")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(
    storage: str, key: str, count: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0
) -> bytes:
    """A tensor as torch pickles it (protocol 2)."""
    ints = [b"(" + b"".join(b"K" + bytes([value]) for value in values) + b"t" for values in (shape, strides)]
    stored = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + b"K" + bytes([count])
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + b"tQK" + bytes([offset])
    return head + ints[0] + ints[1] + b"\x89ccollections\nOrderedDict\n)RtR"


def pickled(tensors: dict[str, bytes]) -> bytes:
    """A state dict, an OrderedDict with torch's note on versions."""
    items = b"".join(text(name) + code for name, code in tensors.items())
    note = b"}" + text("_metadata") + b"}sb"
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u" + note + b"."


def torch_file(path: Path, code: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", "3\n")
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A matrix, its transpose and a part of it in one storage, and a half and a bfloat16 vector."""
    code = pickled(
        {
            "whole": tensor("FloatStorage", "0", 12, (3, 4), (4, 1)),
            "turned": tensor("FloatStorage", "0", 12, (4, 3), (1, 4)),
            "part": tensor("FloatStorage", "0", 12, (2,), (1,), offset=5),
            "half": tensor("HalfStorage", "1", 2, (2,), (1,)),
            "brain": tensor("BFloat16Storage", "2", 1, (1,), (1,)),
            "empty": tensor("FloatStorage", "0", 12, (0, 3), (3, 1)),
        }
    )
    storages = {
        "0": FLOATS.tobytes(),
        "1": np.array([1, -2], dtype="<f2").tobytes(),
        "2": b"\x80\x3f",
    }
    return torch_file(tmp_path / "pytorch_model.bin", code, storages)


def test_a_torch_file_gives_its_tensors(state: Path) -> None:
    found = read_torch(state)
    matrix = FLOATS.reshape(3, 4)
    np.testing.assert_array_equal(found["whole"].read(), matrix)
    np.testing.assert_array_equal(found["turned"].read(), matrix.T)
    np.testing.assert_array_equal(found["part"].read(), [5, 6])
    np.testing.assert_array_equal(found["half"].read(), np.array([1, -2], dtype="float16"))
    assert (found["brain"].dtype, found["brain"].read().tolist()) == ("BF16", [0x3F80])
    assert found["empty"].read().shape == (0, 3)
    assert {name: entry.shape for name, entry in found.items()}["turned"] == (4, 3)


def test_tensors_are_mapped_and_not_read(state: Path) -> None:
    base: Any = read_torch(state)["whole"].read()
    while not isinstance(base, np.memmap):
        base = base.base
    assert Path(base.filename) == state


def test_the_format_before_torch_1_6(tmp_path: Path) -> None:
    code = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    code += pickled({"w": tensor("FloatStorage", "7", 12, (3, 4), (4, 1))}) + pickle.dumps(["7"], 2)
    (tmp_path / "w.bin").write_bytes(code + struct.pack("<q", 12) + FLOATS.tobytes())
    np.testing.assert_array_equal(read_torch(tmp_path / "w.bin")["w"].read(), FLOATS.reshape(3, 4))


def test_what_we_write_we_read(tmp_path: Path) -> None:
    entries = {"a": array_entry(FLOATS.reshape(3, 4)), "b": array_entry(np.array([1, 2], dtype="uint16"), "BF16")}
    write_torch(tmp_path / "w.bin", entries)
    found = read_weight_file(tmp_path / "w.bin")
    for name, entry in entries.items():
        assert (found[name].dtype, found[name].shape) == (entry.dtype, entry.shape)
        np.testing.assert_array_equal(found[name].read(), entry.read())


class Runs:
    """A pickle of it calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("harmful", "name"), [(Runs(os.mkdir, "pwned"), r"posix.mkdir"), (Runs(eval, "1"), r"(builtins|__builtin__).eval")]
)
def test_a_pickle_that_wants_to_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harmful: Runs, name: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    code = pickle.dumps({"w": harmful}, protocol)
    (tmp_path / "m.pdparams").write_bytes(code)
    with pytest.raises(UserError, match=f"m.pdparams' wants to use {name}, .*may run code"):
        read_paddle(tmp_path / "m.pdparams")
    with pytest.raises(UserError, match=f"m.bin' wants to use {name}, .*may run code"):
        read_torch(torch_file(tmp_path / "m.bin", code, {}))
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_cannot_change_what_tensors_are_built_of(tmp_path: Path) -> None:
    code = b"\x80\x02ctorch\nFloatStorage\n}" + text("dtype") + text("F16") + b"sb."
    with pytest.raises(UserError, match="damaged"):
        read_torch(torch_file(tmp_path / "m.bin", code, {}))


@pytest.mark.parametrize("kept", [0, 10, 100, -200, -1])
def test_a_torch_file_that_is_cut_short_says_so(state: Path, kept: int) -> None:
    state.write_bytes(state.read_bytes()[:kept])
    with pytest.raises(UserError, match="pytorch_model.bin' is damaged or cut short .*copy it again"):
        read_torch(state)


def test_a_storage_that_is_too_small_is_told(tmp_path: Path) -> None:
    code = pickled({"w": tensor("FloatStorage", "0", 12, (3, 4), (4, 1))})
    with pytest.raises(UserError, match="w.bin': 'w': it is damaged: a tensor needs 48 bytes of 44; copy it again"):
        read_torch(torch_file(tmp_path / "w.bin", code, {"0": FLOATS.tobytes()[:-4]}))


def test_a_compressed_archive_and_another_zip_are_told(tmp_path: Path) -> None:
    code = pickled({"w": tensor("FloatStorage", "0", 12, (3, 4), (4, 1))})
    path = torch_file(tmp_path / "w.bin", code, {"0": FLOATS.tobytes()}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is a compressed archive"):
        read_torch(path)
    with zipfile.ZipFile(tmp_path / "z.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="zip archive, but not one of torch.save"):
        read_torch(tmp_path / "z.bin")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("rows", [2, 300])
def test_a_file_of_paddle_gives_its_tensors(tmp_path: Path, protocol: int, rows: int) -> None:
    """Large tensors stay in the file, small ones are inside the pickle's frames."""
    values = np.random.RandomState(0).randn(rows, 70).astype("float32")
    layer = paddle.nn.Linear(3, 2)
    tensors = {
        "w": paddle.to_tensor(values),
        "brain": paddle.to_tensor(values).astype("bfloat16"),
        "half": values.astype("float16"),
        "column": np.asfortranarray(values),
        "ids": paddle.arange(4),
    }
    paddle.save(tensors, str(tmp_path / "m.pdparams"), protocol=protocol)
    found = read_paddle(tmp_path / "m.pdparams")
    np.testing.assert_array_equal(found["w"].read(), values)
    np.testing.assert_array_equal(found["half"].read(), values.astype("float16"))
    np.testing.assert_array_equal(found["column"].read(), values)
    np.testing.assert_array_equal(found["brain"].read(), tensors["brain"].numpy())
    assert (found["brain"].dtype, found["ids"].dtype) == ("BF16", "I64")
    paddle.save(layer.state_dict(), str(tmp_path / "l.pdparams"), protocol=protocol)
    assert {name: entry.shape for name, entry in read_paddle(tmp_path / "l.pdparams").items()} == {
        "weight": (3, 2),
        "bias": (2,),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_numpy_arrays_are_read(tmp_path: Path, protocol: int) -> None:
    values = np.arange(5000, dtype="float32").reshape(50, 100)
    (tmp_path / "m.pdparams").write_bytes(pickle.dumps({"w": values}, protocol))
    np.testing.assert_array_equal(read_paddle(tmp_path / "m.pdparams")["w"].read(), values)


def test_a_paddle_file_that_is_cut_short_says_so(tmp_path: Path) -> None:
    path = tmp_path / "m.pdparams"
    paddle.save({"w": paddle.ones([300, 70])}, str(path))
    whole = path.read_bytes()
    for kept in (0, 50, 20_000, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match="m.pdparams' is damaged or cut short"):
            read_paddle(path)


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.pdparams").write_bytes(pickle.dumps({"step": 3}))
    with pytest.raises(UserError, match="'step' is not a tensor but a int"):
        read_paddle(tmp_path / "m.pdparams")
    (tmp_path / "m.pdparams").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="does not hold tensors by name but a list"):
        read_paddle(tmp_path / "m.pdparams")
    (tmp_path / "m.pdparams").write_bytes(pickle.dumps({"w": np.array(["a"])}))
    with pytest.raises(UserError, match="allowed: f8, f4"):
        read_paddle(tmp_path / "m.pdparams")


def test_missing_files_and_other_endings(tmp_path: Path) -> None:
    for read in (read_torch, read_paddle):
        with pytest.raises(MissingFileError, match="does not exist"):
            read(tmp_path / "gone")
    with pytest.raises(UserError, match="is not a weight file; allowed suffixes: .safetensors"):
        read_weight_file(tmp_path / "w.npz")


DOUBLED = b")q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"h\x00"  # a tuple of a tuple twice, and so on
NESTED = b"N" + b"\x85" * 200_000  # as deep as a stack is not
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01%scnumpy\ndtype\n" + text("f4") + b"\x85R\x89%stb"


PLACES = {
    "SETITEM": (b"}", b"K\x01s."),
    "SETITEMS": (b"}(", b"K\x01u."),
    "DICT": (b"(", b"K\x01d."),
    "ADDITEMS": (b"\x8f(", b"\x90."),
    "FROZENSET": (b"(", b"\x91."),
    "OrderedDict": (b"ccollections\nOrderedDict\n((", b"K\x01ttR."),
    "key": (b"}" + text("w") + b"(" + text("storage") + b"ctorch\nFloatStorage\n", text("cpu") + b"K\x01tQs."),
    "kind": (b"}" + text("w") + b"(", b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01tQs."),
    "value": (b"}" + text("w"), b"s."),
}


@pytest.mark.parametrize(("place", "inner"), [*((name, DOUBLED) for name in PLACES), ("SETITEM", NESTED)])
def test_a_pickle_takes_neither_for_ever_nor_the_stack(tmp_path: Path, place: str, inner: bytes) -> None:
    before, behind = PLACES[place]
    (tmp_path / "m.pdparams").write_bytes(b"\x80\x04" + before + inner + behind)
    with pytest.raises(UserError, match="m.pdparams'") as caught:
        read_paddle(tmp_path / "m.pdparams")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("shape", "content"),
    [
        (b"K\x02\x85", b"C\x04abcd"),  # too short
        (b"K\x02\x85", b"K\x08"),  # a number, of so many zeros
        (b"K\x02\x85", b"\x8a\x08" + bytes(7) + b"\x10"),
        (b"M\xff\xffM\xff\xffM\xff\xffM\xff\xff\x87\x85", b"C\x00"),
        (b"J\xff\xff\xff\xff\x85", b"C\x00"),  # -1
        (text("12"), b"C\x08abcdefgh"),
        (b"(" + b"K\x01" * 99 + b"t", b"C\x04abcd"),
    ],
)
def test_an_array_whose_parts_do_not_fit_together(tmp_path: Path, shape: bytes, content: bytes) -> None:
    code = b"\x80\x04}" + text("w") + ARRAY % (shape, content) + b"s."
    (tmp_path / "m.pdparams").write_bytes(code)
    with pytest.raises(UserError, match="m.pdparams'.* damaged"):
        read_paddle(tmp_path / "m.pdparams")


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "problem"),
    [
        ((200, 200), (0, 0), 0, "use numbers more than once"),
        ((3, 4), (4,), 0, "strides"),
        ((12,), (2,), 0, "needs 92 bytes of 48"),
        ((12,), (1,), 1, "needs 52 bytes of 48"),
    ],
)
def test_a_tensor_whose_parts_do_not_fit_together(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, problem: str
) -> None:
    code = pickled({"w": tensor("FloatStorage", "0", 12, shape, strides, offset)})
    with pytest.raises(UserError, match=f"w.bin': 'w': .*{problem}"):
        read_torch(torch_file(tmp_path / "w.bin", code, {"0": FLOATS.tobytes()}))


def test_a_storage_that_the_archive_lacks_is_told(tmp_path: Path) -> None:
    code = pickled({"w": tensor("FloatStorage", "7", 12, (3, 4), (4, 1))})
    with pytest.raises(UserError, match="'w': it is damaged: the storage 7 is missing"):
        read_torch(torch_file(tmp_path / "w.bin", code, {"0": FLOATS.tobytes()}))


def test_lengths_are_believed_no_further_than_the_file_goes(tmp_path: Path) -> None:
    """A petabyte of text or bytes, for which memory would be asked first; and a small archive of much."""
    for code in (b"\x8d", b"\x8e", b"\x96", b"\x95"):
        (tmp_path / "m.pdparams").write_bytes(b"\x80\x04" + code + struct.pack("<Q", 10**15) + b"abc.")
        with pytest.raises(UserError, match="m.pdparams' is damaged or cut short"):
            read_paddle(tmp_path / "m.pdparams")
    with zipfile.ZipFile(tmp_path / "w.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 10_000_000)
    with pytest.raises(UserError, match="is a compressed archive"):
        read_torch(tmp_path / "w.bin")


def test_python_2_s_items_in_pairs_are_read(tmp_path: Path) -> None:
    item = text("w") + tensor("FloatStorage", "0", 12, (3, 4), (4, 1)) + b"\x86"
    code = b"\x80\x02ccollections\nOrderedDict\n(](" + item + b"etR."
    found = read_torch(torch_file(tmp_path / "w.bin", code, {"0": FLOATS.tobytes()}))
    np.testing.assert_array_equal(found["w"].read(), FLOATS.reshape(3, 4))
