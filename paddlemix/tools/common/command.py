"""What every command has around its `main`: one-line errors, exit statuses, Ctrl-C and closed pipes.

Nothing here knows any command.  A command file that users run by path, as in `python paddlemix/tools/x.py`, begins with

    from __future__ import annotations

    import sys
    from pathlib import Path

    if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
        _here = Path(__file__).resolve()
        sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

    from paddlemix.tools.common.command import run_command

(`parents[3]` for a file in `examples/llava/`), defines `main(argv: list[str]) -> int` and ends with

    if __name__ == "__main__":
        raise SystemExit(run_command(main))

So it runs from a checkout that is not installed, and neighbours named `serve.py` or `evaluate.py` hide no library.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from paddlemix.errors import OtherProcessError, Stopped, UserError, cut
from paddlemix.launch.worker import begin_worker, end_worker, report_failure
from paddlemix.log import process_rank
from paddlemix.paths import user_path, user_place

# int64, as paddle's generator takes it.
_LARGEST_SEED = 2**63 - 1  # paddle's
STATUS_USER_ERROR = 2
STATUS_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
STATUS_PIPE_CLOSED = 141  # 128 + SIGPIPE


def run_command(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run a command and turn what a user can cause into a message and an exit status; a launcher that started it hears
    why it fails.

    Args:
        main: the command; receives the arguments without the program's name and returns its status, None for 0.
        argv: those arguments; None for the process's own.

    Returns:
        The status of `main`; 2 after a `UserError` (its message on stderr, the traceback too when the environment has
        PADDLEMIX_TRACEBACK=1); 130 after Ctrl-C; 141, silently, when the reader of the output is gone (`| head`).

    Raises:
        BaseException: whatever else `main` raises; that is a defect of ours, or argparse's own exit.
    """
    _open_closed_streams()
    begin_worker()
    try:
        status = _run(main, sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # a closed pipe shows here, not while the interpreter shuts down
        end_worker(status)
        return status
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _lost_its_reader(stream)]
        # Only our own output's reader makes a broken pipe harmless.
        if not closed:  # some other pipe, e.g. a data worker's: that must not be silent
            raise
        for stream in closed:
            _discard(stream)
        return STATUS_PIPE_CLOSED


def path_argument(text: str) -> Path:
    """The type of an argparse argument that is a path on this machine.

    Raises:
        argparse.ArgumentTypeError: such a path cannot exist; argparse adds the flag's name.
    """
    with _as_argument_error():
        return user_path(text, "the path")


def place_argument(text: str) -> str:
    """The type of an argument that is a path, an address or a model's name, as text.

    Raises:
        argparse.ArgumentTypeError: see `path_argument`.
    """
    with _as_argument_error():
        return user_place(text, "the path")


def seed_argument(text: str) -> int:
    """The type of an argument that is a seed: a whole number of 0 to 2^63 - 1.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    # Length first: int() of a million digits takes seconds.
    digits = text.strip().removeprefix("+")
    if not (digits.isdecimal() and len(digits) < 30 and int(digits) <= _LARGEST_SEED):
        raise argparse.ArgumentTypeError(
            f"'{cut(text, 40)}' is not a seed; give a whole number from 0 to {_LARGEST_SEED}"
        )
    return int(digits)


@contextlib.contextmanager
def _as_argument_error() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """`run_command` without the handling of closed pipes."""
    try:
        return main(argv) or 0
    except OtherProcessError as error:
        sys.stdout.flush()
        # The launcher shows the first process's log; the others need not repeat it.
        if process_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return STATUS_USER_ERROR
    except UserError as error:
        report_failure(error)
        # stdout may be buffered while stderr is not.
        sys.stdout.flush()  # what was printed before the error also appears before it
        if os.environ.get("PADDLEMIX_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return STATUS_USER_ERROR
    except KeyboardInterrupt as error:
        report_failure(error)
        sys.stdout.flush()
        print("interrupted", file=sys.stderr)
        return STATUS_INTERRUPTED
    except Stopped as ended:
        end_worker(int(str(ended.code)))
        raise
    except Exception as error:
        report_failure(error)
        raise


def _open_closed_streams() -> None:
    """Opens /dev/null where the input or an output was closed, as by `<&-` or under a daemon.

    Else Python has no such stream, and the next file or socket gets its number: a child or a library would then read
    from it, write to it or refuse to close it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue  # a file opened since then has it
        # The lowest free number, which is this one, as those below are open.
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _lost_its_reader(stream: TextIO) -> bool:
    """Whether `stream` is a pipe that nobody reads any more; False for a file, a terminal and a captured stream."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # an error is reported without being asked for
    except (AttributeError, OSError, ValueError):  # no poll on Windows; no descriptor under capture or after close
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _discard(stream: TextIO) -> None:
    """Discard what `stream` still holds, or the flush at exit would raise again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
