"""Folds an adapter into the weights of its base model.

python paddlemix/tools/merge_lora_params.py --model_name_or_path BASE --lora_path ADAPTER --merge_model_path OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.errors import UserError
from paddlemix.tools._command import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are PaddleMIX's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_name_or_path", help="the base model; default: the one the adapter names")
    parser.add_argument("--lora_path", required=True, help="the adapter directory")
    parser.add_argument("--merge_model_path", help="where the whole model goes; default: into lora_path")
    parser.add_argument("--device", help="gpu, npu, xpu or cpu; default: what is there")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of the written weights"
    )
    return parser


def main(argv: list[str]) -> int:
    """Merges; the result is a self-contained model directory.  Files there that are no model's or adapter's stay.

    Raises:
        UserError: a directory cannot be used, or the adapter belongs to another base.
    """
    arguments = build_parser().parse_args(argv)
    from paddlemix.checkpoints.adapter import read_adapter
    from paddlemix.checkpoints.layouts import is_adapter
    from paddlemix.checkpoints.load import apply_adapter, base_of, load_base
    from paddlemix.checkpoints.pretrained import write_model
    from paddlemix.device import select_device
    from paddlemix.peft.lora import merge_lora
    from paddlemix.trainer.output import publish

    adapter_path = Path(arguments.lora_path)
    if not is_adapter(adapter_path):
        raise UserError(
            f"lora_path '{adapter_path}' is no adapter directory: no lora_config.json or adapter_config.json"
        )
    target = Path(arguments.merge_model_path or adapter_path)
    select_device(arguments.device)
    adapter = read_adapter(adapter_path)
    spec = base_of(adapter, arguments.model_name_or_path)
    if target.resolve() == Path(spec.model).resolve():
        raise UserError(
            f"merge_model_path '{target}' is the base model, which other adapters need; choose another folder"
        )
    loaded = apply_adapter(load_base(spec), adapter)
    count = merge_lora(loaded.model)
    loaded.model.to(dtype=arguments.dtype)
    publish(target, lambda directory: write_model(loaded, directory))
    print(f"merged {count} layers of {adapter_path} into {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
