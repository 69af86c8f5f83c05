"""Converts a checkpoint between layouts: ours, original LLaVA's, llava-hf's and XTuner's.

    python paddlemix/tools/convert_checkpoint.py --input DIR --output DIR --to {paddlemix,llava,hf,xtuner,peft}

Also reads PaddleMIX's (.pdparams) and InternVL-Chat-LLaVA's layouts and plain language models.  An adapter directory is
converted with --to llava, xtuner or peft into an adapter for original LLaVA, XTuner or PEFT (on llava-hf).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.errors import UserError
from paddlemix.locks import locked_output
from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.command import path_argument, place_argument, run_command

_UNITS = {"": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3}

# Larger numbers are infinite or do not fit an offset of a file.
_LARGEST_SIZE = 2.0**63


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = CommandParser("convert", __doc__)
    parser.add_argument(
        "--input", type=place_argument, required=True, help="checkpoint or adapter to convert, of any supported layout"
    )
    parser.add_argument("--output", type=path_argument, required=True, help="new folder; appears only when complete")
    layouts = ("paddlemix", "llava", "hf", "xtuner", "peft")
    parser.add_argument("--to", required=True, choices=layouts, help="layout to write; peft is for adapters")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="precision of the written weights; default: unchanged",
    )
    parser.add_argument("--shard-size", default="5GB", help="maximum size of a weight file, e.g. 500MB (default 5GB)")
    return parser


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB", "500MB", "2GiB" or "1000".

    Raises:
        UserError: it is not a size of at least one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match.group(2).upper()) if match is not None else None
    size = float(match.group(1)) * unit if match is not None and unit is not None else 0.0
    if not 1 <= size < _LARGEST_SIZE:
        raise UserError(f"--shard-size '{text}' is not a size; give a number with MB or GB, for example 5GB")
    return int(size)


def main(argv: list[str]) -> int:
    """Converts and verifies.

    Raises:
        UserError: the checkpoint cannot be used, the target layout cannot hold it, or the output cannot be written.
    """
    arguments = build_parser().parse_args(argv)
    max_shard_bytes = parse_size(arguments.shard_size)
    from paddlemix.checkpoints.convert.export_model import check_target
    from paddlemix.checkpoints.hub.resolve import resolve_model

    # Resolved once: a name may be downloaded here.
    arguments.input = resolve_model(arguments.input)
    check_target(arguments.output, arguments.input)
    with locked_output(arguments.output, "--output", inside=False):
        return _convert(arguments, max_shard_bytes)


def _convert(arguments: argparse.Namespace, max_shard_bytes: int) -> int:
    from paddlemix.checkpoints.convert.export_model import convert_checkpoint
    from paddlemix.checkpoints.convert.verify import Conversion
    from paddlemix.checkpoints.layouts.recognise import is_adapter
    from paddlemix.progress_bar import ProgressBar

    # Adapters have writers of their own, which build no whole model.
    if is_adapter(arguments.input):
        return _convert_adapter(arguments)
    if arguments.to == "peft":
        raise UserError(f"{arguments.input} is not an adapter, and --to peft writes adapters; use --to hf for a model")
    with ProgressBar("convert, verify", unit="B") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.done)

        # Verifying is part of it: every weight is read back and compared.
        conversion = Conversion(
            to=arguments.to, dtype=arguments.dtype, max_shard_bytes=max_shard_bytes, on_progress=show
        )
        report = convert_checkpoint(arguments.input, arguments.output, conversion)
    print(
        f"wrote and verified {report.num_tensors} weights, {report.num_bytes / 1e9:.2f} GB, of {arguments.input} as "
        f"{arguments.to} in {arguments.output}"
    )
    return 0


def _convert_adapter(arguments: argparse.Namespace) -> int:
    from paddlemix.checkpoints.convert.export_adapter import export_adapter
    from paddlemix.checkpoints.convert.export_peft import export_peft_adapter
    from paddlemix.checkpoints.convert.export_xtuner import export_xtuner_adapter

    writers = {
        "llava": (export_adapter, "original LLaVA"),
        "xtuner": (export_xtuner_adapter, "XTuner"),
        "peft": (export_peft_adapter, "PEFT on llava-hf"),
    }
    if arguments.to not in writers:
        raise UserError(
            f"{arguments.input} is an adapter; it can be written --to llava, --to xtuner or --to peft, or merged into "
            "its base first (paddlemix merge-lora)"
        )
    export, program = writers[arguments.to]
    count = export(arguments.input, arguments.output, arguments.dtype)
    print(f"wrote an adapter of {count} weights for {program} in {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
