"""Chats with a model about an image over several rounds.

    python paddlemix/examples/llava/run_predict_multiround.py --model-path DIR --image-file PATH_OR_URL

Type a question at `USER: `; an empty line or the end of input ends the chat.  DIR is a model or an adapter directory.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by path: modules are looked up from the checkout's root, not from this folder
    _here = Path(__file__).resolve()
    sys.path[:] = [str(_here.parents[3]), *(p for p in sys.path if Path(p).resolve() != _here.parent)]


from paddlemix.errors import UserError
from paddlemix.tools._command import run_command

if TYPE_CHECKING:
    from paddlemix.generation.chat import ChatSession


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are PaddleMIX's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", required=True, help="a model or adapter directory")
    parser.add_argument("--image-file", required=True, help="path or http(s) URL of the image")
    parser.add_argument("--conv-mode", help="conversation template; default: the one stored with the checkpoint")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 takes the likeliest token (default 0.2)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="most tokens of an answer (default 512)")
    parser.add_argument("--fp16", action="store_true", help="compute in float16; needs an accelerator")
    parser.add_argument("--debug", action="store_true", help="print each prompt and answer as JSON")
    parser.add_argument("--device", help="gpu, npu, xpu or cpu; default: what is there")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16, float32 on CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    return parser


def main(argv: list[str]) -> int:
    """Loads the model, then answers until the input ends.

    Raises:
        UserError: the model, the image or an argument cannot be used.
    """
    arguments = build_parser().parse_args(argv)
    from paddlemix.datasets.images import load_image

    images = [load_image(arguments.image_file)]  # before the model, which takes longer
    session = _open_session(arguments)
    while question := _read_question():
        print("ASSISTANT: ", end="", flush=True)
        for piece in session.ask(question, images):
            print(piece, end="", flush=True)
        print(flush=True)
        images = []
        if arguments.debug:
            print(json.dumps({"prompt": session.prompt(), "outputs": session.messages[-1].text}, ensure_ascii=False))
    print("exit...")
    return 0


def _read_question() -> str:
    try:
        return input("USER: ").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise UserError(f"the question is not UTF-8 text (byte {error.start}); type or pipe UTF-8") from error


def _open_session(arguments: argparse.Namespace) -> ChatSession:
    from paddlemix.generation.sampling import GenerationSettings

    settings = GenerationSettings(
        max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, seed=arguments.seed
    )
    from paddlemix.checkpoints.load import load_pretrained
    from paddlemix.device import check_dtype, select_device, set_seed
    from paddlemix.generation.chat import ChatSession
    from paddlemix.processors.templates import get_template

    template = get_template(arguments.conv_mode) if arguments.conv_mode else None
    device = select_device(arguments.device)
    dtype = "float16" if arguments.fp16 else arguments.dtype
    dtype = dtype or ("float32" if device.startswith("cpu") else "bfloat16")
    check_dtype(dtype, device)
    set_seed(arguments.seed)
    loaded = load_pretrained(arguments.model_path, dtype)
    if template is not None and loaded.processor is not None and template.name != loaded.processor.template.name:
        print(
            f"note: --conv-mode {template.name} replaces the checkpoint's template {loaded.processor.template.name}",
            file=sys.stderr,
        )
    return ChatSession(loaded, template, settings)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
