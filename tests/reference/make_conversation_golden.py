"""Writes `tests/golden/conversations_tiny/`: ids and labels that LLaVA's own code makes with a tokenizer of our own.

    pip download --no-deps llava-torch==1.2.2.post1        # and unpack it into FOLDER
    .venv-reference/bin/python -m tests.reference.make_conversation_golden FOLDER

`preprocess_multimodal` and `preprocess` of llava/train/train.py are called as its data set calls them, once for each
template, conversation and prefix rule (`legacy`).  `labels` is null where LLaVA's masking fails on a conversation by
its own count, or supervises something else than the answers and their ends; the ids are right all the same.

LLaVA counts a later round's tokens as if "USER" took one token fewer after `</s>` than at a start, as it does in
Llama's vocabulary.  The tokenizer is trained on texts that make it so here too.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaTokenizer

from paddlemix.demo.vocabulary import train_tokenizer
from tests.tiny import TEXTS

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
OUTPUT = GOLDEN / "conversations_tiny"
VERSIONS = ("v1", "llava_v1", "llava_llama_2", "mistral_instruct", "chatml_direct", "plain")
MORE = (
    ["<image>\nWhat is  this? ", " Two  spaces "],
    ["Where?\n<image>\n\n", "\nOn the mat.\n\n"],
    ["<image>\n x>=1 y>=2", ">>= 3", "And then?", "0.25, 0.33"],
    ["Hi", "Hello", "你好", "你好！", "1", "2", "3", "4"],
    ["<image>\nA", "B", "C", "D", "E", "F"],
    ["What's >this<?", "it's\ta tab; …", "🙂", "ok"],
    ["<image>", "A caption of a red bus."],
    ["Is it?", "USER: no ASSISTANT: yes"],
)


def conversations() -> list[tuple[list[dict[str, str]], bool]]:
    """Every conversation of the other golden file once, and those of MORE; each with whether it shows an image."""
    known: dict[str, tuple[list[dict[str, str]], bool]] = {}
    for case in json.loads((GOLDEN / "conversations.json").read_text(encoding="utf-8")):
        known.setdefault(json.dumps(case["conversations"]), (case["conversations"], case["has_image"]))
    for texts in MORE:
        turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
        known[json.dumps(turns)] = (turns, "<image>" in texts[0])
    return list(known.values())


def supervised_right(
    labels: list[int], turns: list[dict[str, str]], tokenizer: LlamaTokenizer, conversation: Any
) -> bool:
    """Whether the stretches of trained labels spell the answers, each with the end that the template puts after it."""
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label >= 0:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    found = ["".join(tokenizer.decode(part, spaces_between_special_tokens=False).split()) for part in stretches if part]
    end = conversation.sep2 or conversation.sep
    return found == ["".join((turn["value"] + end).split()) for turn in turns[1::2]]


def make_case(train: Any, version: str, turns: list[dict[str, str]], has_image: bool, legacy: bool) -> dict[str, Any]:
    """One conversation as LLaVA's data set prepares it."""
    library = train.conversation_lib
    library.default_conversation = library.conv_templates[version]
    tokenizer = LlamaTokenizer.from_pretrained(str(OUTPUT / "tokenizer"), legacy=legacy)
    tokenizer.pad_token = tokenizer.unk_token
    sources: Any = [copy.deepcopy(turns)]
    if has_image:
        settings = argparse.Namespace(is_multimodal=True, mm_use_im_start_end=False)
        sources = train.preprocess_multimodal(sources, settings)
    made = train.preprocess(sources, tokenizer, has_image=has_image)
    ids, labels = (list(map(int, made[name][0])) for name in ("input_ids", "labels"))
    right = supervised_right(labels, turns, tokenizer, library.default_conversation)
    return {
        "version": version,
        "legacy": legacy,
        "conversations": turns,
        "has_image": has_image,
        "input_ids": ids,
        "labels": labels if right else None,
    }


def write_tokenizer() -> None:
    """ "USER" is one piece, and two ("\u2581US", "ER") where it begins a text."""
    words = ["the US and US or US, US", "xER yER"] * 40 + ["xUSER: yUSER:"] * 20 + ["nothing is a USER"]
    train_tokenizer([text.replace("USER: ", "") for text in TEXTS for _ in range(4)] + words, OUTPUT / "tokenizer", 480)


def main() -> None:
    write_tokenizer()
    folder = sys.argv[1]
    sys.path.insert(0, folder)
    import transformers.trainer

    transformers.trainer.ALL_LAYERNORM_LAYERS = []  # LLaVA's trainer, unused here, wants what newer releases lack
    from llava.train import train

    cases = [
        make_case(train, version, turns, has_image, legacy)
        for legacy in (False, True)
        for version in VERSIONS
        for turns, has_image in conversations()
        if version != "plain" or (has_image and len(turns) == 2)
    ]
    versions = f"llava-torch 1.2.2.post1, transformers {transformers.__version__}, torch {torch.__version__}"
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    text = f'{{"made_by": {json.dumps(versions)}, "cases": [\n{lines}\n]}}\n'
    (OUTPUT / "cases.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
