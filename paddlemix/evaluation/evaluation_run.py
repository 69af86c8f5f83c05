"""Benchmarks one after the other: all data is read first, then each is predicted and scored; both steps resume.

    plan = EvaluationPlan(names=("pope",), data_root=Path("playground/data/eval"), output=Path("results"), predict=job)
    results, problems = evaluate(plan, load)

Knows no command line.  Several processes share the predictions of each benchmark, as `predict_file` does; whoever
completes a file scores it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.errors import UserError
from paddlemix.evaluation.evaluation_plan import EvaluationPlan
from paddlemix.evaluation.prepared import Prepared, write_made_with, write_questions
from paddlemix.evaluation.result_file import Result
from paddlemix.evaluation.scored import score, score_predictions
from paddlemix.generation.predict import processor_for
from paddlemix.generation.predict_file import predict_file
from paddlemix.generation.predict_job import PredictJob

Load = Callable[[], Pretrained]


def evaluate(plan: EvaluationPlan, load: Load) -> tuple[dict[str, Result], list[UserError]]:
    """Predicts and scores the benchmarks of a plan.

    Args:
        load: returns the model; called once, and only where something is left to ask.

    Returns:
        The results by name, of the benchmarks that this process has completed; and what could not be asked or scored:
        one broken picture does not cost the other benchmarks' hours.

    Raises:
        MissingFileError, UserError: data, model or output cannot be used.
    """
    if plan.predict is None:
        return score_predictions(plan)
    loaded: list[Pretrained] = []

    def load_once() -> Pretrained:
        if not loaded:
            loaded.append(load())
        return loaded[0]

    # Data first: a missing file of the last benchmark should show before hours of the first.
    prepared = [plan.prepared(name) for name in plan.names]
    for one in prepared:
        write_questions(one, plan.overwrite)
    results: dict[str, Result] = {}
    problems: list[UserError] = []
    for one in prepared:
        if not _predict(plan, plan.predict, one, load_once):
            continue  # the process that completes the file scores it
        try:
            results[one.benchmark.name] = score(one, plan.output, plan.judge)
        except UserError as error:
            problems.append(error)
    return results, problems


def _predict(plan: EvaluationPlan, template_job: PredictJob, prepared: Prepared, load: Load) -> bool:
    """Answers what is left; returns whether the file of predictions is complete."""
    tokens = plan.max_new_tokens or prepared.benchmark.max_new_tokens[plan.protocol]
    job = replace(
        template_job,
        input=str(prepared.questions_file),
        output=prepared.predictions,
        image_root=prepared.image_root,
        settings=replace(template_job.settings, max_new_tokens=tokens),
    )

    def load_and_note() -> Pretrained:
        found = load()
        write_made_with(prepared, processor_for(found, job.template).template.name)
        return found

    return predict_file(job, load_and_note).complete
