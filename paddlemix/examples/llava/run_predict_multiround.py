"""Chats with a model about images over several rounds.

    python paddlemix/examples/llava/run_predict_multiround.py --model-path DIR --image-file PATH_OR_URL

Type a question at `USER: `, or `/help`; an empty line or the end of input ends the chat.  DIR is a model or adapter
directory; without an image the chat is text only.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[3]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]

from paddlemix.config.less_memory import less_memory_in_answers
from paddlemix.errors import UserError
from paddlemix.out_of_memory import out_of_memory_explained
from paddlemix.tools.common.chat_arguments import build_chat_parser
from paddlemix.tools.common.command import run_command
from paddlemix.tools.common.generation import (
    generation_settings,
    quantization_kind,
    select_precision,
)
from paddlemix.tools.common.tensor_parallel import (
    answering_group,
    start_processes,
    starts_processes,
)

if TYPE_CHECKING:
    from paddlemix.checkpoints.pretrained import Pretrained
    from paddlemix.generation.chat import ChatSession
    from paddlemix.outputs import Needed
    from paddlemix.parallel.layout import Layout
    from paddlemix.tools.common.tensor_parallel import AnsweringGroup


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    return build_chat_parser(__doc__)


def main(argv: list[str]) -> int:
    """Loads the model, then answers until the input ends.

    Raises:
        UserError: the model, an image or an argument cannot be used.
    """
    arguments = build_parser().parse_args(argv)
    if starts_processes(arguments.tensor_parallel, os.environ):
        return start_processes("chat", argv, arguments.tensor_parallel)
    _check(arguments)
    with answering_group("chat", arguments, is_one_group=True) as group:
        if group.leads:
            _chat(arguments, group)
        else:
            _, dtype = select_precision(arguments)
            group.follow(lambda layout: _load(arguments, layout), "answering", less_memory_in_answers(arguments, dtype))
    return 0


def _chat(arguments: argparse.Namespace, group: AnsweringGroup) -> None:
    from paddlemix.datasets.images.decode import load_image

    images = [
        load_image(name) for name in arguments.image_file
    ]  # before the model: a bad path should not cost minutes of loading
    session = _open_session(arguments, group)
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


def _needed(arguments: argparse.Namespace) -> list[Needed]:
    from paddlemix.checkpoints.hub.needs import needed_by_model

    models = [name for name in (arguments.model_path, arguments.model_base) if name]
    return [item for name in models for item in needed_by_model(name)]


def _check(arguments: argparse.Namespace) -> None:
    """Checks what two flags say together.

    Raises:
        UserError: they contradict each other.
    """
    if arguments.num_beams > 1 and not arguments.no_stream:
        raise UserError(
            f"--num-beams {arguments.num_beams} needs --no-stream: the best beam is known only at the end of an answer"
        )
    if arguments.fp16 and arguments.dtype not in (None, "float16"):
        raise UserError(f"--fp16 and --dtype {arguments.dtype} contradict each other; give one of them")
    arguments.dtype = "float16" if arguments.fp16 else arguments.dtype


def _load(arguments: argparse.Namespace, layout: Layout) -> Pretrained:
    from paddlemix.checkpoints.load import load_pretrained

    device, dtype = select_precision(arguments)
    with out_of_memory_explained(
        f"loading {arguments.model_path} on {device}", less_memory_in_answers(arguments, dtype)
    ):
        return load_pretrained(arguments.model_path, dtype, arguments.model_base, quantization_kind(arguments), layout)


def _open_session(arguments: argparse.Namespace, group: AnsweringGroup) -> ChatSession:
    settings = generation_settings(arguments)
    from paddlemix.generation.chat import ChatSession
    from paddlemix.tools.common.processor import named_template

    template = named_template(arguments.conv_mode, arguments.model_path) if arguments.conv_mode else None
    loaded = group.load(lambda layout: _load(arguments, layout))
    # A wrong template still produces fluent answers, only worse ones.
    if template is not None and loaded.processor is not None and template.name != loaded.processor.template.name:
        print(
            f"note: --conv-mode {template.name} replaces the checkpoint's template {loaded.processor.template.name}",
            file=sys.stderr,
        )
    return ChatSession(loaded, template, settings, system=arguments.system, on_overflow=arguments.on_overflow)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
