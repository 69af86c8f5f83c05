"""Answers to the same few questions every N steps, so that one sees what the model learns.

They go into the log, into `samples.jsonl` (one line per answer) and into `metrics.jsonl` (key `samples`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from paddlemix.config.schema import RunConfig
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.log import MetricsWriter, logger, process_rank
from paddlemix.parallel.collectives import agree
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.text.example_text import escape_control
from paddlemix.trainer.answers.answering import Answerer, leaves_others_waiting
from paddlemix.trainer.answers.prompts import Prompt, first_prompts, own_prompts
from paddlemix.trainer.callbacks.meters import StepReport
from paddlemix.trainer.callbacks.progress import METRICS_FILE
from paddlemix.trainer.paddlenlp_trainer import TrainerCallback
from paddlemix.trainer.run_data import data_settings

SAMPLES_FILE = "samples.jsonl"
_DEFAULT_COUNT = 2


def sample_prompts(config: RunConfig, processor: LlavaProcessor, data: SampleDataset) -> list[Prompt]:
    """What a run asks every `sample_steps`; nothing without that key.

    Args:
        processor: the run's.
        data: whose first two records are asked about where there are no `sample_prompts`.

    Raises:
        UserError: an image or a question cannot be used; names the item.
    """
    if config.sample_steps is None:
        return []
    if config.sample_prompts:
        images = data_settings(config).images
        return own_prompts(config.sample_prompts, processor, config.image_root, images)
    return first_prompts(data, _DEFAULT_COUNT)


class ShowAnswers(TrainerCallback):
    """Answers the questions every `every` steps and at the last one, on the first process: with those that have the
    other parts of its model.

    Args:
        prompts: the same every time.
        answerer: answers with the current weights.
        every: steps, >= 1.
        output_dir: where the files go.
        report: the time is not counted as training.
        layout: of the run.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        answerer: Answerer,
        every: int,
        output_dir: Path,
        report: StepReport,
        layout: Layout = ALONE,
    ) -> None:
        self._prompts, self._answerer, self._every, self._report = prompts, answerer, every, report
        self._layout = layout
        self._samples = MetricsWriter(output_dir / SAMPLES_FILE)
        self._metrics = MetricsWriter(output_dir / METRICS_FILE)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drops what an interrupted run wrote after its last checkpoint."""
        if process_rank() == 0:
            self._samples.truncate_after(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Asks every `every` steps."""
        step = state.global_step
        if step % self._every == 0 or step >= state.max_steps:
            # The other processes wait for the answers.
            with self._report.pause():
                agree(self._asked(step))

    def _asked(self, step: int) -> Exception | None:
        """Asks on the processes of the first tensor group, and writes on the first of them; what has failed."""
        if self._layout.rank >= self._layout.tensor_degree:
            return None
        try:
            # All in one batch: one pass over the weights for each token of the longest answer.
            answers = self._answerer.answer(self._prompts)
        except Exception as error:
            if leaves_others_waiting(error, self._layout.tensor_degree == 1):
                raise
            return error
        try:
            if process_rank() == 0:
                self._write(step, answers)
        except Exception as error:
            return error
        return None

    def _write(self, step: int, answers: Sequence[str]) -> None:
        lines = [
            {"image": prompt.image, "question": prompt.text, "answer": answer, "expected": prompt.reference}
            for prompt, answer in zip(self._prompts, answers, strict=True)
        ]
        with tqdm.external_write_mode(file=sys.stderr):  # a bar gives way
            for line in lines:
                self._samples.write({"step": step, **line})
                logger.info("step %d sample: %s", step, escape_control(_described(line)))
        self._metrics.write({"step": step, "samples": lines})


def _described(line: dict[str, Any]) -> str:
    image = "" if line["image"] is None else f"[{line['image']}] "
    expected = "" if line["expected"] is None else f" (expected: {line['expected']})"
    return f"{image}{line['question']} -> {line['answer']}{expected}"
