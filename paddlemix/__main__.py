"""`paddlemix <command> [arguments]`: finds the command's module and hands the rest over.

Knows names only; a command's module is imported when the command is run.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

from paddlemix import __version__
from paddlemix.config.foreign.flags import foreign_command
from paddlemix.errors import UserError, did_you_mean
from paddlemix.tools.common.command import run_command


@dataclass(frozen=True)
class Command:
    """One line of the table below.

    Args:
        module: where `main(argv: list[str]) -> int` is.
        summary: what it does, one line, as `paddlemix --help` shows it.
    """

    module: str
    summary: str


COMMANDS = {
    "finetune": Command("paddlemix.tools.supervised_finetune", "fine-tune a model on conversations, from a JSON file"),
    "pretrain": Command("paddlemix.examples.llava.pretrain", "train the projector on captions, from a JSON file"),
    "launch": Command("paddlemix.tools.launch", "start a command in several processes, one per card"),
    "chat": Command("paddlemix.examples.llava.run_predict_multiround", "talk with a model about an image"),
    "predict": Command("paddlemix.tools.predict", "answer a file of questions, in batches"),
    "evaluate": Command("paddlemix.tools.evaluate", "score a model on published benchmarks, or on data of your own"),
    "merge-lora": Command("paddlemix.tools.merge_lora_params", "fold a LoRA adapter into the weights of its model"),
    "convert": Command("paddlemix.tools.convert_checkpoint", "convert a checkpoint between LLaVA's layouts"),
    "quantize": Command("paddlemix.tools.quantize", "write a model with its language model in 8 or 4 bits"),
    "check-data": Command("paddlemix.tools.check_data", "check data files and images before a run"),
    "show-data": Command("paddlemix.tools.show_data", "show records as a model is trained on them: tokens, tiles"),
    "convert-data": Command(
        "paddlemix.tools.convert_data", "convert a VQA table or records of any form to LLaVA's JSON"
    ),
    "doctor": Command("paddlemix.tools.doctor", "report what is installed, which devices work, and what is wrong"),
    "demo": Command("paddlemix.tools.demo", "train and query a tiny model here, without any download"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after `paddlemix`; None for the process's own.

    Returns:
        The exit status: 0, 2 for bad input, else see `run_command`.
    """
    return run_command(_dispatch, argv)


def _dispatch(argv: list[str]) -> int:
    """Print the help or the version, or run the command that `argv` begins with.

    Raises:
        UserError: there is no such command.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(format_help())
        return 0 if argv else 2  # help that was asked for is a success, a missing command is not
    name, rest = argv[0], argv[1:]
    if name in ("-V", "--version"):
        print(f"paddlemix {__version__}")
        return 0
    if name not in COMMANDS:
        # Another program's command is not a misspelling of ours.
        hint = foreign_command(name) or did_you_mean(name, COMMANDS)
        raise UserError(
            f"'{name}' is not a paddlemix command{hint} "
            f"(commands: {', '.join(COMMANDS)}; `paddlemix --help` describes them)"
        )
    sys.argv[0] = f"paddlemix {name}"  # argparse uses this as the program's name in its usage lines
    # Only now: importing every command would load paddle, which takes seconds, for `paddlemix --help` too.
    module = importlib.import_module(COMMANDS[name].module)
    return module.main(rest)


def format_help() -> str:
    """The text of `paddlemix --help`."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: paddlemix <command> [arguments]",
            "",
            *rows,
            "",
            "`paddlemix <command> --help` lists a command's arguments; `paddlemix --version` shows the version.",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
