"""The arguments of every command: all faults at once, another program's flag with ours, nothing guessed."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from paddlemix.__main__ import COMMANDS
from paddlemix.__main__ import main as front_door
from paddlemix.checkpoints.files.weight_files import read_json, write_json
from paddlemix.config.foreign.flags import FOREIGN_COMMANDS, FOREIGN_FLAGS, SWITCHES, WORD_LISTS
from paddlemix.errors import UserError
from paddlemix.tools.common.arguments import CommandParser
from paddlemix.tools.common.processor import named_template
from tests.tiny_world import World

TRAINING = ("finetune", "pretrain")


def parser_of(command: str) -> CommandParser:
    parser: CommandParser = importlib.import_module(COMMANDS[command].module).build_parser()
    return parser


def faults_of(command: str, *argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parser_of(command).parse_args(list(argv))
    *faults, last = str(caught.value).split("\n")
    assert last.endswith("--help` lists the arguments")
    return faults


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - set(TRAINING)))
def test_every_command_has_such_a_parser(command: str) -> None:
    assert isinstance(parser_of(command), CommandParser)
    assert "--zzz is not a known flag" in faults_of(command, "--zzz")
    with pytest.raises(SystemExit) as caught:
        parser_of(command).parse_args(["--zzz", "--help"])
    assert caught.value.code == 0


def test_a_wrong_word_hides_what_was_given() -> None:
    """argparse stops at a word without a flag: what came with it is not called missing."""
    (fault,) = faults_of("convert-data", "", "--output", "x.json")
    assert fault == "input: the path is empty; name a path ('.' is the working folder)"


@pytest.mark.parametrize("command", FOREIGN_FLAGS)
def test_answers_name_flags_that_the_command_has(command: str) -> None:
    ours = {option for action in parser_of(command)._actions for option in action.option_strings}
    for flags in FOREIGN_FLAGS[command].values():
        for name, answer in flags.items():
            assert not {f"--{name}", f"--{name.replace('_', '-')}"} & ours, name
            assert answer.write or answer.values or answer.says, name
            written = {text.split()[0] for text in (answer.write, *answer.values.values()) if text}
            assert written <= ours, name
    assert not SWITCHES & WORD_LISTS


@pytest.mark.parametrize(
    ("command", "line", "faults"),
    [
        (
            "predict",
            "--question-file q.jsonl --answers-file a.jsonl --image-folder i --model_path m --temperatur 1",
            [
                "--question-file is LLaVA's; write --input q.jsonl",
                "--answers-file is LLaVA's; write --output a.jsonl",
                "--image-folder is LLaVA's; write --image-root i",
                "--temperatur is not a known flag; did you mean '--temperature'?",
            ],
        ),
        (
            "predict",
            "--max_new_tokens x --seed y --dtype bf16 --output",
            [
                "--max-new-tokens: invalid int value: 'x'",
                "--seed: 'y' is not a seed; give a whole number from 0 to 9223372036854775807",
                "--dtype: invalid choice: 'bf16' (choose from 'float32', 'float16', 'bfloat16')",
                "--output: expected one argument",
                "--model-path, --input must be given",
            ],
        ),
        (
            "chat",
            "lmsys/vicuna --visual-encoder c --llava 'x y' --prompt-template vicuna --bits 4 --no-streamer --image a",
            [
                "--visual-encoder is XTuner's; leave it out; the folder says what it is",
                "--llava is XTuner's; write --model-path 'x y' (it names the language model and the tower)",
                "--prompt-template is XTuner's; write --conv-mode xtuner_vicuna (left out, the template stored with "
                "the checkpoint is taken)",
                "--bits is XTuner's; write --load-4bit",
                "--no-streamer is XTuner's; write --no-stream",
                "--image is XTuner's; write --image-file a",
                "'lmsys/vicuna': no flag before it (as XTuner's language model: --model-path names the folder that "
                "--llava names there)",
            ],
        ),
        (
            "chat",
            "--ckpt_dir c --load_dataset_config true --stream=false",
            [
                "--ckpt_dir is ms-swift's; write --model-path c (an adapter's folder names its base)",
                "--load_dataset_config is ms-swift's; `paddlemix predict --input QUESTIONS --output ANSWERS` answers a "
                "file of questions",
                "--stream is ms-swift's; write --no-stream",
            ],
        ),
        (
            "chat",
            "model_name_or_path=m template=llava",
            [
                "model_name_or_path=m is LLaMA-Factory's; write --model-path m",
                "template=llava is LLaMA-Factory's; write --conv-mode vicuna_v1 (left out, the template stored with "
                "the checkpoint is taken)",
            ],
        ),
        (
            "merge-lora",
            "--model-path a --model-base b --save-model-path c",
            [
                "--model-path is LLaVA's; write --lora_path a",
                "--model-base is LLaVA's; write --model_name_or_path b",
                "--save-model-path is LLaVA's; write --merge_model_path c",
            ],
        ),
        (
            "merge-lora",
            "LLM ADAPTER OUT --is-clip",
            [
                "--is-clip is XTuner's; leave it out; adapters of tower and language model are merged together",
                "'LLM', 'ADAPTER', 'OUT': no flag before it (as XTuner's LLM ADAPTER FOLDER: write "
                "--model_name_or_path LLM --lora_path ADAPTER --merge_model_path FOLDER)",
                "--lora_path must be given",
            ],
        ),
        ("convert", "--save-format official --input a --output b", ["--save-format is XTuner's; write --to llava"]),
        ("check-data", "--model x a.json", ["--model is not a known flag"]),
        ("check-data", "", ["CONFIG|FILE must be given"]),
    ],
)
def test_all_faults_with_what_to_write(command: str, line: str, faults: list[str]) -> None:
    found = faults_of(command, *shlex.split(line))
    assert [re.sub(r"\(choose from .*\)", "(choose)", text) for text in found] == [
        re.sub(r"\(choose from .*\)", "(choose)", text) for text in faults
    ]


def test_dashes_and_underscores_are_the_same() -> None:
    arguments = parser_of("predict").parse_args(
        ["--model_path", "m", "--input=q", "--output", "a", "--max_new_tokens", "3"]
    )
    assert (arguments.model_path, arguments.max_new_tokens) == ("m", 3)
    arguments = parser_of("merge-lora").parse_args(["--lora-path", "a", "--merge-model-path=b"])
    assert (str(arguments.lora_path), str(arguments.merge_model_path)) == ("a", "b")


def test_a_model_of_xtuner_is_asked_with_xtuner_s_template(world: World, tmp_path: Path) -> None:
    directory = tmp_path / "of_xtuner"
    shutil.copytree(world.model, directory, copy_function=os.link)
    path = directory / "processor_config.json"
    values = read_json(path)
    path.unlink()
    write_json(path, {**values, "chat_template": "xtuner_llama3_chat"})
    for name in ("vicuna", "internlm2_chat"):
        assert named_template(name, str(directory)).name == f"xtuner_{name}"
    assert named_template("internlm2_chat", str(world.model)).name == "internlm2_chat"
    assert named_template("vicuna_v1", str(tmp_path / "none")).name == "vicuna_v1"  # loading will say that
    with pytest.raises(UserError, match="XTuner's is xtuner_vicuna"):
        named_template("vicuna", str(world.model))


def test_commands_of_others_are_answered_with_ours(capsys: pytest.CaptureFixture[str]) -> None:
    for name, (program, ours) in FOREIGN_COMMANDS.items():
        assert name not in COMMANDS and set(re.findall(r"^[\w-]+|(?<=, or )[\w-]+", ours)) <= COMMANDS.keys()
        assert front_door([name, "x.yaml"]) == 2
        assert f"'{name}' is not a paddlemix command; {program} {name} is {ours} here" in capsys.readouterr().err
