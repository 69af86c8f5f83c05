"""Which fused kernels a run takes, and that the model computes the same with them as without; which a CPU has.

No CPU has one, so stand-ins with the signatures and meanings of paddle's take their places, in plain operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle.nn import functional

from paddlemix.errors import UserError
from paddlemix.models import compiled_library, fused
from paddlemix.models.attention import CausalRuns, SegmentBiases, SegmentLengths, attention_bias, packed_segments
from paddlemix.models.fused import FusedKernels, choose_kernels, chosen, cpu_kernels, use_plain_kernels
from paddlemix.sample import Row
from tests.models.test_packed import SPECS, collate, examples_of, losses_of, model_of

NAMES = ("attention", "packed_attention", "rms_norm", "rotary")


@pytest.fixture(autouse=True)
def plain_afterwards() -> Iterator[None]:
    yield
    use_plain_kernels()


def scores_of(queries: paddle.Tensor, keys: paddle.Tensor, scale: float, causal: bool) -> paddle.Tensor:
    """Weights [H, L, S] of [L, H, E] and [S, K, E]."""
    groups = queries.shape[1] // keys.shape[1]
    keys = paddle.concat([keys[:, head // groups].unsqueeze(1) for head in range(queries.shape[1])], axis=1)
    scores = paddle.einsum("lhe,she->hls", queries, keys) * scale
    if causal:
        length, key_length = scores.shape[1:]
        hidden = np.arange(key_length)[None] > np.arange(length)[:, None] + key_length - length
        scores = scores + paddle.to_tensor(np.where(hidden, -1e9, 0).astype(np.float32))
    return functional.softmax(scores, axis=-1)


def weighed(weights: paddle.Tensor, values: paddle.Tensor) -> paddle.Tensor:
    groups = weights.shape[0] // values.shape[1]
    values = paddle.concat([values[:, head // groups].unsqueeze(1) for head in range(weights.shape[0])], axis=1)
    return paddle.einsum("hls,she->lhe", weights, values)


class StandIns:
    """Paddle's four functions, and how often each was called."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys(NAMES, 0)

    def flash_attention(self, query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False) -> Any:
        self.calls["attention"] += 1
        scale = query.shape[-1] ** -0.5
        rows = zip(query, key, value, strict=True)
        return paddle.stack([weighed(scores_of(q, k, scale, causal), v) for q, k, v in rows]), None

    def flash_attn_unpadded(
        self, query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
        max_seqlen_k: int, scale: float, dropout: float = 0.0, causal: bool = False,
    ) -> Any:  # fmt: skip
        self.calls["packed_attention"] += 1
        assert cu_seqlens_q.dtype == paddle.int32
        starts = cu_seqlens_q.tolist()
        assert starts == cu_seqlens_k.tolist() and starts[0] == 0 and starts[-1] == len(query) == len(key)
        assert max_seqlen_q == max_seqlen_k == max(np.diff(starts))
        spans = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
        runs = [weighed(scores_of(query[s], key[s], scale, causal), value[s]) for s in spans]
        return paddle.concat(runs), None

    def fused_rms_norm_ext(self, x: Any, scale: Any, epsilon: float = 1e-5) -> Any:
        self.calls["rms_norm"] += 1
        inverse = paddle.rsqrt((x * x).mean(axis=-1, keepdim=True) + epsilon)
        return x * inverse * scale, inverse

    def fused_rotary_position_embedding(
        self, q: Any, k: Any = None, v: Any = None, sin: Any = None, cos: Any = None, position_ids: Any = None,
        use_neox_rotary_style: bool = True,
    ) -> Any:  # fmt: skip
        self.calls["rotary"] += 1
        assert sin.shape == cos.shape == [1, q.shape[1], 1, q.shape[3]]
        if use_neox_rotary_style:
            even, odd = q[..., 0::2], q[..., 1::2]
            turned = paddle.stack([-odd, even], axis=-1).reshape(q.shape)
        else:
            first, second = q.split(2, axis=-1)
            turned = paddle.concat([-second, first], axis=-1)
        # the real kernel reads one row of angles for all rows of a batch
        return q * cos + turned * sin, k, v


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """Paddle with fused kernels, which compute in float32."""
    found = StandIns()
    for name in ("flash_attention", "flash_attn_unpadded"):
        monkeypatch.setattr(functional.flash_attention, name, getattr(found, name))
    for name in ("fused_rms_norm_ext", "fused_rotary_position_embedding"):
        monkeypatch.setattr(paddle.incubate.nn.functional, name, getattr(found, name))
    monkeypatch.setattr(fused, "PRECISIONS", ("float32",))
    return found


def test_each_kernel_that_gives_the_same_is_taken(stand_ins: StandIns) -> None:
    assert choose_kernels(True, "gpu:0", "float32") == [f"{name}: fused" for name in NAMES]
    assert all(getattr(chosen(), name) is not None for name in NAMES)
    assert all(stand_ins.calls.values())


def test_without_the_key_none_is_taken(stand_ins: StandIns) -> None:
    choose_kernels(True, "gpu:0", "float32")
    assert choose_kernels(False, "gpu:0", "float32") == ["plain kernels (use_flash_attention false)"]
    assert chosen() == FusedKernels()


@pytest.mark.parametrize("device", ["cpu", "npu:0"])
def test_other_devices_do_not_even_try(stand_ins: StandIns, device: str) -> None:
    """On CPU paddle's fused RMS norm would end the process."""
    *_, line = choose_kernels(True, device, "float32")
    kernels = (
        "use_flash_attention: paddle has fused kernels" if device == "cpu" else "plain kernels: paddle has fused ones"
    )
    assert line == f"{kernels} for gpu, not for {device}"
    assert chosen() == FusedKernels() and not any(stand_ins.calls.values())


# ---- what a CPU has ----


def test_a_cpu_says_which_compiled_kernels_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_library, "missing", lambda: None)
    monkeypatch.setattr(compiled_library, "kind", lambda: "avx2")
    assert choose_kernels(False, "cpu", "float32") == [cpu_kernels()] == ["compiled kernels: avx2"]
    assert choose_kernels(True, "cpu", "float32")[0] == cpu_kernels()


def test_a_cpu_without_them_says_why(
    fresh_library: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PADDLEMIX_CPU_KERNELS", raising=False)
    monkeypatch.setattr(compiled_library, "__file__", str(tmp_path / "compiled_library.py"))
    (line,) = choose_kernels(False, "cpu", "float32")
    assert line.startswith("no compiled kernels, paddle's operators alone: they were not built; install a C compiler")


def test_the_switch_is_read_once(fresh_library: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLEMIX_CPU_KERNELS", "0")
    off = cpu_kernels()
    assert off.endswith("alone: PADDLEMIX_CPU_KERNELS=0 switches them off; unset it")
    monkeypatch.setenv("PADDLEMIX_CPU_KERNELS", "1")
    assert cpu_kernels() == off
    fresh_library()
    assert cpu_kernels() != off


def test_a_wrong_value_of_the_switch_is_named(
    fresh_library: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PADDLEMIX_CPU_KERNELS", "off")
    for ask in (compiled_library.missing, cpu_kernels, lambda: compiled_library.takes(paddle.ones([2]))):
        with pytest.raises(UserError, match="PADDLEMIX_CPU_KERNELS=off is neither 0 nor 1; export .*=0 or =1"):
            ask()


# ---- what a GPU has ----


def test_float32_has_none() -> None:
    (line,) = choose_kernels(True, "gpu:0", "float32")
    assert line == "plain kernels: fused ones compute in bfloat16 or float16, not in float32; set bf16 true"


def test_a_kernel_that_fails_or_differs_is_left_out(stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any) -> None:
        raise RuntimeError("(NotFound) The kernel `fused_rms_norm_ext` is not registered.")

    def neighbours(*arguments: Any, **named: Any) -> Any:
        return stand_ins.fused_rotary_position_embedding(*arguments, **{**named, "use_neox_rotary_style": True})

    monkeypatch.setattr(paddle.incubate.nn.functional, "fused_rms_norm_ext", missing)
    monkeypatch.setattr(paddle.incubate.nn.functional, "fused_rotary_position_embedding", neighbours)
    lines = choose_kernels(True, "gpu:0", "float32")
    assert lines[:2] == ["attention: fused", "packed_attention: fused"]
    assert lines[2].startswith("rms_norm: plain, RuntimeError: (NotFound) The kernel `fused_rms_norm_ext`")
    assert lines[3].startswith("rotary: plain, it differs from the plain form by ")
    assert chosen().rms_norm is None and chosen().rotary is None


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("packed", [True, False])
def test_losses_and_gradients_are_those_of_the_plain_form(stand_ins: StandIns, name: str, packed: bool) -> None:
    examples = examples_of(SPECS[name])
    rows = [Row(tuple(examples[:2])), Row(tuple(examples[2:]))] if packed else examples
    batch, model = collate(rows, SPECS[name].tokens_per_tile), model_of(name)
    losses, grads = losses_of(model, batch)
    choose_kernels(True, "gpu:0", "float32")
    before = dict(stand_ins.calls)
    found, found_grads = losses_of(model, batch)
    np.testing.assert_allclose(found, losses, rtol=2e-5, atol=2e-6)
    for weight, grad in grads.items():
        limit = 2e-5 * max(float(np.abs(grad).max()), 1.0)
        np.testing.assert_allclose(found_grads[weight], grad, rtol=0, atol=limit, err_msg=weight)
    used = {kernel for kernel in NAMES if stand_ins.calls[kernel] > before[kernel]}
    assert used == set(NAMES) - (set() if packed else {"packed_attention"})  # the tower's attention is never packed


def test_tensors_of_another_precision_are_computed_plainly(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "1.5"
    batch, model = collate(examples_of(SPECS[name]), SPECS[name].tokens_per_tile), model_of(name)
    losses, _ = losses_of(model, batch)
    choose_kernels(True, "gpu:0", "float32")
    before = dict(stand_ins.calls)
    monkeypatch.setattr(fused, "PRECISIONS", ("bfloat16",))
    np.testing.assert_allclose(losses_of(model, batch)[0], losses, rtol=1e-6)
    assert stand_ins.calls == before


def test_masks_are_left_to_the_kernel_only_where_it_knows_them(stand_ins: StandIns) -> None:
    choose_kernels(True, "gpu:0", "float32")
    runs = SegmentLengths((2, 3))
    found = attention_bias(5, 5, runs, runs)
    assert isinstance(found, CausalRuns) and found.starts is not None and found.starts.tolist() == [0, 2, 5]
    assert isinstance(found.plain(), SegmentBiases)
    assert isinstance(attention_bias(5, 5, None, None), CausalRuns)
    assert isinstance(attention_bias(5, 5, None, None, 5), CausalRuns)
    # a window, tokens behind a cache, padding on the left
    assert isinstance(attention_bias(5, 5, None, None, 4), paddle.Tensor)
    assert isinstance(attention_bias(5, 5, runs, runs, 2), SegmentBiases)
    assert isinstance(attention_bias(2, 5, None, None), paddle.Tensor)
    segments = paddle.to_tensor([[0, 1, 1, 1, 1]])
    assert isinstance(attention_bias(5, 5, segments, segments), paddle.Tensor)
    assert attention_bias(1, 1, None, None) is None


def test_packed_rows_come_as_lengths_where_a_kernel_takes_these(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    assert isinstance(packed_segments(np.array([[1, 2]])), paddle.Tensor)
    monkeypatch.undo()
    monkeypatch.setattr(fused, "_chosen", FusedKernels(packed_attention=fused._flash_packed))
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    assert packed_segments(np.array([[1, 2]])) == SegmentLengths((1, 1))


@pytest.mark.device
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_kernels_of_this_gpu_give_what_the_plain_forms_give(dtype: str) -> None:
    if not (paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
        pytest.skip("needs a GPU")
    lines = choose_kernels(True, paddle.set_device("gpu:0") and "gpu:0", dtype)
    assert lines == [f"{name}: fused" for name in NAMES]
