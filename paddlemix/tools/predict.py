"""Answers a file of questions in batches.

    python paddlemix/tools/predict.py --model-path DIR --input questions.jsonl --output answers.jsonl --image-root DIR

Questions have the form of LLaVA's `model_vqa` (`question_id`, `image`, `text`) or any training form.  A run that was
interrupted resumes when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[2]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.config.less_memory import less_memory_in_answers
from paddlemix.datasets.forms.parse import FORMS
from paddlemix.errors import UserError
from paddlemix.out_of_memory import out_of_memory_explained
from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.command import path_argument, place_argument, run_command
from paddlemix.tools.common.generation import (
    add_model_flags,
    add_sampling_flags,
    generation_settings,
    launched_chunk,
    quantization_kind,
    select_precision,
)
from paddlemix.tools.common.tensor_parallel import (
    add_tensor_parallel_flag,
    answering_group,
    start_processes,
    starts_processes,
)

if TYPE_CHECKING:
    from paddlemix.checkpoints.pretrained import Pretrained
    from paddlemix.generation.predict_file import Outcome
    from paddlemix.generation.predict_job import Chunk, PredictJob
    from paddlemix.generation.sampling import GenerationSettings
    from paddlemix.parallel.layout import Layout
    from paddlemix.tools.common.tensor_parallel import AnsweringGroup

STATUS_FAILED_QUESTIONS = 1
# Source: haotian-liu/LLaVA llava/eval/model_vqa_science.py (commit c121f04)
ASKS_FOR_LETTER = "Answer with the option's letter from the given choices directly."


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; those that LLaVA has too keep its names."""
    parser = CommandParser("predict", __doc__)
    add_model_flags(parser)
    add_tensor_parallel_flag(parser)
    parser.add_argument(
        "--input", type=place_argument, required=True, help="questions: JSON Lines or a JSON array, path or URL"
    )
    parser.add_argument(
        "--output", required=True, type=path_argument, help="answers as JSON Lines; the file appears when complete"
    )
    parser.add_argument(
        "--image-root", type=place_argument, help="folder of relative image paths; default: the working directory"
    )
    parser.add_argument(
        "--form", choices=FORMS, help="form of the records; needed only for the data sets that PaddleMIX knows by name"
    )
    parser.add_argument("--single-pred-prompt", action="store_true", help=f"append to each question: {ASKS_FOR_LETTER}")
    parser.add_argument("--batch-size", type=int, default=8, help="questions answered in one batch (default 8)")
    parser.add_argument("--workers", type=int, default=1, help="threads that decode images in advance (default 1)")
    parser.add_argument("--overwrite", action="store_true", help="discard existing answers and start again")
    add_sampling_flags(parser, max_new_tokens=1024, temperature=0.0)
    parser.add_argument(
        "--num-chunks", type=int, metavar="N", help="split the questions into N shares, each with its own output"
    )
    parser.add_argument("--chunk-idx", type=int, metavar="I", help="the share that this process answers, 0 to N-1")
    return parser


def main(argv: list[str]) -> int:
    """Answers the questions that have no answer yet.

    Returns:
        0, or 1 if the output has lines with an error.

    Raises:
        UserError: the model, the input, the output or an argument cannot be used.
    """
    arguments = build_parser().parse_args(argv)
    # Before anything is loaded: wrong flags should show at once.
    chunk, settings = _chunk(arguments), generation_settings(arguments)
    if starts_processes(arguments.tensor_parallel, os.environ):
        return start_processes("predict", argv, arguments.tensor_parallel)
    with answering_group("predict", arguments, is_one_group=arguments.num_chunks is not None) as group:
        if group.leads:
            return _predict(arguments, _job(arguments, chunk, settings), group)
        job = _job(arguments, chunk, settings)
        group.follow(lambda layout: _load(job, layout), *_memory_advice(arguments, job))
    return 0


def _job(arguments: argparse.Namespace, chunk: Chunk, settings: GenerationSettings) -> PredictJob:
    from paddlemix.generation.predict_job import PredictJob
    from paddlemix.tools.common.processor import named_template

    # Before the model: a wrong name should not cost minutes of loading.
    template = named_template(arguments.conv_mode, arguments.model_path) if arguments.conv_mode else None
    _, dtype = select_precision(arguments)
    return PredictJob(
        model=arguments.model_path,
        base=arguments.model_base,
        input=arguments.input,
        output=arguments.output,
        image_root=arguments.image_root,
        form=arguments.form,
        suffix=ASKS_FOR_LETTER if arguments.single_pred_prompt else "",
        template=template,
        settings=settings,
        dtype=dtype,
        quantize=quantization_kind(arguments),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        chunk=chunk,
        overwrite=arguments.overwrite,
    )


def _load(job: PredictJob, layout: Layout) -> Pretrained:
    from paddlemix.checkpoints.load import load_pretrained

    return load_pretrained(job.model, job.dtype, job.base, job.quantize, layout)


def _memory_advice(arguments: argparse.Namespace, job: PredictJob) -> tuple[str, list[str]]:
    device, _ = select_precision(arguments)
    return f"answering with {job.model} on {device}", less_memory_in_answers(arguments, job.dtype)


def _predict(arguments: argparse.Namespace, job: PredictJob, group: AnsweringGroup) -> int:
    from paddlemix.generation.predict_file import predict_file

    start = time.monotonic()
    with out_of_memory_explained(*_memory_advice(arguments, job)):
        outcome = predict_file(job, lambda: group.load(lambda layout: _load(job, layout)))
    _report(job, outcome, time.monotonic() - start)
    # Launched processes: only the one that completes the output reports failures.
    return STATUS_FAILED_QUESTIONS if outcome.failed and outcome.complete else 0


def _chunk(arguments: argparse.Namespace) -> Chunk:
    """The share of this process: from the two flags, or its rank under `paddle.distributed.launch`.

    Raises:
        UserError: one flag without the other, or several processes that do not know of each other.
    """
    from paddlemix.generation.predict_job import Chunk

    # As in LLaVA's scripts, which start one process per card.
    if (arguments.num_chunks is None) != (arguments.chunk_idx is None):
        raise UserError("--num-chunks and --chunk-idx must be given together")
    if arguments.num_chunks is not None:
        return Chunk(index=arguments.chunk_idx, count=arguments.num_chunks)
    # Launched processes write one output together; chunks by flags have their own.
    return launched_chunk(arguments.tensor_parallel)


def _report(job: PredictJob, outcome: Outcome, seconds: float) -> None:
    rate = f", {outcome.asked / seconds:.2f} per second including loading" if outcome.asked else ""
    errors = outcome.asked - outcome.answered
    failed = f", {errors} failed" if errors else ""
    print(f"{outcome.answered} of {outcome.total} questions answered in this run{failed}{rate}")
    if not outcome.complete:
        print(f"{job.output} appears when the other processes have finished")
    elif outcome.failed:
        print(f"{job.output} has {outcome.failed} lines with an error; run the same command again to retry them")
    else:
        print(f"{job.output} is complete")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
