"""The environment variables by which a launcher and its workers know of each other, and what they say."""

from __future__ import annotations

from pathlib import Path

# How often the launcher has started the run again after a crash, "0" at first; for trackers and scripts of users.
RESTART = "PADDLEMIX_RESTART"
# The file in which a worker leaves why it failed, and when.
FAILURE_FILE = "PADDLEMIX_FAILURE_FILE"
# The process id of the launcher, without which a worker saves and ends.
LAUNCHER = "PADDLEMIX_LAUNCHER"
# "1" for the worker that has the launcher's terminal, see `launcher.Job`.
TERMINAL = "PADDLEMIX_TERMINAL"


def begin_file(failure_file: Path) -> Path:
    """The file beside a worker's `FAILURE_FILE` that exists as soon as its work has begun."""
    return failure_file.with_suffix(".begun")
