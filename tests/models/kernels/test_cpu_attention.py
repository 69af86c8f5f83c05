"""Compiled attention, over whole rows and behind a cache, against its formula in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import paddle
import pytest
from paddle.nn import functional

from paddlemix.models.attention import MASKED, attention_bias
from paddlemix.models.kernels import cpu
from tests.tiny_models import draw

pytestmark = pytest.mark.usefixtures("library")

TOLERANCE = 4e-6  # of the largest number


@dataclass(frozen=True)
class Case:
    """Sizes of an attention: B, L, S, H, K, E."""

    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    width: int

    def draw(self) -> list[np.ndarray]:
        """Queries, keys and values."""
        narrow = (self.batch, self.keys, self.key_heads, self.width)
        wide = (self.batch, self.queries, self.heads, self.width)
        return [2 * draw(*wide), 2 * draw(*narrow, seed=2), draw(*narrow, seed=3)]


def plain(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, bias: paddle.Tensor | None) -> paddle.Tensor:
    groups = q.shape[2] // k.shape[2]
    q, k, v = (part.transpose([0, 2, 1, 3]) for part in (q, *(p.repeat_interleave(groups, axis=2) for p in (k, v))))
    scores = paddle.matmul(q, k, transpose_y=True) / math.sqrt(q.shape[-1])
    weights = functional.softmax(scores if bias is None else scores + bias, axis=-1)
    return paddle.matmul(weights, v).transpose([0, 2, 1, 3])


def check(case: Case, bias: paddle.Tensor | None, causal: bool) -> None:
    """Values and the gradients of a weighted sum."""
    arrays, weights = case.draw(), draw(case.batch, case.queries, case.heads, case.width, seed=4)
    wide = [paddle.to_tensor(array.astype(np.float64), stop_gradient=False) for array in arrays]
    outputs = plain(*wide, None if bias is None else bias.astype("float64"))
    grads = paddle.grad([outputs], wide, [paddle.to_tensor(weights.astype(np.float64))])
    states = [paddle.to_tensor(array) for array in arrays]
    assert cpu.supports_attention(*states, bias)
    found = [cpu.attention(*states, bias, causal)]
    found += cpu.attention_backward(paddle.to_tensor(weights), *states, bias, causal)
    largest = max(part.abs().max().item() for part in grads)  # one key alone leaves the scores no gradient but rounding
    for number, (one, other) in enumerate(zip(found, [outputs, *grads], strict=True)):
        assert one.shape == other.shape and one.dtype == paddle.float32
        scale = other.abs().max().item() if number == 0 else largest
        assert np.abs(one.numpy() - other.numpy()).max() <= TOLERANCE * scale, number


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 1, 1, 1, 1),
        Case(2, 1, 5, 3, 3, 4),
        Case(1, 3, 17, 2, 1, 3),
        Case(2, 17, 3, 6, 2, 17),
        Case(1, 300, 300, 2, 2, 8),
        Case(1, 130, 64, 4, 1, 64),
        Case(1, 150, 1500, 2, 1, 4),  # blocks of 87 queries
        Case(1, 40, 9000, 1, 1, 4),  # blocks of 16
    ],
    ids=str,
)
def test_without_a_bias(case: Case) -> None:
    check(case, None, causal=False)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 1, 1, 1, 2),
        Case(2, 7, 7, 3, 3, 4),
        Case(2, 6, 9, 6, 2, 5),
        Case(1, 300, 300, 4, 2, 16),
        Case(2, 129, 333, 2, 1, 8),
        Case(1, 150, 1500, 1, 1, 4),
    ],
    ids=str,
)
def test_causal(case: Case, causal: bool) -> None:
    """With and without leaving out what the bias hides."""
    places = np.arange(case.keys - case.queries, case.keys)[:, None]
    check(case, paddle.to_tensor(np.where(np.arange(case.keys) > places, MASKED, 0).astype("float32")), causal)


@pytest.mark.parametrize("window", [1, 3, 200])
def test_a_window(window: int) -> None:
    for case in (Case(2, 7, 7, 3, 3, 4), Case(1, 300, 300, 2, 1, 8), Case(1, 150, 260, 2, 2, 8)):
        bias = attention_bias(case.queries, case.keys, None, None, window)
        assert isinstance(bias, paddle.Tensor) and len(bias.shape) == 2
        check(case, bias, causal=True)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("case", [Case(3, 5, 5, 4, 2, 3), Case(3, 3, 17, 2, 2, 8), Case(3, 140, 200, 2, 1, 4)], ids=str)
def test_a_bias_for_each_row_or_for_all(case: Case, rows: int) -> None:
    check(case, paddle.to_tensor(3 * draw(rows, 1, case.queries, case.keys, seed=5)), causal=False)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (4, 1), (1, 5), (5,), (2, 4, 5), (1, 1, 1, 5)], ids=str)
def test_a_bias_of_another_shape_is_not_taken(shape: tuple[int, ...]) -> None:
    queries, keys = paddle.zeros([2, 4, 3, 8]), paddle.zeros([2, 5, 3, 8])
    assert cpu.supports_attention(queries, keys, keys, paddle.zeros([4, 5]))
    assert not cpu.supports_attention(queries, keys, keys, paddle.zeros(shape))
    assert not cpu.supports_attention(queries, keys, keys, paddle.zeros([4, 5], dtype="float64"))


def test_a_row_whose_every_key_is_masked_stays_finite() -> None:
    case = Case(1, 3, 20, 2, 1, 4)
    bias = paddle.to_tensor(np.where(np.arange(3)[:, None] == 1, MASKED, draw(3, 20)).astype("float32"))
    states = [paddle.to_tensor(array) for array in case.draw()]
    output = cpu.attention(*states, bias, False)
    # their sums with the scores are equal, because those are lost in them
    np.testing.assert_allclose(output.numpy()[0, 1, 1], states[2].numpy()[0, :, 0].mean(axis=0), atol=1e-6)
    for part in cpu.attention_backward(paddle.ones_like(output), *states, bias, False):
        assert np.isfinite(part.numpy()).all()


def test_hidden_keys_count_for_nothing_at_all() -> None:
    """However large their values: their weight is 0, not small."""
    case = Case(1, 4, 4, 1, 1, 4)
    bias = attention_bias(4, 4, None, None)
    arrays = case.draw()
    for causal in (True, False):
        wanted = cpu.attention(*map(paddle.to_tensor, arrays), bias, causal).numpy()
        changed = arrays[2].copy()
        changed[:, 3] = 1e30
        found = cpu.attention(*map(paddle.to_tensor, (*arrays[:2], changed)), bias, causal).numpy()
        np.testing.assert_array_equal(found[:, :3], wanted[:, :3])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_spoils_its_row_alone(value: float) -> None:
    arrays = Case(2, 5, 9, 4, 2, 3).draw()
    wanted = cpu.attention(*map(paddle.to_tensor, arrays), None, False).numpy()
    arrays[0][1, 2, 3, 0] = value
    found = cpu.attention(*map(paddle.to_tensor, arrays), None, False).numpy()
    assert np.isnan(found[1, 2, 3]).all()
    found[1, 2, 3] = wanted[1, 2, 3]
    np.testing.assert_array_equal(found, wanted)


# ---- behind a cache ----


@dataclass(frozen=True)
class Behind:
    """New tokens of rows with hidden leading places, behind a cache."""

    hidden: tuple[int, ...]
    tokens: int
    heads: int
    key_heads: int
    width: int
    held: int
    room: int
    window: int | None = None

    @property
    def batch(self) -> int:
        return len(self.hidden)

    def seen(self, row: int, token: int) -> list[int]:
        """Places that a new token looks at."""
        end = self.held + token + 1
        return [place for place in range(self.hidden[row], end) if self.window is None or place > end - 1 - self.window]


def turned(states: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    first, second = np.split(states.astype(np.float64), 2, axis=-1)
    return states * cosines + np.concatenate([-second, first], axis=-1) * sines


def expected(
    case: Behind, states: list[np.ndarray], tables: tuple[np.ndarray, np.ndarray], buffers: list[np.ndarray]
) -> np.ndarray:
    """[B, L, H, E], token by token; the buffers [B, K, R, E] take up the new keys and values."""
    queries, keys = (turned(part, *tables) for part in states[:2])
    places = slice(case.held, case.held + case.tokens)
    for buffer, part in zip(buffers, (keys, states[2]), strict=True):
        buffer[:, :, places] = part.transpose(0, 2, 1, 3)
    result = np.empty_like(queries)
    for row, token, head in np.ndindex(case.batch, case.tokens, case.heads):
        own, seen = head // (case.heads // case.key_heads), case.seen(row, token)
        scores = buffers[0][row, own, seen] @ queries[row, token, head] / math.sqrt(case.width)
        weights = np.exp(scores - scores.max())
        result[row, token, head] = weights @ buffers[1][row, own, seen] / weights.sum()
    return result


@pytest.mark.parametrize(
    "case",
    [
        Behind((0,), 1, 1, 1, 2, held=1, room=2),
        Behind((0,), 1, 4, 2, 6, held=5, room=64),
        Behind((0, 3, 5), 1, 4, 4, 6, held=5, room=8),
        Behind((2, 0), 3, 6, 2, 34, held=7, room=10),
        Behind((0, 6), 9, 3, 1, 64, held=60, room=128),
        Behind((0, 4), 2, 4, 2, 6, held=9, room=16, window=1),
        Behind((0, 7), 4, 4, 2, 10, held=9, room=16, window=3),
        Behind((0, 7), 4, 4, 2, 10, held=9, room=64, window=12),
        Behind((1,), 2, 2, 1, 130, held=330, room=384),
    ],
    ids=str,
)
def test_new_tokens_behind_a_cache(case: Behind) -> None:
    """What no token sees is no number in the buffers: it is neither read nor changed."""
    wide = (case.batch, case.tokens, case.heads, case.width)
    narrow = (case.batch, case.tokens, case.key_heads, case.width)
    states = [draw(*wide), draw(*narrow, seed=2), draw(*narrow, seed=3)]
    angles = np.tile(5 * draw(case.batch, case.tokens, 1, case.width // 2, seed=4), 2)
    tables = np.cos(angles), np.sin(angles)
    held = [draw(case.batch, case.key_heads, case.room, case.width, seed=seed) for seed in (5, 6)]
    for row in range(case.batch):
        seen = {place for token in range(case.tokens) for place in case.seen(row, token)}
        for buffer in held:
            buffer[row, :, [place for place in range(case.room) if place not in seen]] = np.nan
    buffers = [paddle.to_tensor(part.reshape(-1, case.width)) for part in held]
    addresses = [part.data_ptr() for part in buffers]
    heads, hidden = (case.heads, case.key_heads), paddle.to_tensor(np.array(case.hidden))
    tokens = cpu.CachedTokens(heads, tuple(map(paddle.to_tensor, tables)), hidden, case.room, case.held, case.window)
    flat = [paddle.to_tensor(part.reshape(case.batch * case.tokens, -1)) for part in states]

    found = cpu.attend_cached_(tokens, *flat, tuple(buffers))
    wanted = expected(case, states, tables, held)
    assert found is flat[0]
    assert np.abs(found.numpy().reshape(wide) - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    np.testing.assert_array_equal(flat[1].numpy(), states[1].reshape(flat[1].shape))
    new = slice(case.held, case.held + case.tokens)
    for buffer, part, address in zip(buffers, held, addresses, strict=True):
        assert buffer.data_ptr() == address
        after = buffer.numpy().reshape(part.shape)
        np.testing.assert_allclose(after[:, :, new], part[:, :, new], atol=2e-6)
        rest = np.delete(np.arange(case.room), new)
        np.testing.assert_array_equal(after[:, :, rest], part[:, :, rest])


def test_a_token_that_is_no_number_spoils_its_own_row_alone() -> None:
    results = []
    for value in (1.0, float("nan")):
        queries = draw(2, 2 * 6)
        queries[1, 7] = value
        heads = (2, 1)
        angles = paddle.ones([2, 1, 1, 6]), paddle.zeros([2, 1, 1, 6])
        tokens = cpu.CachedTokens(heads, angles, paddle.zeros([2], dtype="int64"), 8, 5, None)
        keys, buffers = paddle.to_tensor(draw(2, 6, seed=2)), [paddle.to_tensor(draw(16, 6, seed=3)) for _ in range(2)]
        found = cpu.attend_cached_(tokens, paddle.to_tensor(queries), keys, keys, tuple(buffers))
        results.append(found.numpy().reshape(2, 2, 6))
    assert np.isnan(results[1][1, 1]).all()
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1, 0], results[1][1, 0])


def test_threads_do_not_get_in_each_others_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough work for them to meet; sums that they share differ by rounding alone."""
    case, heads = Case(2, 250, 250, 16, 8, 16), (16, 4)
    states, bias = [paddle.to_tensor(array) for array in case.draw()], attention_bias(250, 250, None, None)
    rows, weight, grads = (paddle.to_tensor(draw(*shape)) for shape in ((20_000, 17), (17,), (20_000, 17)))
    angles = paddle.ones([4, 3, 1, 64]), paddle.zeros([4, 3, 1, 64])
    parts = [draw(12, width * 64, seed=width) for width in (16, 4, 4)]
    buffers = tuple(paddle.to_tensor(draw(4 * 4 * 512, 64, seed=seed)) for seed in (5, 6))

    def run(threads: int) -> list[paddle.Tensor]:
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        tokens = cpu.CachedTokens(heads, angles, paddle.zeros([4], dtype="int64"), 512, 500, None)
        outputs, scales = cpu.rms_norm(rows, weight, 1e-5)
        return [
            cpu.attention(*states, bias, True),
            *cpu.attention_backward(states[0], *states, bias, True),
            cpu.attend_cached_(tokens, *map(paddle.to_tensor, parts), buffers),
            outputs,
            *cpu.rms_norm_backward(grads, rows, weight, scales, True),
        ]

    alone = run(1)
    for _ in range(3):
        for number, (found, expected) in enumerate(zip(run(4), alone, strict=True)):
            assert (found - expected).abs().max().item() <= 1e-4 * expected.abs().max().item(), number
