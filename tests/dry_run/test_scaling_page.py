"""`docs/scaling.md` says what the estimator does: which layout holds which model, and what it sends."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tests.dry_run import scaling_table
from tests.dry_run.scaling_table import (
    MEMORY,
    MODELS,
    NETWORKS,
    SplitTraffic,
    Traffic,
    cell,
    computing_seconds,
    least_tokens,
    most_tokens,
)


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


def test_the_page_says_when_tensor_parallelism_sends_less() -> None:
    text = page()
    for name, width in {"7B": 4096, "34B": 7168, "72B": 8192}.items():
        limits = (most_tokens(width, 8, full) for full in (True, False))
        assert f"| {name} | " + " | ".join(f"{round(limit, -2):,.0f}" for limit in limits) + " |" in text
    # The formulas of the page: 12 (N - 1) / N for each row, layer, token and number of the width, in bytes of two.
    assert SplitTraffic(rows=3, tokens=5, width=7, layers=2).sent(4) == 12 * 0.75 * 3 * 5 * 7 * 2 * 2
    assert most_tokens(800, 8, full=True) == 7 * 800 / 8 and most_tokens(800, 8, full=False) == 3 * 800 / 8


def test_what_is_sent_grows_with_the_cards_and_then_no_more() -> None:
    traffic = Traffic(trained=100, weights=200, passes=3)
    assert [traffic.sent("", cards) for cards in (1, 2, 4)] == [0, 400, 600]
    assert [traffic.sent(layout, 2) for layout in ("stage1", "stage2", "stage3")] == [300, 700, 3 * (600 + 400)]
