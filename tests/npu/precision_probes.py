"""What `tests.npu.probes` prints of a whole model's losses, token by token, in half precision."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import numpy as np
import paddle

from paddlemix.models.configuration import DecoderConfig, LlavaConfig
from paddlemix.models.llava import LlavaModel
from paddlemix.trainer import loss as module
from paddlemix.trainer.loss import LossModel

LEVELS = [(dtype, level) for dtype in ("float16", "bfloat16") for level in ("O1", "O2")]
VOCABULARY, LENGTH, OUTLIER = 97, 24, 2000.0
SPREAD = {"embed_tokens": 1.0, "lm_head": 0.8}  # of weights, others 0.2: losses from nearly 0 to many nats


def token_losses() -> dict[str, Any]:
    """Of each level and each of a row's tokens, one at a time: "loss" in float32 on the same weights, "apart" from
    that, "error" beside the loss of the same logits in float64, "slope" the largest relative error of a gradient of
    these logits.

    The first token has an activation of 2,000, as every Llama's; every second target is the likeliest token.
    """
    exact = [_Token(None, None, place) for place in range(LENGTH)]
    found: dict[str, Any] = {}
    for dtype, level in LEVELS:
        tokens = [_Token(dtype, level, place) for place in range(LENGTH)]
        found[f"{dtype} {level}"] = {
            "loss": [token.loss for token in exact],
            "apart": [abs(token.loss - other.loss) for token, other in zip(tokens, exact, strict=True)],
            "error": [abs(token.loss - token.wanted_loss) for token in tokens],
            "slope": [token.slope_error() for token in tokens],
        }
    return found


class _Token:
    """A loss and what it is made of.

    Args:
        dtype, level: of autocast; None computes in float32.
        place: of the token, in the row.
    """

    def __init__(self, dtype: str | None, level: str | None, place: int) -> None:
        model, target = _model(dtype if level == "O2" else None), _target(place)
        ids = paddle.to_tensor(_IDS[None])
        inputs = {"input_ids": ids, "position_ids": paddle.arange(LENGTH).unsqueeze(0)}
        inputs |= {"loss_index": paddle.to_tensor([place]), "loss_targets": paddle.to_tensor([target])}
        made, kept = module._cross_entropy, []

        def watched(logits: paddle.Tensor, targets: paddle.Tensor) -> Any:
            kept.append(logits.astype("float32").numpy())
            result = made(logits, targets)
            kept.append(result[2].astype("float32").numpy())
            return result

        half = contextlib.nullcontext() if dtype is None else paddle.amp.auto_cast(True, level=level, dtype=dtype)
        with half, mock.patch.object(module, "_cross_entropy", watched):
            self.loss = float(model(**inputs)[0])
        logits, self._slopes = (part.reshape(-1).astype(np.float64) for part in kept)
        shares = np.exp(logits - logits.max())
        self.wanted_loss = float(np.log(shares.sum()) + logits.max() - logits[target])
        self._wanted = shares / shares.sum() - np.eye(VOCABULARY)[target]

    def slope_error(self) -> float:
        """Relative, of the gradients that float16 holds with all of its bits; what float32 loses in the difference of
        1 and a share near it is left out."""
        held = np.abs(self._wanted) > 2.0**-14
        errors = np.maximum(np.abs(self._slopes - self._wanted) - 2.0**-22, 0) / np.abs(self._wanted)
        return float(errors[held].max(initial=0.0))


_random = np.random.default_rng(4)
_IDS = _random.integers(3, VOCABULARY, LENGTH)
_IDS[0] = 1
_OTHERS = _random.integers(0, VOCABULARY, LENGTH)
_models: dict[str | None, LossModel] = {}
_likeliest: list[int] = []


def _target(place: int) -> int:
    if not _likeliest:
        model = _model(None).model
        states = model(paddle.to_tensor(_IDS[None]), paddle.arange(LENGTH).unsqueeze(0))
        _likeliest.extend(model.logits(states)[0].argmax(axis=-1).tolist())
    return int(_OTHERS[place] if place % 2 else _likeliest[place])


def _spread(name: str) -> float:
    return next((spread for part, spread in SPREAD.items() if part in name), 0.2)


def _model(dtype: str | None) -> LossModel:
    if dtype not in _models:
        random = np.random.default_rng(5)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 64}
        text = DecoderConfig(vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=2, **sizes)
        model = LlavaModel(LlavaConfig(text=text))
        for name, parameter in model.named_parameters():
            values = random.standard_normal(parameter.shape).astype(np.float32)
            values = values * _spread(name) if parameter.ndim > 1 else np.ones_like(values)
            if "embed" in name:
                values[1, 7] = OUTLIER
            parameter.set_value(paddle.to_tensor(values))
        if dtype is not None:
            model.to(dtype=dtype)
        _models[dtype] = LossModel(model)
        _models[dtype].train()
    return _models[dtype]
