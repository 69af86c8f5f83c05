"""`mm_use_im_start_end`: from a checkpoint's config.json to ids, equal to the reference's way of making them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.adapters.foreign_adapter import read_processor_values
from paddlemix.checkpoints.convert.declared_files import Facts, check_hf, original_config
from paddlemix.checkpoints.files.weight_files import read_json, write_json
from paddlemix.checkpoints.layouts.recognise import recognise
from paddlemix.checkpoints.pretrained import load_processor
from paddlemix.checkpoints.source import open_source
from paddlemix.errors import UserError
from paddlemix.processors.llava import LlavaProcessor, processor_from_dict
from paddlemix.processors.text.conversation import prompt_text, render
from paddlemix.processors.text.known_templates import get_template
from paddlemix.processors.text.template import with_image_markers
from paddlemix.sample import IMAGE_TOKEN_INDEX
from tests.tiny import make_sample
from tests.tiny_models import GOLDEN

MARKERS = ("<im_start>", "<im_end>")


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer_directory: Path) -> Path:
    """An original LLaVA-1.5 that declares the markers and has their tokens."""
    from transformers import LlamaTokenizer

    directory = Path(shutil.copytree(GOLDEN / "llava_v15_llama" / "original", tmp_path / "model"))
    tokenizer = LlamaTokenizer.from_pretrained(str(tokenizer_directory), legacy=False)
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)  # as LLaVA's initialize_vision_tokenizer does
    tokenizer.save_pretrained(str(directory))
    config = read_json(directory / "config.json")
    write_json(directory / "config.json", {**config, "mm_use_im_start_end": True, "vocab_size": len(tokenizer)})
    return directory


def load(directory: Path) -> LlavaProcessor:
    processor = load_processor(open_source(directory))
    assert processor is not None
    return processor


def reference_ids(directory: Path, prompt: str) -> list[int]:
    """LLaVA's tokenizer_image_token: each part between images on its own, BOS once."""
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(str(directory))
    parts = [tokenizer(part).input_ids for part in prompt.split("<image>")]
    ids = parts[0]
    for part in parts[1:]:
        ids = [*ids, IMAGE_TOKEN_INDEX, *part[1:]]
    return ids


@pytest.mark.parametrize("name", ["vicuna_v1", "v1_mmtag", "v0", "llava_llama_2"])
def test_ids_are_the_references(checkpoint: Path, name: str) -> None:
    processor = replace(load(checkpoint), template=get_template(name))
    messages = make_sample("<image>\nWhat is this?", "A cat.", "Is <image> like <image>?", "No").messages
    prompt = prompt_text(render(with_image_markers(processor.template), messages))
    assert prompt.count("<im_start><image><im_end>") == 3
    encoded = processor.encode_text(messages, [(28, 28)] * 3).input_ids.tolist()
    once = [index for number, index in enumerate(encoded) if index != IMAGE_TOKEN_INDEX or encoded[number - 1] != index]
    assert once == reference_ids(checkpoint, prompt)
    start, end = (processor.tokenizer.special_id(token) for token in MARKERS)
    assert encoded.count(start) == encoded.count(end) == 3


def test_markers_in_a_text_are_text(checkpoint: Path) -> None:
    processor = load(checkpoint)
    encoded = processor.encode_text(make_sample("What is <im_start>?", "<im_end>").messages, [])
    assert not {processor.tokenizer.special_id(token) for token in MARKERS} & set(encoded.input_ids.tolist())


def test_they_travel_with_the_checkpoint(checkpoint: Path) -> None:
    processor = load(checkpoint)
    assert processor.image_markers and processor.template == get_template("vicuna_v1")
    values = json.loads(json.dumps(processor.to_dict()))
    assert values["mm_use_im_start_end"] is True
    assert processor_from_dict(values, checkpoint).image_markers
    facts = make_facts(checkpoint)
    assert original_config(facts)["mm_use_im_start_end"] is True
    assert read_processor_values(checkpoint)["mm_use_im_start_end"] is True
    with pytest.raises(UserError, match=r"llava-hf has no place for mm_use_im_start_end"):
        check_hf(facts)


def make_facts(checkpoint: Path) -> Facts:
    source = open_source(checkpoint)
    return Facts(config=source.config, processor={**source.processor}, special_ids={}, dtype="float32")


@pytest.mark.parametrize("declared", [False, None])
def test_other_checkpoints_have_none(checkpoint: Path, declared: Any) -> None:
    config = read_json(checkpoint / "config.json")
    write_json(checkpoint / "config.json", {**config, "mm_use_im_start_end": declared})
    assert recognise(checkpoint).processor["mm_use_im_start_end"] is False
    assert not load(checkpoint).image_markers


def test_tokens_that_the_vocabulary_lacks(checkpoint: Path, tokenizer_directory: Path) -> None:
    values = load(checkpoint).to_dict()
    with pytest.raises(UserError, match="mm_use_im_start_end is set, but the tokenizer has no token <im_start> and no"):
        processor_from_dict(values, tokenizer_directory)


def test_a_template_of_a_file_is_written_into_config_json(checkpoint: Path) -> None:
    template = replace(get_template("vicuna_v1"), name="mine.json", end="</s>\n")
    facts = make_facts(checkpoint)
    values = {**facts.processor, **replace(load(checkpoint), template=template).to_dict()}
    config = json.loads(json.dumps(original_config(replace(facts, processor=values))))
    write_json(checkpoint / "config.json", {**config, "vocab_size": facts.config.text.vocab_size})
    assert load(checkpoint).template == template
