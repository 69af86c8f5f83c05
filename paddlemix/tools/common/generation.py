"""The flags of the commands that answer questions, `predict`, `evaluate` and `chat`: the model, how it is held, how it
answers.

The commands have the same flags with the same words; they differ in two defaults.  Nothing here loads paddle until a
device is selected.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from paddlemix.launch.process_rules import check_starter
from paddlemix.tools.common.command import place_argument, seed_argument

if TYPE_CHECKING:
    from paddlemix.generation.predict_job import Chunk
    from paddlemix.generation.sampling import GenerationSettings


def add_model_flags(parser: argparse.ArgumentParser, is_needed: bool = True) -> None:
    """Adds the flags that say which model answers, on which device and in which precision.

    Args:
        is_needed: whether the command can do nothing without a model.
    """
    parser.add_argument(
        "--model-path", type=place_argument, required=is_needed, help="model or adapter: a directory or a model's name"
    )
    parser.add_argument(
        "--model-base", type=place_argument, help="base model of an adapter; default: the one the adapter names"
    )
    parser.add_argument("--conv-mode", help="conversation template; default: the one stored with the checkpoint")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-8bit", action="store_true", help="load the language model's linear layers in 8 bits")
    bits.add_argument("--load-4bit", action="store_true", help="load the language model's linear layers in 4 bits")
    add_device_flag(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="precision to compute in; default: bfloat16 on an accelerator, float32 on CPU",
    )


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`."""
    parser.add_argument("--device", help="gpu, npu, xpu or cpu; default: an available accelerator, otherwise the CPU")


def add_sampling_flags(parser: argparse.ArgumentParser, max_new_tokens: int, temperature: float) -> None:
    """Adds the eight flags that say how an answer is generated.

    Args:
        max_new_tokens: default of `--max-new-tokens`.
        temperature: default of `--temperature` without beam search; beam search has 0.
    """
    # Beam search is deterministic, so chat's default temperature must not apply to it.
    beams = "" if temperature == 0 else "; 0 with --num-beams"
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        help=f"maximum length of an answer in tokens (default {max_new_tokens})",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help=f"sampling temperature; 0 = always the most likely token (default {temperature:g}{beams})",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample from the K most likely tokens; 0 = no limit (default 0)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the most likely tokens whose probabilities add up to P; 1 = no limit (default 1)",
    )
    parser.add_argument("--num-beams", type=int, default=1, help="beams of a beam search; 1 = no search (default 1)")
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1: make tokens that already occurred less likely (default 1)",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer; repeat for several"
    )
    parser.add_argument("--seed", type=seed_argument, default=0, help="random seed for sampling (default 0)")
    # Kept apart from the flag's value, so that "not given" can be distinguished.
    parser.set_defaults(default_temperature=temperature)


def generation_settings(arguments: argparse.Namespace) -> GenerationSettings:
    """The settings that the flags of `add_sampling_flags` say.

    Raises:
        UserError: a value is out of range, or two contradict each other.
    """
    from paddlemix.generation.sampling import GenerationSettings

    temperature = arguments.temperature
    if temperature is None:  # beams are compared by probability, so sampling has no meaning there
        temperature = 0.0 if arguments.num_beams > 1 else arguments.default_temperature
    return GenerationSettings(
        max_new_tokens=arguments.max_new_tokens,
        temperature=temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        num_beams=arguments.num_beams,
        repetition_penalty=arguments.repetition_penalty,
        stop=tuple(arguments.stop),
        seed=arguments.seed,
    )


def launched_chunk(degree: int) -> Chunk:
    """The share of this process, which a launcher has started with others that write one file together.

    Args:
        degree: processes that answer with one model; they have one share.

    Raises:
        UserError: several processes do not know of each other.
    """
    from paddlemix.generation.predict_job import Chunk

    check_starter(os.environ)
    count = max(1, int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) // degree)
    index = min(int(os.environ.get("PADDLE_TRAINER_ID", "0")) // degree, count - 1)
    return Chunk(index=index, count=count, joined=count > 1)


def quantization_kind(arguments: argparse.Namespace) -> str | None:
    """How `--load-8bit` or `--load-4bit` asks for the linear layers to be held; None without either."""
    return "int8" if arguments.load_8bit else "nf4" if arguments.load_4bit else None


def select_precision(arguments: argparse.Namespace) -> tuple[str, str]:
    """Makes the device of `--device` current and seeds its generator.

    Returns:
        (device, dtype), for example ("gpu:0", "bfloat16").

    Raises:
        UserError: there is no such device, or it cannot compute in the precision.
    """
    from paddlemix.device import check_dtype, default_dtype, select_device, set_seed

    device = select_device(arguments.device)
    dtype = arguments.dtype or default_dtype(device)
    check_dtype(dtype, device)
    set_seed(arguments.seed)
    return device, dtype
