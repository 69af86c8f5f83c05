"""`--tensor-parallel`: which processes it needs, and who starts them."""

from __future__ import annotations

import pytest

from paddlemix.errors import UserError
from paddlemix.parallel.layout import ALONE
from paddlemix.parallel.messages import Channel
from paddlemix.tools import predict
from paddlemix.tools.common import tensor_parallel
from paddlemix.tools.common.chat_arguments import build_chat_parser
from paddlemix.tools.common.command import run_command
from paddlemix.tools.common.tensor_parallel import (
    AnsweringGroup,
    check_processes,
    start_processes,
    starts_processes,
)
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("processes", "degree", "is_one_group", "parts"),
    [
        (3, 2, True, ["chat with --tensor-parallel 2 needs 2 processes", "3 are started"]),
        (1, 2, True, ["needs 2 processes, and 1 is started"]),
        (2, 1, True, ["2 processes needs --tensor-parallel 2", "for one process leave --nproc"]),
        (3, 2, False, ["--tensor-parallel 2 does not divide the 3 processes", "start 2, 4, 6"]),
    ],
)
def test_a_wrong_number_of_processes_is_one_error(processes, degree, is_one_group, parts):
    with pytest.raises(UserError) as error:
        check_processes("chat", processes, degree, is_one_group)
    assert all(part in str(error.value) for part in parts), error.value


def test_right_numbers():
    check_processes("chat", 2, 2, True)
    check_processes("predict", 4, 2, False)
    check_processes("predict", 3, 1, False)


def test_who_starts_the_processes():
    assert starts_processes(2, {})
    assert starts_processes(2, {"PADDLE_TRAINERS_NUM": "1"})  # as platforms leave it
    assert not starts_processes(1, {}) and not starts_processes(2, {"PADDLE_TRAINERS_NUM": "2"})


def test_a_command_alone_becomes_the_launcher(monkeypatch, tmp_path):
    replaced: list[list[str]] = []
    monkeypatch.setattr(tensor_parallel.os, "execv", lambda program, words: replaced.append(words))
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    start_processes("chat", ["--model-path", "m"], 2)
    arguments = ["--model-path", "m", "--input", "q", "--output", str(tmp_path / "a"), "--tensor-parallel", "4"]
    run_command(predict.main, arguments)
    script = str(ROOT / "paddlemix" / "tools" / "launch.py")
    assert replaced[0][1:] == [script, "chat", "--model-path", "m", "--nproc", "2"]
    assert replaced[1][1:] == [script, "predict", *arguments, "--nproc", "4"]


@pytest.mark.parametrize("text", ["0", "-1", "two", "5000"])
def test_a_degree_is_a_whole_number(text):
    with pytest.raises(UserError, match="is not a whole number of 1 to 1024"):
        build_chat_parser().parse_args(["--model-path", "m", "--tensor-parallel", text])


def test_memory_that_runs_out_in_another_process_is_advice(monkeypatch):
    def follow(channel, load):
        raise RuntimeError("ResourceExhaustedError: Out of memory error on GPU 1")

    monkeypatch.setattr("paddlemix.generation.following.follow", follow)
    group = AnsweringGroup(ALONE, Channel([]))
    with pytest.raises(UserError, match="memory ran out while answering .*cheapest first: --load-4bit"):
        group.follow(lambda layout: None, "answering", ["--load-4bit"])
