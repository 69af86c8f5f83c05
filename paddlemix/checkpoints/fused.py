"""PaddleMIX's joined weights taken apart: query, key and value in one matrix, gate and up in one.

Source of the order inside them: PaddleNLP 3.0.0b4 paddlenlp/transformers/llama/modeling.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from paddlemix.checkpoints.tensors import TensorEntry, selected
from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig

_QKV, _GATE_UP = ".self_attn.qkv_proj.", ".mlp.gate_up_fused_proj."


def split_fused(
    tensors: Mapping[str, TensorEntry], text: DecoderConfig, options: tuple[str, ...]
) -> dict[str, TensorEntry]:
    """Replaces joined weights by their parts, unread.

    Args:
        tensors: under our names, [in, out].
        text: sizes that say where the parts are.
        options: "fuse_attention_qkv" and "fuse_attention_ffn" as far as config.json has them on.

    Raises:
        UserError: a joined weight's width is not that of its parts.
    """
    rules = {"fuse_attention_qkv": (_QKV, _query_key_value), "fuse_attention_ffn": (_GATE_UP, _gate_and_up)}
    result: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        rule = next((rules[option] for option in options if rules[option][0] in name), None)
        if rule is None:
            result[name] = entry
            continue
        marker, parts = rule
        for part, columns in parts(entry.shape[-1], text, name):
            result[name.replace(marker, part)] = selected(entry, columns, len(entry.shape) - 1)
    return result


def _query_key_value(width: int, text: DecoderConfig, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Columns of each part: for every key/value head its query heads stand first, then its key, then its value."""
    heads, group, size = text.key_value_heads, text.num_attention_heads // text.key_value_heads, text.head_size
    _check(width, heads * (group + 2) * size, name)
    columns = np.arange(width).reshape(heads, group + 2, size)
    yield ".self_attn.q_proj.", columns[:, :group].reshape(-1)
    yield ".self_attn.k_proj.", columns[:, group].reshape(-1)
    yield ".self_attn.v_proj.", columns[:, group + 1].reshape(-1)


def _gate_and_up(width: int, text: DecoderConfig, name: str) -> Iterator[tuple[str, np.ndarray]]:
    _check(width, 2 * text.intermediate_size, name)
    yield ".mlp.gate_proj.", np.arange(width // 2)
    yield ".mlp.up_proj.", np.arange(width // 2, width)


def _check(width: int, expected: int, name: str) -> None:
    if width != expected:
        raise UserError(f"the joined weight '{name}' is {width} wide, expected {expected} from config.json")
