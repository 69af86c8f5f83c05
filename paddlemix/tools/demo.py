"""Trains and queries a tiny LLaVA on this machine, without any download: `paddlemix demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.locks import locked_output
from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.command import path_argument, run_command


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = CommandParser("demo", __doc__)
    parser.add_argument(
        "--output", type=path_argument, default=Path("runs/demo"), help="folder for everything (default runs/demo)"
    )
    parser.add_argument(
        "--prepare-only",
        action="store_true",
        help="only write the data and the untrained model, for the recipes in config/llava/tiny",
    )
    parser.add_argument("--overwrite", action="store_true", help="use the folder although it has other content")
    return parser


def main(argv: list[str]) -> int:
    """Runs the demo, or prepares what its recipes need.

    Raises:
        UserError: the folder cannot be written, or a step failed.
    """
    arguments = build_parser().parse_args(argv)
    from paddlemix.demo.pipeline import DemoFolder, check_folder, prepare, run_demo

    folder = DemoFolder(arguments.output)
    # Before the lock, whose file would count as content.
    check_folder(folder, arguments.overwrite)
    with locked_output(folder.root, "--output"):
        if arguments.prepare_only:
            prepare(folder)
            print(f"wrote {folder.data} and {folder.start}")
        else:
            run_demo(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
