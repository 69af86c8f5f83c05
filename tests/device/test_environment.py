"""What is set before paddle loads: per device kind, and never over what a user exported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paddlemix.device import environment as module
from paddlemix.device.environment import Prepared, expected_kind, in_force, is_on, plugin_folder, prepare_environment
from paddlemix.device.setting_row import DEVICE_KINDS
from paddlemix.device.settings import SETTINGS, settings_of, value_of
from paddlemix.device.settings_of_processes import PROCESS_SETTINGS
from paddlemix.device.settings_text import settings_table
from paddlemix.device.started import Started
from paddlemix.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = sorted({setting.name for setting in SETTINGS if setting.form != "call"})
LAUNCHED = {"PADDLE_TRAINERS_NUM": "4", "PADDLE_LOCAL_SIZE": "2"}
# Source: PaddleMIX 6afaf05d, the NPU section of paddlemix/examples/llava/README.md
UPSTREAM = {
    "ASCEND_RT_VISIBLE_DEVICES": "8",
    "FLAGS_npu_storage_format": "0",
    "FLAGS_use_stride_kernel": "0",
    "FLAGS_npu_jit_compile": "0",
    "FLAGS_npu_scale_aclnn": "True",
    "FLAGS_npu_split_aclnn": "True",
    "FLAGS_allocator_strategy": "auto_growth",
    "CUSTOM_DEVICE_BLACK_LIST": "set_value,set_value_with_tensor",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back every variable that a test lets the module set, and what it remembers."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(module, "_prepared", None)


def prepared(monkeypatch: pytest.MonkeyPatch, kind: str = "cpu", amd: bool = False, **exported: str) -> dict[str, str]:
    """What `prepare_environment` leaves as long as paddle is not loaded."""
    for name in (*NAMES, *LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    os.environ.update(exported)
    monkeypatch.setattr(module, "_is_amd", lambda: amd)
    monkeypatch.setattr(module, "expected_kind", lambda: kind)
    monkeypatch.setattr(module, "_keep_freed_memory", lambda: True)  # it acts on this whole process
    monkeypatch.setattr(module, "_import_quietly", lambda: None)  # it is loaded already
    monkeypatch.delitem(sys.modules, "paddle", raising=False)
    prepare_environment()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_cpu_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"OMP_NUM_THREADS": str(os.cpu_count()), "GLOG_minloglevel": "1", "KMP_BLOCKTIME": "1"}
    plain["MKL_DISABLE_FAST_MM"] = "1"
    assert prepared(monkeypatch) == {**plain, "FLAGS_use_stride_kernel": "0"}
    assert prepared(monkeypatch, amd=True) == {**plain, "FLAGS_use_stride_kernel": "0", "MKL_DEBUG_CPU_TYPE": "5"}


def test_npu_settings_are_those_of_paddlemix_but_for_the_list_that_is_not_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = prepared(monkeypatch, "npu")
    common = {"OMP_NUM_THREADS": str(os.cpu_count()), "GLOG_minloglevel": "1"}
    yours = ("CUSTOM_DEVICE_BLACK_LIST", "ASCEND_RT_VISIBLE_DEVICES")
    listed = {name: value for name, value in UPSTREAM.items() if name not in yours}
    assert found == {**common, **listed}
    assert {row.name: row.upstream for row in SETTINGS if row.upstream is not None} == UPSTREAM


def test_a_gpu_keeps_its_views_and_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared(monkeypatch, "gpu").keys() == {"OMP_NUM_THREADS", "GLOG_minloglevel"}


def test_several_processes_share_the_cores_and_wait_longer_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paddle's gloo ends a process with a line of level INFO as its only words, so these are shown on CPU."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    here, gpu, npu = (prepared(monkeypatch, kind, **LAUNCHED) for kind in ("cpu", "gpu", "npu"))
    assert (here["OMP_NUM_THREADS"], here["GLOG_minloglevel"], gpu["GLOG_minloglevel"]) == ("4", "0", "1")
    assert gpu.keys() == {"OMP_NUM_THREADS", "GLOG_minloglevel", "PADDLE_PG_TIMEOUT"}
    assert (gpu["PADDLE_PG_TIMEOUT"], npu["HCCL_CONNECT_TIMEOUT"]) == ("7200000", "7200")
    alone = prepared(monkeypatch, "npu", PADDLE_TRAINERS_NUM="1")
    assert set(npu) - set(alone) == {"HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"}
    longer = prepared(monkeypatch, "npu", **LAUNCHED, HCCL_EXEC_TIMEOUT="17340")
    assert longer["HCCL_EXEC_TIMEOUT"] == "17340"
    (row,) = (row for row in in_force("npu", module.prepared(), os.environ) if row.setting.name == "HCCL_EXEC_TIMEOUT")
    assert (row.value, row.source) == ("17340", "user")


@pytest.mark.parametrize(
    ("kind", "exported", "message"),
    [
        ("gpu", {"PADDLE_PG_TIMEOUT": "30min"}, "PADDLE_PG_TIMEOUT=30min is not a whole number from 1 to 2147483647"),
        ("npu", {"HCCL_CONNECT_TIMEOUT": "60"}, "HCCL_CONNECT_TIMEOUT=60 is not a whole number from 120 to 7200; ex"),
    ],
)
def test_a_time_out_that_is_none_stops_before_paddle_loads(
    monkeypatch: pytest.MonkeyPatch, kind: str, exported: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepared(monkeypatch, kind, **LAUNCHED, **exported)
    assert "OMP_NUM_THREADS" not in os.environ
    for other, started in ((kind, {}), ("cpu", LAUNCHED)):  # nobody reads it there
        assert prepared(monkeypatch, other, **started, **exported).items() >= exported.items()


def test_what_the_user_exported_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    found = prepared(monkeypatch, "npu", FLAGS_npu_jit_compile="1", FLAGS_use_stride_kernel="")
    assert (found["FLAGS_npu_jit_compile"], found["FLAGS_use_stride_kernel"]) == ("1", "")
    state = module.prepared()
    sources = {row.setting.name: (row.value, row.source) for row in in_force("npu", state, os.environ)}
    assert sources["FLAGS_npu_jit_compile"] == ("1", "user")
    assert sources["FLAGS_npu_scale_aclnn"] == ("True", "ours")
    assert sources["CUSTOM_DEVICE_BLACK_LIST"] == ("no operator", "default")
    changed = {**os.environ, "FLAGS_npu_scale_aclnn": "0"}
    again = {row.setting.name: row.source for row in in_force("npu", state, changed)}
    assert again["FLAGS_npu_scale_aclnn"] == "user"


@pytest.mark.parametrize("loaded", [True, False])
def test_a_switch_with_another_value_stops_before_paddle_loads(monkeypatch: pytest.MonkeyPatch, loaded: bool) -> None:
    if loaded:
        monkeypatch.setitem(sys.modules, "paddle", object())
        monkeypatch.setenv("PADDLEMIX_CPU_KERNELS", "no")
    with pytest.raises(UserError, match="PADDLEMIX_CPU_KERNELS=no is neither 0 nor 1; export"):
        prepare_environment() if loaded else prepared(monkeypatch, PADDLEMIX_CPU_KERNELS="no")
    assert "KMP_BLOCKTIME" not in os.environ or loaded


def test_a_switch_is_on_where_nobody_set_it() -> None:
    name = "PADDLEMIX_CPU_KERNELS"
    assert is_on(name, {}) and is_on(name, {name: "1"}) and not is_on(name, {name: "0"})


def test_once_paddle_is_loaded_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "paddle", object())
    prepare_environment()
    assert not set(NAMES) & set(os.environ)
    assert module.prepared().in_time is False


def test_a_second_call_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(monkeypatch)
    before = module.prepared()
    monkeypatch.setitem(sys.modules, "paddle", object())
    prepare_environment()
    assert module.prepared() is before and isinstance(before, Prepared)


def test_the_packages_that_need_paddle_prepare_it_first() -> None:
    """A fresh process that imports only the model has the settings before paddle; another value is kept."""
    script = f"import json, os, paddlemix.models; print(json.dumps({{n: os.environ.get(n) for n in {NAMES!r}}}))"
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    clean["KMP_BLOCKTIME"] = "7"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=clean, capture_output=True, text=True)
    found = json.loads(result.stdout)
    assert (found["OMP_NUM_THREADS"], found["KMP_BLOCKTIME"]) == (str(os.cpu_count()), "7"), result.stderr


def test_the_plugin_decides_which_kind_is_expected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUSTOM_DEVICE_ROOT", str(tmp_path))
    plain = expected_kind()  # an empty folder is no plugin
    assert plain != "npu"
    (tmp_path / "libpaddle-custom-npu.so").touch()
    assert expected_kind() == "npu"
    monkeypatch.setenv("CUSTOM_DEVICE_ROOT", str(tmp_path / "missing"))
    assert expected_kind() == plain


def test_without_a_folder_of_their_own_plugins_stand_beside_paddle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUSTOM_DEVICE_ROOT", raising=False)
    folder = plugin_folder()
    assert folder is not None and folder.name == "paddle_custom_device" and (folder.parent / "paddle").is_dir()


def test_every_row_is_of_a_known_kind_and_once_per_kind() -> None:
    assert all(set(row.kinds) <= set(DEVICE_KINDS) for row in SETTINGS)
    for kind in DEVICE_KINDS:
        names = [row.name for row in settings_of(kind)]
        assert len(names) == len(set(names))


def test_a_setting_for_one_make_is_left_alone_on_others() -> None:
    row = next(row for row in SETTINGS if row.only == "AMD")
    assert (value_of(row, is_amd=True), value_of(row, is_amd=False)) == ("5", None)
    assert value_of(row, is_amd=True, started=Started(several=True, local=2)) == "5"


@pytest.mark.parametrize("kinds", [DEVICE_KINDS, ("cpu",), ("gpu", "npu", "xpu"), ("gpu",), ("npu",)], ids=",".join)
def test_the_devices_page_shows_the_table(kinds: tuple[str, ...]) -> None:
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    assert settings_table(kinds) in page
    assert len(re.findall("^\\| `", settings_table(kinds), re.MULTILINE)) >= 1


@pytest.mark.parametrize("kinds", [("gpu",), ("npu",)], ids=",".join)
def test_the_scaling_page_shows_the_settings_of_several_processes(kinds: tuple[str, ...]) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert settings_table(kinds, processes=True) in page
    assert len(re.findall("^\\| `", settings_table(kinds, processes=True), re.MULTILINE)) >= 5
    assert all(row.several is None or row.limits is not None for row in PROCESS_SETTINGS)


@pytest.mark.parametrize(
    ("error", "exported", "message"),
    [
        (
            ValueError("invalid literal for int() with base 10: 'a'"),
            "FLAGS_selected_npus=a",
            "FLAGS_selected_npus=a; unset",
        ),
        (ValueError("Use wrong place"), "FLAGS_selected_npus=7", "FLAGS_selected_npus=7; unset it"),
        (
            NotADirectoryError(20, "Not a directory", "/dev/null/.cache"),
            "HOME=/dev/null",
            "/dev/null/.cache .*export HOME",
        ),
    ],
)
def test_why_paddle_stumbles_while_it_loads(
    monkeypatch: pytest.MonkeyPatch, error: Exception, exported: str, message: str
) -> None:
    """The plugin is not to blame, which an unknown error leads to."""

    def stumble(*arguments: Any) -> None:
        raise error

    os.environ.update([exported.split("=")])
    with monkeypatch.context() as changed:
        changed.delitem(sys.modules, "paddle", raising=False)
        changed.setattr(sys, "meta_path", [type("Stumbling", (), {"find_spec": staticmethod(stumble)})])
        with pytest.raises(UserError, match=message):
            module._import_quietly()
