"""Predictions -> results: the score by its protocol's rules, files for servers, `result.json`.  Runs no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paddlemix.errors import UserError
from paddlemix.evaluation.answered_questions import answered_questions
from paddlemix.evaluation.benchmarks.published_scores import published_score
from paddlemix.evaluation.evaluation_plan import EvaluationPlan
from paddlemix.evaluation.judged import JudgePlan, first_requests, judge_answers
from paddlemix.evaluation.prepared import Prepared, check_made_with, read_made_with
from paddlemix.evaluation.result_file import Result, add_result
from paddlemix.evaluation.scoring.answered import Answered, Score
from paddlemix.generation.answer_file import read_header
from paddlemix.generation.answer_header import IMAGES
from paddlemix.identity import text_digest
from paddlemix.log import logger


def score_predictions(plan: EvaluationPlan) -> tuple[dict[str, Result], list[UserError]]:
    """Scores the predictions that are there.

    Returns:
        The results by name, and what could not be scored.

    Raises:
        MissingFileError, UserError: data cannot be used, or the predictions are of other questions.
    """
    prepared = [plan.prepared(name) for name in plan.names]
    for one in prepared:
        check_made_with(one)
    results: dict[str, Result] = {}
    problems: list[UserError] = []
    for one in prepared:
        try:
            results[one.benchmark.name] = score(one, plan.output, plan.judge)
        except UserError as error:
            problems.append(error)
    return results, problems


def score(prepared: Prepared, output: Path, judge: JudgePlan | None) -> Result:
    """Scores a benchmark, writes the files for servers, and puts the result into `result.json`.

    Args:
        output: folder of `result.json`.
        judge: for open answers; None leaves them without a score.

    Raises:
        MissingFileError, UserError: see `answered_questions`; or the judge cannot be asked.
    """
    benchmark = prepared.benchmark
    answered = answered_questions(prepared)
    submission = _write_submission(prepared, answered)
    found, scored_by = _score(prepared, answered, judge)
    made_with = _made_with(prepared)
    result = Result(
        protocol=prepared.protocol,
        metrics=dict(found.metrics) if found else {},
        by_category={name: dict(values) for name, values in found.by_category.items()} if found else {},
        unit=found.unit if found else "percent",
        headline=benchmark.headline,
        questions=len(answered),
        limit=prepared.limit,
        published_questions=benchmark.published_questions,
        published=published_score(made_with.get("model"), benchmark.name, prepared.protocol),
        scored_by=scored_by,
        submission=submission,
        made_with=made_with,
    )
    add_result(output, benchmark.name, result)
    return result


def _write_submission(prepared: Prepared, answered: Sequence[Answered]) -> str | None:
    """Writes the file for a server; returns its place below the output, None where there is none."""
    submission = prepared.data.submission
    if submission is None:
        return None
    answers = {one.question_id: one.text for one in answered if one.text is not None}
    try:
        submission.write(prepared.folder / submission.name, answers)
    except UserError as error:
        # VizWiz's server takes whole files alone; a package that is missing must not cost a score that we compute
        if not prepared.data.has_references and prepared.limit is None:
            raise
        logger.warning("%s has no file for its server: %s", prepared.benchmark.name, error)
        return None
    return f"{prepared.benchmark.name}/{submission.name}"


def _score(prepared: Prepared, answered: Sequence[Answered], plan: JudgePlan | None) -> tuple[Score | None, str | None]:
    """The score where there is one, and who gave it."""
    benchmark = prepared.benchmark
    # who scores            -> when
    # a judge, or nobody yet -> the benchmark has open answers
    # a server              -> the right answers are not public
    # we                    -> else
    if benchmark.judged is not None:
        if plan is None:
            return None, None
        if plan.dry_run:
            wanted = plan.judge.missing(first_requests(prepared, answered))
            size = sum(len(request.user) + len(request.system) for request in wanted)
            logger.info("%s: the judge would be sent %d requests, %d characters", benchmark.name, len(wanted), size)
            return None, None
        return judge_answers(prepared, answered, plan.judge), f"judge {plan.judge.model}"
    if benchmark.score is None or not prepared.data.has_references:
        return None, "server"
    return benchmark.score(answered, prepared.protocol), "paddlemix"


def _made_with(prepared: Prepared) -> dict[str, Any]:
    header = read_header(prepared.predictions)
    # pictures have a digest for each question there: in a table of results one of all of them is enough
    if IMAGES in header:
        header[IMAGES] = text_digest(*header[IMAGES])
    found = read_made_with(prepared)
    return {**header, **{key: value for key, value in found.items() if key not in ("benchmark", "protocol", "limit")}}
