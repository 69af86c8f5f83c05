"""Models and processors as `save_pretrained` of one transformers leaves them, with that transformers' ids and logits.

    .venv-reference457/bin/python tests/reference/make_saved_folders.py tests/golden/saved/4.57
    .venv-reference5/bin/python tests/reference/make_saved_folders.py tests/golden/saved/5

Run by an interpreter whose transformers is another than ours (PYTHONPATH: the checkout), so nothing of the package is
used but the tiny tokenizers' training.  A folder is written, read by the Auto classes and written again, as every run
of TRL or LLaMA-Factory ends.

Ids are those of the class over the file that we read too: of transformers 4 the slow one over tokenizer.model, as LLaVA
loads it, with a null of its file as no key.  The fast one gives the same but beside an added token that opens a text
or, under the older rule, follows a space.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, LlamaConfig

from tests.tiny import draw_picture
from tests.tiny_tokenizers import llama, mistral

NEWER = int(transformers.__version__.split(".")[0]) >= 5
TEXTS = (
    "A chat between a curious user",
    "Sure, [SEG].",
    "[SEG] first, [SEG][SEG] last [SEG]",
    "How many?  Two  spaces,\n a line\nand 3",
    "你好，这是什么颜色？",
    "it's\tx >= 1",
)
PROMPT = "A chat. USER: <image>\nWhat is the [SEG] of the bus? ASSISTANT:"
ADDED_ROWS = 32  # the model's vocabulary is padded, as llava-hf's are
LOGITS = 6  # of the last positions
# name -> tokenizer, side lengths of the picture; grids of one where llava-hf and LLaVA choose alike
CASES = {"llava": (llama, (40, 40)), "llava_next": (mistral, (60, 40))}
GRIDS = [[28, 56], [56, 28], [56, 56]]


def build_tokenizer(make: Any, folder: Path) -> Any:
    """A tokenizer with a word and two special tokens added."""
    make(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[SEG]"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    return tokenizer


def build_model(name: str, tokenizer: Any) -> Any:
    """A random model whose positions turn as a long-context Llama's do."""
    scaling: dict[str, Any] = {"rope_type": "linear", "factor": 2.0}
    rope = (
        {"rope_parameters": {**scaling, "rope_theta": 5e5}} if NEWER else {"rope_theta": 5e5, "rope_scaling": scaling}
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer) + ADDED_ROWS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=[2, 7],
        **rope,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    kind = "LlavaNext" if name == "llava_next" else "Llava"
    extra = {"image_grid_pinpoints": GRIDS} if name == "llava_next" else {}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids("<image>"), **extra
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in parameter_name and parameter_name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
    return model


def build_processor(name: str, tokenizer: Any) -> Any:
    """The processor class of the model, over its own image processor."""
    pixels: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "resample": 2}
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "image_token": "<image>"}
    if name == "llava_next":
        images = transformers.LlavaNextImageProcessor(**pixels, image_grid_pinpoints=GRIDS)
        return transformers.LlavaNextProcessor(images, tokenizer, num_additional_image_tokens=1, **options)
    return transformers.LlavaProcessor(
        CLIPImageProcessor(**pixels), tokenizer, num_additional_image_tokens=1, **options
    )


def make(name: str, folder: Path) -> None:
    """Writes one case."""
    make_tokenizer, (width, height) = CASES[name]
    shutil.rmtree(folder, ignore_errors=True)
    base = folder / "base"
    base.mkdir(parents=True)
    tokenizer = build_tokenizer(make_tokenizer, base)
    model, processor = build_model(name, tokenizer), build_processor(name, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    processor.save_pretrained(folder)
    shutil.rmtree(base)
    picture = draw_picture(width, height, 0)
    batch = processor(text=PROMPT, images=picture, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits[0].float().numpy()
    tokenizer = processor.tokenizer
    if not NEWER:
        slow = AutoTokenizer.from_pretrained(folder, use_fast=False, add_prefix_space=True)
        for text in TEXTS:
            assert "[SEG]" in text or slow(text).input_ids == tokenizer(text).input_ids, text
        tokenizer = slow
    expected = {
        "transformers": transformers.__version__,
        "tokenizer": type(tokenizer).__name__,
        "texts": {text: tokenizer(text).input_ids for text in TEXTS},
        "picture": [width, height, 0],
        "image_token": tokenizer.convert_tokens_to_ids("<image>"),
        "input_ids": batch["input_ids"][0].tolist(),
    }
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    np.savez_compressed(folder / "expected.npz", logits=logits[-LOGITS:])


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for case in CASES:
        make(case, Path(sys.argv[1]) / case)
