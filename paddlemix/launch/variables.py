"""The environment variables by which a launcher and its workers know of each other, and what they say."""

from __future__ import annotations

import os
from collections.abc import Mapping

# How often the run was started again after a crash; not set, or 0, in a first start.
RESTART = "PADDLEMIX_RESTART"
# The file in which a worker leaves why it failed, and when.
FAILURE_FILE = "PADDLEMIX_FAILURE_FILE"
# The process id of the launcher, without which a worker saves and ends.
LAUNCHER = "PADDLEMIX_LAUNCHER"


def restarts(environment: Mapping[str, str] | None = None) -> int:
    """How often a launcher has started this run again by itself; 0 where the user started it.

    Args:
        environment: variables by name; None for this process's own.
    """
    text = (os.environ if environment is None else environment).get(RESTART, "")
    return int(text) if text.isdecimal() else 0
