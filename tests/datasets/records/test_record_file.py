"""Record files: both kinds in every spelling, what the cache keeps, and errors that name file, record and line."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paddlemix.cache import cache_directory
from paddlemix.datasets.records import index, record_file, scan, validation
from paddlemix.datasets.records.record_file import RecordFile, open_records, read_records
from paddlemix.errors import MissingFileError, UserError
from tests.conftest import HANG

ROOT = Path(__file__).resolve().parents[2]


def record(question: str = "Q", answer: str = "A", **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **keys}


TRICKY = [
    record('a "quoted" [{ text', 'back\\slash \\" }]', id=1),
    record("<image>\n多行\n问题 😀", "ends in \\", image="a.jpg"),
    record("\u2028 \u0085 \t", "\x7f {}[]", extra=[[], {}, [{"a": [1.5, None, True]}], "]}"]),
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes bytes, text or records to a new file."""

    def write(content: bytes | str | list[Any], name: str = "train.json") -> Path:
        path = tmp_path / name
        text = json.dumps(content) if isinstance(content, list) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that are scanned during the test."""
    seen: list[str] = []

    def build(path: str, name: str, form: str | None) -> index.Index:
        seen.append(name)
        return index.build_index(path, name, form)

    monkeypatch.setattr(record_file, "build_index", build)
    return seen


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    for module in (record_file, validation):
        monkeypatch.setattr(module.logger, "warning", lambda text, *values: seen.append(text % values))
    return seen


def as_lines(items: list[Any], end: str = "\n", **keys: Any) -> str:
    return "".join(json.dumps(item, **keys) + end for item in items)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(TRICKY),
        json.dumps(TRICKY, ensure_ascii=False),
        json.dumps(TRICKY, indent=2),
        json.dumps(TRICKY, ensure_ascii=False, indent="\t").replace("\n", "\r\n"),
        json.dumps(TRICKY, separators=(",", ":")),
        " \r\n\t" + json.dumps(TRICKY, separators=(" , ", " : ")) + "\n \n\t",
        "\ufeff" + json.dumps(TRICKY),
        as_lines(TRICKY),
        as_lines(TRICKY, "\r\n", ensure_ascii=False),
        as_lines(TRICKY, "\n\n \t\n" + " " * 100 + "\n\r\n"),
        as_lines(TRICKY, "\n   ").rstrip(),
        "\ufeff" + as_lines(TRICKY, ensure_ascii=False),
        "\n\n" + as_lines(TRICKY),
    ],
)
def test_every_spelling_is_read(write: Callable[..., Path], content: str) -> None:
    path = write(content)
    assert read_records(path) == read_records(str(path)) == TRICKY
    assert open_records(path).words.tolist() == [-7, 7, -2]
    assert open_records(path).problems() == []


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_one_record_is_a_file(write: Callable[..., Path], end: bytes) -> None:
    assert read_records(write(json.dumps(TRICKY[0]).encode() + end)) == TRICKY[:1]
    assert read_records(write(json.dumps(TRICKY[:1]).encode() + end, "b.json")) == TRICKY[:1]


def test_words_tell_the_modality_and_bad_records(write: Callable[..., Path]) -> None:
    items = [record("one two"), record("<image> what", "three more words", image="a.png"), {"id": 3}, record("", "x")]
    file = open_records(write(items))
    assert (len(file), file.words.dtype.name, file.words.tolist()) == (4, "int32", [-3, 5, 0, -1])
    ((number, message),) = file.problems()
    assert number == 2 and message.startswith(f"{file.path} record 2: ")
    assert file[2] == {"id": 3}  # the JSON is right; whoever parses it hears the same


def test_form_of_the_records(write: Callable[..., Path]) -> None:
    path = write([{"image": "a.jpg", "caption": "a red bus"}])
    assert open_records(path, "coco_caption").words.tolist() == [4]
    assert open_records(path).words.tolist() == [0]
    assert open_records(path).fingerprint != open_records(path, "coco_caption").fingerprint


def test_records_out_of_range(write: Callable[..., Path]) -> None:
    file = open_records(write(TRICKY))
    for number in (-1, 3):
        with pytest.raises(IndexError, match=f"record {number} of 3"):
            file[number]


# --- any JSON ---------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
HARD_TEXT = st.text('\\"{}[],:\n aé😀', max_size=12)
OBJECTS = st.lists(st.dictionaries(HARD_TEXT, VALUES | HARD_TEXT, max_size=4), min_size=1, max_size=5)
BLANK = st.text(" \t\r\n", max_size=3)
COMMA, COLON = (st.builds("".join, st.tuples(BLANK, st.just(mark), BLANK)) for mark in ",:")
ON_FILES = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def arrays(draw: Any) -> tuple[list[dict[str, Any]], str]:
    """Records and an array of them in some spelling."""
    items = draw(OBJECTS)
    style = {"separators": (draw(COMMA), draw(COLON)), "indent": draw(st.sampled_from([None, 0, 3, "\t"]))}
    return items, draw(BLANK) + json.dumps(items, ensure_ascii=draw(st.booleans()), **style) + draw(BLANK)


def same_spans(tmp_path: Path, text: str, block: int, items: list[Any], scan_file: Any, start: int) -> None:
    path = tmp_path / "any.json"
    path.write_text(text, encoding="utf-8", newline="")
    data, found = path.read_bytes(), []
    with pytest.MonkeyPatch.context() as patch, open(path, "rb") as file:
        patch.setattr(scan, "BLOCK_BYTES", block)
        for spans in scan_file(file.fileno(), start):
            found += [data[first:last] for first, last in zip(spans.starts, spans.ends, strict=True)]
    assert [json.loads(piece) for piece in found] == items


@ON_FILES
@given(arrays(), st.integers(1, 40))
def test_any_array_is_cut_right_at_any_block_size(tmp_path: Path, drawn: Any, block: int) -> None:
    items, text = drawn
    same_spans(tmp_path, text, block, items, scan.scan_array, len(text[: text.index("[") + 1].encode()))


@ON_FILES
@given(
    OBJECTS, st.booleans(), st.lists(st.sampled_from(["\n", "\r\n", "\n\n", " \n\t \n", "\n  "])), st.integers(1, 40)
)
def test_any_lines_are_cut_right_at_any_block_size(
    tmp_path: Path, items: list[Any], as_ascii: bool, ends: list[str], block: int
) -> None:
    ends = (ends + ["\n"] * len(items))[: len(items)]
    text = "".join(json.dumps(item, ensure_ascii=as_ascii) + end for item, end in zip(items, ends, strict=True))
    same_spans(tmp_path, text, block, items, scan.scan_lines, 0)


@ON_FILES
@given(arrays())
def test_any_array_is_read(tmp_path: Path, drawn: Any) -> None:
    path = tmp_path / "any.json"
    path.write_text(drawn[1], encoding="utf-8", newline="")
    assert list(open_records(path)) == drawn[0]  # type: ignore[call-overload]


@settings(ON_FILES, max_examples=200)
@given(arrays(), st.integers(0), st.sampled_from(["", *'"\\{}[],:x1']), st.booleans())
def test_a_broken_array_gives_the_error_that_json_gives(
    tmp_path: Path, drawn: Any, place: int, put: str, cut_off: bool
) -> None:
    text = drawn[1]
    first = text.index("[") + 1
    place = first + place % (len(text) - first)
    broken = text[:place] + put + ("" if cut_off else text[place + 1 :])
    path = tmp_path / "any.json"
    path.write_text(broken, encoding="utf-8", newline="")
    try:
        expected = json.loads(broken)
    except json.JSONDecodeError as error:
        with pytest.raises(UserError) as caught:
            open_records(path)
        same = f"is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        worded_anew = error.msg.startswith("Illegal trailing comma")  # Python 3.13
        assert str(caught.value).endswith(same) or "expected an object with" in str(caught.value) or worded_anew
        return
    if expected and all(isinstance(item, dict) for item in expected):
        assert read_records(path) == expected
        return
    with pytest.raises(UserError, match="holds no record|record \\d+: a JSON .*, expected an object"):
        open_records(path)


# --- errors -----------------------------------------------------------------------------------------------------------

GOOD = json.dumps(record())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", "is not JSON: line 1, column 3: Expecting property name"),
        (f"[{GOOD},\n {GOOD}", f"is not JSON: line 2, column {len(GOOD) + 2}: Expecting ',' delimiter"),
        (f"[{GOOD},\n", "is not JSON: line 2, column 1: Expecting value"),
        (f"[\n{GOOD}\n{GOOD}]", "is not JSON: line 3, column 1: Expecting ',' delimiter"),
        (f"[\n{GOOD},\n]", "is not JSON: line 3, column 1: Expecting value"),
        (f"[{GOOD}]\n[{GOOD}]", "is not JSON: line 2, column 1: Extra data"),
        (f"[{GOOD}}}]", f"is not JSON: line 1, column {len(GOOD) + 2}: Expecting ',' delimiter"),
        (f'[{GOOD},\n{{"é": "ab\ncd"}}]', "is not JSON: line 2, column 10: Invalid control character at"),
        (
            f'[{GOOD}, {{"a": "never closed}}]',
            f"is not JSON: line 1, column {len(GOOD) + 10}: Unterminated string starting at",
        ),
        ('[{"a": "never closed' + "x" * 200_000 + "}]", "is not JSON: line 1, column 8: Unterminated string"),
        ("\ufeff[{]", "is not JSON: line 1, column 3"),
        ("[tru]", "is not JSON: line 1, column 2: Expecting value"),
        ('["é"]'.encode("latin-1"), "is not UTF-8 (byte 2); save it as UTF-8"),
        (f'[{GOOD}, {{"a": "é"}}]'.encode("latin-1"), f"is not UTF-8 (byte {len(GOOD) + 10}); save it as UTF-8"),
        ("", "holds no record: it is empty"),
        (" \n\t", "holds no record: it is empty"),
        ("\ufeff", "holds no record: it is empty"),
        ("[]", "holds no record"),
        (" [ \n ] ", "holds no record"),
        ("[] x", "is not JSON: line 1, column 4: Extra data"),
        ('"text"', "holds a JSON text, expected an array"),
        ("null", "holds a JSON null, expected an array"),
        ("17", "holds a JSON number, expected an array"),
        ("image,question\n", "is not JSON: it begins with 'image,question\\n'"),
        (f"[{GOOD}, [1]]", "train.json record 1: a JSON array, expected an object with 'conversations'"),
        (f"[{GOOD}, 7]", "train.json record 1: a JSON number, expected an object with 'conversations'"),
        (f'[{GOOD}, "a", {GOOD}]', "train.json record 1: a JSON text, expected an object with 'conversations'"),
        ("[null]", "train.json record 0: a JSON null, expected an object with 'conversations'"),
        ('{\n  "conversations": []\n}\n', "holds an object that is spread over lines; put the records into an array"),
        ('{"conversations": [\n[]]}', "holds an object that is spread over lines"),
        (gzip.compress(b"[{}]", mtime=0), "is compressed with gzip; unpack it with gunzip"),
        (b"PAR1\x15\x04", "is a Parquet file; write its rows as JSON Lines"),
        (b"PK\x03\x04\x14", "is a zip archive"),
        ("[{}]".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("[{}]".encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
        ("\n<!DOCTYPE html><html>", "begins like a web page or XML"),
    ],
)
def test_file_that_cannot_be_used(write: Callable[..., Path], content: bytes | str, message: str) -> None:
    path = write(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        open_records(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"conversations": [', "not JSON: column 20: Expecting value"),
        ("  nothing", "not JSON: column 3: Expecting value"),
        (GOOD + GOOD, f"not JSON: column {len(GOOD) + 1}: Extra data"),
        ("[1]", "a JSON array, expected an object with 'conversations'"),
        ('{"a": "é"}'.encode("latin-1"), "not UTF-8 (byte 7 of the line); save the file as UTF-8"),
        ('{"a": NaN}', "NaN is not JSON; write a number or null"),
    ],
)
def test_a_bad_line_leaves_the_others(write: Callable[..., Path], bad: bytes | str, message: str) -> None:
    line = bad if isinstance(bad, bytes) else bad.encode()
    path = write(GOOD.encode() + b"\n\n" + line + b"\n" + GOOD.encode())
    file = open_records(path)
    assert file.words.tolist() == [-2, 0, -2]
    assert file.problems() == [(1, f"{path} record 1 (line 3): {message}")]
    assert file[2] == record()
    with pytest.raises(UserError, match=re.escape(f"{path} record 1 (line 3): {message}")):
        file[1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"a": -Infinity}', "-Infinity is not JSON; write a number or null"),
        ('{"a": %s}' % ("9" * 5000), "Exceeds the limit (4300 digits)"),
        ('{"a": %s}' % ("[" * 100_000 + "]" * 100_000), "lists or objects are nested too deeply"),
        ('{"a": "\\ud83d"}', "record 1: "),
    ],
)
def test_a_bad_item_leaves_the_others(write: Callable[..., Path], bad: str, message: str) -> None:
    path = write(f"[{GOOD}, {bad}, {GOOD}]")
    file = open_records(path)
    assert file.words.tolist() == [-2, 0, -2]
    ((number, problem),) = file.problems()
    assert number == 1 and problem.startswith(f"{path} record 1: ") and message in problem


def test_every_problem_is_kept(write: Callable[..., Path]) -> None:
    path = write([{"id": f"é\n\u2028{number}"} for number in range(5000)])
    for _ in ("made", "kept"):
        assert [number for number, _ in open_records(path).problems()] == list(range(5000))


def test_file_that_is_not_there(tmp_path: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingFileError, match=r"absent.json' does not exist \(looked in .*check its path"):
        open_records(tmp_path / "absent.json")
    with pytest.raises(MissingFileError, match="is a folder; give a file"):
        open_records(tmp_path)
    with pytest.raises(MissingFileError, match="is no regular file"):
        open_records("/dev/null")
    path = write([record()], "locked.json")

    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MissingFileError, match="locked.json' cannot be read: Permission denied"):
        open_records(path)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_the_second_opening_scans_nothing(write: Callable[..., Path], builds: list[str]) -> None:
    path = write([*TRICKY, {"id": 3}])
    first, second = open_records(path), open_records(path)
    assert builds == [str(path)]
    assert list(first) == list(second) == [*TRICKY, {"id": 3}]  # type: ignore[call-overload]
    assert first.words.tolist() == second.words.tolist()
    assert first.problems() == second.problems()
    assert first.fingerprint == second.fingerprint


def test_messages_name_the_path_of_this_opening(
    write: Callable[..., Path], builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write([{"id": 1}])
    open_records(path)
    monkeypatch.chdir(path.parent)
    assert open_records("train.json").problems()[0][1].startswith("train.json record 0: ")
    assert builds == [str(path)]


def test_a_changed_file_is_scanned_again(write: Callable[..., Path], builds: list[str]) -> None:
    path = write([record("one")])
    old = open_records(path)
    write([record("one two three")])
    assert open_records(path).words.tolist() == [-4]
    same_size = write([record("one tw, three")])
    os.utime(same_size, ns=(1, 1))
    new = open_records(path)
    assert new[0] == record("one tw, three")
    assert len(builds) == 3
    assert new.fingerprint != old.fingerprint


def kept_index(write: Callable[..., Path]) -> tuple[Path, Path]:
    """A data file and what the cache keeps of it."""
    before = set(cache_directory("records").glob("*.index"))
    path = write([*TRICKY, {"id": 3}])
    open_records(path)
    (store,) = set(cache_directory("records").glob("*.index")) - before
    return path, store


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"no index",
        lambda data: b"[]" + data[2:],
        lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:],
        lambda data: data[:-5] + b"x" + data[-4:],
        lambda data: data.replace(b'"version": "4 ', b'"version": "3 '),
    ],
)
def test_a_damaged_index_is_made_again(
    write: Callable[..., Path], builds: list[str], damage: Callable[[bytes], bytes]
) -> None:
    path, store = kept_index(write)
    data = store.read_bytes()
    store.unlink()  # a new file: the old one may be mapped
    store.write_bytes(damage(data))
    assert open_records(path)[1] == TRICKY[1]
    assert len(builds) == 2
    assert store.read_bytes() == data


@pytest.mark.parametrize("full", [True, False])
def test_without_a_cache_the_index_is_held(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str], full: bool
) -> None:
    path = write([*TRICKY, {"id": 3}])
    if full:

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", refuse)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "file"))
    file = open_records(path)
    assert len(warnings) == 1 and "is not kept" in warnings[0] and str(path) in warnings[0]
    copy = pickle.loads(pickle.dumps(file))
    assert list(copy) == list(file) == [*TRICKY, {"id": 3}]
    assert copy.problems() == file.problems() != []
    assert len(warnings) == 1


def test_an_index_that_another_process_made_meanwhile_is_taken(
    write: Callable[..., Path], builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, one_at_a_time = write(TRICKY), record_file._one_at_a_time

    def wait(store: Path) -> contextlib.AbstractContextManager[None]:
        monkeypatch.setattr(record_file, "_one_at_a_time", one_at_a_time)
        open_records(path)  # what happens while this process waits
        return one_at_a_time(store)

    monkeypatch.setattr(record_file, "_one_at_a_time", wait)
    assert list(open_records(path)) == TRICKY
    assert len(builds) == 1


def test_a_copy_opens_the_kept_index(write: Callable[..., Path], builds: list[str]) -> None:
    file = open_records(write(TRICKY * 1000))
    sent = pickle.dumps(file)
    copy = pickle.loads(sent)
    assert len(sent) < 1000 and len(builds) == 1
    assert (copy.path, copy.fingerprint, copy[2999]) == (file.path, file.fingerprint, TRICKY[2])


@pytest.mark.parametrize("change", ["longer", "touched", "gone"])
def test_a_file_that_changes_during_the_run(write: Callable[..., Path], change: str) -> None:
    path = write(TRICKY)
    file = open_records(path)
    sent = pickle.dumps(file)
    if change == "longer":
        write([*TRICKY, *TRICKY])
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
    expected = "does not exist" if change == "gone" else "changed during the run; start again"
    for use in (lambda: file[0], lambda: pickle.loads(sent)):
        with pytest.raises(UserError, match=f"data file '{path}' {expected}"):
            use()


@pytest.mark.parametrize("text", ["[{}, {}]", "[{}, "])
def test_a_file_that_changes_while_it_is_scanned(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = write(TRICKY)

    def build(*given: Any) -> index.Index:
        path.write_text(text)
        return index.build_index(*given)

    monkeypatch.setattr(record_file, "build_index", build)
    with pytest.raises(UserError, match="changed during the run"):
        open_records(path)


def test_threads_share_a_file(write: Callable[..., Path]) -> None:
    file = open_records(write([record(f"Q{number}") for number in range(200)]))
    wrong: list[int] = []

    def read() -> None:
        wrong.extend(number for number in range(200) if file[number] != record(f"Q{number}"))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- several processes ------------------------------------------------------------------------------------------------


def test_processes_check_what_one_would(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    items = [record(f"{'word ' * (number % 7)}", id=number) if number % 9 else {"id": number} for number in range(3000)]
    alone = open_records(write(items, "a.json"))
    monkeypatch.setattr(index, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(scan, "BLOCK_BYTES", 20_000)
    together = open_records(write(as_lines(items), "b.jsonl"))
    assert together.words.tolist() == alone.words.tolist()
    assert [number for number, _ in together.problems()] == [number for number, _ in alone.problems()]
    assert together[2999] == items[2999]
    with pytest.raises(UserError, match="line 2, column 1: Expecting ',' delimiter"):
        open_records(write(json.dumps(items)[:-1] + "\n{}]", "c.json"))
    assert warnings == []


@pytest.mark.parametrize("survived", [0, 1, 5])
def test_a_lost_process_loses_nothing(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, warnings: list[str], survived: int
) -> None:
    class Pool:
        """Handles so many tasks."""

        def __init__(self, *_: Any) -> None:
            self.left = survived

        def submit(self, function: Any, task: Any) -> Any:
            self.left -= 1
            if self.left < -2:
                raise BrokenProcessPool
            return Future(function(task) if self.left >= 0 else None)

        def shutdown(self, **_: Any) -> None: ...

    class Future:
        def __init__(self, value: Any) -> None:
            self.value = value

        def result(self) -> Any:
            if self.value is None:
                raise BrokenProcessPool
            return self.value

    monkeypatch.setattr(validation, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(index, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(scan, "BLOCK_BYTES", 500)
    items = [record(f"Q{number}") for number in range(100)]
    assert read_records(write(items)) == items
    assert len(warnings) == 1 and "continues alone" in warnings[0]


def run_scripts(*arguments: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """What scripts at the root of the checkout print, run side by side."""
    keys: dict[str, Any] = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [
        subprocess.Popen([sys.executable, *each], env={**os.environ, "PYTHONPATH": "."}, **keys) for each in arguments
    ]
    results = [process.communicate(timeout=HANG) for process in running]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err)
        for process, (out, err) in zip(running, results, strict=True)
    ]


def test_processes_that_start_at_once_all_succeed(write: Callable[..., Path]) -> None:
    path = write([record(f"Q{number}") for number in range(5000)])
    script = (
        "import sys; from paddlemix.datasets.records.record_file import open_records; "
        "file = open_records(sys.argv[1]); "
        "print(len(file), file[4999]['conversations'][0]['value'], sorted({'paddle', 'PIL'} & set(sys.modules)))"
    )
    results = run_scripts(*[["-c", script, str(path)]] * 3)
    assert [result.stdout for result in results] == ["5000 Q4999 []\n"] * 3, results[0].stderr


def test_a_script_without_main_guard_does_not_hang(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write([record(f"Q{number}") for number in range(5000)])
    script = tmp_path / "script.py"
    script.write_text(
        "from paddlemix.datasets.records import index, record_file\nindex._PARALLEL_BYTES = 0\n"
        f"print(len(record_file.open_records({str(path)!r})))\n"
    )
    (result,) = run_scripts([str(script)])
    assert (result.returncode, result.stdout) == (0, "5000\n"), result.stderr
    assert "continues alone" in result.stderr


# --- addresses --------------------------------------------------------------------------------------------------------


def test_an_address_is_fetched(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write([*TRICKY, {"id": 3}])
    monkeypatch.setattr(record_file, "fetch", lambda url, settings: path if url == "https://x.org/a.json" else None)
    file = open_records("https://x.org/a.json")
    assert isinstance(file, RecordFile) and file[0] == TRICKY[0]
    assert file.problems()[0][1].startswith("https://x.org/a.json record 3: ")
    assert pickle.loads(pickle.dumps(file))[0] == TRICKY[0]  # fetches nothing


def test_an_address_offline() -> None:
    with pytest.raises(UserError, match="https://example.org/a.json' is not in the cache, and PADDLEMIX_OFFLINE=1"):
        open_records("https://example.org/a.json")


def test_folders_of_images_are_kept_with_the_index(write: Callable[..., Path], builds: list[str]) -> None:
    asked = "<image>\nQ"
    named = ["b/c/1.jpg", "b/c/2.jpg", "0.jpg", "/a/é/1.png", "https://x.org/d/1.png", "data:image/png;base64,aa/bb"]
    rows = [*(record(asked, image=name) for name in named), record(), {"image": "bad/1.jpg"}]
    path = write([*rows, record(f"{asked} {asked}", images=["b/1.jpg", "../x/2.jpg"])])
    for _ in range(2):
        file = open_records(path)
        assert sorted(file.pictures(None).folders) == [".", "../x", "/a/é", "b", "b/c"]
        assert sorted(file.pictures("/r").folders) == ["/a/é", "/r/", "/r/../x", "/r/b", "/r/b/c"]
        names = [*(f"/r/{name}" for name in named[:3]), *named[3:], "/r/b/1.jpg", "/r/../x/2.jpg"]
        assert list(file.pictures("/r").names()) == names
        assert [number for number, _ in file.problems()] == [len(named) + 1]
    assert len(builds) == 1
