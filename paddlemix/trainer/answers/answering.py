"""Answers of the model while it trains: for samples in the log, and for the generation metrics of an evaluation.

Greedy, so no random number is drawn; the model is back in training mode afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import paddle

from paddlemix.datasets.mixture import SampleDataset
from paddlemix.evaluation.metrics import exact_match, rouge_l
from paddlemix.generation.generate import generate
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.models.llava import LlavaModel
from paddlemix.trainer.answers.prompts import Prompt, prompt_of_record


class Answerer:
    """Answers questions with the model's current weights.

    Args:
        model: may be in training mode.
        max_new_tokens: limit of an answer's length, >= 1.
        precision: returns the context in which the model computes.
    """

    def __init__(
        self, model: LlavaModel, max_new_tokens: int, precision: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._model, self._precision = model, precision
        self._settings = GenerationSettings(max_new_tokens=max_new_tokens)

    def answer(self, questions: Sequence[Prompt]) -> list[str]:
        """One answer for each question, all in one batch.

        Raises:
            UserError: a question does not fit the model's context, or has an image and the model no tower.
        """
        # One batch may mix templates, so it stops at any of their end tokens; each text is cut by its own afterwards.
        end_ids = {token for question in questions for token in question.ending.ids}
        training = self._model.training
        self._model.eval()
        try:
            with paddle.no_grad(), self._precision():
                answers = generate(self._model, [item.encoded for item in questions], self._settings, end_ids)
        finally:
            # The Trainer may have been in either mode.
            if training:
                self._model.train()
        texts = (item.processor.tokenizer.decode(tokens) for item, tokens in zip(questions, answers, strict=True))
        return [item.ending.cut(text.lstrip())[0].strip() for item, text in zip(questions, texts, strict=True)]


class AnswerScores:
    """Metrics over the answers to an evaluation set's first questions.

    Args:
        answerer: answers.
        data: the evaluation set.
        batch_size: questions that are answered together, >= 1.
        max_batches: limit for each process; <= 0 for all.
    """

    def __init__(self, answerer: Answerer, data: SampleDataset, batch_size: int, max_batches: int) -> None:
        self._answerer, self._data = answerer, data
        self._batch_size, self._max_batches = batch_size, max_batches

    def sums(self, rank: int, world_size: int) -> tuple[float, float, float]:
        """Summed exact matches and ROUGE-L over one process's share of the samples, and their number."""
        # Every world_size-th sample, so that the processes have equally many of each kind.
        rows = range(rank, len(self._data), world_size)
        batches = [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]
        # The same samples at every evaluation, so that their metrics compare.
        if self._max_batches > 0:
            batches = batches[: self._max_batches]
        # Floats, because the sums are added over processes in one float32 tensor.
        exact = overlap = count = 0.0
        for batch in batches:
            found = [question for row in batch if (question := prompt_of_record(self._data, row)) is not None]
            for question, answer in zip(found, self._answerer.answer(found), strict=True):
                exact += exact_match(answer, question.reference or "")
                overlap += rouge_l(answer, question.reference or "")
                count += 1
        return exact, overlap, count
