"""Starts a command in several processes, one per card, and watches over them.

    paddlemix launch [finetune|pretrain|predict|evaluate|chat] ARGUMENTS [--devices 0,1] [--nproc N]
                     [--nnodes N --master IP:PORT --rank K] [--max-restart N] [--log-dir DIR] [--dry-run]

ARGUMENTS are those of the command, `finetune` if none is named: CONFIG.json [key=value ...].
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.config.load import Fault, load_config, parse_command_line
from paddlemix.config.pretraining import DEFAULTS
from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.launch.cards import choose_cards, planned_cards
from paddlemix.launch.launcher import Job, equivalent_command, launch
from paddlemix.launch.options import LaunchOptions, take_options
from paddlemix.launch.process_rules import check_devices
from paddlemix.launch.rank_logs import FOLDER
from paddlemix.log import logger
from paddlemix.tools.common.chat_arguments import build_chat_parser
from paddlemix.tools.common.command import STATUS_PIPE_CLOSED, run_command
from paddlemix.tools.common.tensor_parallel import check_processes
from paddlemix.tools.evaluate import build_parser as build_evaluate_parser
from paddlemix.tools.predict import STATUS_FAILED_QUESTIONS, build_parser

_PACKAGE = Path(__file__).resolve().parents[1]
_HELP = """\
usage: paddlemix launch [finetune|pretrain|predict|evaluate|chat] ARGUMENTS [flags]

Starts a command in several processes, one per card, and watches over them.

ARGUMENTS are those of the command, `finetune` if none is named: CONFIG.json [key=value ...]; or a Python file.

  --devices 0,1      cards of this machine, by their numbers (also --gpus, --npus); default: all visible ones
  --nproc N          number of processes on this machine; on CPU there is one otherwise
  --nnodes N         number of machines; the same command is started on each, with
  --master IP:PORT   an address of the first machine and a free port there, and
  --rank K           the number of this machine, 0 for the first; left out, the launchers agree
  --max-restart N    start again after a crash, at most N times (default 0); the run resumes from its last checkpoint
  --log-dir DIR      one log per process; default: logs/ranks in output_dir
  --dry-run          start nothing: print the equivalent command of Paddle's launcher, and what --dry-run of a training
                     command prints, for N devices with --nproc N, also where there are no cards

NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and NPROC_PER_NODE are read where flags are missing, and Paddle's names of
the same: PADDLE_NNODES, PADDLE_RANK, PADDLE_MASTER, PADDLE_NPROC_PER_NODE, PADDLE_DEVICES.
"""


@dataclass(frozen=True)
class _Checked:
    """What the launcher has to know of a command line that is right.

    Args:
        device: that it asks for.
        logs: where its processes' logs go.
        config: of a training.
        degree: processes that answer with one model.
        is_one_group: whether one model does all of it.
    """

    device: str | None
    logs: Path
    config: RunConfig | None = None
    degree: int = 1
    is_one_group: bool = False


def main(argv: list[str]) -> int:
    """Starts the processes, and waits for them.

    Returns:
        See `paddlemix.launch.launcher.launch`.

    Raises:
        UserError: anything in the command line or the configuration is wrong; nothing was started.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if argv else 2
    options, words = take_options(argv, os.environ)
    # A platform's number of this machine; as a worker's rank it would silence the log of all machines but the first.
    os.environ.pop("PADDLE_TRAINER_ID", None)
    command, arguments = _command(words)
    checked = command.check(arguments)
    # An estimate is often made where there are no cards.
    is_estimate = options.is_dry and command.is_training
    options = _enough(options, checked)
    cards = (planned_cards if is_estimate else choose_cards)(options, checked.device, os.environ)
    if cards.kind == "cpu" and checked.degree > 1 and options.processes is None:  # with cards there is one for each
        cards = replace(cards, processes=checked.degree)
    # Of other machines it is not known how many processes they have; their number is checked when all have come.  A
    # dry run checks by itself.
    if checked.config is not None and options.nodes == 1 and not is_estimate:
        check_devices(checked.config, cards.processes, cards.kind)
    if command.answers and options.nodes == 1:
        check_processes(command.answers, cards.processes, checked.degree, checked.is_one_group)
    job = Job(
        command.script,
        arguments,
        options,
        cards,
        options.log_dir or checked.logs,
        command.results,
        reports_begin=command in COMMANDS.values(),
        has_terminal=command.has_terminal,
    )
    if options.is_dry or not command.has_terminal:
        logger.info("the same without paddlemix launch: %s", equivalent_command(job))
    if not options.is_dry:
        return launch(job, os.environ)
    if is_estimate:
        return _dry_run(command.script, arguments, cards.processes * options.nodes)
    return 0


def _enough(options: LaunchOptions, checked: _Checked) -> LaunchOptions:
    """As many processes as one model needs, where nothing else says how many."""
    is_open = options.devices is None and options.processes is None and options.nodes == 1
    return replace(options, processes=checked.degree) if is_open and checked.is_one_group else options


@dataclass(frozen=True)
class _Command:
    """A command that can be started.

    Args:
        script: its file.
        check: reads its arguments.
        is_training: whether it has `--dry-run`.
        results, has_terminal: see `Job`.
        answers: its name, where it answers with a model that may be split.
    """

    script: Path
    check: Callable[[list[str]], _Checked]
    is_training: bool = False
    results: frozenset[int] = frozenset()
    has_terminal: bool = False
    answers: str = ""


def _command(words: list[str]) -> tuple[_Command, list[str]]:
    """Which command a line begins with, and its arguments."""
    first = words[0] if words else ""
    if first in COMMANDS:
        return COMMANDS[first], words[1:]
    if not first.endswith(".py"):
        return COMMANDS["finetune"], words
    script = Path(first)
    if not script.is_file():
        raise UserError(f"'{first}' does not exist; name a Python file, a run's JSON file or one of {_names()}")
    known = (command for command in COMMANDS.values() if command.script.samefile(script))
    return next(known, _Command(script.resolve(), _check_nothing)), words[1:]


def _names() -> str:
    return ", ".join(COMMANDS)


def _check_finetune(arguments: list[str]) -> _Checked:
    return _check_run(arguments, "launch", None)


def _check_pretrain(arguments: list[str]) -> _Checked:
    return _check_run(arguments, "launch pretrain", DEFAULTS)


def _check_run(arguments: list[str], command: str, defaults: dict[str, str] | None) -> _Checked:
    """Reads the configuration as each process will, so that a wrong key is one error."""
    faults: list[Fault] = []
    path, overrides = parse_command_line(arguments, f"paddlemix {command}", "See paddlemix launch --help.", faults)
    config = load_config(path, overrides, defaults, faults)
    return _Checked(config.device, Path(str(config.output_dir)) / FOLDER, config)


def _check_predict(arguments: list[str]) -> _Checked:
    parsed = build_parser().parse_args(arguments)
    logs = parsed.output.with_name(f"{parsed.output.name}.logs")
    degree = parsed.tensor_parallel
    # A share that the user has named is answered by one model.
    return _Checked(parsed.device, logs, degree=degree, is_one_group=degree > 1 and parsed.num_chunks is not None)


def _check_evaluate(arguments: list[str]) -> _Checked:
    parsed = build_evaluate_parser().parse_args(arguments)
    return _Checked(parsed.device, parsed.output / "logs", degree=parsed.tensor_parallel, is_one_group=False)


def _check_chat(arguments: list[str]) -> _Checked:
    parsed = build_chat_parser().parse_args(arguments)
    # What is said in a chat is nobody else's: there is no folder of its own to keep logs in.
    logs = Path(tempfile.gettempdir()) / f"paddlemix-chat-{secrets.token_hex(8)}"  # nobody can have made it
    return _Checked(parsed.device, logs, degree=parsed.tensor_parallel, is_one_group=True)


def _check_nothing(arguments: list[str]) -> _Checked:
    return _Checked(None, FOLDER)


COMMANDS = {
    "finetune": _Command(_PACKAGE / "tools" / "supervised_finetune.py", _check_finetune, is_training=True),
    "pretrain": _Command(_PACKAGE / "examples" / "llava" / "pretrain.py", _check_pretrain, is_training=True),
    "predict": _Command(
        _PACKAGE / "tools" / "predict.py",
        _check_predict,
        results=frozenset([STATUS_FAILED_QUESTIONS]),
        answers="predict",
    ),
    "evaluate": _Command(
        _PACKAGE / "tools" / "evaluate.py",
        _check_evaluate,
        results=frozenset([STATUS_FAILED_QUESTIONS]),
        answers="evaluate",
    ),
    "chat": _Command(
        _PACKAGE / "examples" / "llava" / "run_predict_multiround.py",
        _check_chat,
        results=frozenset([STATUS_PIPE_CLOSED]),
        has_terminal=True,
        answers="chat",
    ),
}


def _dry_run(script: Path, arguments: list[str], processes: int) -> int:
    """The command's own dry run takes the place of this process: it needs nothing more of it."""
    sys.stdout.flush()
    words = [sys.executable, str(script), *arguments, "--dry-run", "--devices", str(processes)]
    os.execv(sys.executable, words)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
