"""Any data set with reference answers, by metrics that the user names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from paddlemix.errors import UserError, did_you_mean
from paddlemix.evaluation.metrics import exact_match
from paddlemix.evaluation.scoring.answered import Answered, Score, as_text, check_answered, group, mean
from paddlemix.evaluation.scoring.refcoco import THRESHOLD, iou, parse_numbers
from paddlemix.evaluation.scoring.text_similarity import anls, bleu, bleu_tokenizer, rouge_l, sentence_bleu
from paddlemix.evaluation.scoring.vqa_answers import vqa_accuracy

Metric = Callable[[str, Sequence[str]], float]


def box_accuracy(answer: str, references: Sequence[str]) -> float:
    """1.0 where the first four numbers of an answer are a box that a reference has an IoU of 0.5 with, else 0.0."""
    said = parse_numbers(answer)
    boxes = [box for box in map(parse_numbers, references) if box is not None]
    return float(said is not None and any(iou(said, box) >= THRESHOLD for box in boxes))


def _nearest(compare: Callable[[str, str], float]) -> Metric:
    return lambda answer, references: max((compare(answer, one) for one in references), default=0.0)


# Each is the mean over the questions of 0..1; BLEU alone is of the whole set.
METRICS: Mapping[str, Metric] = {
    "exact_match": _nearest(exact_match),
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "rouge_l": rouge_l,
    "iou_at_0.5": box_accuracy,
}
BLEU = "bleu"
DEFAULT_METRICS = ("exact_match",)
# What users write -> the name here.
_ALIASES = {
    "iou": "iou_at_0.5",
    "iou@0.5": "iou_at_0.5",
    "iou_0.5": "iou_at_0.5",
    "rougel": "rouge_l",
    "rouge-l": "rouge_l",
}


def metric_names(names: Sequence[str]) -> tuple[str, ...]:
    """The metrics by their names here, each once.

    Raises:
        UserError: a name that is none.
    """
    known = (*METRICS, BLEU)
    found: list[str] = []
    for name in names:
        own = _ALIASES.get(name.lower(), name.lower())
        if own not in known:
            raise UserError(f"metric '{name}' is not one of {', '.join(known)}{did_you_mean(name, known)}")
        if own not in found:
            found.append(own)
    return tuple(found)


def references_of(one: Answered) -> list[str]:
    """The right answers of a question: its record's "references", or its "reference".

    Raises:
        UserError: it has none.
    """
    found = one.record.get("references") or one.record.get("reference")
    if not found:
        raise UserError(f"question {one.question_id!r} has no reference answer")
    return [found] if isinstance(found, str) else [str(reference) for reference in found]


def score_custom(answered: Sequence[Answered], names: Sequence[str] = DEFAULT_METRICS) -> Score:
    """A data set of the user's.

    Args:
        answered: records with "reference" or "references".
        names: of metrics; a question's `right` is the first one's.

    Returns:
        The metrics, shares, of all and of each category.

    Raises:
        UserError: no question, no reference, an unknown metric, or a package that it needs is not installed.
    """
    check_answered(answered)
    names = metric_names(names)
    texts, references = [as_text(one.text) for one in answered], [references_of(one) for one in answered]
    values: dict[str, list[float]] = {}
    for name in names:
        metric = METRICS.get(name) or _sentences(references)
        values[name] = [metric(text, known) for text, known in zip(texts, references, strict=True)]

    def measure(places: Sequence[int]) -> dict[str, float]:
        return {
            name: bleu([texts[i] for i in places], [references[i] for i in places])
            if name == BLEU
            else mean(values[name][i] for i in places)
            for name in names
        }

    categories = group(one.category for one in answered)
    return Score(
        metrics=measure(range(len(answered))),
        by_category={name: measure(places) for name, places in categories.items() if name},
        right=values[names[0]],
    )


def _sentences(references: Sequence[Sequence[str]]) -> Metric:
    tokenizer = bleu_tokenizer(references)
    return lambda answer, known: sentence_bleu(answer, known, tokenizer)
