"""Generated tokens of tiny random models against transformers: greedy, repetition penalty, beam search.

Run by `make reference`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.generation.generate import generate
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.models.llava import LlavaModel
from paddlemix.processors.images.visual_tokens import visual_token_index
from paddlemix.sample import IMAGE_TOKEN_INDEX, Example
from tests.reference.test_models_reference import draw_case, draw_rows, reference_model

torch = pytest.importorskip("torch", reason="needs the reference environment: make reference")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

LENGTH = 24
VOCABULARY = 61
ENDS = (5, 11, 23)  # several, so that answers end early


@dataclass(frozen=True)
class Pair:
    """One model twice."""

    reference: Any
    ours: LlavaModel


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A text-only model whose answers end by themselves now and then."""
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False
    )
    reference = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(0.35 * torch.randn_like(parameter) + (parameter.ndim == 1))
    directory = tmp_path_factory.mktemp("llama")
    reference.save_pretrained(directory)
    return Pair(reference, load_pretrained(directory).model)


def prompt(seed: int) -> np.ndarray:
    random = np.random.RandomState(seed)
    return random.randint(24, VOCABULARY, random.randint(3, 12))


def text_example(ids: np.ndarray) -> Example:
    return Example(
        input_ids=ids,
        labels=ids,
        pixel_values=np.zeros((0, 3, 28, 28), dtype=np.float32),
        image_index=np.zeros(0, dtype=np.int64),
    )


def without_end(tokens: list[int]) -> list[int]:
    """Up to the first end."""
    return list(itertools.takewhile(lambda token: token not in ENDS, tokens))


def theirs(reference: Any, ids: np.ndarray, settings: GenerationSettings, **more: Any) -> list[int]:
    with torch.no_grad():
        found = reference.generate(
            torch.tensor(ids[None]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=settings.max_new_tokens,
            num_beams=settings.num_beams,
            length_penalty=settings.length_penalty,
            early_stopping=settings.early_stopping,
            repetition_penalty=settings.repetition_penalty,
            do_sample=False,
            eos_token_id=list(ENDS),
            pad_token_id=0,
            **more,
        )
    return without_end(found[0, len(ids) :].tolist())


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_tokens_are_equal(pair: Pair, penalty: float) -> None:
    settings = GenerationSettings(max_new_tokens=LENGTH, repetition_penalty=penalty)
    prompts = [prompt(seed) for seed in range(12)]
    wanted = [theirs(pair.reference, ids, settings) for ids in prompts]
    assert generate(pair.ours, [text_example(ids) for ids in prompts], settings, ENDS) == wanted
    assert len({len(answer) for answer in wanted}) > 2


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beams_are_equal(pair: Pair, num_beams: int, length_penalty: float, early_stopping: bool | str) -> None:
    settings = GenerationSettings(
        max_new_tokens=LENGTH, num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping
    )
    for seed in range(6):
        ids = prompt(seed)
        assert generate(pair.ours, [text_example(ids)], settings, ENDS) == [theirs(pair.reference, ids, settings)], seed


def test_beams_with_a_penalty_are_equal(pair: Pair) -> None:
    settings = GenerationSettings(max_new_tokens=LENGTH, num_beams=4, repetition_penalty=1.4)
    prompts = [prompt(seed) for seed in range(20, 28)]
    wanted = [theirs(pair.reference, ids, settings) for ids in prompts]
    assert generate(pair.ours, [text_example(ids) for ids in prompts], settings, ENDS) == wanted


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_about_images_are_equal(tmp_path: Path, seed: int, num_beams: int) -> None:
    """LLaVA-1.5 and any resolution."""
    case = draw_case(seed)
    reference = reference_model(case, seed)
    image = reference.config.image_token_index
    with torch.no_grad():
        reference.lm_head.weight[image] = 0  # an answer that names the image token would ask for another image
    reference.save_pretrained(tmp_path / "hf")
    ours = load_pretrained(tmp_path / "hf").model
    settings = GenerationSettings(max_new_tokens=10, num_beams=num_beams)
    (before, behind, tiles), (width, height) = draw_rows(case, seed)[0], case.sizes[0]
    index = visual_token_index(width, height, case.spec)
    pixels, extra = torch.tensor(tiles), {}
    if case.next_generation:
        pixels, extra = pixels[None], {"image_sizes": torch.tensor([[height, width]])}
    ids = np.array([*before, *[image] * len(index), *behind])
    wanted = theirs(reference, ids, settings, pixel_values=pixels, **extra)
    marked = np.where(ids == image, IMAGE_TOKEN_INDEX, ids)
    example = Example(input_ids=marked, labels=marked, pixel_values=tiles, image_index=index)
    assert image not in wanted
    assert generate(ours, [example], settings, ENDS) == [wanted]
