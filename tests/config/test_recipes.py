"""The shipped recipes, PaddleMIX's own files, and the schema against the PaddleNLP that is installed."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import paddlemix.config
from paddlemix.config.load import load_config
from paddlemix.config.schema import SPECS, RunConfig, trainer_keys

RECIPES = Path(paddlemix.config.__file__).parent / "llava"
SHIPPED = [
    "pretrain.json",
    "v1_5/lora_sft_argument.json",
    "v1_5/lora_sft_argument_stage2.json",
    "v1_5/qlora_sft_argument.json",
    "v1_5/sft_argument.json",
    "v1_5/task_lora.json",
    "v1_6/lora_sft_argument.json",
    "v1_6/lora_sft_argument_stage2.json",
    "v1_6/sft_argument.json",
]

# Keys and values of PaddleMIX's v1_5/lora_sft_argument.json (commit 753d09b3).
ITS_ENTRY = {"name": "chatml_dataset", "data_files": "train.json", "chat_template": "chat_template.json"}
ITS_LORA_FILE = {
    "model_name_or_path": "paddlemix/llava/llava-v1.5-7b",
    "dataset": {"train": [ITS_ENTRY], "eval": [{**ITS_ENTRY, "data_files": "val.json"}]},
    "mixtoken": False,
    "output_dir": "./checkpoints/llava_sft_ckpts",
    "overwrite_output_dir": True,
    "recompute": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 1,
    "eval_accumulation_steps": 16,
    "num_train_epochs": 1,
    "learning_rate": 2e-4,
    "mm_projector_lr": 2e-5,
    "weight_decay": 0.0,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_steps": 100,
    "evaluation_strategy": "epoch",
    "save_strategy": "epoch",
    "max_length": 2048,
    "bf16": False,
    "fp16_opt_level": "O1",
    "do_train": True,
    "do_eval": False,
    "disable_tqdm": True,
    "load_best_model_at_end": False,
    "eval_with_do_generation": False,
    "skip_memory_metrics": False,
    "benchmark": False,
    "save_total_limit": 1,
    "lora": True,
    "lora_rank": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.0,
    "lora_target_modules": [f"llama.layer.*{name}_proj.*" for name in ("q", "k", "v", "gate", "up", "down", "o")],
}


def trainer_fields() -> dict[str, object]:
    """Name -> default of PaddleNLP's TrainingArguments, read from its source: importing it takes many seconds."""
    package = importlib.util.find_spec("paddlenlp")
    assert package is not None and package.origin is not None
    source = Path(package.origin).with_name("trainer") / "training_args.py"
    (declared,) = [
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    ]
    return {
        node.target.id: default_of(node.value)
        for node in declared.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def default_of(value: ast.expr | None) -> object:
    """The `default=` of a `field(...)` call; "unknown" when it is an expression."""
    keywords = {item.arg: item.value for item in value.keywords} if isinstance(value, ast.Call) else {}
    try:
        return ast.literal_eval(keywords["default"])
    except (KeyError, ValueError):
        return "unknown"


def test_the_list_of_recipes_is_complete() -> None:
    found = [path.relative_to(RECIPES).as_posix() for path in RECIPES.glob("*.json")]
    found += [path.relative_to(RECIPES).as_posix() for path in RECIPES.glob("v1_*/*.json")]
    assert sorted(found) == SHIPPED
    documented = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in documented for name in SHIPPED)


def test_no_shipped_recipe_deletes_checkpoints() -> None:
    """A cluster may start the command of a job again at any time; then it has to resume."""
    files = list(RECIPES.parent.rglob("*.json"))
    recipes = [
        values for path in files if (values := json.loads(path.read_text(encoding="utf-8"))) and "output_dir" in values
    ]
    assert len(recipes) >= 40 and not any(values.get("overwrite_output_dir") for values in recipes)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_without_warnings(name: str) -> None:
    config = load_config(RECIPES / name)
    assert config.warnings == []
    assert config.given == set(json.loads((RECIPES / name).read_text(encoding="utf-8")))
    assert config.do_train and config.bf16 and config.fp16_opt_level == "O2" and config.amp_master_grad
    assert config.lr_scheduler_type == "cosine" and config.warmup_ratio == 0.03 and config.weight_decay == 0
    assert config.chat_template == ("plain" if name == "pretrain.json" else "vicuna_v1")


@pytest.mark.parametrize("name", SHIPPED)
def test_recipes_have_the_official_numbers(name: str) -> None:
    """Sources: LLaVA scripts/v1_5/{pretrain,finetune,finetune_lora}.sh; LLaVA-NeXT direct_finetune_clip.sh."""
    config = load_config(RECIPES / name)
    assert batch_on_8_cards(config) == (256 if name == "pretrain.json" else 128)
    assert config.image_aspect_ratio == {"v1_5": "pad", "v1_6": "anyres"}.get(name[:4], "square")
    assert config.mm_patch_merge_type == ("spatial_unpad" if "v1_6" in name else None)
    assert config.group_by_modality_length is (name != "pretrain.json")
    assert config.max_length > (2928 if "v1_6" in name else 576)  # the largest image fits, with room for text
    if "lora" in name:
        is_qlora = "qlora" in name
        rates = (config.learning_rate, config.mm_projector_lr, config.mm_vision_tower_lr)
        assert rates == (2e-4, None if is_qlora else 2e-5, None)
        shape = (config.lora_rank, config.lora_alpha, config.lora_dropout)
        assert config.lora and shape == ((512, 256, 0.05) if is_qlora else (128, 256, 0.05))
        assert config.lora_target_modules is None if is_qlora else len(config.lora_target_modules) == 7
    else:
        rates = {"pretrain.json": (1e-3, None), "v1_5/sft_argument.json": (2e-5, None)}.get(name, (1e-5, 2e-6))
        assert (config.learning_rate, config.mm_vision_tower_lr, config.lora) == (*rates, False)
    assert config.sharding == ("stage2" if "stage2" in name else "")


def batch_on_8_cards(config: RunConfig) -> int:
    return 8 * config.per_device_train_batch_size * config.gradient_accumulation_steps


def test_all_recipes_share_one_optimiser() -> None:
    """As the reference's scripts leave it: AdamW of torch, clipping at 1, one epoch, the loss by tokens."""
    keys = ("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs", "loss_reduction")
    for name in SHIPPED:
        config = load_config(RECIPES / name)
        assert [getattr(config, key) for key in keys] == [0.9, 0.999, 1e-8, 1.0, 1, "tokens"], name
        assert not config.neftune


def test_xtuner_s_recipe_quantises_the_language_model_and_adapts_the_tower() -> None:
    """Source: xtuner 0.1.23, llava_vicuna_7b_v15_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune.py."""
    for name in SHIPPED:
        config = load_config(RECIPES / name)
        found = (config.quantize_base, config.vision_lora_rank, config.vision_lora_alpha, config.vision_tower)
        if "qlora" in name:
            assert found == ("nf4", 64, 16, "lora")
            assert (config.projector, config.language_model) == ("full", "lora")
        else:
            assert found == (None, None, None, "full" if name == "v1_6/sft_argument.json" else None)


def test_the_task_recipe_is_the_lora_recipe_from_a_tuned_model() -> None:
    """LLaVA's two scripts differ in model and data alone; both train on the whole batch of 128."""
    task, lora = (load_config(RECIPES / "v1_5" / name) for name in ("task_lora.json", "lora_sft_argument.json"))
    differ = {key for key in SPECS if getattr(task, key) != getattr(lora, key)}
    assert differ == {"model_name_or_path", "dataset", "output_dir"}
    assert task.model_name_or_path == "paddlemix/llava/llava-v1.5-13b"


def test_the_recipe_book_says_what_the_files_do() -> None:
    """Each row of its table: learning rates in the order rate, projector, tower, and the batch on 8 devices."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    rows = {name: cells for name in SHIPPED for cells in table_rows(page) if cells[0] == f"`{name}`"}
    assert rows.keys() == {name for name in SHIPPED if "stage2" not in name}
    for name, (_, _, _, rates, batch, _) in rows.items():
        config = load_config(RECIPES / name)
        assert batch == str(batch_on_8_cards(config)), name
        projector, tower = config.mm_projector_lr, config.mm_vision_tower_lr
        same, frozen = "the same", "frozen" if config.vision_tower is None else "the same"
        said = [spell(config.learning_rate), spell(projector) or same, spell(tower) or frozen]
        assert rates == ("1e-3, the projector alone" if name == "pretrain.json" else "; ".join(said)), name
    for batch in (128, 256):
        ((_, *accumulation),) = [
            row for row in table_rows(page) if row[0].startswith(f"`gradient_accumulation_steps` for {batch}")
        ]
        assert [int(cell) * devices for cell, devices in zip(accumulation, (8, 4, 2, 1), strict=True)] == 4 * [batch]


def table_rows(page: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def spell(rate: float | None) -> str:
    """0.0002 as "2e-4"; "" for None."""
    return "" if rate is None else f"{rate:.0e}".replace("e-0", "e-")


def test_paddlemix_own_file_loads_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "lora_sft_argument.json"
    path.write_text(json.dumps(ITS_LORA_FILE), encoding="utf-8")
    config = load_config(path)
    assert config.warnings == []  # its keys without effect stand at their defaults
    for name, value in ITS_LORA_FILE.items():
        assert getattr(config, name) == value, name
    ours = json.loads((RECIPES / "v1_5/lora_sft_argument.json").read_text(encoding="utf-8"))
    without_effect = {name for name in ITS_LORA_FILE if SPECS[name].status == "ignored"}
    assert set(ITS_LORA_FILE) - without_effect <= set(ours)


def test_its_other_keys_only_warn(tmp_path: Path) -> None:
    keys = {"benchmark": True, "version": "plain", "top_p": 0.9, "amp_master_grad": 1}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**ITS_LORA_FILE, **keys}), encoding="utf-8")
    warned = load_config(path).warnings
    assert len(warned) == 3 and all(" has no effect here. " in text for text in warned)


def test_every_trainer_argument_is_a_key_with_its_default() -> None:
    theirs = trainer_fields()
    assert len(theirs) > 100
    assert set(theirs) - set(SPECS) == set()
    assert set(trainer_keys()) <= set(theirs)
    changed = {
        name
        for name, default in theirs.items()
        if name != "output_dir" and default != "unknown" and SPECS[name].default != default
    }
    assert changed == {"logging_steps", "report_to", "device"}


def test_every_default_keeps_its_own_key_s_rules() -> None:
    from paddlemix.config.values import check_value

    for spec in SPECS.values():
        assert check_value(spec, spec.default) == (spec.default, []), spec.name
        assert spec.help.endswith("."), spec.name
    assert RunConfig().report_to is not RunConfig().report_to  # lists are not shared


def test_the_configuration_imports_nothing_heavy() -> None:
    code = "import sys, paddlemix.config.load; print([m for m in ('numpy', 'paddle', 'paddlenlp') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
