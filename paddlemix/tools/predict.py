"""Answers a file of questions.

    python paddlemix/tools/predict.py --model-path DIR --input questions.jsonl --output answers.jsonl --image-root DIR

Questions are those of LLaVA's `model_vqa` (`question_id`, `image`, `text`) or records of any training form.  Started
again with the same arguments it goes on where it stopped.
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
from paddlemix.memory import out_of_memory_explained
from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.command import path_argument, place_argument, run_command, seed_argument

if TYPE_CHECKING:
    from paddlemix.generation.predict_file import Chunk, Outcome, PredictJob
    from paddlemix.generation.sampling import GenerationSettings

STATUS_FAILED_QUESTIONS = 1
# Source: haotian-liu/LLaVA llava/eval/model_vqa_science.py (commit c121f04)
ASKS_FOR_LETTER = "Answer with the option's letter from the given choices directly."


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; those that LLaVA has too have its names."""
    parser = CommandParser("predict", __doc__)
    parser.add_argument(
        "--model-path", type=place_argument, required=True, help="a model or adapter, directory or name"
    )
    parser.add_argument("--model-base", type=place_argument, help="an adapter's base; default: the one it names")
    parser.add_argument(
        "--input", type=place_argument, required=True, help="the questions: JSON Lines or a JSON array, path or URL"
    )
    parser.add_argument(
        "--output", required=True, type=path_argument, help="the answers, JSON Lines; appears when complete"
    )
    parser.add_argument(
        "--image-root", type=place_argument, help="folder that image paths start from; default: the working directory"
    )
    parser.add_argument("--form", choices=FORMS, help="of the records, where PaddleMIX tells it by name")
    parser.add_argument("--conv-mode", help="conversation template; default: the one stored with the checkpoint")
    parser.add_argument("--single-pred-prompt", action="store_true", help=f"add to each question: {ASKS_FOR_LETTER}")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="most tokens of an answer (default 1024)")
    parser.add_argument("--batch-size", type=int, default=8, help="questions answered together (default 8)")
    parser.add_argument("--workers", type=int, default=1, help="threads that decode images ahead (default 1)")
    parser.add_argument("--overwrite", action="store_true", help="forget the answers that are there")
    _add_sampling(parser)
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-8bit", action="store_true", help="hold the language model in 8 bits (int8)")
    bits.add_argument("--load-4bit", action="store_true", help="hold the language model in 4 bits (nf4)")
    parser.add_argument("--device", help="gpu, npu, xpu or cpu; default: what is there")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16, float32 on CPU")
    parser.add_argument(
        "--num-chunks", type=int, help="cut the questions into so many shares, each with its own output"
    )
    parser.add_argument("--chunk-idx", type=int, help="which of them this process answers, 0 for the first")
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="likeliest tokens that reach it together (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="only the likeliest tokens, so many; 0: all (default)")
    parser.add_argument(
        "--num-beams", type=int, default=1, help="beam search, one question at a time (default 1: none)"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 avoids tokens that were there")
    parser.add_argument("--stop", action="append", default=[], help="text that ends an answer; may be given repeatedly")
    parser.add_argument("--seed", type=seed_argument, default=0, help="of the sampling (default 0)")


def main(argv: list[str]) -> int:
    """Answers what has no answer yet.

    Returns:
        0, or 1 where the output has lines with an error.

    Raises:
        UserError: the model, the input, the output or an argument cannot be used.
    """
    arguments = build_parser().parse_args(argv)
    chunk, settings = _chunk(arguments), _settings(arguments)
    from paddlemix.checkpoints.load import load_pretrained
    from paddlemix.device import check_dtype, default_dtype, select_device, set_seed
    from paddlemix.generation.predict_file import PredictJob, predict_file
    from paddlemix.tools.common.processor import named_template

    template = named_template(arguments.conv_mode, arguments.model_path) if arguments.conv_mode else None
    device = select_device(arguments.device)
    dtype = arguments.dtype or default_dtype(device)
    check_dtype(dtype, device)
    set_seed(arguments.seed)
    job = PredictJob(
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
        quantize="int8" if arguments.load_8bit else "nf4" if arguments.load_4bit else None,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        chunk=chunk,
        overwrite=arguments.overwrite,
    )
    start = time.monotonic()
    with out_of_memory_explained(f"answering with {job.model} on {device}", less_memory_in_answers(arguments, dtype)):
        outcome = predict_file(job, lambda: load_pretrained(job.model, job.dtype, job.base, job.quantize))
    _report(job, outcome, time.monotonic() - start)
    return STATUS_FAILED_QUESTIONS if outcome.failed and outcome.complete else 0


def _settings(arguments: argparse.Namespace) -> GenerationSettings:
    from paddlemix.generation.sampling import GenerationSettings

    return GenerationSettings(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        num_beams=arguments.num_beams,
        repetition_penalty=arguments.repetition_penalty,
        stop=tuple(arguments.stop),
        seed=arguments.seed,
    )


def _chunk(arguments: argparse.Namespace) -> Chunk:
    """The share of this process: by the two flags, or its rank under `paddle.distributed.launch`."""
    from paddlemix.generation.predict_file import Chunk

    if (arguments.num_chunks is None) != (arguments.chunk_idx is None):
        raise UserError("--num-chunks and --chunk-idx belong together; give both or neither")
    if arguments.num_chunks is not None:
        return Chunk(index=arguments.chunk_idx, count=arguments.num_chunks)
    count = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
    return Chunk(index=int(os.environ.get("PADDLE_TRAINER_ID", "0")), count=count, joined=count > 1)


def _report(job: PredictJob, outcome: Outcome, seconds: float) -> None:
    rate = f", {outcome.asked / seconds:.2f} per second with loading" if outcome.asked else ""
    errors = outcome.asked - outcome.answered
    failed = f", {errors} ended in an error" if errors else ""
    print(f"{outcome.answered} of {outcome.total} questions answered in this run{failed}{rate}")
    if not outcome.complete:
        print(f"{job.output} appears when the other processes have finished")
    elif outcome.failed:
        print(f"{job.output} has {outcome.failed} lines with an error; the same command asks these again")
    else:
        print(f"{job.output} is complete")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
