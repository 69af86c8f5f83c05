"""The flags that `predict` and `chat` share: the same words in both, and what they mean."""

from __future__ import annotations

import argparse

import pytest

from paddlemix.tools import predict
from paddlemix.tools.common.chat_arguments import build_chat_parser
from paddlemix.tools.common.generation import add_sampling_flags, generation_settings, quantization_kind

SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty", "stop", "seed")
MODEL = ("model_path", "model_base", "conv_mode", "load_8bit", "load_4bit", "device", "dtype")


def settings_of(*argv: str, temperature: float = 0.2) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser, max_new_tokens=512, temperature=temperature)
    return parser.parse_args(argv)


def test_predict_and_chat_describe_the_flags_with_the_same_words() -> None:
    """Only the defaults of two flags differ."""
    both = [
        {action.dest: action.help or "" for action in build()._actions}
        for build in (predict.build_parser, build_chat_parser)
    ]
    for name in (*SAMPLING, *MODEL):
        first, second = (helps[name].partition(" (default")[0] for helps in both)
        assert first == second and first, name
    assert [helps["temperature"].partition("(")[2] for helps in both] == [
        "default 0)",
        "default 0.2; 0 with --num-beams)",
    ]


def test_the_settings_are_those_of_the_flags() -> None:
    argv = "--max-new-tokens 7 --temperature 0.5 --top-k 3 --top-p 0.9 --repetition-penalty 1.1 --seed 4"
    found = generation_settings(settings_of(*argv.split(), "--stop", "a", "--stop", "b"))
    expected = {"max_new_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "num_beams": 1}
    expected |= {"repetition_penalty": 1.1, "stop": ("a", "b"), "seed": 4}
    assert {name: getattr(found, name) for name in SAMPLING} == expected


@pytest.mark.parametrize(
    ("argv", "temperature"), [((), 0.2), (("--num-beams", "3"), 0.0), (("--temperature", "0"), 0.0)]
)
def test_beam_search_has_temperature_0_unless_one_is_given(argv: tuple[str, ...], temperature: float) -> None:
    assert generation_settings(settings_of(*argv)).temperature == temperature


@pytest.mark.parametrize(("flag", "kind"), [("", None), ("--load-8bit", "int8"), ("--load-4bit", "nf4")])
def test_bits_are_kinds_of_quantisation(flag: str, kind: str | None) -> None:
    argv = ["--model-path", "x", *([flag] if flag else [])]
    assert quantization_kind(build_chat_parser().parse_args(argv)) == kind
