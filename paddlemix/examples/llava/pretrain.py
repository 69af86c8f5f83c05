"""Trains the projector on captions: `python paddlemix/examples/llava/pretrain.py CONFIG.json [key=value ...]`.

The recipe is that of `tools/supervised_finetune.py`; only the defaults differ: template `plain`, images cropped
square, and everything but the projector frozen.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[3]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.config.load import Fault, load_config, parse_command_line, split_dry_run
from paddlemix.config.pretraining import DEFAULTS
from paddlemix.tools.common.command import run_command


def main(argv: list[str]) -> int:
    """Runs the recipe that a JSON file describes, with the defaults of pretraining.

    Raises:
        UserError: the file, or anything that it names, cannot be used.
    """
    rest, is_dry, devices = split_dry_run(argv)
    faults: list[Fault] = []
    description = "Train the projector on captions, as one JSON file says."
    path, overrides = parse_command_line(rest, "pretrain.py", description, faults)
    # Defaults only: the file and the command line override them.
    config = load_config(path, overrides, DEFAULTS, faults)
    if is_dry:
        from paddlemix.dry_run.report import dry_run

        print(*dry_run(config, devices), sep="\n")
        return 0
    from paddlemix.trainer.recipe import run_recipe  # loads paddle: not before the file is known to be right

    run_recipe(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
