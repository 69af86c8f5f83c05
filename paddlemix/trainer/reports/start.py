"""What a run says before its first step: how much of each part trains, and a sample as the model will see it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from paddlemix.datasets.mixture import SampleDataset
from paddlemix.log import logger, process_rank
from paddlemix.models.llava import LlavaModel
from paddlemix.processors.text.example_text import Style, image_runs, marked_text
from paddlemix.trainer.trainable import count_parameters

_TRIED, _SHOWN_LINES, _SHOWN_CHARACTERS = 20, 40, 2000


def report_parts(model: LlavaModel) -> None:
    """Logs every part's parameters and how many of them train."""
    for part, (trained, total) in count_parameters(model).items():
        if total:
            logger.info("%-15s %13d parameters, %13d trained", part, total, trained)


def report_sample(data: SampleDataset) -> None:
    """Logs the first training sample that is not left out: its text, with what is trained marked."""
    if process_rank() == 0:
        for line in describe_sample(data, Style.of_stream(sys.stderr)):
            logger.info("%s", line)


def describe_sample(data: SampleDataset, style: Style) -> Iterator[str]:
    """The same as lines; none where the first samples are all left out.

    Args:
        style: marks of trained text and images.
    """
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
    half = _SHOWN_CHARACTERS // 2
    return f"{line[:half]} ... {line[-half:]}"
