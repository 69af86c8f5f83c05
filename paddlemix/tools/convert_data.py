"""Converts data to LLaVA's JSON: a VQA table (CSV) or records of any supported form.

    paddlemix convert-data TABLE.csv --output OUT.json --image-root DIR [--suffix TEXT] [--split 0.05]
    paddlemix convert-data DATA.jsonl --output OUT.json

Rows that cannot be converted are listed with their line; nothing is written then, unless --skip-bad is given.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.errors import UserError
from paddlemix.locks import write_errors
from paddlemix.outputs import Needed, Output, check_output, check_replaceable
from paddlemix.paths import is_address
from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.command import path_argument, place_argument, run_command, seed_argument

_TABLES = (".csv", ".tsv")
# Thousands of bad rows usually have one cause.
_SHOWN = 20  # bad rows that are listed
Converted = Iterator[tuple[str, dict[str, Any] | UserError]]  # its place, and the record or what is wrong with it


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = CommandParser("convert-data", __doc__)
    parser.add_argument("input", type=place_argument, help="table (.csv, .tsv) or records (.json, .jsonl; path or URL)")
    parser.add_argument(
        "--output", type=path_argument, required=True, help="file to write: .json, or .jsonl for JSON Lines"
    )
    parser.add_argument(
        "--image-root", type=path_argument, help="folder of the images; every image must then exist in it"
    )
    parser.add_argument(
        "--split", type=float, metavar="FRACTION", help="write about this share of the records to OUTPUT_eval.json"
    )
    parser.add_argument("--seed", type=seed_argument, default=0, help="random seed of the split (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count what cannot be converted")
    parser.add_argument(
        "--form", help="form of the records: coco_caption, coco_vqa, vg_caption; default: recognised by their keys"
    )
    table = parser.add_argument_group("tables")
    table.add_argument("--image-column", metavar="NAME", help="default: image, image_id, image_path or image_file")
    table.add_argument("--question-column", metavar="NAME", help="default: question")
    table.add_argument("--answer-column", metavar="NAME", help="default: answer")
    table.add_argument("--suffix", metavar="TEXT", help="append to every question; \\n is a line break")
    table.add_argument("--group-by-image", action="store_true", help="one conversation per image instead of per row")
    return parser


def main(argv: list[str]) -> int:
    """Converts one file.

    Raises:
        UserError: the file cannot be read, a row cannot be converted, or the output cannot be written.
    """
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    is_table = arguments.input.lower().endswith(_TABLES)
    converted = _convert_table(arguments) if is_table else _convert_records(arguments)
    outputs = [arguments.output]
    if arguments.split is not None:
        outputs.append(arguments.output.with_name(f"{arguments.output.stem}_eval{arguments.output.suffix}"))
    _check_outputs(outputs, arguments)
    for report in _write(converted, outputs, arguments):
        print(report)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    name = arguments.input.lower()
    if not name.endswith((*_TABLES, ".json", ".jsonl")):
        raise UserError(f"'{arguments.input}' is not of a known kind; give a .csv, .tsv, .json or .jsonl file")
    if arguments.output.suffix not in (".json", ".jsonl"):
        raise UserError(f"--output '{arguments.output}' must end in .json or .jsonl")
    if arguments.split is not None and not 0 < arguments.split < 1:
        raise UserError(f"--split {arguments.split} is not between 0 and 1; 0.05 keeps 5 % for evaluation")
    of_tables = ("image_column", "question_column", "answer_column", "suffix", "group_by_image")
    foreign = ("form",) if name.endswith(_TABLES) else of_tables
    given = [key for key in foreign if getattr(arguments, key)]
    if given:
        kind = "records, not for tables" if name.endswith(_TABLES) else "tables, not for records"
        raise UserError(f"--{given[0].replace('_', '-')} is for {kind}")
    if arguments.form is not None:
        from paddlemix.datasets.forms.parse import FORMS

        if arguments.form not in FORMS:
            raise UserError(f"--form '{arguments.form}' is not one of {', '.join(FORMS)}")


def _check_outputs(outputs: list[Path], arguments: argparse.Namespace) -> None:
    needed = [] if is_address(arguments.input) else [Needed("the input", Path(arguments.input), "file")]
    if arguments.image_root is not None:
        needed.append(Needed("the image root", arguments.image_root, "pictures"))
    for path in outputs:
        output = Output("--output", path, "file")
        check_output(output, needed)
        check_replaceable(output, arguments.overwrite)


def _convert_records(arguments: argparse.Namespace) -> Converted:
    from paddlemix.datasets.forms.llava_record import llava_record
    from paddlemix.datasets.forms.parse import parse_record
    from paddlemix.datasets.forms.vqa_table import ImageFinder
    from paddlemix.datasets.records.record_file import open_records

    # Looks every image up, so that a record of a missing one is bad here and not in training.
    finder = ImageFinder(arguments.image_root)
    records = open_records(arguments.input, arguments.form)
    problems = dict(records.problems())
    for number in range(len(records)):
        where = f"{arguments.input} record {number}"
        if number in problems:
            yield where, UserError(problems[number].removeprefix(f"{where}: "))
            continue
        try:
            record = records[number]
            sample = parse_record(record, where, None, arguments.form)
            if arguments.image_root is not None:
                sample = replace(sample, images=tuple(map(finder.find, sample.images)))
            yield where, llava_record(sample, str(record.get("id", number)))
        except UserError as error:
            yield where, UserError(str(error).removeprefix(f"{where}: "))


def _convert_table(arguments: argparse.Namespace) -> Converted:
    from paddlemix.datasets.forms.vqa_table import Columns, ImageFinder, TableRow, read_table

    given = {key: getattr(arguments, f"{key}_column") for key in ("image", "question", "answer")}
    columns = Columns(**{key: (name,) for key, name in given.items() if name is not None})
    finder = ImageFinder(arguments.image_root)
    suffix = (arguments.suffix or "").replace("\\n", "\n")
    conversations: dict[str, list[tuple[str, str]]] = {}  # of each image, where they are grouped
    for number, (line, row) in enumerate(read_table(Path(arguments.input), columns)):
        where = f"{arguments.input} line {line}"
        try:
            if not isinstance(row, TableRow):
                raise row
            if "<image>" in row.question:
                raise UserError("the question contains <image>, which is added automatically; remove it")
            image, pair = finder.find(row.image), (row.question + suffix, row.answer)
        except UserError as error:
            yield where, error
            continue
        if arguments.group_by_image:
            conversations.setdefault(image, []).append(pair)
        else:
            yield where, _vqa_record(number, image, [pair])
    for number, (image, pairs) in enumerate(conversations.items()):
        yield f"{arguments.input} image {image}", _vqa_record(number, image, pairs)


def _vqa_record(number: int, image: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    turns = []
    for index, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if index else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": str(number), "image": image, "conversations": turns}


@dataclass
class _Output:
    """An output file while it is written.

    Args:
        path: its final place.
        file: the temporary file.
    """

    path: Path
    file: TextIO
    count: int = 0
    images: set[str] = field(default_factory=set)

    def add(self, record: dict[str, Any]) -> None:
        lines = self.path.suffix == ".jsonl"
        with write_errors(f"'{self.path}'"):
            self.file.write("" if lines else ",\n" if self.count else "[\n")
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n" * lines)
        self.count += 1
        self.images.update(_images_of(record))

    def finish(self) -> None:
        """Brings the whole file to the disk.

        Raises:
            UserError: it has no record, or the disk is full.
        """
        if not self.count:
            raise UserError(f"no record is left for {self.path}, so nothing was written; see --split and --skip-bad")
        with write_errors(f"'{self.path}'"):
            self.file.write("" if self.path.suffix == ".jsonl" else "\n]\n")
            self.file.flush()
            os.fsync(self.file.fileno())


def _images_of(record: dict[str, Any]) -> list[str]:
    value = record.get("image", [])
    return [value] if isinstance(value, str) else value


def _write(converted: Converted, paths: list[Path], arguments: argparse.Namespace) -> list[str]:
    """Writes the files, all of them or none, and returns a line of report for each."""
    from paddlemix.cache import replacing
    from paddlemix.progress_bar import ProgressBar

    bad: list[str] = []
    with contextlib.ExitStack() as stack:
        outputs = []
        for path in paths:
            temporary = stack.enter_context(replacing(path))
            outputs.append(_Output(path, stack.enter_context(temporary.open("w", encoding="utf-8"))))
        choose = _chooser(arguments.split, arguments.seed)
        for where, record in stack.enter_context(ProgressBar("convert", unit=" records")).over(converted):
            if isinstance(record, UserError):
                bad.append(f"{where}: {record}")
            else:
                # Written as they come: a file may have more records than memory holds.
                outputs[choose(record, where)].add(record)
        _print_bad(bad, arguments.skip_bad)
        # each takes its place when the block ends: by then all of them are on the disk, so that a full disk leaves none
        for output in outputs:
            output.finish()
    return [f"wrote {output.count} records of {len(output.images)} images in {output.path}" for output in outputs] + (
        [f"skipped {len(bad)} that cannot be converted"] if bad else []
    )


def _chooser(fraction: float | None, seed: int) -> Callable[[dict[str, Any], str], int]:
    """Which file a record goes to: 0, or 1 for evaluation; all records of an image go to the same one."""

    def choose(record: dict[str, Any], where: str) -> int:
        if fraction is None:
            return 0
        # By image, not by record: a picture must not be in both parts.
        key = "\0".join([str(seed), *(_images_of(record) or [where])])
        number = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")
        return int(number < fraction * 2**64)

    return choose


def _print_bad(bad: list[str], skip: bool) -> None:
    for line in bad[:_SHOWN]:
        print(line, file=sys.stderr)
    if len(bad) > _SHOWN:
        print(f"... and {len(bad) - _SHOWN} more", file=sys.stderr)
    if bad and not skip:
        raise UserError(f"{len(bad)} cannot be converted, so nothing was written; fix them or give --skip-bad")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
