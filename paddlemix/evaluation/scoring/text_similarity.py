"""How near a text is to its references: ROUGE-L and BLEU by their packages, ANLS and edit distance here.

`evaluation/metrics.py` has the ROUGE-L that training shows, for which no package is needed; both are equal.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from paddlemix.evaluation import metrics
from paddlemix.evaluation.scoring.optional import import_extra

_ANLS_THRESHOLD = 0.5
_CJK = ("\u3040", "\u9fff")  # kana and the common ideographs


class UnicodeWords:
    """rouge-score's tokenizer for every script: its own keeps [a-z0-9] alone, so that Chinese would have no word."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text; a CJK character is one."""
        return metrics.words(text)


def edit_distance(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The least number of insertions, removals and replacements that make the second of the first (Levenshtein)."""
    row = list(range(len(second) + 1))
    for line, one in enumerate(first, 1):
        diagonal, row[0] = row[0], line
        for place, other in enumerate(second, 1):
            # one row of the table is enough: `diagonal` keeps what the step before has overwritten
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (one != other))
    return row[-1]


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity: of the nearest reference; below 0.5 it is 0.

    Case and spaces at the ends do not count.

    Source: STVQAANLSEvaluator of llava/eval/m4c_evaluator.py, llava-torch 1.2.2.post1.
    """
    return max((_similarity(answer.lower().strip(), one.lower().strip()) for one in references), default=0.0)


def _similarity(answer: str, reference: str) -> float:
    longest = max(len(answer), len(reference))
    # the original divides by zero where both are empty
    similarity = 1 - edit_distance(answer, reference) / longest if longest else 1.0
    return similarity if similarity >= _ANLS_THRESHOLD else 0.0


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F1 of ROUGE-L against the nearest reference, 0..1.

    Two texts without any word, which ROUGE gives 0, are compared exactly.

    Raises:
        UserError: rouge-score is not installed.
    """
    scorer = _rouge_scorer()
    best = 0.0
    for reference in references:
        if metrics.words(answer) or metrics.words(reference):
            best = max(best, scorer.score(reference, answer)["rougeL"].fmeasure)
        else:
            best = max(best, metrics.exact_match(answer, reference))
    return best


@functools.cache
def _rouge_scorer() -> Any:
    module = import_extra("rouge_score.rouge_scorer", "the metric rouge_l")
    return module.RougeScorer(["rougeL"], tokenizer=UnicodeWords())


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of a whole set, 0..1: sacrebleu's score / 100, with its tokenizer `zh` where a reference is Chinese.

    Args:
        answers: at least one.
        references: of each answer, one and more.

    Raises:
        UserError: sacrebleu is not installed.
    """
    module = import_extra("sacrebleu", "the metric bleu")
    # sacrebleu wants the first reference of all answers, then the second of all, None for one that is missing
    most = max(len(of_answer) for of_answer in references)
    columns = [[of_answer[n] if n < len(of_answer) else None for of_answer in references] for n in range(most)]
    return float(module.corpus_bleu(list(answers), columns, tokenize=bleu_tokenizer(references)).score) / 100


def sentence_bleu(answer: str, references: Sequence[str], tokenizer: str) -> float:
    """BLEU of one answer, 0..1, without the orders of n-grams that it is too short for."""
    module = import_extra("sacrebleu", "the metric bleu")
    return float(module.sentence_bleu(answer, list(references), tokenize=tokenizer).score) / 100


def bleu_tokenizer(references: Sequence[Sequence[str]]) -> str:
    """sacrebleu's name of the tokenizer for a set: one for all, so that all are counted alike."""
    is_chinese = any(_CJK[0] <= character <= _CJK[1] for one in references for text in one for character in text)
    return "zh" if is_chinese else "13a"
