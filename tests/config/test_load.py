"""Configuration files and command lines: what loads, what is refused, and what the refusal says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paddlemix.config.document import locate_keys
from paddlemix.config.load import ConfigError, format_help, load_config, parse_command_line, save_config
from paddlemix.config.schema import SPECS
from paddlemix.errors import MissingFileError, UserError

ENTRY = {"data_files": "train.json"}
RUN = {"model_name_or_path": "m", "output_dir": "out"}


def write(folder: Path, content: str | dict) -> Path:
    path = folder / "run.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")
    return path


def faults_of(folder: Path, **keys: object) -> list[str]:
    """Faults of a run that is right but for `keys`; None removes a key."""
    values = {name: value for name, value in {**RUN, **keys}.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, values))
    return caught.value.faults


# ---------------------------------------------------------------------------------------- what loads


def test_values_defaults_and_given(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, {**RUN, "learning_rate": 1, "amp_master_grad": 1}))
    assert config.learning_rate == 1.0 and isinstance(config.learning_rate, float)  # a whole number is a number
    assert config.amp_master_grad is True  # PaddleMIX's benchmark files write 1
    assert config.given == {"model_name_or_path", "output_dir", "learning_rate", "amp_master_grad"}
    assert (config.logging_steps, config.report_to, config.device, config.warnings) == (10, [], None, [])


def test_precedence_is_schema_command_file_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, {**RUN, "seed": 3, "max_steps": 5})
    config = load_config(path, ["max_steps=7"], defaults={"seed": 1, "max_steps": 1, "save_steps": 9})
    assert (config.seed, config.max_steps, config.save_steps, config.eval_steps) == (3, 7, 9, None)
    assert "save_steps" not in config.given and "max_steps" in config.given


def test_command_line_alone_is_enough() -> None:
    config = load_config(
        None, ["model_name_or_path=m", "output_dir=2024", "bf16=True", "adam_epsilon=.5", "device=None"]
    )
    assert (config.output_dir, config.bf16, config.adam_epsilon, config.device) == ("2024", True, 0.5, None)
    config = load_config(
        None, ["model_name_or_path=m", "output_dir=o", 'freeze_include=["*a*"]', 'dataset={"train": []}']
    )
    assert config.freeze_include == ["*a*"] and config.dataset == {"train": []}


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(RUN).encode())
    assert load_config(tmp_path / "run.json").output_dir == "out"


def test_dataset_entries_get_their_default_name(tmp_path: Path) -> None:
    dataset = {
        "train": [ENTRY, {"name": "other", "data_files": ["a", "b"], "chat_template": "plain", "image_root": "i"}]
    }
    config = load_config(write(tmp_path, {**RUN, "do_train": True, "dataset": dataset}))
    assert config.dataset["train"] == [{"name": "chatml_dataset", **ENTRY}, dataset["train"][1]]


@pytest.mark.parametrize("device", ["gpu", "npu:3", "cpu", "xpu", "gpu:0"])
def test_devices(tmp_path: Path, device: str) -> None:
    assert load_config(write(tmp_path, {**RUN, "device": device})).device == device


@pytest.mark.parametrize(("written", "read"), [("none", []), (["none"], []), ("wandb", ["wandb"]), (["all"], ["all"])])
def test_report_to_has_one_form(tmp_path: Path, written: object, read: list[str]) -> None:
    assert load_config(write(tmp_path, {**RUN, "report_to": written})).report_to == read


def test_keys_without_effect_warn_only_when_they_differ(tmp_path: Path) -> None:
    path = write(tmp_path, '{"model_name_or_path": "m",\n"output_dir": "o",\n"lazy": false,\n"eta_min": 1e-4}')
    (warning,) = load_config(path).warnings
    assert warning == f"{path}, line 4: eta_min has no effect here. Set min_learning_rate."


def test_a_strategy_alone_or_do_eval_alone_means_evaluation(tmp_path: Path) -> None:
    dataset = {"eval": [ENTRY]}
    config = load_config(write(tmp_path, {**RUN, "dataset": dataset, "do_eval": False, "evaluation_strategy": "epoch"}))
    assert config.resolved_evaluation_strategy == "epoch" and config.warnings == []
    config = load_config(write(tmp_path, {**RUN, "dataset": dataset, "do_eval": True}))
    assert config.resolved_evaluation_strategy == "steps"
    assert load_config(write(tmp_path, RUN)).resolved_evaluation_strategy == "no"


def test_a_dataset_of_the_command_line_without_eval_switches_the_file_s_evaluation_off(tmp_path: Path) -> None:
    both, train = {"train": [ENTRY], "eval": [ENTRY]}, 'dataset={"train": [{"data_files": "mine.json"}]}'
    path = write(tmp_path, {**RUN, "do_train": True, "evaluation_strategy": "epoch", "dataset": both})
    config = load_config(path, [train])
    assert config.resolved_evaluation_strategy == "no" and not config.do_eval
    assert config.warnings == [
        'command line: dataset has no eval, so nothing is evaluated, though the file says "epoch"'
    ]
    for asked in ("do_eval=true", "evaluation_strategy=steps"):  # then it is meant
        with pytest.raises(ConfigError, match="dataset.eval is missing; .* else set "):
            load_config(path, [train, asked])
    path = write(tmp_path, {**RUN, "do_train": True, "evaluation_strategy": "epoch", "dataset": {"train": [ENTRY]}})
    with pytest.raises(ConfigError, match='dataset.eval is missing; .* else set evaluation_strategy "no"'):
        load_config(path)


# ---------------------------------------------------------------------------------------- files that are no JSON object


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{\n "a": 1\n "seed": 2}',
            r"line 3, column 2: not valid JSON .*comma missing at the end of the line before\?: \"seed\": 2",
        ),
        ('{\n "seed": 2,\n}', r"line [23], .*remove the comma before the closing bracket"),
        ('{"seed": 2, # why\n}', r"line 1, column 13: .*JSON has no comments"),
        ("[1]", "must hold one object"),
        ("  \n", "is empty"),
    ],
)
def test_broken_files_name_the_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        load_config(write(tmp_path, text))
    assert str(tmp_path / "run.json") in str(caught.value)


def test_missing_foreign_and_folder(tmp_path: Path) -> None:
    write(tmp_path, RUN)
    with pytest.raises(MissingFileError, match="run.jsn does not exist; did you mean 'run.json'"):
        load_config(tmp_path / "run.jsn")
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"output_dir": "\xe9t\xe9"}')
    with pytest.raises(UserError, match=r"is not UTF-8 text \(byte 16\)"):
        load_config(tmp_path / "latin.json")


def test_keys_are_located_at_any_depth() -> None:
    text = '{"a": [{"b": ","},\n {"b": "{\\""}],\n "c": {"d":\n 1}, "e": [1, [2]], "a": 2}'
    places = [("a", 1), ("a[0].b", 1), ("a[1].b", 2), ("c", 3), ("c.d", 3), ("e", 4), ("a", 4)]
    assert locate_keys(text) == places


# ---------------------------------------------------------------------------------------- faults


def test_all_faults_come_together_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """{
  "model_name_or_path": "m",
  "learning_rat": 1e-4,
  "warmup_ratio": 2,
  "bf16": true, "fp16": true,
  "seed": 1,
  "weight_decay": "0.1",
  "seed": 2,
  "dataset": {
    "train": [
      {"data_files": "x"},
      {"data_file": "x"}
    ]
  }
}"""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["lr_scheduler_type=cosin", "seed"])
    assert str(caught.value) == "\n".join(caught.value.faults)
    found = [fault.removeprefix(f"{path}") for fault in caught.value.faults]
    assert found == [
        ", line 3: learning_rat is not a known key; did you mean 'learning_rate'?",
        ", line 4: warmup_ratio: 2.0 is above 1, the maximum",
        ", line 5: bf16 and fp16 are both true; choose one",
        ", line 7: weight_decay: expected a number, got text '0.1'; remove the quotes",
        ", line 8: seed is given again, first in line 6; remove one of them",
        ", line 12: dataset.train[1].data_file: data_file is not a known key; did you mean 'data_files'? "
        "(allowed: name, data_files, splits, chat_template, image_root, split, weight)",
        ", line 12: dataset.train[1]: data_files is missing; give the JSON file or a list of them",
        ": output_dir is missing; set it to the folder for the results",
        "command line: lr_scheduler_type='cosin' is not one of linear, cosine, constant, constant_with_warmup, "
        "polynomial; did you mean 'cosine'?",
        "command line: 'seed' is not key=value",
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", "2e-4", "expected a number, got text '2e-4'; remove the quotes"),
        ("learning_rate", True, "expected a number, got true"),
        ("learning_rate", float("nan"), "NaN is not a number; remove the key or give a number"),
        ("learning_rate", float("inf"), "the number is beyond 3.40282e+38, the largest that float32 has"),
        (
            "resume_from_checkpoint",
            True,
            "this is transformers': leave it out (a run resumes from the newest checkpoint",
        ),
        ("learning_rate", -1, "-1.0 is below 0, the minimum"),
        ("max_steps", 10.0, "expected a whole number, got the number 10.0; write 10"),
        ("max_length", 0, "0 tokens is below 1, the minimum"),
        ("bf16", "true", "expected true or false, got text 'true'; remove the quotes"),
        ("bf16", 2, "expected true or false, got the number 2"),
        ("lora_rank", 0, "0 is below 1"),
        ("lora_alpha", 0, "0 is below 1"),
        ("output_dir", 5, "expected text or null, got the number 5; put it in quotes"),
        ("freeze_include", "*a*", """expected a list of texts or null, got text '*a*'; write ["*a*"]"""),
        ("freeze_include", ["a", 1], "expected a list of texts or null, got a list"),
        ("dataset", [], "expected an object or null, got a list"),
        ("image_aspect_ratio", "sqare", "is not one of square, pad, anyres; did you mean 'square'?"),
        ("mm_projector_type", "mlp0x_gelu", "is not one of linear, mlpNx_gelu, identity"),
        ("device", "gpu:x", "is not one of gpu, npu, cpu, xpu, gpu:0"),
        ("fp16_opt_level", "O3", "is not one of O0, O1, O2"),
        ("report_to", ["wandbb"], "did you mean 'wandb'?"),
        ("image_grid_pinpoints", [[336, 672], [336]], "item 1 is [336]; expected two whole numbers"),
        ("sep_parallel_degree", 2, "sep_parallel_degree 2: a sequence is not split here; set it to 1"),
    ],
)
def test_wrong_values(tmp_path: Path, name: str, value: object, message: str) -> None:
    (fault,) = faults_of(tmp_path, **{name: value})
    assert message in fault and name in fault and ", line " in fault


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"trian": []}, "dataset.trian is not a known key; did you mean 'train'?"),
        ({"train": ENTRY}, "dataset.train: expected a list of entries, got an object; put it in [ ]"),
        ({"train": ["a.json"]}, "dataset.train[0]: expected an object, got text 'a.json'"),
        ({"eval": [{}]}, "dataset.eval[0]: data_files is missing"),
        (
            {"train": [{"data_files": 3}]},
            "dataset.train[0].data_files: expected text or a list of texts, got the number 3",
        ),
        ({"train": [{"data_files": ["a", 3]}]}, "dataset.train[0].data_files: expected a list of texts"),
        ({"train": [{**ENTRY, "image_root": 3}]}, "dataset.train[0].image_root: expected text, got the number 3"),
    ],
)
def test_wrong_datasets(tmp_path: Path, dataset: dict, message: str) -> None:
    (fault,) = faults_of(tmp_path, dataset=dataset)
    assert message in fault and ", line " in fault


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both true"),
        ({"bf16_full_eval": True, "fp16_full_eval": True}, "bf16_full_eval and fp16_full_eval are both true"),
        ({"fp16_opt_level": "O2"}, 'fp16_opt_level "O2" needs bf16 or fp16'),
        ({"fp16": True, "scale_loss": 0}, "scale_loss 0 makes every gradient of fp16 0 / 0"),
        ({"bf16": True, "dtype": "float16"}, 'dtype "float16" contradicts bf16'),
        ({"load_best_model_at_end": True}, 'needs save_strategy ("steps") equal to evaluation_strategy ("no")'),
        (
            {
                "load_best_model_at_end": True,
                "evaluation_strategy": "steps",
                "eval_steps": 200,
                "dataset": {"eval": [ENTRY]},
            },
            "save_steps 500 is not a multiple of eval_steps 200",
        ),
        ({"do_train": True}, "dataset.train is missing"),
        ({"do_train": True, "dataset": {"train": []}}, "dataset.train is missing"),
        ({"do_eval": True}, "dataset.eval is missing; do_eval true"),
        ({"evaluation_strategy": "epoch"}, 'dataset.eval is missing; evaluation_strategy "epoch"'),
        ({"num_train_epochs": 0}, "there would be no step"),
        ({"min_learning_rate": 1.0}, "min_learning_rate 1 is above learning_rate 5e-05"),
        ({"lora": False, "language_model": "lora"}, 'language_model "lora" contradicts lora false'),
        ({"output_dir": None}, "output_dir is missing"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
    ],
)
def test_rules_between_keys(tmp_path: Path, keys: dict, message: str) -> None:
    (fault,) = faults_of(tmp_path, **keys)
    assert message in fault and "run.json" in fault


def test_allowed_combinations(tmp_path: Path) -> None:
    both = {"train": [ENTRY], "eval": [ENTRY]}
    for keys in (
        {"lora_path": "adapter", "lora": False},
        {"fp16_opt_level": "O2", "fp16": True},
        {"num_train_epochs": 0, "max_steps": 3},
        {"language_model": "lora"},
        {"load_best_model_at_end": True, "evaluation_strategy": "steps", "eval_steps": 250, "dataset": both},
        {"load_best_model_at_end": True, "evaluation_strategy": "epoch", "save_strategy": "epoch", "dataset": both},
    ):
        load_config(write(tmp_path, {**RUN, **keys}))


def test_a_wrong_value_causes_no_second_fault(tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, do_train=True, dataset="train.json")
    assert "dataset: expected an object" in fault


# ---------------------------------------------------------------------------------------- saving


def test_a_saved_configuration_loads_as_the_same(tmp_path: Path) -> None:
    keys = {
        "chat_template": "描述.json",
        "wandb_api_key": "secret",
        "report_to": "none",
        "lazy": True,
        "learning_rate": 1e-6,
    }
    config = load_config(write(tmp_path, {**RUN, **keys}))
    target = tmp_path / "new" / "config.json"
    save_config(config, target)
    text = target.read_text(encoding="utf-8")
    assert "secret" not in text and "描述.json" in text and "lazy" not in text
    assert list(json.loads(text)) == [name for name in SPECS if name in json.loads(text)]  # by group
    again = load_config(target)
    for name, spec in SPECS.items():
        if spec.status == "used" and not spec.secret:
            assert getattr(again, name) == getattr(config, name), name
    assert again.warnings == [] and [item.name for item in target.parent.iterdir()] == ["config.json"]


def test_saving_to_an_impossible_place_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*choose another place"):
        save_config(load_config(write(tmp_path, RUN)), tmp_path / "file" / "config.json")


# ---------------------------------------------------------------------------------------- command line


def parse(*argv: str) -> tuple[Path | None, list[str]]:
    return parse_command_line(list(argv), "finetune", "Fine-tunes a model.")


def test_file_assignments_and_flags() -> None:
    path, overrides = parse("runs/a.json", "seed=1", "--max_steps", "-1", "--learning-rate=1e-4", "--output_dir", "o")
    assert path == Path("runs/a.json")
    assert overrides == ["seed=1", "max_steps=-1", "learning_rate=1e-4", "output_dir=o"]


def test_flags_for_booleans_and_lists() -> None:
    _, overrides = parse("--bf16", "--do_train", "False", "--freeze_include", "*a*", "*b*", "seed=1", "--lora")
    assert overrides == ["bf16=true", "do_train=False", 'freeze_include=["*a*", "*b*"]', "seed=1", "lora=true"]
    assert parse("--bf16", "a.json") == (Path("a.json"), ["bf16=true"])
    assert parse("--freeze_include", '["*a*"]') == (None, ['freeze_include=["*a*"]'])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a configuration file"),
        (["a.json", "b.json"], "'b.json' is a second file after 'a.json'"),
        (["--learning_rat", "1"], "--learning_rat is not a known key; did you mean 'learning_rate'?"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--bf16"], "--seed needs a value"),
    ],
)
def test_wrong_command_lines(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert message in str(caught.value)


def test_help_lists_every_key_and_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("a.json", "--help")
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and shown.startswith("usage: finetune CONFIG.json") and "Fine-tunes a model." in shown
    assert format_help() in shown
    for name in SPECS:
        assert f"\n  {name}: " in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_values_without_end_are_told(tmp_path: Path) -> None:
    """A number of 400 digits, a text of a hundred thousand characters, lists in lists on the command line."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"learning_rate": 10**400, "lora_rank": "a" * 100_000, "dataset": [["a b "] * 9000]}))
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["seed=" + "[" * 100_000])
    message = str(caught.value)
    assert all(f"{key}: expected" in message for key in ("learning_rate", "lora_rank", "dataset", "seed"))
    assert len(message) < 5000


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("adam_beta1", "1", "adam_beta1 1 divides by zero in the first step; set it below 1 (default 0.9)"),
        ("adam_beta2", "1.0", "adam_beta2 1 divides by zero in the first step"),
        ("learning_rate", "1e39", "learning_rate: 1e+39 is beyond 3.40282e+38, the largest number that float32 has"),
        ("max_steps", "1" + "0" * 30, "max_steps: expected a whole number, got the number 1000"),
        ("seed", "-1", "seed: -1 is below 0"),
    ],
)
def test_numbers_that_nothing_can_be_computed_with(key: str, value: str, message: str) -> None:
    texts = ["model_name_or_path=m", "output_dir=out", f"{key}={value}"]
    with pytest.raises(UserError) as caught:
        load_config(None, texts)
    assert message in str(caught.value) and len(str(caught.value)) < 300


def test_each_fault_is_told_once_and_fifty_at_most(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    twice = ", ".join(['"seed": 1'] * 400)
    many = ", ".join(f'"unknown_{number}": 1' for number in range(120))
    path.write_text("{" + twice + ", " + many + "}")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert sum("seed is given again" in fault for fault in caught.value.faults) == 1
    assert len(lines) == 51 and lines[-1] == f"... and {len(caught.value.faults) - 50} more"


def test_a_resumed_run_needs_no_word() -> None:
    for text in ("true", "True"):
        with pytest.raises(ConfigError, match=r"this is transformers': leave it out \(a run resumes from the newest"):
            load_config(None, ["model_name_or_path=m", "output_dir=o", f"resume_from_checkpoint={text}"])
    with pytest.raises(ConfigError, match='write (--)?"?overwrite_output_dir'):
        load_config(None, ["model_name_or_path=m", "output_dir=o", "resume_from_checkpoint=false"])


def test_keys_of_the_feature_cache_without_it_give_a_warning() -> None:
    given = ["model_name_or_path=m", "output_dir=o", "vision_cache_dir=c", "vision_cache_gb=2"]
    notes = load_config(None, given).warnings
    assert [note.partition(" has no effect without cache_vision_features true")[0] for note in notes] == [
        "command line: vision_cache_dir",
        "command line: vision_cache_gb",
    ]
    assert load_config(None, [*given, "cache_vision_features=true"]).warnings == []
