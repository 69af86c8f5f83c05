"""The flags of `chat`, read by the command and, before its processes start, by the launcher."""

from __future__ import annotations

from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.command import place_argument
from paddlemix.tools.common.generation import add_model_flags, add_sampling_flags
from paddlemix.tools.common.tensor_parallel import add_tensor_parallel_flag

_TEMPERATURE = 0.2  # PaddleMIX's


def build_chat_parser(doc: str | None = None) -> CommandParser:
    """The command's arguments; those that PaddleMIX has too keep their names and defaults.

    Args:
        doc: of the command's module; its first line is shown by `--help`.
    """
    parser = CommandParser("chat", doc)
    add_model_flags(parser)
    add_tensor_parallel_flag(parser)
    parser.add_argument(
        "--image-file",
        type=place_argument,
        action="append",
        default=[],
        help="path or http(s) URL of an image; repeat for several",
    )
    parser.add_argument("--system", help="system text in place of the template's own")
    add_sampling_flags(parser, max_new_tokens=512, temperature=_TEMPERATURE)
    parser.add_argument("--no-stream", action="store_true", help="show each answer only when it is complete")
    parser.add_argument(
        "--on-overflow",
        default="stop",
        help="what to do when the conversation exceeds the model's context: stop (default) or drop_oldest rounds",
    )
    parser.add_argument("--fp16", action="store_true", help="same as --dtype float16; needs an accelerator")
    parser.add_argument("--debug", action="store_true", help="print each prompt and answer as JSON")
    return parser
