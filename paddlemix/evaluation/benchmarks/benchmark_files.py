"""Files of benchmarks: found in the layouts that they are published in, read whole, joined by their ids."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paddlemix.errors import MissingFileError, UserError
from paddlemix.evaluation.benchmarks.benchmark import Benchmark
from paddlemix.identity import listed
from paddlemix.json_files import parse_json, read_text
from paddlemix.log import logger

_MOST_BYTES = 2 * 1024**3  # of a file of annotations; those of VQAv2 have 0.1 GB


def find_folder(benchmark: Benchmark, root: Path, is_alone: bool) -> Path:
    """The folder of a benchmark.

    Args:
        root: has one folder for each benchmark, as `playground/data/eval` does.
        is_alone: whether no other benchmark is asked for; `root` may then be its folder.

    Raises:
        MissingFileError: there is none with a file of its questions; says where it was looked for.
    """
    if not root.is_dir():
        raise MissingFileError(f"data root '{root}' is not a folder (looked from {Path.cwd()})")
    places = [*([root] if is_alone else []), *(root / name for name in benchmark.folders)]
    for place in places:
        if any((place / name).is_file() for name in benchmark.question_files):
            return place
    names = " or ".join(dict.fromkeys(benchmark.question_files))
    raise MissingFileError(
        f"{benchmark.name}: there is no {names} in {', '.join(f'{place}{os.sep}' for place in places)}; "
        "docs/evaluation.md lists the files of each benchmark"
    )


def find_file(folder: Path, *names: str) -> Path:
    """The first of some files that is there.

    Raises:
        MissingFileError: none is.
    """
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise MissingFileError(f"there is no {' or '.join(names)} in {folder}")
    if len(found) > 1:
        logger.info("%s is read, and not %s", found[0], listed([path.name for path in found[1:]]))
    return found[0]


def find_pictures(folder: Path, *names: str) -> Path:
    """The first of some folders that is there; where none is, the first one's place.

    Scores need no pictures: `check_pictures` says what is missing before a model is asked.
    """
    return next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])


def read_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The records of a file of JSON Lines or of a JSON array.

    Args:
        keys: that each must have.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is broken, or a record lacks a key.
    """
    # Read at once, unlike files of training: the largest, VQAv2's test2015, has 100 MB, and all of it is asked.
    text = read_text(path, _MOST_BYTES)
    if text.lstrip()[:1] == "[":
        places = [(f"{path} record {number}", value) for number, value in enumerate(_parsed(text, f"'{path}'"))]
    else:
        lines = ((f"{path} line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        places = [(place, _parsed(line, place)) for place, line in lines]
    for place, record in places:
        check_keys(record, keys, place)
    return [record for _, record in places]


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {error}; is the file whole?") from error


def check_keys(record: Any, keys: Iterable[str], source: str) -> None:
    """Whether a record is an object with some keys.

    Raises:
        UserError: it is not.
    """
    if not isinstance(record, dict):
        raise UserError(f"{source} is not an object")
    missing = [key for key in keys if key not in record]
    if missing:
        raise UserError(f"{source} has no {', '.join(map(repr, missing))} (keys: {', '.join(record) or 'none'})")


def read_json(path: Path, kind: type) -> Any:
    """The value of a JSON file.

    Args:
        kind: `dict` or `list`, which it must be.

    Raises:
        MissingFileError, UserError: there is no such file, it is broken, or of another kind.
    """
    text = read_text(path, _MOST_BYTES)
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"'{path}' is a JSON {type(value).__name__}, expected a {kind.__name__}")
    return value


def indexed(records: Iterable[Mapping[str, Any]], key: str, path: Path) -> dict[Hashable, Mapping[str, Any]]:
    """Records by the value of a key.

    Raises:
        UserError: two have the same value.
    """
    found: dict[Hashable, Mapping[str, Any]] = {}
    for record in records:
        if record[key] in found:
            raise UserError(f"{path}: {key} {record[key]!r} is there more than once")
        found[record[key]] = record
    return found


def check_all_there(asked: Sequence[Any], known: Iterable[Any], questions: Path, answers: Path) -> None:
    """Whether two files are of the same questions, so that half a data set is not taken for a whole one.

    Args:
        asked: identities of the questions.
        known: of the right answers.

    Raises:
        UserError: one has questions that the other has not.
    """
    has, wanted = set(asked), set(known)
    # a list keeps their order, so that the error is the same each time
    lost = [one for one in asked if one not in wanted]
    if lost:
        raise UserError(
            f"{answers} has no answer to {len(lost)} of the {len(asked)} questions of {questions}: "
            f"{listed([str(one) for one in lost])}; are both files complete?"
        )
    more = sorted(str(one) for one in wanted - has)
    if more:
        raise UserError(
            f"{questions} lacks {len(more)} questions that {answers} has: {listed(more)}; are both files complete?"
        )


def check_pictures(image_root: Path | None, names: Iterable[str], name: str) -> None:
    """Whether all pictures are there, before a model is loaded.

    Raises:
        MissingFileError: some are not; names the first ones.
    """
    wanted = list(dict.fromkeys(names))
    root = Path() if image_root is None else image_root
    # looked up by their folders: on a network one listing costs less than ten thousand questions for a file
    there: dict[str, set[str]] = {}
    lost = []
    for path in wanted:
        folder, file = os.path.split(os.path.join(root, path))
        if folder not in there:
            there[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if file not in there[folder]:
            lost.append(path)
    if lost:
        raise MissingFileError(f"{name}: {len(lost)} of {len(wanted)} pictures are not in {root}: {listed(lost)}")
