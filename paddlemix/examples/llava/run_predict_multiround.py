"""Chats with a model about images over several rounds.

    python paddlemix/examples/llava/run_predict_multiround.py --model-path DIR --image-file PATH_OR_URL

Type a question at `USER: `, or `/help`; an empty line or the end of input ends the chat.  DIR is a model or an adapter
directory; without an image it is a chat in words alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[3]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.config.less_memory import less_memory_in_answers
from paddlemix.errors import UserError
from paddlemix.memory import out_of_memory_explained
from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.command import place_argument, run_command, seed_argument

if TYPE_CHECKING:
    from paddlemix.generation.chat import ChatSession
    from paddlemix.generation.sampling import GenerationSettings
    from paddlemix.outputs import Needed

_TEMPERATURE = 0.2  # PaddleMIX's


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; those that PaddleMIX has too have its names and defaults."""
    parser = CommandParser("chat", __doc__)
    parser.add_argument(
        "--model-path", type=place_argument, required=True, help="a model or adapter, directory or name"
    )
    parser.add_argument("--model-base", type=place_argument, help="an adapter's base; default: the one it names")
    parser.add_argument(
        "--image-file",
        type=place_argument,
        action="append",
        default=[],
        help="path or http(s) URL of the image; may be given several times",
    )
    parser.add_argument("--conv-mode", help="conversation template; default: the one stored with the checkpoint")
    parser.add_argument("--system", help="text before the first question, instead of the template's own")
    _add_generation(parser)
    parser.add_argument("--no-stream", action="store_true", help="show each answer when it is complete")
    parser.add_argument(
        "--on-overflow",
        default="stop",
        help="of a conversation that outgrows the model's context: stop (default), or drop_oldest rounds",
    )
    parser.add_argument("--fp16", action="store_true", help="compute in float16; needs an accelerator")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16, float32 on CPU")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-8bit", action="store_true", help="hold the language model in 8 bits (int8)")
    bits.add_argument("--load-4bit", action="store_true", help="hold the language model in 4 bits (nf4)")
    parser.add_argument("--device", help="gpu, npu, xpu or cpu; default: what is there")
    parser.add_argument("--debug", action="store_true", help="print each prompt and answer as JSON")
    return parser


def _add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature",
        type=float,
        help=f"0 takes the likeliest token (default {_TEMPERATURE}; 0 with --num-beams)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, help="most tokens of an answer (default 512)")
    parser.add_argument("--top-p", type=float, default=1.0, help="likeliest tokens that reach it together (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="only the likeliest tokens, so many; 0: all (default)")
    parser.add_argument("--seed", type=seed_argument, default=0, help="of the sampling (default 0)")
    parser.add_argument("--num-beams", type=int, default=1, help="beam search; needs --no-stream (default 1: none)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 avoids tokens that were there")
    parser.add_argument(
        "--stop", action="append", default=[], help="text that ends an answer; may be given several times"
    )


def main(argv: list[str]) -> int:
    """Loads the model, then answers until the input ends.

    Raises:
        UserError: the model, an image or an argument cannot be used.
    """
    arguments = build_parser().parse_args(argv)
    from paddlemix.datasets.images.decode import load_image

    images = [load_image(name) for name in arguments.image_file]  # before the model, which takes longer
    session = _open_session(arguments)
    from paddlemix.generation.history import Picture
    from paddlemix.tools.common.terminal import Terminal, TerminalOptions

    if images and session.model.config.vision is None:
        raise UserError(f"--image-file {arguments.image_file[0]}: the model has no vision tower")
    pictures = [Picture(image, image.size) for image in images]
    dtype = str(session.model.language_model.embed_tokens.weight.dtype).rpartition(".")[2]
    options = TerminalOptions(
        stream=not arguments.no_stream,
        debug=arguments.debug,
        interactive=sys.stdin.isatty(),
        less_memory=less_memory_in_answers(arguments, dtype),
        needed=lambda: _needed(arguments),
    )
    Terminal(session, list(zip(arguments.image_file, pictures, strict=True)), options).run()
    return 0


def _needed(arguments: argparse.Namespace) -> list[Needed]:
    from paddlemix.checkpoints.hub.needs import needed_by_model

    models = [name for name in (arguments.model_path, arguments.model_base) if name]
    return [item for name in models for item in needed_by_model(name)]


def _settings(arguments: argparse.Namespace) -> GenerationSettings:
    from paddlemix.generation.sampling import GenerationSettings

    temperature = arguments.temperature
    if temperature is None:
        temperature = 0.0 if arguments.num_beams > 1 else _TEMPERATURE
    if arguments.num_beams > 1 and not arguments.no_stream:
        raise UserError(
            f"--num-beams {arguments.num_beams} needs --no-stream: the best beam is known at the answer's end alone"
        )
    return GenerationSettings(
        max_new_tokens=arguments.max_new_tokens,
        temperature=temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        repetition_penalty=arguments.repetition_penalty,
        num_beams=arguments.num_beams,
        stop=tuple(arguments.stop),
    )


def _open_session(arguments: argparse.Namespace) -> ChatSession:
    settings = _settings(arguments)
    from paddlemix.checkpoints.load import load_pretrained
    from paddlemix.device import check_dtype, default_dtype, select_device, set_seed
    from paddlemix.generation.chat import ChatSession
    from paddlemix.tools.common.processor import named_template

    template = named_template(arguments.conv_mode, arguments.model_path) if arguments.conv_mode else None
    device = select_device(arguments.device)
    dtype = "float16" if arguments.fp16 else arguments.dtype
    dtype = dtype or default_dtype(device)
    check_dtype(dtype, device)
    set_seed(arguments.seed)
    quantize = "int8" if arguments.load_8bit else "nf4" if arguments.load_4bit else None
    with out_of_memory_explained(
        f"loading {arguments.model_path} on {device}", less_memory_in_answers(arguments, dtype)
    ):
        loaded = load_pretrained(arguments.model_path, dtype, arguments.model_base, quantize)
    if template is not None and loaded.processor is not None and template.name != loaded.processor.template.name:
        print(
            f"note: --conv-mode {template.name} replaces the checkpoint's template {loaded.processor.template.name}",
            file=sys.stderr,
        )
    return ChatSession(loaded, template, settings, system=arguments.system, on_overflow=arguments.on_overflow)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
