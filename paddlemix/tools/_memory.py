"""What commands that answer questions could be told so that they take less memory."""

from __future__ import annotations

import argparse


def less_memory(arguments: argparse.Namespace, dtype: str) -> list[str]:
    """Arguments that take less, the cheapest first.

    Args:
        arguments: with `load_8bit`, `load_4bit`, `max_new_tokens` and, where questions are answered together,
            `batch_size`.
        dtype: that the model is computed in.
    """
    found = []
    size = getattr(arguments, "batch_size", 1)
    if size > 1:
        found.append(f"--batch-size {size} -> a smaller one")
    if dtype == "float32":
        found.append("--dtype bfloat16 (GPU and NPU)")
    if not arguments.load_4bit:
        found.append("--load-4bit" if arguments.load_8bit else "--load-8bit or --load-4bit")
    return [*found, f"--max-new-tokens {arguments.max_new_tokens} -> a smaller one"]
