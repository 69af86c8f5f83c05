"""Shows records as a model is trained on them: their tokens, which of them are trained, lengths and image tiles.

    paddlemix show-data --model-path DIR --data FILE [--index N | --count N] [--output DIR] [--json]

No weights are loaded.  Exit status 1 if a record cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.errors import UserError
from paddlemix.paths import is_address
from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.command import path_argument, place_argument, run_command

if TYPE_CHECKING:
    from paddlemix.datasets.records.record_file import RecordFile

_DEFAULT_COUNT = 3


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = CommandParser("show-data", __doc__)
    parser.add_argument(
        "--model-path", type=place_argument, required=True, help="checkpoint: model or adapter, of any supported layout"
    )
    parser.add_argument("--data", type=place_argument, required=True, help="data file")
    parser.add_argument(
        "--conv-mode", type=place_argument, help="conversation template, a name or file; default: the checkpoint's"
    )
    parser.add_argument(
        "--image-root", type=place_argument, help="folder of relative image paths; default: the working directory"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--index", type=int, help="show only this record; the first is 0")
    chosen.add_argument(
        "--count", type=int, help=f"number of records to show (default {_DEFAULT_COUNT}; all with --json)"
    )
    parser.add_argument("--max-length", type=int, help="maximum length of a sample in tokens; default: no limit")
    parser.add_argument("--output", type=path_argument, help="folder for pictures of the images' tiles")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing files with the names of these pictures"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per record and nothing else")
    return parser


def main(argv: list[str]) -> int:
    """Shows the records.

    Raises:
        UserError: the checkpoint or the data file cannot be used, or the record does not exist.
    """
    arguments = build_parser().parse_args(argv)
    _check_numbers(arguments)
    from paddlemix.datasets.images.sources import ImageSettings
    from paddlemix.datasets.records.record_file import open_records
    from paddlemix.processors.text.example_text import Style
    from paddlemix.tools.common.processor import open_processor
    from paddlemix.tools.common.sample_view import describe, read_view, to_json, write_pictures

    if arguments.output:
        _check_output(arguments)
    processor = open_processor(arguments.model_path, arguments.conv_mode)
    records = open_records(arguments.data)
    # Only then can a picture of a record be replaced.
    if arguments.output and arguments.overwrite:
        _check_pictures(arguments, records)
    style = Style.of_stream(sys.stdout)
    if not arguments.json:
        print(style.legend)
    settings, num_bad = ImageSettings(), 0
    for index in _rows(arguments, len(records)):
        try:
            view = read_view(records, index, arguments.image_root, processor, settings, arguments.max_length)
            files = []
            if arguments.output:
                files = write_pictures(view, processor, settings, (arguments.output, arguments.overwrite))
        except UserError as error:
            # The other records are still shown: this is a command for looking around.
            num_bad += 1
            print(json.dumps({"index": index, "error": str(error)}) if arguments.json else f"\n{error}")
            continue
        if arguments.json:
            print(json.dumps(to_json(view), ensure_ascii=False))
        else:
            print("\n" + describe(view, processor, style, files))
    return 1 if num_bad else 0


def _check_output(arguments: argparse.Namespace) -> None:
    from paddlemix.checkpoints.hub.needs import needed_by_model
    from paddlemix.outputs import Needed, Output, check_output

    needed = list(needed_by_model(arguments.model_path))
    if not is_address(arguments.data):
        needed.append(Needed("the data file", Path(arguments.data), "file"))
    check_output(Output("--output", arguments.output, "additions"), needed)


def _check_pictures(arguments: argparse.Namespace, records: RecordFile) -> None:
    """Whether no picture that `--overwrite` replaces can be one that a record names."""
    from paddlemix.outputs import Output, check_pictures

    named = [records.pictures(arguments.image_root)]
    check_pictures(Output("--output", arguments.output, "additions"), named, below=False)


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name, least in (("index", 0), ("count", 1), ("max_length", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def _rows(arguments: argparse.Namespace, size: int) -> Iterator[int]:
    if arguments.index is not None:
        if arguments.index >= size:
            raise UserError(f"--index {arguments.index}: {arguments.data} has {size} records, 0 to {size - 1}")
        yield arguments.index
        return
    count = arguments.count or (size if arguments.json else _DEFAULT_COUNT)
    yield from range(min(count, size))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
