"""Other programs' names: every answer is true of our own keys, and a run's faults show it, all together."""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from paddlemix.config.foreign.answers import VALUE, keys_written
from paddlemix.config.foreign.flags import FOREIGN_FLAGS
from paddlemix.config.foreign.names import (
    FOREIGN_KEYS,
    foreign_file,
    foreign_key,
    foreign_value,
    keys_meant,
)
from paddlemix.config.foreign.script_keys import ENTRY_KEYS, VALUES
from paddlemix.config.foreign.templates import FOREIGN_RECIPES, FOREIGN_TEMPLATES
from paddlemix.config.load import ConfigError, Fault, load_config, parse_command_line
from paddlemix.config.schema import SPECS
from paddlemix.config.values import check_value
from paddlemix.errors import MissingFileError, UserError
from paddlemix.processors.text.known_templates import TEMPLATES
from paddlemix.tools import supervised_finetune
from tests.config.foreign_tables import PAGE, fill, tables_of
from tests.conftest import ROOT

RECIPES = ROOT / "paddlemix" / "config" / "llava"
SAMPLES = {"int": 4, "float": 0.5, "str": "text", "bool": True}  # kind of a key -> a value of it


def faults_of(folder: Path, values: dict[str, Any], *overrides: str) -> list[str]:
    path = folder / "run.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "output_dir": "o", **values}, indent=1), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [fault.removeprefix(str(path)) for fault in caught.value.faults]


# ---------------------------------------------------------------------------------------- the table itself


def test_an_answer_names_keys_that_have_an_effect() -> None:
    for program, answers in FOREIGN_KEYS.items():
        for name, answer in answers.items():
            assert name not in SPECS, (program, name, "it is a key of ours")
            assert answer.write or answer.values or answer.says or answer.otherwise, (program, name)
            assert all(SPECS[key].status == "used" for key in keys_written(answer)), (program, name)


def test_what_an_answer_says_to_write_is_taken() -> None:
    for answers in FOREIGN_KEYS.values():
        for name, answer in answers.items():
            for written in {answer.write, *answer.values.values()} - {""}:
                spec = SPECS[re.search(r'"(\w+)":[^,]*\$', written)[1]] if VALUE in written else SPECS["lora"]
                if "dataset" in written:
                    spec = SPECS["output_dir"]
                value = (
                    spec.choices[0] if spec.choices else next(SAMPLES[kind] for kind in SAMPLES if kind in spec.kinds)
                )
                for ours, item in json.loads("{" + written.replace(VALUE, json.dumps(value)) + "}").items():
                    assert check_value(SPECS[ours], item)[1] == [], (name, written)


def test_every_argument_of_transformers_is_ours_or_answered() -> None:
    """Read from the source: importing transformers' trainer takes seconds."""
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.origin is not None
    source = Path(package.origin).with_name("training_args.py").read_text(encoding="utf-8")
    (declared,) = [
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    ]
    names = {
        node.target.id
        for node in declared.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
    }
    assert len(names) > 100
    assert {name for name in names if name not in SPECS and not foreign_key(name, None)} == set()


def test_keys_of_templates_and_entries_are_ours() -> None:
    assert all(
        named.ours is None or named.ours in TEMPLATES
        for names in FOREIGN_TEMPLATES.values()
        for named in names.values()
    )
    entry_keys = {key for _, answer in ENTRY_KEYS.values() for key in keys_written(answer)}
    assert entry_keys <= {"data_files", "image_root", "weight"}
    assert set(VALUES) <= set(SPECS)


@pytest.mark.parametrize(
    ("program", "name"), [(program, name) for program, recipes in FOREIGN_RECIPES.items() for name in recipes]
)
def test_recipes_of_others_are_ours_with_what_stands_beside(program: str, name: str) -> None:
    file, beside = FOREIGN_RECIPES[program][name]
    load_config(RECIPES / file, beside.split())
    assert f"{name} is paddlemix/config/llava/{file}" in foreign_file(f"somewhere/{name}.sh")


# ---------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lora_enable", True, 'lora_enable is LLaVA\'s; write "lora": true'),
        ("lora_r", 128, 'lora_r is LLaVA\'s; write "lora_rank": 128'),
        ("data_path", "a.json", 'data_path is LLaVA\'s; write "dataset": {"train": [{"data_files": "a.json"}]}'),
        ("bits", 4, 'bits is LLaVA\'s; write "quantize_base": "nf4"'),
        ("bits", 16, "bits is LLaVA's; leave it out"),
        (
            "bits",
            3,
            'bits is LLaVA\'s; write "quantize_base": "nf4" for 4, "quantize_base": "int8" for 8, leave it out for '
            "16, 32, null",
        ),
        ("gradient_checkpointing", True, 'gradient_checkpointing is transformers\'; write "recompute": true'),
        ("freeze_mm_mlp_adapter", True, 'freeze_mm_mlp_adapter is LLaVA\'s; write "projector": "frozen"'),
        ("deepspeed", "./scripts/zero3_offload.json", 'transformers\'; write "sharding": "stage3"'),
        ("deepspeed", "default-zero2", 'write "sharding": "stage2"'),
        ("sft_type", "lora", 'sft_type is ms-swift\'s; write "lora": true'),
        ("model_type", "llava1_5", "model_type is ms-swift's; leave it out; the checkpoint's config.json"),
        ("vit_lr", 2e-6, 'vit_lr is ms-swift\'s; write "mm_vision_tower_lr": 2e-06'),
        ("freeze_vit", False, 'write "vision_tower": "full" ("lora" trains adapters on it)'),
        ("cutoff_len", 2048, 'LLaMA-Factory\'s; write "max_length": 2048'),
        ("template", "llava_next", 'template is LLaMA-Factory\'s; write "chat_template": "vicuna_v1"'),
        ("template", "llava1_6_vicuna_hf", 'template is ms-swift\'s; write "chat_template": "llava_v1"'),
        ("prompt_template", "vicuna", 'XTuner\'s; write "chat_template": "xtuner_vicuna"'),
        ("accumulative_counts", 4, 'XTuner\'s; write "gradient_accumulation_steps": 4'),
        ("force_image_size", 448, 'InternVL\'s; write "vision_image_size": 448'),
        ("use_llm_lora", 16, 'InternVL\'s; write "lora": true, "lora_rank": 16'),
        ("packing", True, "packing is ms-swift's and LLaMA-Factory's; write \"mixtoken\": true"),
        ("annotation", None, "annotation is not a known key"),
        ("frobnicate", 1, "frobnicate is not a known key"),
    ],
)
def test_keys(tmp_path: Path, name: str, value: object, message: str) -> None:
    (fault,) = faults_of(tmp_path, {name: value})
    assert fault.startswith(", line ") and message in fault
    assert "did you mean" not in fault


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vision_tower", "openai/clip", 'LLaVA\'s: write "mm_vision_tower": "openai/clip"'),
        ("optim", "adamw_torch", 'transformers\': write "optim": "adamw"'),
        ("dataset", ["a.json"], 'write "dataset": {"train": [{"data_files": ["a.json"]}]}'),
        ("dtype", "bf16", 'write "dtype": "bfloat16"'),
        ("device", "cuda:0", 'torch\'s: write "device": "gpu"'),
        ("lora_target_modules", "ALL", 'ms-swift\'s: write "lora_target_modules": "all-linear"'),
        ("image_aspect_ratio", "anyres_max_9", "another computation"),
        ("image_grid_pinpoints", "[(336, 672)]", "write a list of [width, height]"),
        ("dataset", {"train": [{"annotation": "a.json", "root": "i"}]}, 'InternVL\'s; write "data_files": "a.json"'),
    ],
)
def test_values(tmp_path: Path, name: str, value: object, message: str) -> None:
    fault = faults_of(tmp_path, {name: value})[0]
    assert message in fault and "did you mean" not in fault


# What scripts of other programs pass to their training.  Sources: LLaVA scripts/v1_5/finetune_lora.sh and pretrain.sh;
# the ms-swift and LLaMA-Factory files follow their documentation's examples for LLaVA.
LLAVA_LORA = """--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --deepspeed ./scripts/zero3.json
    --model_name_or_path lmsys/vicuna-13b-v1.5 --version v1 --data_path ./data/mix665k.json --image_folder ./data
    --vision_tower openai/clip-vit-large-patch14-336 --pretrain_mm_mlp_adapter ./checkpoints/mm_projector.bin
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
    --image_aspect_ratio pad --group_by_modality_length True --bf16 True --output_dir ./out --num_train_epochs 1
    --per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
    --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1 --learning_rate 2e-4
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to wandb"""
SWIFT_LORA = """--model llava-hf/llava-1.5-7b-hf --tuner_type lora --dataset a.jsonl --val_dataset b.jsonl
    --torch_dtype bfloat16 --lora_rank 8 --lora_alpha 32 --target_modules all-linear --freeze_vit true
    --freeze_aligner false --vit_lr 1e-6 --aligner_lr 2e-5 --learning_rate 1e-4 --attn_impl flash_attn
    --gradient_checkpointing true --packing true --max_length 4096 --eval_steps 50 --save_steps 50
    --split_dataset_ratio 0 --deepspeed zero2 --output_dir out"""
FACTORY_LORA = """--model_name_or_path llava-hf/llava-1.5-7b-hf --stage sft --finetuning_type lora --lora_target all
    --lora_rank 8 --template llava --cutoff_len 2048 --max_samples 1000 --overwrite_cache true --media_dir data
    --preprocessing_num_workers 16 --output_dir out --plot_loss true --do_train true --quantization_bit 4
    --freeze_vision_tower true --freeze_multi_modal_projector false --val_size 0.1 --dataset a.json"""


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            LLAVA_LORA,
            {
                "lora": True,
                "lora_rank": 128,
                "lora_alpha": 256,
                "mm_projector_lr": 2e-5,
                "sharding": "stage3",
                "dataset": {"train": [{"name": "chatml_dataset", "data_files": "./data/mix665k.json"}]},
                "image_root": "./data",
                "mm_vision_tower": "openai/clip-vit-large-patch14-336",
                "pretrain_mm_mlp_adapter": "./checkpoints/mm_projector.bin",
                "max_length": 2048,
                "recompute": True,
                "bf16": True,
                "report_to": ["wandb"],
            },
        ),
        (
            SWIFT_LORA,
            {
                "model_name_or_path": "llava-hf/llava-1.5-7b-hf",
                "lora": True,
                "lora_target_modules": "all-linear",
                "vision_tower": "frozen",
                "projector": "full",
                "mm_vision_tower_lr": 1e-6,
                "mm_projector_lr": 2e-5,
                "use_flash_attention": True,
                "mixtoken": True,
                "sharding": "stage2",
                "fp16_opt_level": "O2",
            },
        ),
        (
            FACTORY_LORA,
            {
                "lora": True,
                "lora_target_modules": "all-linear",
                "chat_template": "vicuna_v1",
                "quantize_base": "nf4",
                "vision_tower": "frozen",
                "projector": "full",
                "image_root": "data",
                "do_train": True,
            },
        ),
    ],
)
def test_who_follows_the_answers_has_a_run(script: str, expected: dict[str, Any]) -> None:
    """A refused argument is replaced by what its fault says to write, and left out where that is nothing."""
    flags = re.findall(r"--(\w+) (\S+)", script)
    argv = [f"--{name}={value}" for name, value in flags]
    for _ in range(2):
        faults: list[Fault] = []
        _, overrides = parse_command_line(argv, "finetune", "", faults)
        try:
            config = load_config(None, overrides, faults=faults)
        except ConfigError as error:
            said = [fault.removeprefix("command line: ") for fault in error.faults]
            kept = [item for item in overrides if not any(text.startswith(item.partition("=")[0]) for text in said)]
            argv = [*kept, *(word for text in said for word in written(text))]
            continue
        break
    # a second entry of `dataset` is put beside the first by hand
    assert {name: getattr(config, name) for name in expected} == expected


def written(fault: str) -> list[str]:
    """The words after "write" of a fault."""
    found = re.search(r"write (.*?)(?: \(.*)?$", fault)
    return [] if found is None else [word for word in shlex.split(found[1]) if "=" in word]


def test_version_is_only_warned_of_with_our_template(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"model_name_or_path": "m", "output_dir": "o", "version": "v1"}', encoding="utf-8")
    (warning,) = load_config(path).warnings
    assert warning.endswith('This is LLaVA\'s: write "chat_template": "vicuna_v1".')
    assert foreign_value("version", "of mine") == 'LLaVA\'s: write "chat_template": "of mine"'


def test_what_another_key_meant_to_set_is_not_missing(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"model_id_or_path": "m", "data_path": "a.json", "work_dir": "o", "do_train": true}')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(caught.value.faults) == 3 and not any("missing" in fault for fault in caught.value.faults)
    assert keys_meant("data_path") == {"dataset"}


def test_all_faults_of_a_command_line_come_together(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"model_name_or_path": "m", "learning_rat": 1}', encoding="utf-8")
    argv = [str(path), "--lora_enable", "True", "--output_dir", "o", "other.json", "--seed", "--bits=4", "--model-type"]
    argv += ["x", "--max_steps", "2.5", "--data_path", "my data.json", "--zzz", "1", "bogus=3"]
    with pytest.raises(ConfigError) as caught:
        supervised_finetune.main(argv)
    assert caught.value.faults == [
        f"{path}, line 1: learning_rat is not a known key; did you mean 'learning_rate'?",
        "command line: max_steps: expected a whole number, got the number 2.5",
        "command line: bogus is not a known key",
        "command line: lora_enable is LLaVA's; write lora=true",
        f"command line: 'other.json' is a second file after '{path}'; give one, and keys as key=value",
        "command line: --seed needs a value after it",
        "command line: bits is LLaVA's; write quantize_base=nf4",
        "command line: model_type is ms-swift's; leave it out; the checkpoint's config.json says what it is",
        'command line: data_path is LLaVA\'s; write \'dataset={"train": [{"data_files": "my data.json"}]}\'',
        "command line: --zzz is not a known key",
    ]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--finetuning_type lora", ["finetuning_type is LLaMA-Factory's; write lora=true"]),
        ("--train_type lora", ["train_type is ms-swift's; write lora=true"]),
        ("--tuner_type lora --seed", ["tuner_type is ms-swift's; write lora=true", "--seed needs a value after it"]),
        ("--zzz lora", ["--zzz is not a known key"]),
        ("--fsdp_config fsdp.json --zzz 1", ["fsdp_config is transformers'; *", "--zzz is not a known key"]),
        ("--finetuning_type full {recipe}", ["finetuning_type is LLaMA-Factory's; write lora=false"]),
        ("lora --zzz 1", ["configuration file lora does not exist", "--zzz is not a known key"]),
    ],
)
def test_command_lines_of_others_as_they_are_typed(tmp_path: Path, typed: str, said: list[str]) -> None:
    """The word after another program's flag is its value, though a key of ours has that name; all is told at once."""
    recipe = tmp_path / "run.json"
    recipe.write_text("{}", encoding="utf-8")
    words = typed.format(recipe=recipe).split()
    with pytest.raises(ConfigError) as caught:
        supervised_finetune.main(["--model_name_or_path", "t/hf", *words, "--output_dir", "t/zz"])
    found = [fault.removeprefix("command line: ") for fault in caught.value.faults]
    assert len(found) == len(said)
    assert all(map(fnmatch.fnmatchcase, found, said))


def test_a_value_may_have_the_name_of_a_key() -> None:
    assert parse_command_line(["--run_name", "lora", "--freeze_include", "seed", "bf16=true"], "finetune", "") == (
        None,
        ["run_name=lora", 'freeze_include=["seed"]', "bf16=true"],
    )


def test_the_file_after_an_unknown_flag_is_the_file() -> None:
    faults: list[Fault] = []
    assert parse_command_line(["--zzz", "run.json", "seed=1"], "finetune", "", faults) == (Path("run.json"), ["seed=1"])
    assert [fault.message for fault in faults] == ["--zzz is not a known key"]
    with pytest.raises(UserError, match="--zzz is not a known key\ncommand line: --seed needs a value"):
        parse_command_line(["run.json", "--zzz", "--seed"], "finetune", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llava_v15_7b_finetune_lora", "XTuner's llava_v15_7b_finetune_lora is paddlemix/config/llava/v1_5/lora_sft"),
        ("pretrain_internvit6b_448_vicuna7b.sh", "internvl/pretrain_448.json model_name_or_path=lmsys/vicuna-7b-v1.5"),
        ("mine.yaml", "YAML, which LLaMA-Factory and ms-swift use, is not read; write a JSON file"),
        ("mine.jsn", ""),
    ],
)
def test_files_of_others(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(MissingFileError) as caught:
        load_config(tmp_path / name)
    assert (
        str(caught.value)
        .removeprefix(f"configuration file {tmp_path / name} does not exist")
        .startswith(f"; {message}"[: 2 * bool(message)])
    )
    assert message in str(caught.value)
    (tmp_path / name).write_text("model_name_or_path: m\n", encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON") as broken:
        load_config(tmp_path / name)
    assert message in str(broken.value)


def test_the_page_shows_the_tables_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert fill(page) == page, "python -m tests.config.foreign_tables"
    wanted = {"recipes", "values", "entries", "templates"}
    wanted |= {f"keys {program}" for program in FOREIGN_KEYS if program != "PEFT"}
    assert set(tables_of(page)) == wanted | {f"flags {command}" for command in FOREIGN_FLAGS}
    assert "| `lora_enable` | `lora` |" in page and "`--question-file`" in page
