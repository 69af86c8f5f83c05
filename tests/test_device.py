"""The environment that paddle reads, the choice of a device, and seeds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paddlemix import device
from paddlemix.device import (
    available_kinds,
    check_dtype,
    peak_memory_bytes,
    prepare_environment,
    select_device,
    set_seed,
)
from paddlemix.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("OMP_NUM_THREADS", "GLOG_minloglevel", "MKL_DEBUG_CPU_TYPE", "FLAGS_use_stride_kernel")


def prepared(monkeypatch: pytest.MonkeyPatch, amd: bool = False, accelerator: bool = False) -> dict[str, str]:
    """What `prepare_environment` sets as long as paddle is not loaded."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device, "_is_amd", lambda: amd)
    monkeypatch.setattr(device, "_accelerator_expected", lambda: accelerator)
    monkeypatch.setattr(device, "_keep_freed_memory", lambda: None)  # it acts on this whole process
    monkeypatch.setattr(device, "_import_quietly", lambda: None)  # it is loaded already
    monkeypatch.delitem(sys.modules, "paddle", raising=False)
    prepare_environment()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back every variable that a test lets the module set."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_cpu_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"OMP_NUM_THREADS": str(os.cpu_count()), "GLOG_minloglevel": "1", "FLAGS_use_stride_kernel": "0"}
    assert prepared(monkeypatch) == plain
    assert prepared(monkeypatch, amd=True) == {**plain, "MKL_DEBUG_CPU_TYPE": "5"}


def test_an_accelerator_keeps_its_views(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "FLAGS_use_stride_kernel" not in prepared(monkeypatch, accelerator=True)


def test_what_the_user_exported_wins() -> None:
    script = "import os, paddlemix.device as d; d.prepare_environment(); print(os.environ['OMP_NUM_THREADS'])"
    exported = {**os.environ, "OMP_NUM_THREADS": "7"}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=exported, capture_output=True, text=True)
    assert result.stdout.strip() == "7", result.stderr


def test_once_paddle_is_loaded_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "paddle", object())
    prepare_environment()
    assert not set(NAMES) & set(os.environ)


def test_the_packages_that_need_paddle_prepare_it_first() -> None:
    """A fresh process that imports only the model has the settings before paddle."""
    script = f"import json, os, paddlemix.models; print(json.dumps({{n: os.environ.get(n) for n in {NAMES!r}}}))"
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert json.loads(result.stdout)["OMP_NUM_THREADS"] == str(os.cpu_count()), result.stderr


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
    check_dtype(dtype, "gpu:0")
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
