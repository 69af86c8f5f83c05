"""The example of docs/chat.md does what it says."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from tests.tiny_world import World


def test_the_example_runs(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(code.replace('"DIR"', repr(str(world.model))).replace('"a.png"', repr(str(world.picture))), names)  # noqa: S102
    session = names["session"]
    assert [item.question[-1] for item in session.rounds] == ["What is this?"]  # type: ignore[attr-defined]
    assert len(capsys.readouterr().out) > 20
