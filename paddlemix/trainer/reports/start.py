"""What a run reports before its first step: environment, kernels, what trains, a sample as the model will see it.

It only reports what was decided before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from paddlemix.datasets.mixture import SampleDataset
from paddlemix.device import report_settings
from paddlemix.log import logger, process_rank
from paddlemix.models.llava import LlavaModel
from paddlemix.processors.text.example_text import Style, image_runs, marked_text
from paddlemix.trainer.run import Run
from paddlemix.trainer.trainable import count_parameters

_TRIED, _SHOWN_LINES, _SHOWN_CHARACTERS = 20, 40, 2000


def report_start(run: Run, kernels: Iterable[str]) -> None:
    """Logs all of it.

    Args:
        kernels: lines about the kernels that the run computes with.
    """
    report_settings(run.device)
    for line in kernels:
        logger.info("%s", line)
    report_parts(run.loaded.model)
    if run.train is not None:
        report_sample(run.train.samples)
    if run.evaluation is not None:
        logger.info("%d evaluation samples", len(run.evaluation))


def report_parts(model: LlavaModel) -> None:
    """Logs every part's parameters and how many of them train."""
    for part, (trained, total) in count_parameters(model).items():
        # A text-only model has no tower and no projector.
        if total:
            logger.info("%-15s %13d parameters, %13d trained", part, total, trained)


def report_sample(data: SampleDataset) -> None:
    """Logs the first training sample that is not left out: its text, with what is trained marked."""
    # Reading a sample decodes its pictures; once is enough.
    if process_rank() == 0:
        for line in describe_sample(data, Style.of_stream(sys.stderr)):
            logger.info("%s", line)


def describe_sample(data: SampleDataset, style: Style) -> Iterator[str]:
    """The lines of `report_sample`; none where the first samples are all left out.

    Args:
        style: marks of trained text and images.
    """
    # The first samples may all be left out; a broken data set is reported elsewhere.
    for index in range(min(len(data), _TRIED)):
        for example in data[index].examples:
            visual = image_runs(example)
            yield (
                f"a sample as it is trained on ({example.source}): {len(example.input_ids)} tokens, {sum(visual)} of "
                f"them visual, {example.num_supervised} trained; {style.legend}"
            )
            lines = marked_text(example, visual, data.processor_of(index).tokenizer, style).split("\n")
            for line in lines[:_SHOWN_LINES]:
                yield f"  | {_shortened(line)}"
            if len(lines) > _SHOWN_LINES:
                yield f"  | ... and {len(lines) - _SHOWN_LINES} more lines"
            return


def _shortened(line: str) -> str:
    """A line's two ends where it is very long: colours begin and end in them."""
    if len(line) <= _SHOWN_CHARACTERS:
        return line
    # A cut in the middle keeps the escape codes at both ends.
    half = _SHOWN_CHARACTERS // 2
    return f"{line[:half]} ... {line[-half:]}"
