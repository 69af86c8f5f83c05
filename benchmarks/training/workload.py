"""The step that `benchmarks/train.py` times: sizes, start weights and batch, equal for every library.

Only numpy is loaded here, so that a worker's memory is its library's own.
"""

from __future__ import annotations

import argparse
import zlib
from dataclasses import dataclass

import numpy as np

LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0
METHODS = ("lora", "full")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A small LLaVA and one batch for it; names as in config.json.

    Args:
        text_only: no tower; the image positions hold text tokens.
        lora_rank: of the adapters on every linear layer of the decoder; lora_alpha is twice that.
    """

    text_only: bool = False
    lora_rank: int = 8
    batch_size: int = 4
    image_tokens: int = 256
    text_tokens: int = 128
    supervised: int = 83
    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    rms_norm_eps: float = 1e-5
    tower_hidden_size: int = 384
    tower_intermediate_size: int = 1536
    tower_layers: int = 12
    tower_heads: int = 6
    image_size: int = 224
    patch_size: int = 14

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.image_tokens + self.text_tokens

    @property
    def image_token(self) -> int:
        """The id at the positions where transformers inserts image features; occurs nowhere else."""
        return self.vocab_size - 1


@dataclass(frozen=True)
class RawBatch:
    """One batch before any library's own form.

    Args:
        input_ids: int64 [B, L]; `image_token` at the positions of visual tokens.
        supervised: bool [L], positions whose own token is trained.
        pixel_values: float32 [B, 3, H, W], None without tower.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    pixel_values: np.ndarray | None


def draw_batch(work: Workload) -> RawBatch:
    """A begin token, the image, a question, an answer that is trained, and an end of the same length for every row."""
    random = np.random.default_rng(0)
    input_ids = random.integers(3, work.image_token, (work.batch_size, work.length))
    supervised = np.zeros(work.length, dtype=bool)
    supervised[-work.supervised :] = True
    if work.text_only:
        return RawBatch(input_ids, supervised, None)
    input_ids[:, 1 : 1 + work.image_tokens] = work.image_token
    shape = (work.batch_size, 3, work.image_size, work.image_size)
    return RawBatch(input_ids, supervised, random.standard_normal(shape, dtype=np.float32))


def draw_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Start values of a weight, float32, from its name in transformers alone; linear weights are [out, in]."""
    if "norm" in name or name.endswith("bias"):
        return np.full(shape, 1.0 if "norm" in name and "weight" in name else 0.0, "float32")
    random = np.random.default_rng(zlib.crc32(name.encode()))
    return 0.02 * random.standard_normal(shape, dtype=np.float32)


def parse_worker(description: str) -> tuple[str, Workload]:
    """Method and workload from a worker's command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--text-only", action="store_true")
    parser.add_argument("--rank", type=int, default=Workload.lora_rank)
    arguments = parser.parse_args()
    return arguments.method, Workload(text_only=arguments.text_only, lora_rank=arguments.rank)
