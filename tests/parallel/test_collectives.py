"""With one process the collectives return at once, and an error stays what it is (paddlemix.parallel.collectives)."""

from __future__ import annotations

import pytest

from paddlemix.errors import UserError
from paddlemix.parallel.collectives import from_first, gathered, gathered_objects, together
from paddlemix.parallel.layout import ALONE


def test_one_process_gets_its_own_values() -> None:
    assert gathered([3.0, 2.0]).tolist() == [[3.0, 2.0]]
    assert gathered_objects({"a": 1}) == [{"a": 1}]
    assert from_first("x") == "x"
    assert not ALONE.several and ALONE.writers == 1 and ALONE.writes


def test_together_passes_an_own_error_on() -> None:
    with pytest.raises(UserError, match="disk is full"), together():
        raise UserError("the disk is full")
