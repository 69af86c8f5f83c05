"""Each mistake in the environment is named together with what to do, and what is right is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddlemix.device.checks import check_cards, check_late, check_names, check_plugin_root, check_values, no_card_left
from paddlemix.device.environment import Prepared
from paddlemix.device.settings import SETTINGS


def kind_of_setting(name: str) -> str:
    """A device kind that a setting concerns: an NPU where it does."""
    kinds = next(setting.kinds for setting in reversed(SETTINGS) if setting.name == name)
    return "npu" if "npu" in kinds else kinds[0]


def prepared(in_time: bool = True, **environment: str) -> Prepared:
    return Prepared("npu", {}, environment, in_time)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FLAGS_npu_scale_aclnn", "", "FLAGS_npu_scale_aclnn is empty, .* reads an empty text as true; export .*=0 or"),
        (
            "FLAGS_npu_jit_compile",
            "on",
            "=on: the plugin reads only the first character, 'o', and takes it as false; export",
        ),
        ("FLAGS_npu_jit_compile", "enable", "first character, 'e', and takes it as false"),
        ("FLAGS_npu_jit_compile", "tomorrow", "first character, 't', and takes it as true"),
        ("FLAGS_npu_split_aclnn", " true", "first character, ' ', and takes it as false"),
        ("FLAGS_use_stride_kernel", "off", "paddle understands 0, 1, true and false, and keeps its default 1"),
        ("FLAGS_allocator_strategy", "best", "best is not one of auto_growth, naive_best_fit, thread_local"),
        ("FLAGS_allocator_strategy", "naive_best_fit", "92 % of a card's memory at once"),
        ("PADDLEMIX_CPU_KERNELS", "off", "=off is neither 0 nor 1; export PADDLEMIX_CPU_KERNELS=0 or =1, or unset it"),
        ("PADDLEMIX_CPU_KERNELS", "", "= is neither 0 nor 1; export"),
        ("OMP_NUM_THREADS", "all", "OMP_NUM_THREADS=all is not a number of at least 1"),
        ("OMP_NUM_THREADS", "0", "is not a number of at least 1"),
        ("HCCL_CONNECT_TIMEOUT", "2h", "=2h is not a whole number from 120 to 7200; export HCCL_CONNECT_TIMEOUT=7200"),
        ("CUSTOM_DEVICE_BLACK_LIST", "matmul,set_value,mean", "names matmul, mean, .*; write matmul_v2, reduce_mean"),
    ],
)
def test_a_value_that_is_read_otherwise_is_named(name: str, value: str, message: str) -> None:
    import re

    (problem,) = check_values(kind_of_setting(name), {name: value})
    assert re.search(message, str(problem))
    assert name in problem.what
    assert problem.serious is (value != "naive_best_fit")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("FLAGS_npu_scale_aclnn", ("True", "true", "1", "0", "False", "off", "no", "yes", "Y")),
        ("FLAGS_use_stride_kernel", ("0", "1", "True", "false")),
        ("FLAGS_allocator_strategy", ("auto_growth",)),
        ("OMP_NUM_THREADS", ("1", "16", "4,2")),
        ("PADDLEMIX_CPU_KERNELS", ("0", "1")),
        ("HCCL_EXEC_TIMEOUT", ("0", "1836", "7200")),
        ("CUSTOM_DEVICE_BLACK_LIST", ("set_value,set_value_with_tensor", "matmul_v2", "")),
    ],
)
def test_a_right_value_is_left_alone(name: str, values: tuple[str, ...]) -> None:
    for value in values:
        assert check_values(kind_of_setting(name), {name: value}) == []


def test_the_settings_of_another_kind_are_not_looked_at() -> None:
    assert check_values("cpu", {"FLAGS_npu_scale_aclnn": ""}) == []


def test_a_plugin_folder_without_a_plugin(tmp_path: Path) -> None:
    assert check_plugin_root({}) == []
    for value, state in ((str(tmp_path), "holds no .so file"), (str(tmp_path / "no"), "is not a folder")):
        (problem,) = check_plugin_root({"CUSTOM_DEVICE_ROOT": value})
        assert f"{state}, so paddle finds no NPU" in problem.what and "unset CUSTOM_DEVICE_ROOT" in problem.fix
    (tmp_path / "libx.so").touch()
    assert check_plugin_root({"CUSTOM_DEVICE_ROOT": str(tmp_path)}) == []


@pytest.mark.parametrize(("value", "wrong"), [("7", "7"), ("0,2", "2"), ("x", "x"), ("0", None), ("1,0", None)])
def test_cards_that_are_not_there(value: str, wrong: str | None) -> None:
    found = check_cards("npu", 2, {"FLAGS_selected_npus": value})
    assert len(found) == (wrong is not None)
    if found:
        assert f"FLAGS_selected_npus={value}: there is no npu {wrong}" in found[0].what
        assert "sees 2 (npu:0 to npu:1)" in found[0].fix and "ASCEND_RT_VISIBLE_DEVICES" in found[0].fix


def test_no_card_is_left() -> None:
    block = {"ASCEND_RT_VISIBLE_DEVICES": "8"}
    problem = no_card_left("npu", "libpaddle-custom-npu.so", block)
    assert problem.what == (
        "paddle loaded libpaddle-custom-npu.so, but no card: ASCEND_RT_VISIBLE_DEVICES=8 leaves none of this machine's "
        "visible"
    )
    assert "unset ASCEND_RT_VISIBLE_DEVICES, or export numbers of cards that npu-smi info lists" in problem.fix
    assert no_card_left("npu", "libx.so", {}).fix.startswith("check npu-smi info, ASCEND_RT_VISIBLE_DEVICES, and")
    assert "CUDA_VISIBLE_DEVICES=-1 leaves none" in no_card_left("gpu", "", {"CUDA_VISIBLE_DEVICES": "-1"}).what


def test_a_flag_that_came_when_paddle_was_loaded() -> None:
    before = {"FLAGS_npu_jit_compile": "0", "FLAGS_npu_scale_aclnn": "True"}
    now = {**before, "FLAGS_npu_jit_compile": "1"}
    (problem,) = check_late("npu", prepared(**before), now)
    assert "FLAGS_npu_jit_compile=1 was set after paddle had been loaded" in problem.what
    assert "before python starts" in problem.fix
    assert check_late("npu", prepared(**before), before) == []


def test_paddles_own_flags_say_for_sure() -> None:
    now = {"FLAGS_use_stride_kernel": "0", "FLAGS_allocator_strategy": "auto_growth"}
    known = {"FLAGS_use_stride_kernel": False, "FLAGS_allocator_strategy": "auto_growth"}
    assert check_late("npu", prepared(), now, known) == []  # set within the process, and in time
    (problem,) = check_late("npu", prepared(**now), now, {**known, "FLAGS_use_stride_kernel": True})
    assert "FLAGS_use_stride_kernel=0" in problem.what


def test_what_may_be_set_later_is_not_late() -> None:
    assert check_late("npu", prepared(), {"CUSTOM_DEVICE_BLACK_LIST": "set_value", "FLAGS_selected_npus": "0"}) == []


def test_paddle_before_us_is_a_problem_but_no_serious_one() -> None:
    (problem,) = check_late("npu", prepared(in_time=False), {})
    assert "paddle was imported before paddlemix" in problem.what and not problem.serious


def test_a_name_that_is_nearly_a_settings_is_told() -> None:
    (problem,) = check_names({"FLAGS_npu_jit_compil": "0", "PATH": "/bin", "OMP_NUM_THREAD": "1"})
    assert str(problem) == (
        "FLAGS_npu_jit_compil is not a known setting, and FLAGS_npu_jit_compile is not set by it; "
        "export FLAGS_npu_jit_compile if that was meant"
    )
    assert not problem.serious
    assert not check_names({setting.name: "0" for setting in SETTINGS})
    others = ("FLAGS_npu_cache_aclnn", "CUDA_VISIBLE", "FLAGS_selected_xpus", "ASCEND_HOME_PATH", "PADDLEMIX_CACHE")
    assert not check_names(dict.fromkeys(others, "1"))
