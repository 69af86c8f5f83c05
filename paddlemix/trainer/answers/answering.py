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
from paddlemix.parallel.collectives import agree, gathered_objects
from paddlemix.trainer.answers.prompts import Prompt, prompt_of_record
from paddlemix.trainer.evaluator import Between, EvaluationShare


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
        """One answer for each question, all in one batch; no question gets none.

        Raises:
            UserError: a question does not fit the model's context, or has an image and the model no tower.
        """
        if not questions:
            return []
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
    """

    def __init__(self, answerer: Answerer, data: SampleDataset) -> None:
        self._answerer, self._data = answerer, data

    def means(self, share: EvaluationShare, between: Between = agree) -> dict[str, float]:
        """`exact_match` and `rouge_l`, 0..1: means over the samples of all processes.

        Args:
            share: the questions of this process.
            between: see `Evaluator`.
        """
        sums = zip(*gathered_objects(self.sums(share, between)), strict=True)
        exact, overlap, count = (sum(values) for values in sums)
        return {"exact_match": exact / max(count, 1), "rouge_l": overlap / max(count, 1)}

    def sums(self, share: EvaluationShare, between: Between = agree) -> tuple[float, float, int]:
        """Summed exact matches and ROUGE-L over this process's share of the samples, and their number."""
        exact, overlap, count = 0.0, 0.0, 0
        failure: Exception | None = None
        # The same samples at every evaluation, so that their metrics compare; every process makes equally many rounds.
        for batch in [*share.batches(len(self._data)), *([] for _ in share.filling(len(self._data)))]:
            between(failure)
            try:
                found = [question for row in batch if (question := prompt_of_record(self._data, row)) is not None]
                for question, answer in zip(found, self._answerer.answer(found), strict=True):
                    exact += exact_match(answer, question.reference or "")
                    overlap += rouge_l(answer, question.reference or "")
                    count += 1
            except Exception as error:
                failure = error
        agree(failure)
        return exact, overlap, count
