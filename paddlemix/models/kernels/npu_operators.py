"""Operators of the NPU plugin's own, which paddle does not know before they are registered.

None of them could be run where this was written, so fused.py compares each with the plain form before it is used.

Source: PaddleNLP 3.0.0b4, transformers/llama/fusion_ops.py, for names, arguments and the registration.
"""

from __future__ import annotations

import functools
from typing import Any

import paddle

from paddlemix.device.environment import plugin_libraries


@functools.cache
def register() -> tuple[str, ...]:
    """Makes the operators of the plugin's libraries known to paddle, where there are any.

    Returns:
        A line for each library that has none, with paddle's message.
    """
    lines = []
    for library in plugin_libraries():
        try:
            paddle.base.core.load_op_meta_info_and_register_op(str(library))
        except Exception as error:  # whatever paddle raises for a library without operators
            said = str(error).strip().splitlines() or [""]
            reason = next((line for line in said if line.startswith("(")), said[-1].strip())  # "(NotFound) ..."
            lines.append(f"operators of {library.name}: none, {type(error).__name__}: {reason}")
    return tuple(lines)


def attention(queries: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, causal: bool) -> paddle.Tensor:
    """See `fused.FusedKernels`."""
    # seed offset, mask, two more inputs; dropout, causal, softmax returned, inference, triangular mask, varying lengths
    options = None, None, None, None, 0.0, causal, True, False, False, False
    return _run("flash_attention_npu", queries, keys, values, *options)


def rms_norm(states: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """See `fused.FusedKernels`."""
    return _run("rms_norm_npu", states, weight, epsilon)


def rotary(states: paddle.Tensor, cosines: paddle.Tensor, sines: paddle.Tensor) -> paddle.Tensor:
    """See `fused.FusedKernels`.  Every position of the batch as one long row, as its angles are those of a row."""
    row, width = states.reshape([1, -1, *states.shape[2:]]), states.shape[-1]
    angles = (part.reshape([1, -1, 1, width]) for part in (cosines, sines))
    return _run("fused_rope", row, *angles).reshape(states.shape)


def _run(name: str, *arguments: Any) -> paddle.Tensor:
    """An operator's first result; an error where the plugin has none of that name."""
    return paddle.base.core.eager._run_custom_op(name, *arguments)[0]
