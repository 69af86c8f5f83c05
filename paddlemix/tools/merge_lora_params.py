"""Folds an adapter into the weights of its base model.

python paddlemix/tools/merge_lora_params.py --model_name_or_path BASE --lora_path ADAPTER --merge_model_path OUT
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.errors import UserError
from paddlemix.locks import locked_output
from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.command import path_argument, place_argument, run_command
from paddlemix.tools.common.generation import add_device_flag

if TYPE_CHECKING:
    from paddlemix.checkpoints.pretrained import Pretrained

# largest difference of a logit after merging, as a share of the largest logit
# Rounding of the weights alone: bfloat16 keeps 8 bits, and a logit sums thousands of products.
MOST_DIFFERENT = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.15}


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are PaddleMIX's."""
    parser = CommandParser("merge-lora", __doc__)
    parser.add_argument(
        "--model_name_or_path", type=place_argument, help="base model; default: the one the adapter names"
    )
    parser.add_argument("--lora_path", type=path_argument, required=True, help="adapter directory")
    parser.add_argument(
        "--merge_model_path",
        type=path_argument,
        help="folder for the merged model; default: lora_path, whose adapter then moves to lora_path/adapter",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model or adapter")
    add_device_flag(parser)
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16", "bfloat16"),
        help="precision of the written weights (default float32)",
    )
    return parser


def main(argv: list[str]) -> int:
    """Merges; the result is a self-contained model directory.  Unrelated files there stay.

    One example's logits are compared before and after: the result is put in place only if they agree.

    Raises:
        UserError: a directory cannot be used, the adapter belongs to another base, or the result answers differently.
    """
    arguments = build_parser().parse_args(argv)
    from paddlemix.checkpoints.layouts.recognise import is_adapter
    from paddlemix.checkpoints.layouts.xtuner_layout import conversion_hint

    adapter_path: Path = arguments.lora_path
    if not is_adapter(adapter_path):
        raise UserError(
            f"lora_path '{adapter_path}' is not an adapter directory: no lora_config.json, adapter_config.json or "
            f"XTuner's llm_adapter or visual_encoder_adapter{conversion_hint(adapter_path)}"
        )
    target: Path = arguments.merge_model_path or adapter_path
    _check_target(target, arguments)
    with locked_output(target, "merge_model_path"):
        return _merge(target, arguments)


def _check_target(target: Path, arguments: argparse.Namespace) -> None:
    """Whether the merged model may go there.

    Raises:
        UserError: it holds the base, the adapter, or another model without --overwrite; or the merge would replace a
            checkpoint from which a run may resume.
    """
    from paddlemix.checkpoints.adapters.merging import check_can_be_kept
    from paddlemix.checkpoints.hub.needs import needed_by_model
    from paddlemix.outputs import Output, check_output
    from paddlemix.trainer.output import holds_result
    from paddlemix.trainer.resuming.checkpoint_folders import STATE_FILE

    adapter, base = arguments.lora_path, arguments.model_name_or_path
    needed = [*(needed_by_model(base, "the base model") if base else ()), *needed_by_model(adapter, "the adapter")]
    # PaddleMIX's default: the result replaces the adapter, which moves to a subfolder.
    in_place = target.resolve() == adapter.resolve()
    if in_place:
        needed = [item for item in needed if item.path.resolve() != target.resolve()]
    check_output(Output("merge_model_path", target), needed)
    # A checkpoint's adapter is part of its state.
    if in_place and (target / STATE_FILE).is_file():
        raise UserError(
            f"lora_path '{target}' is a checkpoint, from which its run could not resume after a merge in place; give "
            "merge_model_path a new folder"
        )
    if in_place:
        check_can_be_kept(target)
    elif holds_result(target) and not arguments.overwrite:
        raise UserError(
            f"merge_model_path '{target}' holds a model or adapter already; choose another folder, or give --overwrite "
            "to replace it"
        )


def _merge(target: Path, arguments: argparse.Namespace) -> int:
    from paddlemix.checkpoints.adapters.adapter import read_adapter
    from paddlemix.checkpoints.adapters.base_places import base_of
    from paddlemix.checkpoints.adapters.merging import exact_storage, keeping_adapter
    from paddlemix.checkpoints.load import apply_adapter, load_base
    from paddlemix.device import select_device
    from paddlemix.trainer.output import publishing

    adapter_path: Path = arguments.lora_path
    select_device(arguments.device)
    adapter = read_adapter(adapter_path)
    spec = base_of(adapter, arguments.model_name_or_path)
    if spec.quantize is None and not adapter.config.pissa:  # PiSSA starts from float weights
        spec = replace(spec, quantize=exact_storage(spec.model))
    loaded = [apply_adapter(load_base(spec), adapter)]
    if loaded[0].processor is None:
        raise UserError(
            f"{spec.model} has no tokenizer files, without which a merged model cannot be used; copy them there"
        )
    in_place = target.resolve() == adapter_path.resolve()
    keeping = keeping_adapter(adapter_path) if in_place else contextlib.nullcontext()
    with keeping, publishing(target) as directory:
        said = _write_and_compare(loaded, directory, arguments.dtype)
    print(f"merged {adapter_path} into {target}: {said}")
    return 0


def _write_and_compare(loaded: list[Pretrained], directory: Path, dtype: str) -> str:
    """Writes the merged model, reads it back and compares it.

    Args:
        loaded: the model with its adapter, alone in a list, so that it can be freed before the result is read.

    Returns:
        What was done, for the user.

    Raises:
        UserError: the result answers differently.
    """
    import numpy as np

    from paddlemix.checkpoints.adapters.merging import exact_storage, write_merged
    from paddlemix.checkpoints.load import load_pretrained
    from paddlemix.tools.common.sample_logits import sample_logits

    # With the adapter still separate, so that merging itself is what is tested.
    before = sample_logits(loaded[0])
    count = write_merged(loaded.pop(), directory, dtype)
    after = sample_logits(load_pretrained(directory, quantize=exact_storage(str(directory))))
    difference, largest = float(np.abs(after - before).max()), float(np.abs(before).max())
    most = MOST_DIFFERENT[dtype] * largest
    compared = f"logits of an example differ by at most {difference:.1e}, {dtype} allows {most:.1e}"
    # Nothing is published yet, so an error leaves the target as it was.
    if not difference <= most:  # also false for NaN
        what = "choose --dtype float32" if dtype != "float32" else "check that base and adapter are complete"
        raise UserError(f"the merged model does not answer like the adapter: {compared}. Nothing was written; {what}")
    return f"{count} layers; {compared}"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
