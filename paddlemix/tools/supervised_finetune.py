"""Fine-tunes a model on conversations: `python paddlemix/tools/supervised_finetune.py CONFIG.json [key=value ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.config.load import Fault, load_config, parse_command_line, split_dry_run
from paddlemix.tools.common.command import run_command


def main(argv: list[str]) -> int:
    """Runs the recipe that a JSON file describes.

    Raises:
        UserError: the file, or anything that it names, cannot be used.
    """
    rest, is_dry, devices = split_dry_run(argv)
    faults: list[Fault] = []
    description = "Fine-tune a LLaVA model, whole or with LoRA, as one JSON file says."
    path, overrides = parse_command_line(rest, "supervised_finetune.py", description, faults)
    # Faults of the command line are reported together with the file's.
    config = load_config(path, overrides, faults=faults)
    if is_dry:
        # Loads paddle only now: faults of a configuration appear at once.
        from paddlemix.dry_run.report import dry_run

        print(*dry_run(config, devices), sep="\n")
        return 0
    from paddlemix.trainer.recipe import run_recipe  # loads paddle: not before the file is known to be right

    run_recipe(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
