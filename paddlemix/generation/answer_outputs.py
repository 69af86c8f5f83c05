"""The files that answering a file of questions writes, and what it may not write over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from paddlemix.checkpoints.hub.needs import needed_by_model
from paddlemix.generation.answer_file import beside
from paddlemix.outputs import Needed, Output, check_output, check_replaceable
from paddlemix.paths import is_address

_BESIDE = ("partial", "run.json")


@dataclass(frozen=True, kw_only=True)
class AnswerInputs:
    """What answers are made of.

    Args:
        model, base: see `PredictJob`.
        input: the questions, path or address.
        image_root: folder that image paths start from.
    """

    model: str
    base: str | None
    input: str
    image_root: str | None

    def needed(self) -> Iterator[Needed]:
        """All of it that is on this machine."""
        yield from needed_by_model(self.model)
        if self.base:
            yield from needed_by_model(self.base, "the base model")
        if not is_address(self.input):
            yield Needed("the input", Path(self.input), "file")
        if self.image_root and not is_address(self.image_root):
            yield Needed("the image root", Path(self.image_root), "pictures")


def check_answer_outputs(output: Path, shares: Sequence[Path], inputs: AnswerInputs, overwrite: bool) -> None:
    """Whether the answers, and what is kept beside them, can go to their places.

    Args:
        shares: the files of processes that write one output together.

    Raises:
        UserError: one of them is an input or a part of the model, or `overwrite` would replace what is not a file of
            answers.
    """
    # the file itself, what is written beside it, and the shares of other processes
    needed = list(inputs.needed())
    for path in (output, *shares):
        for place in (path, *(beside(path, suffix) for suffix in _BESIDE)):
            check_output(Output("--output", place, "file"), needed)
    # without it an existing file is resumed, or refused when its header is read
    if overwrite:
        check_replaceable(Output("--output", output, "file"), overwrite=True)
