"""The stand-in NPU is built on demand: once, and a mistake in it is a failure and no skip."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.npu_double import build as double


def test_it_is_built_once(plugin: Path) -> None:
    library = plugin / double.LIBRARY
    before = library.stat()
    assert double.build() == plugin
    assert library.stat().st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in plugin.iterdir()] == [double.LIBRARY]  # paddle loads whatever lies there


def test_a_compile_error_fails(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*double.SOURCES, *double.HEADERS):
        (tmp_path / name).write_text('#error "a mistake"\n')
    monkeypatch.setattr(double, "HERE", tmp_path)
    with pytest.raises(RuntimeError, match="does not compile:(.|\n)*a mistake"):
        double.build(tmp_path / "cache")
    assert not list(tmp_path.rglob(double.LIBRARY))


def test_a_child_gets_the_plugin_and_no_flag_of_ours(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGS_use_stride_kernel", "0")
    found = double.environment(plugin, FLAGS_npu_jit_compile="0")
    assert found["CUSTOM_DEVICE_ROOT"] == str(plugin)
    assert {name for name in found if name.startswith("FLAGS_")} == {"FLAGS_npu_jit_compile"}
    assert "CUSTOM_DEVICE_ROOT" not in double.environment(None)
