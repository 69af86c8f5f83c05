"""The recipes of the families beside Vicuna: their numbers, where they start, and what the tables say of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.models.presets import PUBLISHED_NAMES
from paddlemix.processors.text.known_templates import template_names
from tests.config.test_recipes import RECIPES, batch_on_8_cards, spell, table_rows
from tests.conftest import ROOT

# Folder -> templates of its recipes, that of projector pretraining first.
FAMILIES = {
    "internlm": ("xtuner_internlm_chat",),
    "internlm2": ("xtuner_internlm2_chat",),
    "internvl": ("plain", "vicuna_v1"),
    "llama3": ("plain", "llava_llama_3", "xtuner_llama3_chat"),
    "mistral": ("plain", "mistral_instruct"),
    "qwen": ("plain", "qwen_1_5"),
    "yi": ("plain", "chatml_direct"),
}
OF_FAMILIES = sorted(
    path.relative_to(RECIPES).as_posix() for family in FAMILIES for path in (RECIPES / family).glob("*.json")
)


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_recipes_of_families_load_without_warnings(name: str) -> None:
    config = load_config(RECIPES / name)
    assert config.warnings == []
    assert config.given == set(json.loads((RECIPES / name).read_text(encoding="utf-8")))
    assert config.do_train and config.bf16 and config.fp16_opt_level == "O2" and config.amp_master_grad
    assert config.lr_scheduler_type == "cosine" and config.warmup_ratio == 0.03 and config.weight_decay == 0
    assert config.chat_template in FAMILIES[name.split("/")[0]]
    assert config.chat_template in template_names()


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_recipes_of_families_have_the_published_numbers(name: str) -> None:
    """Sources: LLaVA-NeXT scripts/train/{pretrain,finetune}_clip.sh; xtuner 0.1.23 configs/llava; InternVL
    internvl_chat_llava/scripts_internvl."""
    config = load_config(RECIPES / name)
    family, file = name.split("/")
    is_pretrain, is_next = "pretrain" in file, family in ("mistral", "yi", "llama3", "qwen") and "xtuner" not in file
    assert batch_on_8_cards(config) == (256 if is_pretrain else 128)
    assert config.group_by_modality_length is not is_pretrain
    aspect = "square" if is_pretrain else "anyres" if is_next else "pad"
    assert config.image_aspect_ratio == aspect
    assert config.mm_patch_merge_type == ("spatial_unpad" if aspect == "anyres" else None)
    assert config.max_length == (4096 if aspect == "anyres" else 2048)
    rates = (config.learning_rate, config.mm_projector_lr, config.mm_vision_tower_lr)
    parts = (config.vision_tower, config.projector, config.language_model)
    if is_pretrain:
        assert rates == (1e-3, None, None) and parts == ("frozen", "full", "frozen") and not config.lora
        assert config.mm_projector_type == "mlp2x_gelu"
    elif "qlora" in file:
        assert rates == (2e-4, None, None) and parts == ("lora", "full", "lora") and config.quantize_base == "nf4"
        assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (512, 256, 0.05)
        assert (config.vision_lora_rank, config.vision_lora_alpha) == (64, 16)
    elif file.startswith("lora_"):
        assert rates == (2e-4, 2e-5, None) and config.quantize_base is None
        assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (128, 256, 0.05)
    elif "vision_lora" in file:
        assert rates == (2e-5, None, None) and parts == ("lora", "full", "full")
        assert (config.vision_lora_rank, config.vision_lora_alpha, config.lora_dropout) == (64, 16, 0.05)
    else:
        assert rates == ((1e-5, None, 2e-6) if is_next else (2e-5, None, None)) and not config.lora
        assert parts == (("full",) * 3 if is_next else (None,) * 3)


def test_towers_of_families() -> None:
    """Source: the scripts above; InternVL reads 336 pixels with a tower made for 224."""
    clip = ("openai/clip-vit-large-patch14-336", None, -2)
    found = {}
    for name in OF_FAMILIES:
        config = load_config(RECIPES / name)
        if "pretrain" in name:
            found[name] = (config.mm_vision_tower, config.vision_image_size, config.mm_vision_select_layer)
    of_internvl = {
        "internvl/pretrain_336.json": ("OpenGVLab/InternViT-6B-224px", 336, -4),
        "internvl/pretrain_448.json": ("OpenGVLab/InternViT-6B-448px-V1-5", 448, -1),
    }
    assert found == {name: of_internvl.get(name, clip) for name in found}
    assert of_internvl.keys() <= found.keys() and len(found) == 9


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_a_second_stage_starts_from_the_first_or_from_a_published_model(name: str) -> None:
    config = load_config(RECIPES / name)
    family = name.split("/")[0]
    results = {load_config(path).output_dir for path in (RECIPES / family).glob("*pretrain*.json")}
    assert config.model_name_or_path in {*PUBLISHED_NAMES, *results}
    assert ("pretrain" in name) is (config.output_dir in results)


def test_tables_of_families_say_what_the_files_do() -> None:
    readme = {cells[0]: cells for cells in table_rows((RECIPES / "README.md").read_text(encoding="utf-8"))}
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    book = {cells[0]: cells for cells in table_rows(page)}
    for name in OF_FAMILIES:
        config = load_config(RECIPES / name)
        _, start, _, rate, images, template = readme[f"`{name}`"]
        assert start == ("the result of its `pretrain`" if is_result(config) else f"`{config.model_name_or_path}`")
        assert rate == spell(config.learning_rate) and template == config.chat_template
        assert images.split(",")[0] == config.image_aspect_ratio
        _, _, batch, memory, _ = book[f"`{name}`"]
        assert batch == str(batch_on_8_cards(config)) and memory.isdigit()


def is_result(config: RunConfig) -> bool:
    return config.model_name_or_path.startswith("./checkpoints/")


def test_the_list_of_families_is_complete() -> None:
    folders = {path.name for path in RECIPES.iterdir() if path.is_dir()}
    assert folders == {"tiny", "v1_5", "v1_6", *FAMILIES}
    assert len(OF_FAMILIES) == 28


def test_they_share_the_optimiser_of_all_recipes() -> None:
    keys = ("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs", "loss_reduction")
    for name in OF_FAMILIES:
        config = load_config(RECIPES / name)
        assert [getattr(config, key) for key in keys] == [0.9, 0.999, 1e-8, 1.0, 1, "tokens"], name


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.json")), ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_every_recipe_says_what_data_it_wants_and_runs_with_other_data(path: Path) -> None:
    config = load_config(path)
    assert config.dataset is not None
    for entry in [entry for entries in config.dataset.values() for entry in entries]:
        assert path.parent.name == "tiny" or entry["about"], path  # those are made by `paddlemix demo`
    replaced = load_config(path, ['dataset={"train": [{"data_files": "mine.json"}]}'])
    assert replaced.resolved_evaluation_strategy == "no"
