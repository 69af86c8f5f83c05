"""A conversation that one process of a tensor group leads and another follows, see `test_tensor_commands.py`.

Each process has the whole model too.
"""

from __future__ import annotations

import io
import itertools
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.families.families import ANSWER, FAMILIES, QUESTION, TEXT, FamilyCase
from tests.tiny import draw_picture, make_processor

MOST_TOKENS = 8
QUESTIONS = (QUESTION, "How many?", "Where is the small cat, and what is it looking at?")

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 3},
    "beams": {"num_beams": 2},
}


class Pair:
    """A family's model whole, and this process's part of it.

    Args:
        case: the family.
        tokenizer: of its kind.
        layout: with a tensor group.
    """

    def __init__(self, case: FamilyCase, tokenizer: Any, layout: Any) -> None:
        import paddle

        from paddlemix.checkpoints.pretrained import Pretrained, build_model, fill_model, tensor_entry
        from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig

        sizes = {
            **TEXT,
            "initializer_range": 0.1,
            **case.text,
            "vocab_size": len(tokenizer),
        }
        vision = VisionConfig(**case.vision)
        config = LlavaConfig(text=DecoderConfig(**sizes), vision=vision, mm_vision_select_layer=-1)
        paddle.seed(1)
        whole = build_model(config, initialise=True)
        random = np.random.RandomState(1)
        for name, parameter in whole.named_parameters():
            if name.endswith("bias"):  # else they are zero
                parameter.set_value(0.1 * random.randn(*parameter.shape).astype("float32"))
        part = build_model(config, layout=layout)
        entries = {name: tensor_entry(parameter) for name, parameter in whole.named_parameters()}
        assert not fill_model(part, entries, "a test")
        for model in (whole, part):
            model.eval()
        processor = make_processor(tokenizer, template=case.template)
        self.whole, self.part = (Pretrained(model, processor, Path()) for model in (whole, part))


def tokenizer_of(case: FamilyCase) -> Any:
    """A new one of the family's kind."""
    from paddlemix.processors.text.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        case.tokenizer(Path(folder))
        return load_tokenizer(Path(folder))


def conversation(loaded: Any, **settings: Any) -> list[str]:
    """Answers of three rounds about two pictures, after one that was taken back."""
    from paddlemix.generation.chat import ChatSession
    from paddlemix.generation.sampling import GenerationSettings

    session = ChatSession(loaded, settings=GenerationSettings(max_new_tokens=MOST_TOKENS, **settings))
    session.answer(ANSWER)
    session.back()
    answers = [session.answer(QUESTIONS[0], [draw_picture(40, 30, 1)])]
    answers.append(session.answer(QUESTIONS[1]))
    return [*answers, session.answer(QUESTIONS[2], [draw_picture(30, 40, 2)])]


def led(pair: Pair, layout: Any, ask: Callable[[Any], Any]) -> Any:
    """What the first process is answered while the other follows; None on the other."""
    from paddlemix.generation.following import follow
    from paddlemix.generation.leading import LOAD, lead
    from paddlemix.parallel.messages import open_channel

    channel = open_channel(layout)
    if layout.tensor_rank:
        follow(channel, lambda: pair.part.model)
        return None
    try:
        channel.send((LOAD, ()))
        lead(pair.part.model, channel)
        return ask(pair.part)
    finally:
        channel.close()


def led_conversations(names: list[str]) -> dict[str, bool]:
    """Whether the first process hears what one process says, by family and settings; on the other no answers."""
    from paddlemix.parallel.groups import begin_tensor_groups

    layout = begin_tensor_groups(2)
    found = {}
    for case in (case for case in FAMILIES if case.name in names):
        pair = Pair(case, tokenizer_of(case), layout)
        for kind, settings in SETTINGS.items():
            heard = led(pair, layout, lambda loaded, given=settings: conversation(loaded, **given))
            if layout.tensor_rank == 0:
                found[f"{case.name} {kind}"] = heard == conversation(pair.whole, **settings)
    return found


def type_in(text: str) -> None:
    """Questions on standard input, as if they were piped."""
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")


def interrupt_step(number: int) -> None:
    """Ctrl-C in the middle of a token's computation, the first one being number 0."""
    from paddlemix.models.cached_decoder import CachedDecoder

    run, calls = CachedDecoder.__call__, itertools.count()

    def interrupted(self: CachedDecoder, *given: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return run(self, *given)

    CachedDecoder.__call__ = interrupted  # type: ignore[method-assign]
