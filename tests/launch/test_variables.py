"""What a worker reads of its launcher."""

from __future__ import annotations

import pytest

from paddlemix.launch.variables import RESTART, restarts


@pytest.mark.parametrize(("text", "count"), [(None, 0), ("", 0), ("0", 0), ("2", 2), ("yes", 0)])
def test_restarts_are_those_of_the_launcher(text, count):
    assert restarts({} if text is None else {RESTART: text}) == count
