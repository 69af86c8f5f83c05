"""`docs/scaling.md` says what the estimator does: which layout holds which model, and what it sends."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tests.dry_run import scaling_table
from tests.dry_run.scaling_table import MEMORY, MODELS, NETWORKS, Traffic, cell, computing_seconds, least_tokens


def page() -> str:
    return (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "size", [size if size == "7B" else pytest.param(size, marks=pytest.mark.slow) for size in MODELS]
)
def test_the_page_shows_the_layouts(size: str) -> None:
    text = page()
    for memory in MEMORY:
        shown = text[text.index(f"| {memory} GiB | 1 card") :]
        for method in scaling_table.METHODS:
            cells = [cell(size, method, cards, memory) for cards in scaling_table.CARDS]
            row = next(line for line in shown.splitlines() if line.startswith(f"| {size} {method} |"))
            assert row == f"| {size} {method} | {' | '.join(cells)} |"


def test_the_page_shows_what_a_step_sends() -> None:
    text = page()
    assert scaling_table.traffic_table() in text
    assert f"computing takes {computing_seconds(2048):.0f} s" in text
    limits = [least_tokens(speed, full) for full in (True, False) for speed in NETWORKS.values()]
    assert [f"{round(limit, -2):,.0f}" in text for limit in limits] == [True] * 6


def test_what_is_sent_grows_with_the_cards_and_then_no_more() -> None:
    traffic = Traffic(trained=100, weights=200, passes=3)
    assert [traffic.sent("", cards) for cards in (1, 2, 4)] == [0, 400, 600]
    assert [traffic.sent(layout, 2) for layout in ("stage1", "stage2", "stage3")] == [300, 700, 3 * (600 + 400)]
