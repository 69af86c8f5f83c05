"""MME: two yes-or-no questions for each image; points for each answer and for each image with both right.

Source: eval_tool/calculation.py and convert_answer_to_mme.py, which come with MME's data and LLaVA's eval.zip;
lmms_eval/tasks/mme/utils.py of lmms-eval 0.7.3.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from paddlemix.errors import UserError
from paddlemix.evaluation.scoring.answered import LLAVA, Answered, Score, as_text, check_answered, group, mean

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES, NO, OTHER = "yes", "no", "other"

_SUFFIX = "Answer the question using a single word or phrase."
_ASKS = "Please answer yes or no."


def parse_first_characters(text: str) -> str:
    """ "yes", "no" or "other": the word within the first four characters, as `calculation.py` reads a line.

    Spaces before it and periods stay: " yes" is a yes, "  yes" is not; "know" is a no, "y" is neither.
    """
    text = text.lower()
    return text if text in (YES, NO) else _in_start(text)


def parse_lmms(text: str) -> str:
    """The same as lmms-eval reads it: without spaces at the ends and without any period; "y" and "n" alone count."""
    text = text.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": YES, "n": NO}.get(text, OTHER)
    return _in_start(text)


def _in_start(text: str) -> str:
    start = text[:4]
    # a yes comes first: "noyes" has no room for it
    return YES if YES in start else NO if NO in start else OTHER


def release_question(prompt: str, known: Container[str]) -> str:
    """The question as MME's own files have it, out of LLaVA's prompt.

    Args:
        prompt: question, a line end and the instruction for a short answer.
        known: the questions of the picture's file; a few have two spaces before their last sentence.
    """
    question = prompt.replace(_SUFFIX, "").strip() if _SUFFIX in prompt else prompt
    if _ASKS in question:
        return question
    single = f"{question} {_ASKS}"
    return single if single in known else f"{question}  {_ASKS}"


def score_mme(answered: Sequence[Answered], protocol: str = LLAVA) -> Score:
    """MME.

    Args:
        answered: with one of the 14 tasks as category; records with "answer", Yes or No.  The two questions of an image
            have one question_id, and follow each other within their category.

    Returns:
        `perception` and `cognition`, points: the sums of their tasks' `score`, at most 200 each.  Of each task also
        `accuracy` and `accuracy_plus`, percent, which add up to its score.

    Raises:
        UserError: an unknown task, an answer that is not yes or no, or not two questions for an image.
    """
    check_answered(answered, protocol)
    parse = parse_first_characters if protocol == LLAVA else parse_lmms
    right = [parse(as_text(one.text)) == _answer(one) for one in answered]
    tasks: dict[str, dict[str, float]] = {}
    for name, places in group(one.category for one in answered).items():
        if name not in PERCEPTION and name not in COGNITION:
            raise UserError(f"'{name}' is not a task of MME; they are {', '.join((*PERCEPTION, *COGNITION))}")
        tasks[name] = _task_score([answered[place] for place in places], [right[place] for place in places], protocol)
    # a part without a task, as with few questions, has no points
    metrics = {
        part: sum(
            tasks[name]["score"] for name in (names if protocol == LLAVA else tasks) if name in tasks and name in names
        )
        for part, names in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return Score(metrics=metrics, by_category=tasks, right=right, unit="points")


def _answer(one: Answered) -> str:
    answer = str(one.value("answer")).lower().strip().replace(".", "")
    if answer not in (YES, NO):
        raise UserError(f"question {one.question_id!r}: the answer {answer!r} is not yes or no")
    return answer


def _task_score(asked: Sequence[Answered], right: Sequence[bool], protocol: str) -> dict[str, float]:
    # llava     -> lines follow each other in pairs, whatever image they name
    # lmms-eval -> by question_id
    keys = [place // 2 for place in range(len(asked))] if protocol == LLAVA else [one.question_id for one in asked]
    pairs = list(group(keys).values())
    for places in pairs:
        found = {asked[place].question_id for place in places}
        if len(places) != 2 or len(found) != 1:
            raise UserError(
                f"MME needs two questions for each image, one after the other; of {asked[places[0]].category} "
                f"{', '.join(sorted(map(str, found)))} has {len(places) if len(found) == 1 else 'its own'}"
            )
    both = [all(right[place] for place in places) for places in pairs]
    accuracy, plus = mean(map(float, right)) * 100, mean(map(float, both)) * 100
    if protocol == LLAVA:
        score = accuracy + plus
    else:  # the mean of sums instead of the sum of means: another last digit
        score = mean(
            all_right * 100.0 + mean(float(right[i]) for i in places) * 100.0
            for places, all_right in zip(pairs, both, strict=True)
        )
    return {"score": score, "accuracy": accuracy, "accuracy_plus": plus}
