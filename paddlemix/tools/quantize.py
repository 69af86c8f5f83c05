"""Writes a model with its language model's linear layers in 8 or 4 bits.

    python paddlemix/tools/quantize.py --model-path DIR --output DIR --kind {int8,nf4}

Tower, projector, embeddings and output layer are unchanged.  Every command accepts the result like any model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.errors import UserError
from paddlemix.locks import locked_output
from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.command import path_argument, place_argument, run_command


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = CommandParser("quantize", __doc__)
    parser.add_argument(
        "--model-path",
        type=place_argument,
        required=True,
        help="model: a directory of any supported layout, or a model's name",
    )
    parser.add_argument("--output", type=path_argument, required=True, help="new folder; appears only when complete")
    parser.add_argument(
        "--kind",
        required=True,
        choices=("int8", "nf4", "bfloat16", "float16"),
        help="int8: 1 byte per weight; nf4: 0.52 bytes; bfloat16, float16: 2 bytes, computed in float32 on CPU",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="precision of the other weights; default: that of the embeddings",
    )
    return parser


def main(argv: list[str]) -> int:
    """Quantises weight by weight while reading, so that only the quantised model is held in memory.

    Raises:
        UserError: the model cannot be used, is an adapter or already quantised, or the output cannot be written.
    """
    arguments = build_parser().parse_args(argv)
    from paddlemix.checkpoints.convert.export_model import check_target

    check_target(arguments.output, arguments.model_path)
    with locked_output(arguments.output, "--output", inside=False):
        return _quantize(arguments)


def _quantize(arguments: argparse.Namespace) -> int:
    from paddlemix.checkpoints.base_model import BaseSpec
    from paddlemix.checkpoints.files.directories import atomic_directory
    from paddlemix.checkpoints.files.joint_writing import write_files
    from paddlemix.checkpoints.files.tensors import FLOAT_TYPES
    from paddlemix.checkpoints.identity.weight_identity import WeightFiles, write_origin
    from paddlemix.checkpoints.load import load_base
    from paddlemix.checkpoints.pretrained import model_files
    from paddlemix.checkpoints.quantized import read_quantization
    from paddlemix.checkpoints.source import open_source
    from paddlemix.device import select_device
    from paddlemix.peft.quantize import quantized_linears

    source = open_source(arguments.model_path)
    declared = read_quantization(source.directory)
    # Quantising codes again would add a second rounding.
    if declared is not None:
        raise UserError(
            f"{arguments.model_path} is already quantised ({declared.kind}); start from the model it was made from"
        )
    embedding = source.tensors().get("language_model.embed_tokens.weight")
    # safetensors' short names, "BF16", to ours.
    names = {short: name for name, short in FLOAT_TYPES.items()}
    dtype = arguments.dtype or names.get(embedding.dtype if embedding is not None else "", "float32")
    select_device("cpu")  # nothing is computed, and the model need not fit into a device's memory
    loaded = load_base(BaseSpec(model=arguments.model_path, quantize=arguments.kind), dtype)
    with atomic_directory(arguments.output) as temporary:
        write_files(temporary, model_files(loaded))
        # So that an adapter of the unquantised model is accepted on this one.
        write_origin(temporary, WeightFiles(source).digests())
    layers = quantized_linears(loaded.model).values()
    weights = sum(layer.weight_shape[0] * layer.weight_shape[1] for layer in layers)
    held = sum(layer.num_bytes for layer in layers)
    print(
        f"wrote {len(layers)} layers of {arguments.model_path} as {arguments.kind} to {arguments.output}: "
        f"{weights / 1e6:.1f} million weights in {held / 1e6:.1f} MB"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
