"""Run on every process of a tensor group: models of every family, split, beside the same models whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained, save_model
from paddlemix.generation.chat import ChatSession
from paddlemix.generation.generate import generate
from paddlemix.generation.incremental import IncrementalModel
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
from paddlemix.models.kernels import cpu_library
from paddlemix.models.language_presets import LANGUAGE_MODELS
from paddlemix.models.llava import LlavaModel
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.text.tokenizer import load_tokenizer
from paddlemix.sample import Example, Message
from tests.parallel.tensor_files import begin
from tests.tiny import PATCH, TILE, draw_picture, make_processor
from tests.tiny_models import tiny_model

# Uneven parts: 43 inner numbers; and a vocabulary as large as the tokenizer's, which is not even either.
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 43, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = VisionConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=TILE,
    patch_size=PATCH,
)
MORE = {  # what no published model has, and files may declare
    "llama with biases": DecoderConfig(attention_bias=True, num_key_value_heads=8),
    "mistral with wide heads": DecoderConfig(model_type="mistral", head_dim=10, num_key_value_heads=8),
}
EVERY_WAY = ("qwen1.5-110b-chat", "mistral-7b-v0.1", "llama with biases")  # for what does not depend on the family
QUESTIONS = (("What is the colour of the big bus?", 0), ("How many?", None), ("Where is the small cat?", 1))
Compute = Callable[[Pretrained], Any]


def small(published: DecoderConfig, vocab_size: int) -> DecoderConfig:
    """The same kind of decoder in small: grouped heads stay grouped, and a window is shorter than the prompts."""
    grouped = published.key_value_heads < published.num_attention_heads
    scaling = published.rope_scaling
    if scaling is not None and "original_max_position_embeddings" in scaling:
        scaling = {**scaling, "original_max_position_embeddings": 64}
    return replace(
        published,
        **SIZES,
        vocab_size=vocab_size,
        num_key_value_heads=2 if grouped else published.num_key_value_heads and 4,
        max_position_embeddings=512,
        rope_scaling=scaling,
        sliding_window=published.sliding_window and 7,
    )


def kinds(vocab_size: int) -> dict[str, DecoderConfig]:
    """Every kind of decoder among the published ones, by the first name that has it, and `MORE`."""
    found: dict[str, DecoderConfig] = {}
    for name, published in (LANGUAGE_MODELS | MORE).items():
        text = small(published, vocab_size)
        if text not in found.values():
            found[name] = text
    return found


def drawn_model(config: LlavaConfig) -> LlavaModel:
    """With scores about as large as those of a real model: 1e-5 is a few of their last bits."""
    model = tiny_model(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.set_value(parameter * 0.5)
    return model


@dataclass(frozen=True)
class Pair:
    """The same model twice: whole in this process, and this process's part of it."""

    whole: Pretrained
    split: Pretrained

    @classmethod
    def of(cls, config: LlavaConfig, processor: LlavaProcessor, directory: Path, layout: Layout) -> Pair:
        """A drawn model, written, and read again in parts."""
        whole = Pretrained(drawn_model(config), processor, directory)
        save_model(whole, directory)
        return cls(whole, load_pretrained(directory, layout=layout))

    def both(self, compute: Compute) -> tuple[Any, Any]:
        """What both compute."""
        return compute(self.whole), compute(self.split)


def compare(folder: str, tokenizer: str) -> dict[str, dict[str, Any]]:
    """Every kind, tied and untied, with the kernels in C, and some in paddle's operators too.

    Returns:
        Kind -> the largest differences of scores, and the answers of one process and of both.
    """
    layout, processor = begin(), make_processor(load_tokenizer(Path(tokenizer)))
    own, found = Path(folder) / str(layout.rank), {}
    own.mkdir(parents=True)
    for name, text in kinds(processor.tokenizer.num_rows).items():
        for tied in (False, True):
            text = replace(text, tie_word_embeddings=tied)
            config = LlavaConfig(text=text, vision=VISION, mm_vision_select_layer=-1)
            key = f"{name}{', tied' if tied else ''}"
            pair = Pair.of(config, processor, own / key, layout)
            found[key] = _compared(pair, every_way=name in EVERY_WAY)
            if name in EVERY_WAY:
                with cpu_library.switched_off():
                    found[f"{key}, plain"] = _compared(pair, every_way=name in EVERY_WAY)
    return found


def _compared(pair: Pair, every_way: bool) -> dict[str, Any]:
    prompts = _prompts(pair.whole.processor)
    whole, split = pair.both(lambda loaded: _scores(loaded, prompts))
    assert pair.split.model.language_model.config.vocab_size < pair.whole.model.config.text.vocab_size
    # a process keeps the keys and values of its own heads alone
    assert whole["cache"] == 2 * split["cache"]
    gaps = {part: float(np.abs(whole[part] - split[part]).max()) for part in ("all", "prompt", "step")}
    answers = pair.both(lambda loaded: [_batch(loaded, prompts, every_way), _chat(loaded)])
    return {"gaps": gaps, "whole": answers[0], "split": answers[1]}


def _prompts(processor: LlavaProcessor | None) -> list[Example]:
    """Of different lengths, with a picture and without."""
    assert processor is not None
    contents: list[tuple[tuple[str | int, ...], list[Any]]] = [
        (("How many?",), []),
        ((0, "Where is the small cat?"), [draw_picture(40, 30, 1)]),
        ((0, "What is the colour of the big bus? Is it red, or is it on the mat?"), [draw_picture(30, 40, 2)]),
    ]
    return [processor.encode_prompt([Message(role="user", content=text)], images) for text, images in contents]


@paddle.no_grad()
def _scores(loaded: Pretrained, prompts: list[Example]) -> dict[str, Any]:
    """Of every position of a text, of the tokens after the prompts, and of those one token further."""
    model, incremental = loaded.model, IncrementalModel(loaded.model)
    ids = paddle.to_tensor(np.random.RandomState(2).randint(0, model.config.text.vocab_size, [2, 19]))
    positions = paddle.arange(19).unsqueeze(0).expand([2, 19])
    everywhere = model.logits(model(ids, positions)).numpy()
    first = incremental.prefill(prompts)
    then = incremental.step(np.arange(len(prompts)) + 5)
    return {"all": everywhere, "prompt": first, "step": then, "cache": incremental.cache.num_bytes}


def _batch(loaded: Pretrained, prompts: list[Example], every_way: bool) -> list[Any]:
    """Greedy answers side by side, and with `every_way` drawn ones and the best beams."""
    settings = GenerationSettings(max_new_tokens=4)
    drawn = replace(settings, temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=7)
    ways = [settings, *([drawn, replace(settings, num_beams=2)] if every_way else [])]
    return [generate(loaded.model, prompts, way, {2}) for way in ways]


def _chat(loaded: Pretrained) -> list[str]:
    """Three rounds; the first and the last show a picture."""
    session = ChatSession(loaded, settings=GenerationSettings(max_new_tokens=3))
    found = []
    for text, picture in QUESTIONS:
        images = [] if picture is None else [draw_picture(35, 40, picture)]
        found.append("".join(session.ask(text, images=images)))
    return found


def from_own_files(folder: str, tokenizer: str) -> dict[str, float]:
    """Language models in the files of their own families, whose names and joined weights differ: gaps of their
    scores."""
    layout, processor = begin(), make_processor(load_tokenizer(Path(tokenizer)))
    own, found = Path(folder) / str(layout.rank), {}
    own.mkdir(parents=True)
    for name, text in kinds(processor.tokenizer.num_rows).items():
        if name in MORE:
            continue
        ours, theirs = own / f"{name}-ours", own / name
        whole = drawn_model(LlavaConfig(text=text))
        save_model(Pretrained(whole, processor, ours), ours)
        convert_checkpoint(ours, theirs, Conversion(to="hf"))
        split = load_pretrained(theirs, layout=layout).model
        ids, positions = paddle.to_tensor([[5, 7, 50, 1]]), paddle.arange(4).unsqueeze(0)
        with paddle.no_grad():
            scores = [model.logits(model(ids, positions)) for model in (whole, split)]
        found[name] = float((scores[0] - scores[1]).abs().max())
    return found


def on_cards(folder: str, tokenizer: str, dtype: str) -> dict[str, Any]:
    """Where the device chooses the likeliest token: answers of one process, and of all together."""
    layout, processor = begin(), make_processor(load_tokenizer(Path(tokenizer)))
    text = small(LANGUAGE_MODELS["qwen2-7b-instruct"], processor.tokenizer.num_rows)
    directory = Path(folder) / f"card-{layout.rank}"
    config = LlavaConfig(text=text, vision=VISION, mm_vision_select_layer=-1)
    save_model(Pretrained(tiny_model(config), processor, directory), directory)
    prompts, found = _prompts(processor), {}
    for name, kind in (("whole", ALONE), ("split", layout)):
        loaded = load_pretrained(directory, dtype, layout=kind)
        settings = GenerationSettings(max_new_tokens=6)
        chosen = IncrementalModel(loaded.model).prefill(prompts, greedy=True)
        found[name] = [chosen.tolist(), generate(loaded.model, prompts, settings, {2}), _chat(loaded)]
    return found
