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

from paddlemix.checkpoints import load
from paddlemix.errors import UserError
from paddlemix.models.attention import (
    CausalMask,
    DenseMask,
    SegmentedMask,
    SegmentLengths,
    attention_mask,
    packed_segments,
)
from paddlemix.models.cached_decoder import CachedDecoder
from paddlemix.models.kernels import cpu_library, fused, gpu_operators, npu_operators
from paddlemix.models.kernels.fused import (
    FusedKernels,
    KernelSizes,
    choose_kernels,
    cpu_kernels,
    selected_kernels,
    use_plain_kernels,
)
from paddlemix.models.kv_cache import KVCache
from paddlemix.sample import Row
from tests.models.test_packed import SPECS, collate, examples_of, losses_of, model_of
from tests.tiny_models import draw
from tests.tiny_world import World

NAMES = ("attention", "packed_attention", "rms_norm", "rotary", "swiglu")
SMALL = KernelSizes(width=48, inner=40, head_size=16, groups=2)


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

    def swiglu(self, x: Any, y: Any) -> Any:
        self.calls["swiglu"] += 1
        return functional.silu(x) * y

    def npu(self, name: str, *arguments: Any) -> Any:
        """The operators of the NPU plugin, with the arguments that PaddleNLP gives them."""
        if name == "rms_norm_npu":
            return self.fused_rms_norm_ext(*arguments)[0]
        if name == "fused_rope":
            states, cosines, sines = arguments
            named = {"sin": sines, "cos": cosines, "use_neox_rotary_style": False}
            return self.fused_rotary_position_embedding(states, **named)[0]
        assert name == "flash_attention_npu"
        queries, keys, values, *options = arguments
        assert options == [None, None, None, None, 0.0, options[5], True, False, False, False]
        return self.flash_attention(queries, keys, values, causal=options[5])[0]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """Paddle with fused kernels, which compute in float32."""
    found = StandIns()
    for name in ("flash_attention", "flash_attn_unpadded"):
        monkeypatch.setattr(functional.flash_attention, name, getattr(found, name))
    monkeypatch.setattr(npu_operators, "_run", found.npu)
    monkeypatch.setattr(functional, "swiglu", found.swiglu, raising=False)  # paddle before 3.3 has the other alone
    for name in ("fused_rms_norm_ext", "fused_rotary_position_embedding", "swiglu"):
        monkeypatch.setattr(paddle.incubate.nn.functional, name, getattr(found, name))
    monkeypatch.setattr(fused, "PRECISIONS", ("float32",))
    return found


@pytest.mark.parametrize("wanted", [None, True])
@pytest.mark.parametrize("device", ["gpu:0", "npu:0"])
def test_each_kernel_that_gives_the_same_is_taken(stand_ins: StandIns, device: str, wanted: bool | None) -> None:
    """Asked for or not; the NPU's plugin has none for packed rows."""
    names = [name for name in NAMES if device != "npu:0" or name != "packed_attention"]
    assert choose_kernels(wanted, device, "float32", SMALL) == [f"{name}: fused" for name in names]
    assert [name for name in NAMES if getattr(selected_kernels(), name) is not None] == names
    assert [name for name in NAMES if stand_ins.calls[name]] == names


def test_kernels_are_tried_with_the_sizes_of_the_model(stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that supports heads of 64 and 128 alone is not for a model with others."""
    flash = functional.flash_attention.flash_attention

    def picky(query: Any, *arguments: Any, **named: Any) -> Any:
        if query.shape[-1] not in (64, 128):
            raise ValueError(f"head_dim {query.shape[-1]} is not supported")
        return flash(query, *arguments, **named)

    monkeypatch.setattr(functional.flash_attention, "flash_attention", picky)
    assert choose_kernels(None, "gpu:0", "float32", KernelSizes(48, 40, 64, 2))[0] == "attention: fused"
    lines = choose_kernels(None, "gpu:0", "float32", SMALL)
    assert lines[0] == "attention: plain, ValueError: head_dim 16 is not supported"
    assert selected_kernels().attention is None and selected_kernels().rms_norm is not None


def test_what_a_model_is_tried_with() -> None:
    text = model_of("1.5").config.text
    sizes = KernelSizes.of(text)
    assert (sizes.width, sizes.inner, sizes.head_size) == (text.hidden_size, text.intermediate_size, text.head_size)
    assert sizes.groups * text.key_value_heads == text.num_attention_heads


def test_loading_a_model_to_ask_it_chooses(stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """Chat, prediction and everything else that generates load so."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(load, "choose_kernels", lambda *arguments: asked.append(arguments) or [])
    loaded = load.load_pretrained(world.model)
    assert asked == [(None, "cpu", "float32", KernelSizes.of(loaded.model.config.text))]


@pytest.mark.parametrize("length", [1, 3])
def test_decoded_tokens_are_those_of_the_plain_form(stand_ins: StandIns, length: int) -> None:
    """Norms, turned positions and gates of tokens behind a cache."""
    model = model_of("1.5")
    decoder = model.language_model
    embeds = paddle.to_tensor(draw(1, 6 + length, decoder.config.hidden_size))

    def run() -> np.ndarray:
        cache = KVCache(64)
        with paddle.no_grad(), cpu_library.switched_off():
            decoder(embeds[:, :6], paddle.arange(6).unsqueeze(0), None, cache)
            return CachedDecoder(decoder)(embeds[:, 6:], np.arange(6, 6 + length)[None], cache).numpy()

    expected = run()
    choose_kernels(None, "gpu:0", "float32", KernelSizes.of(decoder.config))
    before = dict(stand_ins.calls)
    np.testing.assert_allclose(run(), expected, atol=1e-5)
    for name in ("rms_norm", "rotary", "swiglu"):
        assert stand_ins.calls[name] - before[name] >= 2 * decoder.config.num_hidden_layers


def test_without_the_key_none_is_taken(stand_ins: StandIns) -> None:
    choose_kernels(True, "gpu:0", "float32", SMALL)
    assert choose_kernels(False, "gpu:0", "float32") == ["plain kernels (use_flash_attention false)"]
    assert selected_kernels() == FusedKernels()


@pytest.mark.parametrize("device", ["cpu", "xpu:0"])
def test_other_devices_do_not_even_try(stand_ins: StandIns, device: str) -> None:
    """On CPU paddle's fused RMS norm would end the process."""
    *_, line = choose_kernels(True, device, "float32")
    kernels = (
        "use_flash_attention: paddle has fused kernels" if device == "cpu" else "plain kernels: there are fused ones"
    )
    assert line == f"{kernels} for gpu, npu, not for {device}"
    assert selected_kernels() == FusedKernels() and not any(stand_ins.calls.values())


def test_a_plugin_without_operators_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libother.so").write_bytes(b"not a library")
    monkeypatch.setattr(npu_operators, "plugin_libraries", lambda: [tmp_path / "libother.so"])
    npu_operators.register.cache_clear()
    try:
        line, *kernels = choose_kernels(None, "npu:0", "bfloat16", SMALL)
    finally:
        npu_operators.register.cache_clear()
    assert line.startswith("operators of libother.so: none, RuntimeError: ") and len(line) > 60
    assert [name.partition(":")[0] for name in kernels] == ["attention", "rms_norm", "rotary", "swiglu"]
    assert all(": plain, " in kernel for kernel in kernels[:3]), kernels


# ---- what a CPU has ----


def test_a_cpu_says_which_compiled_kernels_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "missing", lambda: None)
    monkeypatch.setattr(cpu_library, "kind", lambda: "avx2")
    assert choose_kernels(False, "cpu", "float32") == [cpu_kernels()] == ["compiled kernels: avx2"]
    assert choose_kernels(True, "cpu", "float32")[0] == cpu_kernels()


def test_a_cpu_without_them_says_why(
    fresh_library: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PADDLEMIX_CPU_KERNELS", raising=False)
    monkeypatch.setattr(cpu_library, "__file__", str(tmp_path / "cpu_library.py"))
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
    for ask in (cpu_library.missing, cpu_kernels, lambda: cpu_library.is_supported(paddle.ones([2]))):
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
    lines = choose_kernels(True, "gpu:0", "float32", SMALL)
    assert lines[:2] == ["attention: fused", "packed_attention: fused"]
    assert lines[2].startswith("rms_norm: plain, RuntimeError: (NotFound) The kernel `fused_rms_norm_ext`")
    assert lines[3].startswith("rotary: plain, it differs from the plain form by ")
    assert lines[4] == "swiglu: fused"
    assert selected_kernels().rms_norm is None and selected_kernels().rotary is None


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("packed", [True, False])
def test_losses_and_gradients_are_those_of_the_plain_form(stand_ins: StandIns, name: str, packed: bool) -> None:
    examples = examples_of(SPECS[name])
    rows = [Row(tuple(examples[:2])), Row(tuple(examples[2:]))] if packed else examples
    batch, model = collate(rows, SPECS[name].tokens_per_tile), model_of(name)
    losses, grads = losses_of(model, batch)
    choose_kernels(True, "gpu:0", "float32", SMALL)
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
    choose_kernels(True, "gpu:0", "float32", SMALL)
    before = dict(stand_ins.calls)
    monkeypatch.setattr(fused, "PRECISIONS", ("bfloat16",))
    np.testing.assert_allclose(losses_of(model, batch)[0], losses, rtol=1e-6)
    assert stand_ins.calls == before


def test_masks_are_left_to_the_kernel_only_where_it_knows_them(stand_ins: StandIns) -> None:
    choose_kernels(True, "gpu:0", "float32", SMALL)
    runs = SegmentLengths((2, 3))
    found = attention_mask(5, 5, runs, runs)
    assert isinstance(found, CausalMask) and found.starts is not None and found.starts.tolist() == [0, 2, 5]
    assert isinstance(found.as_matrices(), SegmentedMask)
    assert isinstance(attention_mask(5, 5, None, None), CausalMask)
    assert isinstance(attention_mask(5, 5, None, None, 5), CausalMask)
    # a window, tokens behind a cache, padding on the left
    assert isinstance(attention_mask(5, 5, None, None, 4), DenseMask)
    assert isinstance(attention_mask(5, 5, runs, runs, 2), SegmentedMask)
    assert isinstance(attention_mask(2, 5, None, None), DenseMask)
    segments = paddle.to_tensor([[0, 1, 1, 1, 1]])
    assert isinstance(attention_mask(5, 5, segments, segments), DenseMask)
    assert attention_mask(1, 1, None, None) == DenseMask(None)


def test_packed_rows_come_as_lengths_where_a_kernel_takes_these(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    assert isinstance(packed_segments(np.array([[1, 2]])), np.ndarray)
    monkeypatch.undo()
    monkeypatch.setattr(fused, "_chosen", FusedKernels(packed_attention=gpu_operators.packed_attention))
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    assert packed_segments(np.array([[1, 2]])) == SegmentLengths((1, 1))


@pytest.mark.device
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_kernels_of_this_gpu_give_what_the_plain_forms_give(dtype: str) -> None:
    if not (paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
        pytest.skip("needs a GPU")
    lines = choose_kernels(True, paddle.set_device("gpu:0") and "gpu:0", dtype)
    assert lines == [f"{name}: fused" for name in NAMES]
