"""Checks data files before a run: every record, every conversation, every image, in parallel.

    paddlemix check-data CONFIG.json            all data files of a run, as the run reads them
    paddlemix check-data DATA.json [...]        data files by themselves

Exit status: 0 if everything is fine, 1 if problems were found, 2 if the command itself failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.errors import UserError
from paddlemix.outputs import Needed, Output, check_output, check_replaceable
from paddlemix.paths import is_address
from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.command import path_argument, place_argument, run_command

if TYPE_CHECKING:
    from paddlemix.datasets.checking.check import CheckReport
    from paddlemix.tools.common.check_plan import CheckPlan

_MOST_WORKERS = 8


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = CommandParser("check-data", __doc__)
    parser.add_argument(
        "inputs", type=place_argument, nargs="+", metavar="CONFIG|FILE", help="the JSON file of a run, or data files"
    )
    parser.add_argument(
        "--image-root",
        type=place_argument,
        help="folder of relative image paths; default: the run's, otherwise the working directory",
    )
    parser.add_argument(
        "--model-path", type=place_argument, help="checkpoint whose tokenizer counts tokens; default: the run's"
    )
    parser.add_argument(
        "--chat-template",
        type=place_argument,
        help="conversation template, a name or file; default: the run's, otherwise the checkpoint's",
    )
    parser.add_argument("--max-length", type=int, help="maximum length of a sample in tokens; default: the run's")
    parser.add_argument("--workers", type=int, help=f"processes (default: one per CPU core, at most {_MOST_WORKERS})")
    parser.add_argument("--report", type=path_argument, metavar="OUT.json", help="write all findings as JSON")
    parser.add_argument(
        "--fix",
        type=path_argument,
        metavar="OUT.json",
        help="write the good records to a new file; .jsonl for JSON Lines",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files of --fix and --report")
    parser.add_argument("--no-images", action="store_true", help="do not open images")
    parser.add_argument("--limit", type=int, metavar="N", help="check only the first N records of each file")
    return parser


def main(argv: list[str]) -> int:
    """Checks, reports and, where asked for, writes the good records.

    Raises:
        UserError: a file, the checkpoint or an output cannot be used.
    """
    arguments = build_parser().parse_args(argv)
    for name in ("max_length", "workers", "limit"):
        value = getattr(arguments, name)
        # argparse knows no lower bound.
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    from paddlemix.datasets.checking.good_records import check_fix_target, write_good_records
    from paddlemix.tools.common.check_plan import CheckOptions, make_plan
    from paddlemix.tools.common.check_report import format_report, measure_statistics, write_report

    options = CheckOptions(
        image_root=arguments.image_root,
        model=arguments.model_path,
        chat_template=arguments.chat_template,
        max_length=arguments.max_length,
    )
    plan = make_plan(arguments.inputs, options)
    _check_outputs(arguments, plan)
    if arguments.fix:
        # Mixed splits would train on evaluation data.
        if len(plan.splits) > 1:
            raise UserError("--fix would mix training and evaluation data in one file; name the data files instead")
        check_fix_target(arguments.fix, plan.files)
    report = _check(plan, arguments)
    statistics = measure_statistics(report, plan.max_length)
    print(format_report(report, statistics, plan))
    if arguments.report:
        write_report(arguments.report, report, statistics, plan)
    if arguments.fix:
        count = write_good_records(report, arguments.fix, arguments.limit)
        print(f"\nwrote {count:,} good records to {arguments.fix}")
    return 0 if report.is_clean else 1


def _check_outputs(arguments: argparse.Namespace, plan: CheckPlan) -> None:
    """Whether the two files can be written.

    Raises:
        UserError: one is an input, or exists and may not be replaced.
    """
    from paddlemix.tools.common.check_report import is_report

    outputs = {"--fix": arguments.fix, "--report": arguments.report}
    if arguments.fix and arguments.report and os.path.realpath(arguments.fix) == os.path.realpath(arguments.report):
        raise UserError(f"--fix and --report are both '{arguments.fix}'; give two names")
    # What a model needs is only looked up if something is written.
    if not any(outputs.values()):
        return
    needed = _files("one of the files that are checked", [file.path for file in plan.files])
    needed += _files("the run's file", arguments.inputs)
    needed += _files("the chat template", [arguments.chat_template])
    roots = dict.fromkeys(file.image_root for file in plan.files)
    needed += [Needed("the image root", Path(root), "pictures") for root in roots if root and not is_address(root)]
    if plan.models:
        from paddlemix.checkpoints.hub.needs import needed_by_model

        needed += [item for name in dict.fromkeys(plan.models) for item in needed_by_model(name)]
    for flag, path in outputs.items():
        if path is not None:
            output = Output(flag, path, "file")
            # An own report may be replaced, anything else needs --overwrite.
            check_output(output, needed)
            check_replaceable(output, arguments.overwrite, own=flag == "--report" and is_report(path))


def _files(role: str, names: Sequence[str | None]) -> list[Needed]:
    return [Needed(role, Path(name), "file") for name in names if name and not is_address(name)]


def _check(plan: CheckPlan, arguments: argparse.Namespace) -> CheckReport:
    from paddlemix.datasets.checking.check import check_files
    from paddlemix.datasets.checking.record_checker import CheckSettings
    from paddlemix.progress_bar import ProgressBar

    settings = CheckSettings(
        images=plan.images,
        open_images=not arguments.no_images,
        max_length=plan.max_length,
        on_too_long=plan.on_too_long,
        limit=arguments.limit,
        # More processes than this wait for the disk rather than for the CPU.
        workers=arguments.workers or min(os.cpu_count() or 1, _MOST_WORKERS),
    )
    with ProgressBar("check", unit=" records") as bar:

        def show(done: int, total: int) -> None:
            # The number of records is known only when all files are indexed.
            bar.total = total
            bar.update(done - bar.done)

        return check_files(plan.files, settings, show)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
