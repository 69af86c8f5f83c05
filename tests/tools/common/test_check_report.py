"""The report of `check-data`: what counts as an earlier report, and examples that fit a terminal."""

from __future__ import annotations

import json
from pathlib import Path

from paddlemix.tools.common import check_report
from paddlemix.tools.common.check_report import is_report


def test_only_a_report_is_replaced_without_a_flag(tmp_path: Path) -> None:
    keys = ("files", "records", "good", "bad", "problems", "statistics")
    (tmp_path / "report.json").write_text(json.dumps(dict.fromkeys(keys)))
    (tmp_path / "other.json").write_text(json.dumps(dict.fromkeys(keys[:-1])))
    (tmp_path / "broken.json").write_text("{")
    found = {name: is_report(tmp_path / f"{name}.json") for name in ("report", "other", "broken", "missing")}
    assert found == {"report": True, "other": False, "broken": False, "missing": False}


def test_an_example_is_one_short_line_without_control_characters() -> None:
    assert check_report._short("a\n\x1b[31mb  c") == "a [31mb c"
    assert check_report._short("x" * 400) == "x" * 300 + "..."
