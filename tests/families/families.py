"""Every shipped family at tiny size: its files as it publishes them, and what a user runs on them.

A family is a row of `FAMILIES`.  The model starts as in real life from two directories: a language model in the
family's own form, with its own kind of tokenizer files, and a vision tower.  `commands` are those that a user would
give, for any device, so that every test of a device can run them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import tiny_tokenizers
from tests.tiny import draw_picture, make_processor

QUESTION, ANSWER = "What is the colour of the big bus?", "红色的公交车。 It is red."
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_INTERN_VIT = {
    **_VISION,
    "num_hidden_layers": 6,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "norm_type": "rms_norm",
    "qkv_bias": False,
    "qk_normalization": True,
    "layer_scale": 0.1,
    "outer_norms": False,
    "patch_bias": True,
}
_LLAMA_3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@dataclass(frozen=True, kw_only=True)
class FamilyCase:
    """One family.

    Args:
        name: shown by the test.
        tokenizer: writes its tokenizer files.
        template: its conversations.
        stops: every token that ends an answer.
        text: fields of `DecoderConfig` that make it this family.
        vision: fields of `VisionConfig`.
        keys: of the recipe that this family has besides.
    """

    name: str
    tokenizer: Callable[[Path], None]
    template: str
    stops: frozenset[str]
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=lambda: _VISION)
    keys: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = (
    FamilyCase(
        name="vicuna", tokenizer=tiny_tokenizers.llama, template="vicuna_v1", stops=frozenset({"</s>"}), text={}
    ),
    FamilyCase(
        name="mistral",
        tokenizer=tiny_tokenizers.mistral,
        template="mistral_instruct",
        stops=frozenset({"</s>"}),
        text={"model_type": "mistral", "sliding_window": 24, "rope_theta": 1e6},
    ),
    FamilyCase(
        name="yi",
        tokenizer=tiny_tokenizers.yi,
        template="chatml_direct",
        stops=frozenset({"<|im_start|>", "<|im_end|>"}),
        text={"rope_theta": 5e6},
    ),
    FamilyCase(
        name="llama3",
        tokenizer=tiny_tokenizers.llama3,
        template="llava_llama_3",
        stops=frozenset({"<|eot_id|>", "<|end_of_text|>"}),
        text={"rope_theta": 5e5, "rope_scaling": _LLAMA_3_SCALING},
    ),
    FamilyCase(
        name="qwen",
        tokenizer=tiny_tokenizers.qwen,
        template="qwen_1_5",
        stops=frozenset({"<|im_start|>", "<|im_end|>", "<|endoftext|>"}),
        text={"model_type": "qwen2", "attention_bias": True, "attention_output_bias": False, "rope_theta": 1e6},
    ),
    FamilyCase(
        name="internlm",
        tokenizer=tiny_tokenizers.internlm,
        template="xtuner_internlm_chat",
        stops=frozenset({"</s>", "<eoa>"}),
        text={"model_type": "internlm", "attention_bias": True, "num_key_value_heads": None},
    ),
    FamilyCase(
        name="internlm2",
        tokenizer=tiny_tokenizers.internlm2,
        template="xtuner_internlm2_chat",
        stops=frozenset({"</s>", "<|im_start|>", "<|im_end|>"}),
        text={"model_type": "internlm2", "rope_theta": 1e6},
    ),
    FamilyCase(  # its tower reads a larger tile than it was made for
        name="internvit",
        tokenizer=tiny_tokenizers.llama,
        template="vicuna_v1",
        stops=frozenset({"</s>"}),
        vision=_INTERN_VIT,
        keys={"vision_image_size": 42, "mm_vision_select_layer": -4},
    ),
)


@dataclass(frozen=True)
class FamilyFiles:
    """Where a family's files are.

    Args:
        root: holds all of it.
        case: the family.
    """

    root: Path
    case: FamilyCase

    @property
    def language_model(self) -> Path:
        """The language model in its family's own form."""
        return self.root / "language_model"

    @property
    def tower(self) -> Path:
        """The vision tower in its family's own form."""
        return self.root / "llava" / "vision_tower"

    @property
    def picture(self) -> Path:
        """What the question is about."""
        return self.root / "bus.png"

    def recipe(self, folder: Path, device: str) -> Path:
        """A run that teaches the one answer; its adapter is `folder`/adapter."""
        values = {
            "model_name_or_path": str(self.language_model),
            "mm_vision_tower": str(self.tower),
            "dataset": {"train": [{"data_files": str(self.root / "train.json")}]},
            "image_root": str(self.root),
            "chat_template": self.case.template,
            "image_aspect_ratio": "pad",
            "output_dir": str(folder / "adapter"),
            "do_train": True,
            "lora": True,
            "lora_rank": 32,
            "lora_alpha": 64,
            "max_steps": 25,
            "learning_rate": 0.01,
            "warmup_ratio": 0.1,
            "adam_beta2": 0.99,
            "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_length": 256,
            "seed": 1,
            "disable_tqdm": True,
            "device": device,
            **self.case.keys,
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "recipe.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        return path

    def commands(self, folder: Path, device: str) -> tuple[tuple[str, list[str], str], ...]:
        """Fine-tuning, then a chat over two rounds: module below `paddlemix`, arguments, typed input of each."""
        chat = ["--model-path", str(folder / "adapter"), "--image-file", str(self.picture), "--device", device]
        chat += ["--temperature", "0", "--max-new-tokens", "40", "--dtype", "float32"]
        return (
            ("tools.supervised_finetune", [str(self.recipe(folder, device))], ""),
            ("examples.llava.run_predict_multiround", chat, f"{QUESTION}\n{QUESTION}\n"),
        )


def build_family(case: FamilyCase, root: Path, image_newline: bool = False) -> FamilyFiles:
    """Writes a family's files into an empty folder.

    Args:
        image_newline: its LLaVA model has the vector that LLaVA-1.6 adds.
    """
    from paddlemix.checkpoints.convert.export_model import convert_checkpoint
    from paddlemix.checkpoints.convert.verify import Conversion
    from paddlemix.checkpoints.pretrained import Pretrained, build_model, save_model
    from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
    from paddlemix.processors.text.tokenizer import load_tokenizer

    files = FamilyFiles(root, case)
    (root / "tokenizer").mkdir()
    case.tokenizer(root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    text = DecoderConfig(**{**TEXT, "vocab_size": len(tokenizer), **case.text})
    vision = VisionConfig(**case.vision)
    processor = make_processor(tokenizer, template=case.template)
    of_llava: dict[str, Any] = {"mm_vision_select_layer": -1, "image_newline": image_newline}
    for name, config, to in (
        ("language_model", LlavaConfig(text=text), "hf"),
        ("llava", LlavaConfig(text=text, vision=vision, **of_llava), "llava"),
    ):
        ours = root / f"{name}_ours"
        model = build_model(config, initialise=True)
        save_model(Pretrained(model, processor, ours), ours)
        convert_checkpoint(ours, root / name, Conversion(to=to))
    draw_picture(40, 30, 7).save(files.picture)
    record = {"image": "bus.png", "conversations": [[f"<image>\n{QUESTION}", ANSWER]]}
    (root / "train.json").write_text(json.dumps([record] * 4, ensure_ascii=False), encoding="utf-8")
    return files
