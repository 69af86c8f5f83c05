"""`--tensor-parallel N` of the commands that answer questions: one model over N processes, one card each.

    how the command was started             what happens
    alone                                   it starts its N processes through `paddlemix launch`
    as one of several, by a launcher        every N processes of neighbouring ranks answer with one model

The first process of each N does what the command does; the others follow it, see `generation/leading.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paddlemix.errors import UserError, cut
from paddlemix.out_of_memory import out_of_memory_explained
from paddlemix.tools.common.generation import select_precision

if TYPE_CHECKING:
    from paddlemix.checkpoints.pretrained import Pretrained
    from paddlemix.parallel.layout import Layout
    from paddlemix.parallel.messages import Channel

    Load = Callable[[Layout], Pretrained]

_MOST = 1024
_LAUNCHER = Path(__file__).resolve().parents[1] / "launch.py"


def add_tensor_parallel_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--tensor-parallel`."""
    parser.add_argument(
        "--tensor-parallel",
        type=_degree,
        default=1,
        metavar="N",
        help="split the language model over N cards, one process each, which are started (default 1)",
    )


def _degree(text: str) -> int:
    if not (text.isdecimal() and len(text) <= len(str(_MOST)) and 1 <= int(text) <= _MOST):
        raise argparse.ArgumentTypeError(f"'{cut(text, 40)}' is not a whole number of 1 to {_MOST}")
    return int(text)


def starts_processes(degree: int, environment: Mapping[str, str]) -> bool:
    """Whether the command has to start its processes: no launcher has started this one as one of several."""
    # Platforms leave PADDLE_TRAINERS_NUM=1, and launchers set it for a single process too.
    return degree > 1 and environment.get("PADDLE_TRAINERS_NUM", "") in ("", "0", "1")


def start_processes(command: str, argv: list[str], degree: int) -> int:
    """`paddlemix launch COMMAND ... --nproc N` takes the place of this process, which has loaded nothing yet."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(_LAUNCHER), command, *argv, "--nproc", str(degree)])


def check_processes(command: str, processes: int, degree: int, is_one_group: bool) -> None:
    """Checks that a number of processes suits the degree.

    Args:
        is_one_group: whether the command is done by one model; else each group has a share of it.

    Raises:
        UserError: it does not.
    """
    if is_one_group and processes != degree == 1:
        raise UserError(
            f"{command} with one model in {processes} processes needs --tensor-parallel {processes}, which splits the "
            "model over them; for one process leave --nproc and --devices out"
        )
    if is_one_group and processes != degree:
        raise UserError(
            f"{command} with --tensor-parallel {degree} needs {degree} processes, and {processes} "
            f"{'is' if processes == 1 else 'are'} started; leave --nproc and --devices out, or name {degree} with them"
        )
    if processes % degree:
        allowed = ", ".join(str(number * degree) for number in (1, 2, 3))
        raise UserError(
            f"--tensor-parallel {degree} does not divide the {processes} processes of {command}; start {allowed}, ... "
            "of them with --nproc or --devices"
        )


@dataclass(frozen=True)
class AnsweringGroup:
    """The processes that answer with one model, seen from one of them.

    Args:
        layout: which process this is.
        channel: from the first to the others; None where it is alone.
    """

    layout: Layout
    channel: Channel | None = None

    @property
    def leads(self) -> bool:
        """Whether this process does what the command does; the others call `follow`."""
        return self.layout.tensor_rank == 0

    def load(self, load: Load) -> Pretrained:
        """Loads the model on all of them, on the first one.

        Args:
            load: returns the part of a process.

        Raises:
            OtherProcessError: another process has ended meanwhile.
        """
        if self.channel is None:
            return load(self.layout)
        from paddlemix.generation.leading import LOAD, lead

        self.channel.send((LOAD, ()))
        loaded = load(self.layout)
        # Its first collective must not find one of the others still reading: gloo ends after 30 seconds.
        self.channel.wait_for_others()
        lead(loaded.model, self.channel)
        return loaded

    def follow(self, load: Load, doing: str, less_memory: Sequence[str]) -> None:
        """Computes this process's part until the first one ends.

        Args:
            load: see `load`.
            doing, less_memory: what is being done and what takes less memory, see `out_of_memory_explained`.

        Raises:
            UserError: this process has run out of memory.
        """
        from paddlemix.generation.following import follow

        assert self.channel is not None
        # Parts are of one size: whether the first process runs out or this one is a race.
        with out_of_memory_explained(doing, less_memory):
            follow(self.channel, lambda: load(self.layout).model)


@contextlib.contextmanager
def answering_group(command: str, arguments: argparse.Namespace, is_one_group: bool) -> Iterator[AnsweringGroup]:
    """Joins the processes of the command; at the end of the block on the first process the others end too.

    Args:
        arguments: with those of `add_model_flags`.
        is_one_group: see `check_processes`.

    Raises:
        UserError: their number does not suit `--tensor-parallel`, or the device cannot be used.
    """
    from paddlemix.parallel.layout import ALONE

    degree = arguments.tensor_parallel
    if degree == 1:
        yield AnsweringGroup(ALONE)
        return
    check_processes(command, int(os.environ.get("PADDLE_TRAINERS_NUM", "1")), degree, is_one_group)
    # The room that answers comes first: what paddle reads from the environment is set when it is imported.
    import paddlemix.generation  # noqa: F401
    from paddlemix.parallel.groups import begin_tensor_groups
    from paddlemix.parallel.messages import open_channel

    select_precision(arguments)
    layout = begin_tensor_groups(degree)
    channel = open_channel(layout)
    try:
        yield AnsweringGroup(layout, channel)
    finally:
        channel.close()
