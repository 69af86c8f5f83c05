"""Which compiled kernels are loaded, what they take, and what computes where there are none."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import paddle
import pytest

from paddlemix.models.cached_decoder import CachedDecoder
from paddlemix.models.kernels import cpu, cpu_library
from paddlemix.models.kernels.attention_functions import AttentionFunction
from paddlemix.models.kernels.cached_constants import cached_constant
from paddlemix.models.kernels.functions import GatedFunction, RMSNormFunction, RotaryFunction
from paddlemix.models.kv_cache import KVCache
from paddlemix.models.rotary import _half_turn
from paddlemix.trainer.loss import LossModel
from tests.kernels_built import REQUIRED, need_kernels
from tests.tiny_models import draw, tiny_model

EVERY_FEATURE = tuple(sorted(set.union(*cpu_library._KINDS.values())))
Break = Callable[[pytest.MonkeyPatch, Path], None]


def no_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("PADDLEMIX_CPU_KERNELS", raising=False)
    monkeypatch.setattr(cpu_library, "openmp", lambda: object())
    monkeypatch.setattr(cpu_library, "__file__", str(folder / "cpu_library.py"))


def a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "_cpu_kernels_plain.so").write_bytes(b"")
    no_file(monkeypatch, folder)


def another_version(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    need_kernels()
    monkeypatch.setattr(cpu_library, "_VERSION", 10**6)


def a_function_is_missing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    need_kernels()
    monkeypatch.setitem(cpu_library._ARGUMENTS, "a_later_function", ())


def no_openmp(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    need_kernels()
    monkeypatch.setattr(cpu_library, "openmp", lambda: None)


def switched_off_by_the_user(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PADDLEMIX_CPU_KERNELS", "0")


BUILT = pytest.mark.usefixtures("kernels")
BREAKS = [
    pytest.param(no_file, "they were not built; install a C compiler", id="no file"),
    pytest.param(a_file_that_is_no_library, r"_cpu_kernels_plain.so cannot be loaded \(.*\); install", id="no library"),
    pytest.param(another_version, "is of another version of paddlemix; install", id="version"),
    pytest.param(a_function_is_missing, "is of another version of paddlemix; install", id="function"),
    pytest.param(no_openmp, "OpenMP runtime cannot be loaded", id="no OpenMP"),
    pytest.param(switched_off_by_the_user, "PADDLEMIX_CPU_KERNELS=0 switches them off; unset it", id="switch"),
]


def everything(seed: int = 0) -> list[np.ndarray]:
    """Loss and gradients of a tiny model on a text, a tower's features without gradients, and decoded tokens."""
    model = tiny_model(seed=seed)
    ids = paddle.to_tensor([[3, 1, 4, 1, 5, 9, 2]])
    inputs = {"input_ids": ids, "position_ids": paddle.arange(7).unsqueeze(0)}
    loss, _ = LossModel(model)(paddle.to_tensor([1, 2, 5]), paddle.to_tensor([5, 0, 36]), **inputs)
    loss.backward()
    found = [loss.numpy(), *(part.grad.numpy() for part in model.parameters() if part.grad is not None)]
    cache, decoder = KVCache(), model.language_model
    with paddle.no_grad():
        found.append(model.vision_tower(paddle.to_tensor(draw(2, 3, 6, 6))).numpy())
        decoder(paddle.to_tensor(draw(2, 3, 12)), paddle.arange(3).unsqueeze(0).expand([2, -1]), cache=cache)
    for place in (3, 4):
        found.append(CachedDecoder(decoder)(paddle.to_tensor(draw(2, 1, 12)), np.full((2, 1), place), cache).numpy())
    return found


@pytest.mark.parametrize(("breaks", "reason"), BREAKS)
def test_without_kernels_all_is_computed_and_it_is_said_why(
    fresh_library: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, breaks: Break, reason: str
) -> None:
    before = everything()
    breaks(monkeypatch, tmp_path)
    fresh_library()
    assert re.search(reason, cpu_library.missing() or ""), cpu_library.missing()
    assert cpu_library.kind() is None and not cpu_library.is_supported(paddle.ones([2]))
    states = paddle.ones([1, 2, 1, 2])
    assert not cpu.supports_attention(states, states, states, None)
    assert not cpu.supports_rotation(states, states, states)
    for found, expected in zip(everything(), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@BUILT
def test_what_is_compared_is_computed_in_two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that a model of float32 weights needs takes part in one form, none in the other."""
    called = set()

    def watched(name: str, *arguments: Any) -> None:
        called.add(name)
        call(name, *arguments)

    call = cpu_library.call
    monkeypatch.setattr(cpu_library, "call", watched)
    with cpu_library.switched_off():
        everything()
    assert not called
    everything()
    quantized = {name for name in cpu_library._ARGUMENTS if name.startswith(("int8_", "nf4_"))}  # tests/peft
    assert called == set(cpu_library._ARGUMENTS) - quantized


# ---- which library ----


@pytest.fixture
def opened(fresh_library: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Names of the libraries that are opened, out of one for each kind; none of them is real."""
    names: list[str] = []

    def open_library(path: str) -> Mock:
        names.append(Path(path).name)
        library = Mock()
        library.kernels_version.return_value = cpu_library._VERSION
        return library

    for kind in cpu_library._KINDS:
        (tmp_path / f"_cpu_kernels_{kind}.cpython-311-x86_64-linux-gnu.so").touch()
    no_file(monkeypatch, tmp_path)
    monkeypatch.setattr(ctypes, "CDLL", open_library)
    yield names


@pytest.mark.parametrize(
    ("lacks", "kind"),
    [((), "avx512"), (("avx512bw",), "avx2"), (("avx512f", "fma"), "plain"), (EVERY_FEATURE, "plain")],
)
def test_a_processor_gets_the_best_that_it_can_run(
    opened: list[str], monkeypatch: pytest.MonkeyPatch, lacks: tuple[str, ...], kind: str
) -> None:
    has = {"sse2", *EVERY_FEATURE} - {*lacks}
    monkeypatch.setattr(cpu_library, "_processor_features", lambda: has)
    assert cpu_library.missing() is None and cpu_library.kind() == kind
    assert cpu_library.missing() is None and opened == [f"_cpu_kernels_{kind}.cpython-311-x86_64-linux-gnu.so"]


def test_a_kind_that_was_not_built_is_passed_over(
    opened: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu_library, "_processor_features", lambda: {*EVERY_FEATURE})
    next(tmp_path.glob("_cpu_kernels_avx512.*")).unlink()
    assert cpu_library.kind() == "avx2" and opened == ["_cpu_kernels_avx2.cpython-311-x86_64-linux-gnu.so"]


def test_processors_of_another_make_get_the_plain_kind(opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library.platform, "machine", lambda: "aarch64")
    assert cpu_library._processor_features() == set() and cpu_library.kind() == "plain"


# ---- what is taken ----


@BUILT
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64"])
def test_float32_alone_is_taken(dtype: str) -> None:
    other, states = paddle.ones([2, 3]).astype(dtype), paddle.ones([2, 3])
    assert cpu_library.is_supported(states) and cpu_library.is_supported(states, states) and cpu_library.is_supported()
    assert cpu_library.is_supported(states, other) is cpu_library.is_supported(other, states) is (dtype == "float32")


@BUILT
def test_nothing_is_taken_where_they_are_switched_off() -> None:
    states = paddle.ones([1, 2, 1, 2])
    for _ in range(2):
        assert cpu.supports_attention(states, states, states, None) and cpu.supports_rotation(*[states] * 3)
        with pytest.raises(KeyError), cpu_library.switched_off(), cpu_library.switched_off():
            assert not cpu_library.is_supported(states) and not cpu.supports_rotation(*[states] * 3)
            assert not cpu.supports_attention(states, states, states, None) and cpu_library.missing() is None
            raise KeyError


@BUILT
def test_a_view_is_not_taken() -> None:
    """Paddle makes copies here, unless it is told to give views."""
    before = paddle.get_flags("FLAGS_use_stride_kernel")
    paddle.set_flags({"FLAGS_use_stride_kernel": True})
    try:
        whole = paddle.to_tensor(draw(4, 6))
        assert cpu_library.is_supported(whole) and not cpu_library.is_supported(whole.transpose([1, 0]))
        assert not cpu_library.is_supported(whole[:, 2:4]) and not cpu_library.is_supported(whole, whole[:, ::2])
        part = whole[2:]  # contiguous, but it begins in the middle
        assert cpu_library.is_supported(part)
        wanted = draw(4, 6)[2:] + draw(6, seed=2)
        np.testing.assert_array_equal(cpu.add_bias_(part, paddle.to_tensor(draw(6, seed=2))).numpy(), wanted)
    finally:
        paddle.set_flags(before)


@BUILT
def test_gradients_that_are_views_are_computed_all_the_same() -> None:
    """A backward pass may get a transposed gradient."""
    results = []
    before = paddle.get_flags("FLAGS_use_stride_kernel")
    for strided in (False, True):
        paddle.set_flags({"FLAGS_use_stride_kernel": strided})
        try:
            results.append(gradients_of_a_transposed_sum())
        finally:
            paddle.set_flags(before)
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def gradients_of_a_transposed_sum() -> list[np.ndarray]:
    angles = paddle.to_tensor(np.tile(draw(5, 3, 1, 2), 2))
    functions: list[tuple[Callable[..., paddle.Tensor], int]] = [
        (lambda a, b: RMSNormFunction.apply(a, b[0, 0, 0], 1e-5), 2),
        (GatedFunction.apply, 2),
        (lambda a: RotaryFunction.apply(a, paddle.cos(angles), paddle.sin(angles), cached_constant(_half_turn, 4)), 1),
        (lambda a, b, c: AttentionFunction.apply(a, b, c, None, None), 3),
    ]
    found = []
    for function, count in functions:
        inputs = [paddle.to_tensor(draw(5, 3, 2, 4, seed=seed), stop_gradient=False) for seed in range(count)]
        weights = paddle.to_tensor(draw(4, 2, 3, 5, seed=9))
        (function(*inputs).transpose([3, 2, 1, 0]) * weights).sum().backward()
        found += [part.grad.numpy() for part in inputs]
    return found


_EVERY_EXPONENTIAL = r"""
#include "cpu_kernels.c"
#include <math.h>
int omp_get_thread_num(void) { return 0; }
int main(void)
{
    const float ends[] = {NAN, -NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 87.0f, -87.0f, 0.0f};
    for (int i = 0; i < 9; i++)
        if (isnan(ends[i]) != isnan(exponential(ends[i]))) return 1;
    return 0;
}
"""


def test_nothing_in_the_exponential_is_undefined(tmp_path: Path) -> None:
    """What C leaves undefined ends a program that is built with this sanitizer: a NaN as an integer, for one."""
    compiler = shutil.which("gcc")
    if compiler is None:  # as for the kernels themselves: an error where the environment requires these
        (pytest.fail if os.environ.get(REQUIRED) == "1" else pytest.skip)("there is no gcc")
    (tmp_path / "check.c").write_text(_EVERY_EXPONENTIAL, encoding="utf-8")
    sources = Path(cpu_library.__file__).parent
    flags = ["-O1", "-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-I", str(sources)]
    built = subprocess.run(
        [compiler, *flags, str(tmp_path / "check.c"), "-lm", "-o", str(tmp_path / "check")],
        capture_output=True,
        text=True,
    )
    if "ubsan" in built.stderr:
        pytest.skip("gcc has no library for its sanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(tmp_path / "check")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
