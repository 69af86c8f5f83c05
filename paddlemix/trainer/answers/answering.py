"""Answers of the model while it trains: for samples in the log, and for the generation metrics of an evaluation.

Greedy, so no random number is drawn; the model is back in training mode afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import paddle

from paddlemix.datasets.mixture import SampleDataset
from paddlemix.errors import UserError
from paddlemix.evaluation.metrics import exact_match, rouge_l
from paddlemix.generation.generate import generate
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.models.llava import LlavaModel
from paddlemix.parallel.collectives import gathered_objects
from paddlemix.trainer.answers.prompts import Prompt, prompt_of_record
from paddlemix.trainer.evaluator import Between, EvaluationShare, agreed


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


def leaves_others_waiting(error: Exception, computes_alone: bool) -> bool:
    """Whether other processes are in the same answer and wait for the one that had this error: it must end at once, and
    its launcher them.

    Args:
        error: of `Answerer.answer`.
        computes_alone: whether the process has the whole model.
    """
    # What is wrong with a question is found before anything is computed, and by all.
    return not computes_alone and not isinstance(error, UserError)


class AnswerScores:
    """Metrics over the answers to an evaluation set's first questions.

    Args:
        answerer: answers.
        data: the evaluation set.
    """

    def __init__(self, answerer: Answerer, data: SampleDataset) -> None:
        self._answerer, self._data = answerer, data

    def means(self, share: EvaluationShare, between: Between = agreed) -> dict[str, float]:
        """`exact_match` and `rouge_l`, 0..1: means over the samples of all processes.

        Args:
            share: the questions of this process.
            between: see `Evaluator`.
        """
        own = self.sums(share, between)
        sums = zip(*(found for found in gathered_objects(own if share.counts else None) if found), strict=True)
        exact, overlap, count = (sum(values) for values in sums)
        return {"exact_match": exact / max(count, 1), "rouge_l": overlap / max(count, 1)}

    def sums(self, share: EvaluationShare, between: Between = agreed) -> tuple[float, float, int]:
        """Summed exact matches and ROUGE-L over this process's share of the samples, and their number."""
        exact, overlap, count = 0.0, 0.0, 0
        failure: Exception | None = None
        # The same samples at every evaluation, so that their metrics compare; every process makes equally many rounds.
        for batch in [*share.batches(len(self._data)), *([] for _ in share.filling(len(self._data)))]:
            found: list[Prompt] = []
            try:
                found = [] if failure else self._prompts(batch)
            except Exception as error:
                failure = error
            # After pictures are read, before anything is computed: those who compute together all come to it, or none.
            between(failure)
            try:
                answers = self._answerer.answer(found)
            except Exception as error:
                if leaves_others_waiting(error, share.passes_alone):
                    raise
                failure = error
                continue
            for question, answer in zip(found, answers, strict=True):
                exact += exact_match(answer, question.reference or "")
                overlap += rouge_l(answer, question.reference or "")
                count += 1
        agreed(failure)
        return exact, overlap, count

    def _prompts(self, rows: Sequence[int]) -> list[Prompt]:
        return [question for row in rows if (question := prompt_of_record(self._data, row)) is not None]
