"""The choice of a device and of a precision, seeds and memory."""

from __future__ import annotations

import random

import numpy as np
import pytest

from paddlemix.device import (
    available_kinds,
    check_dtype,
    choice,
    default_dtype,
    device_count,
    peak_memory_bytes,
    random_state,
    report_settings,
    restore_random_state,
    select_device,
    set_seed,
    supported_dtypes,
)
from paddlemix.errors import UserError


def test_cpu_can_always_be_chosen() -> None:
    import paddle

    before = paddle.get_device()
    try:
        assert select_device("cpu") == "cpu"
        assert available_kinds()[-1] == "cpu"
        assert select_device() == paddle.get_device()
    finally:
        paddle.set_device(before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpuu", "device='gpuu' is not one of gpu, npu, xpu, cpu; did you mean 'gpu'"),
        ("", "device='' is not one of"),
        ("cuda:0", "device='cuda:0' is not one of gpu, npu, xpu, cpu"),
        ("cpu:x", "device='cpu:x' cannot be used here .*available: .*cpu"),
    ],
)
def test_a_device_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_device(name)


@pytest.mark.parametrize("kind", ["gpu", "npu", "xpu"])
def test_a_device_that_is_not_here_names_those_that_are(kind: str) -> None:
    if kind in available_kinds():
        pytest.skip(f"this machine has a {kind}")
    with pytest.raises(UserError, match=rf"device='{kind}:0' cannot be used here \(.+\); available: .*cpu.*install"):
        select_device(f"{kind}:0")


def test_paddle_without_a_kind_is_said_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paddle's own error shows a `re.Match` object there."""
    monkeypatch.setattr(choice, "device_count", lambda kind: int(kind == "cpu"))
    with pytest.raises(UserError, match=r"^device='gpu:0' cannot be used here \(paddle finds no gpu\); available: "):
        select_device("gpu:0")


def test_an_error_without_words_is_no_second_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import paddle

    def fail(name: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(paddle, "set_device", fail)
    with pytest.raises(UserError, match="device='cpu' cannot be used here"):
        select_device("cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_refused_on_cpu_alone(dtype: str) -> None:
    with pytest.raises(UserError, match=f'{dtype} cannot be computed on CPU .*"device": "gpu" or "npu"'):
        check_dtype(dtype, "cpu")
    check_dtype(dtype, "npu:0")
    check_dtype("float32", "cpu")


def test_a_seed_fixes_every_generator() -> None:
    import paddle

    def numbers() -> list[float]:
        return [random.random(), float(np.random.rand()), *paddle.rand([2]).tolist()]

    set_seed(2**32 + 5)  # numpy alone takes 32 bits only
    first = numbers()
    set_seed(2**32 + 5)
    assert numbers() == first
    set_seed(6)
    assert all(a != b for a, b in zip(numbers(), first, strict=True))


def test_peak_memory_is_of_this_process() -> None:
    assert 10**7 < peak_memory_bytes("cpu") < 10**12


@pytest.mark.parametrize("device", ["gpu", "npu"])
def test_a_card_that_is_not_there(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(choice, "device_count", lambda kind: 2)
    with pytest.raises(
        UserError, match=rf"device='{device}:2' is not available: .* sees 2 \({device}:0 to {device}:1\)"
    ):
        select_device(f"{device}:2")
    monkeypatch.setenv(f"FLAGS_selected_{device}s", "5")
    with pytest.raises(UserError, match=rf"device='{device}': FLAGS_selected_{device}s=5: there is no {device} 5"):
        select_device(device)


def test_precisions_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import paddle

    assert (supported_dtypes("cpu"), default_dtype("cpu")) == (("float32",), "float32")
    # paddle does not answer for an NPU
    monkeypatch.setattr(paddle.amp, "is_bfloat16_supported", lambda device: pytest.fail("asked"))
    assert default_dtype("npu:0") == "bfloat16"
    check_dtype("float16", "npu:0")
    monkeypatch.setattr(paddle.amp, "is_bfloat16_supported", lambda device: True)
    assert default_dtype("gpu:0") == "bfloat16"
    monkeypatch.setattr(paddle.amp, "is_bfloat16_supported", lambda device: False)
    assert default_dtype("gpu:0") == "float16"
    with pytest.raises(UserError, match="bfloat16 cannot be computed on gpu:0, .*use float16"):
        check_dtype("bfloat16", "gpu:0")


def test_the_state_of_every_generator_is_put_back() -> None:
    import paddle

    def numbers() -> list[float]:
        return [random.random(), float(np.random.rand()), *paddle.rand([2]).tolist()]

    state = random_state()
    first = numbers()
    assert numbers() != first
    restore_random_state(state)
    assert numbers() == first


def test_a_kind_without_devices_has_none() -> None:
    assert (device_count("cpu"), device_count("npu")) == (1, 0)


def test_a_run_says_what_is_set_and_warns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from paddlemix.log import logger

    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with caplog.at_level("INFO"):
        report_settings("cpu")
    texts = [record.getMessage() for record in caplog.records]
    assert any("environment for cpu: " in text and "OMP_NUM_THREADS=many (yours)" in text for text in texts)
    assert any("OMP_NUM_THREADS=many is not a number" in text for text in texts)
