"""The launcher's command line: what is checked before any process starts, and what it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paddlemix.launch.launcher import Job
from paddlemix.tools import launch as command
from paddlemix.tools.common.command import run_command
from tests.conftest import ROOT

VARIABLES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "PADDLE_TRAINER_ID")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What would have been started."""
    found: list[Job] = []
    monkeypatch.setattr(command, "launch", lambda job, environment: found.append(job) or 0)
    monkeypatch.setattr("paddlemix.launch.cards.expected_kind", lambda: "cpu")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return found


def recipe(folder: Path, **values: Any) -> str:
    path = folder / "run.json"
    run = {"model_name_or_path": "model", "output_dir": str(folder / "out"), "do_train": True}
    path.write_text(json.dumps({**run, "dataset": {"train": [{"data_files": "train.json"}]}, **values}))
    return str(path)


def test_fine_tuning_is_started_unless_another_command_is_named(jobs, tmp_path):
    config = recipe(tmp_path)
    assert run_command(command.main, [config, "--nproc", "2", "lora=true"]) == 0
    assert run_command(command.main, ["pretrain", config]) == 0
    assert (
        run_command(
            command.main, [str(ROOT / "paddlemix" / "tools" / "predict.py"), *predict_flags(tmp_path), "--nproc", "3"]
        )
        == 0
    )
    scripts = [job.script.relative_to(ROOT / "paddlemix").as_posix() for job in jobs]
    assert scripts == ["tools/supervised_finetune.py", "examples/llava/pretrain.py", "tools/predict.py"]
    assert [job.cards.processes for job in jobs] == [2, 1, 3]
    assert jobs[0].arguments == [config, "lora=true"]
    assert jobs[0].log_dir == tmp_path / "out" / "logs" / "ranks"
    assert jobs[2].log_dir == tmp_path / "answers.jsonl.logs"
    assert all(job.reports_begin for job in jobs)


def predict_flags(folder: Path) -> list[str]:
    return ["--model-path", "m", "--input", "q.jsonl", "--output", str(folder / "answers.jsonl")]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["lora_rnak=3", "learning_rate=fast"], ["'lora_rank'", "learning_rate"]),
        (["--nproc", "many"], ["--nproc=many is not a whole number"]),
        (["device=gpu:1"], ["names one card", "--devices 1"]),
        (
            ["--nproc", "3", "sharding=stage1", "sharding_parallel_degree=2"],
            ["degree 2 does not divide the 3 processes"],
        ),
        (["--devices", "0,1"], ["this run computes on CPU; write --nproc"]),
    ],
)
def test_what_is_wrong_is_one_error_before_anything_starts(jobs, tmp_path, capsys, words, parts):
    assert run_command(command.main, [recipe(tmp_path), *words]) == 2
    told = capsys.readouterr().err
    assert all(part in told for part in parts), told
    assert not jobs and [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_predict_s_flags_are_checked_too(jobs, tmp_path, capsys):
    assert run_command(command.main, ["predict", *predict_flags(tmp_path), "--bach-size", "3"]) == 2
    assert "--batch-size" in capsys.readouterr().err and not jobs


def test_a_script_that_does_not_exist(jobs, capsys):
    assert run_command(command.main, ["nothing.py"]) == 2
    assert "'nothing.py' does not exist" in capsys.readouterr().err


def test_a_script_of_the_user_s_says_nothing_about_its_work(jobs, tmp_path):
    (tmp_path / "own.py").touch()
    assert run_command(command.main, [str(tmp_path / "own.py"), "--nproc", "2"]) == 0
    assert not jobs[0].reports_begin


def test_a_dry_run_is_the_command_s_own_with_the_number_of_processes(jobs, tmp_path, capsys, monkeypatch):
    replaced: list[list[str]] = []
    monkeypatch.setattr(command.os, "execv", lambda program, words: replaced.append(words))
    config = recipe(tmp_path)
    options = ["--nproc", "2", "--nnodes", "3", "--master", "10.0.0.1:99"]
    run_command(command.main, [config, *options, "--dry-run", "bf16=false"])
    assert replaced[0][2:] == [config, "bf16=false", "--dry-run", "--devices", "6"]
    told = capsys.readouterr().err
    assert "python -m paddle.distributed.launch --nnodes 3 --master 10.0.0.1:99 --nproc_per_node 2" in told
    assert not jobs


@pytest.mark.parametrize(
    "options", [["--nproc", "8", "device=gpu", "sharding=stage3"], ["--devices", "0,1,2,3,4,5,6,7"]]
)
def test_a_dry_run_estimates_cards_that_this_machine_does_not_have(jobs, tmp_path, monkeypatch, options):
    replaced: list[list[str]] = []
    monkeypatch.setattr(command.os, "execv", lambda program, words: replaced.append(words))
    run_command(command.main, [recipe(tmp_path), "--dry-run", *options])
    assert replaced[0][-3:] == ["--dry-run", "--devices", "8"]


def test_a_dry_run_of_one_card_s_number_is_refused(jobs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.os, "execv", lambda program, words: pytest.fail("an estimate of one device"))
    assert run_command(command.main, [recipe(tmp_path), "--dry-run", "--devices", "8"]) == 2
    assert "write --nproc 8" in capsys.readouterr().err


def test_a_platform_s_number_of_the_machine_does_not_silence_it(jobs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    options = ["--nnodes", "2", "--master", "10.0.0.1:99"]
    assert run_command(command.main, [recipe(tmp_path), *options]) == 0
    assert jobs[0].options.node == 1
    assert "paddle.distributed.launch" in capsys.readouterr().err
    assert "PADDLE_TRAINER_ID" not in os.environ


def test_nothing_of_paddle_is_loaded_to_launch():
    code = (
        "import sys, paddlemix.tools.launch; print([name for name in ('paddle', 'paddlenlp') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout == "[]\n"


def test_a_chat_has_as_many_processes_as_its_model_and_the_terminal(jobs, capsys):
    assert run_command(command.main, ["chat", "--model-path", "m", "--tensor-parallel", "2"]) == 0
    assert run_command(command.main, ["chat", "--model-path", "m"]) == 0
    assert [job.cards.processes for job in jobs] == [2, 1] and all(job.has_terminal for job in jobs)
    assert capsys.readouterr().err == ""  # nothing about another launcher among what is said
    assert run_command(command.main, ["chat", "--model-path", "m", "--tensor-parallel", "2", "--nproc", "3"]) == 2
    assert "needs 2 processes, and 3 are started" in capsys.readouterr().err


def test_predict_has_a_share_for_each_model(jobs, tmp_path, capsys):
    flags = ["predict", *predict_flags(tmp_path), "--tensor-parallel", "2"]
    assert run_command(command.main, flags) == 0
    assert run_command(command.main, [*flags, "--nproc", "4"]) == 0
    assert run_command(command.main, [*flags, "--num-chunks", "2", "--chunk-idx", "0"]) == 0
    assert [job.cards.processes for job in jobs] == [2, 4, 2] and not any(job.has_terminal for job in jobs)
    assert run_command(command.main, [*flags, "--nproc", "3"]) == 2
    assert "does not divide the 3 processes" in capsys.readouterr().err
