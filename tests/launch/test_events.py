"""Signals that wait until they are asked for."""

from __future__ import annotations

import os
import signal

from paddlemix.launch.events import Signals


def test_signals_wait_together_with_files():
    before = signal.getsignal(signal.SIGTERM)
    read, write = os.pipe()
    seen = []
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.write(write, b"x")
        assert signals.wait({read: lambda: seen.append(os.read(read, 1))}, 10.0) == [signal.SIGTERM]
        assert signals.wait({}, 0.0) == []
    assert seen == [b"x"] and signal.getsignal(signal.SIGTERM) is before
    os.close(read)
    os.close(write)


def test_what_is_ignored_at_the_start_stays_ignored():
    # As under nohup, and for the Ctrl-C of a script's background job.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.wait({}, 0.0) == []
    finally:
        signal.signal(signal.SIGHUP, before)
