"""Joined weights split and joined again: query, key and value in one matrix, gate and up in one.

PaddleMIX joins both if configured to, InternLM2 always joins the first; the order inside is the same.
Sources: PaddleNLP 3.0.0b4 paddlenlp/transformers/llama/modeling.py; modeling_internlm2.py of internlm/internlm2-7b.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from paddlemix.checkpoints.files.tensors import TensorEntry, selected_outputs, transposed
from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig

_QKV, _GATE_UP = ".self_attn.qkv_proj.", ".mlp.gate_up_fused_proj."


def split_fused(
    tensors: Mapping[str, TensorEntry], text: DecoderConfig, options: tuple[str, ...]
) -> dict[str, TensorEntry]:
    """Replaces joined weights by their parts, unread.

    Args:
        tensors: under our names, [in, out].
        text: sizes, which determine where the parts are.
        options: "fuse_attention_qkv" and "fuse_attention_ffn" as far as config.json enables them.

    Raises:
        UserError: a joined weight's width is not that of its parts.
    """
    # config.json's key -> (name of the joined weight, where its parts are)
    rules = {"fuse_attention_qkv": (_QKV, _query_key_value), "fuse_attention_ffn": (_GATE_UP, _gate_and_up)}
    result: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        rule = next((rules[option] for option in options if rules[option][0] in name), None)
        if rule is None:
            result[name] = entry
            continue
        marker, parts = rule
        for part, columns in parts(entry.shape[-1], text, name):
            result[name.replace(marker, part)] = selected_outputs(entry, columns)
    return result


def join_attention(tensors: Mapping[str, TensorEntry], text: DecoderConfig) -> dict[str, TensorEntry]:
    """The reverse of `split_fused` for query, key and value, unread.

    Args:
        tensors: under our names, [in, out]; all three or none of them for a layer.
    """
    result: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        query, key, value = (f".self_attn.{part}_proj." for part in "qkv")
        # written once, at the place of the query; key and value are then skipped
        if query in name:
            parts = [entry, *(tensors[name.replace(query, other)] for other in (key, value))]
            result[name.replace(query, _QKV)] = _joined_outputs(parts, text, name)
        elif key not in name and value not in name:
            result[name] = entry
    return result


def _joined_outputs(parts: list[TensorEntry], text: DecoderConfig, name: str) -> TensorEntry:
    """Outputs of query, key and value in the order of `_query_key_value`."""
    flat = len(parts[0].shape) == 1
    rows = parts if flat else [transposed(part) for part in parts]  # [out, in]
    count = sum(part.shape[0] for part in rows)
    # `_query_key_value` says where each part's outputs are in the joined matrix; argsort inverts that permutation
    order = np.argsort(np.concatenate([columns for _, columns in _query_key_value(count, text, name)]))

    def read() -> np.ndarray:
        return np.concatenate([part.read() for part in rows])[order]

    whole = TensorEntry(rows[0].dtype, (count, *rows[0].shape[1:]), read)
    return whole if flat else transposed(whole)


def _query_key_value(width: int, text: DecoderConfig, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Columns of each part: for every key/value head first its query heads, then its key, then its value."""
    heads, group, size = text.key_value_heads, text.num_attention_heads // text.key_value_heads, text.head_size
    _check(width, heads * (group + 2) * size, name)
    columns = np.arange(width).reshape(heads, group + 2, size)  # [key/value heads, queries + 2, head size]
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
