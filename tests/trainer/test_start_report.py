"""What a run on CPU says of its kernels before the first step, with compiled ones and without."""

from __future__ import annotations

import pytest

from paddlemix.models import compiled_library
from paddlemix.trainer import start_report


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are logged."""
    lines: list[str] = []
    monkeypatch.setattr(start_report.logger, "info", lambda form, *values: lines.append(form % values))
    return lines


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (None, "compiled kernels: avx2"),
        ("they were not built; build", "no compiled kernels, paddle's operators alone: they were not built; build"),
    ],
)
def test_a_run_on_cpu_says_which_kernels_it_has(
    monkeypatch: pytest.MonkeyPatch, told: list[str], reason: str | None, line: str, wanted: bool
) -> None:
    monkeypatch.setattr(compiled_library, "missing", lambda: reason)
    monkeypatch.setattr(compiled_library, "kind", lambda: "avx2")
    start_report.report_kernels(wanted, "cpu", "float32")
    asked = ["use_flash_attention: paddle has fused kernels for gpu, not for cpu"] if wanted else []
    assert told == [line, *asked]
