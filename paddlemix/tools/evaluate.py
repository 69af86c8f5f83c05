"""Scores a model or adapter on published benchmarks, from local files, with their official prompts and metrics.

    paddlemix evaluate --model-path DIR --benchmark pope,textvqa --data-root playground/data/eval --output results

Predictions and scores both resume when the command is started again with the same arguments.  `--score-only` scores
answers that are there; `--benchmark custom --data FILE` takes data of your own.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.config.less_memory import less_memory_in_answers
from paddlemix.errors import UserError
from paddlemix.out_of_memory import out_of_memory_explained
from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.command import path_argument, run_command, seed_argument
from paddlemix.tools.common.generation import add_model_flags, launched_chunk, quantization_kind, select_precision
from paddlemix.tools.common.tensor_parallel import (
    add_tensor_parallel_flag,
    answering_group,
    start_processes,
    starts_processes,
)

if TYPE_CHECKING:
    from paddlemix.checkpoints.pretrained import Pretrained
    from paddlemix.evaluation.evaluation_plan import EvaluationPlan
    from paddlemix.evaluation.judged import JudgePlan
    from paddlemix.evaluation.result_file import Result
    from paddlemix.generation.predict_job import PredictJob
    from paddlemix.parallel.layout import Layout
    from paddlemix.tools.common.tensor_parallel import AnsweringGroup

STATUS_FAILED_QUESTIONS = 1  # of one of several processes: the others go on with their work
_PROTOCOLS = ("llava", "lmms-eval")
_LONGEST = 1024  # tokens: the protocols' longest usual answer, for advice about memory


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = CommandParser("evaluate", __doc__)
    add_model_flags(parser, is_needed=False)
    add_tensor_parallel_flag(parser)
    parser.add_argument(
        "--benchmark", required=True, metavar="NAME[,NAME]", help="benchmarks, with commas between them"
    )
    parser.add_argument(
        "--data-root",
        type=path_argument,
        help="folder with one folder per benchmark; with one name also its own folder",
    )
    parser.add_argument("--output", required=True, type=path_argument, help="folder of predictions and result.json")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each benchmark")
    parser.add_argument(
        "--protocol", choices=_PROTOCOLS, default="llava", help="whose prompts and rules (default llava)"
    )
    parser.add_argument("--score-only", action="store_true", help="score the predictions in --output; needs no model")
    parser.add_argument(
        "--data", type=path_argument, help="with --benchmark custom: a file of questions with references"
    )
    parser.add_argument(
        "--image-root", type=path_argument, help="with --benchmark custom: folder of relative image paths"
    )
    parser.add_argument(
        "--metrics", help="with --benchmark custom: metrics, with commas between them (default exact_match)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="questions answered in one batch (default 8)")
    parser.add_argument("--workers", type=int, default=1, help="threads that decode images in advance (default 1)")
    parser.add_argument("--max-new-tokens", type=int, help="maximum length of an answer; default: the protocol's")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = the most likely token (default 0)")
    parser.add_argument("--num-beams", type=int, default=1, help="beams of a beam search; 1 = no search (default 1)")
    parser.add_argument("--seed", type=seed_argument, default=0, help="random seed for sampling (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="discard existing predictions and start again")
    _add_judge_flags(parser)
    return parser


def _add_judge_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge-address", metavar="URL", help="OpenAI-compatible interface of a judge: http://HOST/v1")
    parser.add_argument("--judge-model", metavar="NAME", help="the judge's name there")
    parser.add_argument(
        "--judge-key-variable", metavar="NAME", default="OPENAI_API_KEY", help="environment variable with its key"
    )
    parser.add_argument("--judge-dry-run", action="store_true", help="ask no judge; say how much it would be asked")


def main(argv: list[str]) -> int:
    """Predicts and scores.

    Returns:
        0; 1 from one of several processes that could not ask or score something.

    Raises:
        MissingFileError, UserError: the model, the data, an argument or an answer cannot be used.
    """
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    if arguments.score_only:
        return _evaluate(arguments, _plan(arguments, None), None)
    _guard_model(arguments)
    if starts_processes(arguments.tensor_parallel, os.environ):
        return start_processes("evaluate", argv, arguments.tensor_parallel)
    with answering_group("evaluate", arguments, is_one_group=False) as group:
        if group.leads:
            return _evaluate(arguments, _plan(arguments, _job(arguments)), group)
        job = _job(arguments)
        group.follow(lambda layout: _load(job, layout), *_memory_advice(arguments, job))
    return 0


def _guard_model(arguments: argparse.Namespace) -> None:
    """Raises UserError where the results would come into a folder that the model needs."""
    from paddlemix.checkpoints.hub.needs import needed_by_model
    from paddlemix.outputs import Output, check_output

    models = [name for name in (arguments.model_path, arguments.model_base) if name]
    check_output(
        Output("--output", arguments.output, "folder"), [item for name in models for item in needed_by_model(name)]
    )


def _check(arguments: argparse.Namespace) -> None:
    """Flags that do not belong together, before anything is loaded.

    Raises:
        UserError: says which.
    """
    from paddlemix.evaluation.benchmarks.known_benchmarks import benchmark_names
    from paddlemix.evaluation.benchmarks.own_data import CUSTOM

    names = benchmark_names(arguments.benchmark)
    if arguments.model_path is None and not arguments.score_only:
        raise UserError("--model-path must be given; only --score-only needs no model")
    if arguments.score_only and arguments.overwrite:
        raise UserError("--score-only keeps the predictions that --overwrite would discard; give one of them")
    for flag in ("data", "image_root", "metrics"):
        if getattr(arguments, flag) is not None and CUSTOM not in names:
            raise UserError(
                f"--{flag.replace('_', '-')} is for --benchmark custom, and {arguments.benchmark} is asked for"
            )
    if CUSTOM in names and arguments.data is None:
        raise UserError("--benchmark custom needs --data, the file of your own questions")
    if any(name != CUSTOM for name in names) and arguments.data_root is None:
        raise UserError(f"--benchmark {arguments.benchmark} needs --data-root, the folder with its data")
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens} must be at least 1")


def _plan(arguments: argparse.Namespace, job: PredictJob | None) -> EvaluationPlan:
    from paddlemix.evaluation.benchmarks.known_benchmarks import benchmark_names
    from paddlemix.evaluation.benchmarks.own_data import custom_benchmark
    from paddlemix.evaluation.evaluation_plan import EvaluationPlan

    custom = None
    if arguments.data is not None:
        metrics = (arguments.metrics or "exact_match").split(",")
        custom = custom_benchmark(arguments.data, arguments.image_root, [name.strip() for name in metrics])
    return EvaluationPlan(
        names=tuple(benchmark_names(arguments.benchmark)),
        output=arguments.output,
        data_root=arguments.data_root,
        predict=job,
        protocol=arguments.protocol,
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
        custom=custom,
        judge=_judge(arguments),
    )


def _judge(arguments: argparse.Namespace) -> JudgePlan | None:
    from paddlemix.evaluation.judged import JudgePlan
    from paddlemix.evaluation.judging.endpoint import Judge, key_from_environment

    if arguments.judge_address is None:
        if arguments.judge_model or arguments.judge_dry_run:
            raise UserError("--judge-address must be given with --judge-model and --judge-dry-run")
        return None
    if not arguments.judge_model:
        raise UserError("--judge-model must be given: a score names its judge")
    # a server of one's own needs none
    key = key_from_environment(arguments.judge_key_variable, is_needed=False)
    judge = Judge(address=arguments.judge_address, model=arguments.judge_model, key=key)
    return JudgePlan(judge=judge, dry_run=arguments.judge_dry_run)


def _job(arguments: argparse.Namespace) -> PredictJob:
    """What all benchmarks are asked with; input and output are each benchmark's own."""
    from paddlemix.generation.predict_job import PredictJob
    from paddlemix.generation.sampling import GenerationSettings
    from paddlemix.tools.common.processor import named_template

    # Before the model: a wrong name should not cost minutes of loading.
    template = named_template(arguments.conv_mode, arguments.model_path) if arguments.conv_mode else None
    _, dtype = select_precision(arguments)
    return PredictJob(
        model=arguments.model_path,
        base=arguments.model_base,
        input="",
        output=arguments.output,
        template=template,
        settings=GenerationSettings(
            max_new_tokens=arguments.max_new_tokens or _LONGEST,
            temperature=arguments.temperature,
            num_beams=arguments.num_beams,
            seed=arguments.seed,
        ),
        dtype=dtype,
        quantize=quantization_kind(arguments),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        chunk=launched_chunk(arguments.tensor_parallel),
        overwrite=arguments.overwrite,
    )


def _load(job: PredictJob, layout: Layout) -> Pretrained:
    from paddlemix.checkpoints.load import load_pretrained

    return load_pretrained(job.model, job.dtype, job.base, job.quantize, layout)


def _evaluate(arguments: argparse.Namespace, plan: EvaluationPlan, group: AnsweringGroup | None) -> int:
    from paddlemix.evaluation.score_table import score_table

    if plan.predict is None or group is None:
        from paddlemix.evaluation.scored import score_predictions

        results, problems = score_predictions(plan)
    else:
        results, problems = _predict_and_score(arguments, plan, plan.predict, group)
    if results:
        print(score_table(results))
        print(f"\n{plan.output / 'result.json'} has these numbers and what they were made with")
    if not problems:
        return 0
    if plan.predict is not None and plan.predict.chunk.joined:
        # An error would make the launcher stop the processes that are still at work.
        print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
        return STATUS_FAILED_QUESTIONS
    raise UserError("\n".join(str(problem) for problem in problems))


def _memory_advice(arguments: argparse.Namespace, job: PredictJob) -> tuple[str, list[str]]:
    advised = argparse.Namespace(**{**vars(arguments), "max_new_tokens": job.settings.max_new_tokens})
    return f"answering with {job.model}", less_memory_in_answers(advised, job.dtype)


def _predict_and_score(
    arguments: argparse.Namespace, plan: EvaluationPlan, job: PredictJob, group: AnsweringGroup
) -> tuple[dict[str, Result], list[UserError]]:
    from paddlemix.evaluation.evaluation_run import evaluate

    with out_of_memory_explained(*_memory_advice(arguments, job)):
        return evaluate(plan, lambda: group.load(lambda layout: _load(job, layout)))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
