"""The variables of a worker, against those of Paddle's launcher."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from paddlemix.errors import MissingFileError, OtherProcessError, UserError
from paddlemix.launch import worker
from paddlemix.launch.cards import Cards
from paddlemix.launch.worker import begin_worker, report_failure
from paddlemix.launch.worker_environment import Places, WorkerPlace, free_ports, worker_environment
from tests.conftest import ROOT

PLACES = Places("10.0.0.1:50", [["10.0.0.1:51", "10.0.0.1:52"], ["10.0.0.2:61", "10.0.0.2:62"]])


def environment(kind="gpu", given=None):
    cards = Cards(kind, ("4", "5"), ("0", "1"), 2) if kind != "cpu" else Cards(kind, (), (), 2)
    return worker_environment(WorkerPlace(PLACES, 1, 1), cards, given or {}, "failure.json", restart=2)


def test_a_worker_knows_its_place_and_its_card():
    found = environment()
    assert found["PADDLE_TRAINER_ID"] == found["PADDLE_GLOBAL_RANK"] == "3"
    assert found["PADDLE_TRAINERS_NUM"] == found["PADDLE_GLOBAL_SIZE"] == "4"
    assert found["PADDLE_TRAINER_ENDPOINTS"] == "10.0.0.1:51,10.0.0.1:52,10.0.0.2:61,10.0.0.2:62"
    assert found["PADDLE_CURRENT_ENDPOINT"] == "10.0.0.2:62" and found["PADDLE_MASTER"] == "10.0.0.1:50"
    assert found["FLAGS_selected_gpus"] == "1" and found["PADDLE_NNODES"] == found["PADDLE_LOCAL_SIZE"] == "2"
    assert found["PADDLEMIX_RESTART"] == "2"


def test_each_kind_of_device_has_its_way_to_talk():
    assert environment("cpu")["PADDLE_DISTRI_BACKEND"] == "gloo"
    npu = environment("npu")
    assert (npu["PADDLE_DISTRI_BACKEND"], npu["PADDLE_XCCL_BACKEND"], npu["FLAGS_selected_npus"]) == (
        "xccl",
        "npu",
        "1",
    )
    assert "PADDLE_DISTRI_BACKEND" not in environment("gpu")


def test_what_another_launcher_left_is_not_taken_for_the_worker_s_own():
    left = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "FLAGS_selected_npus": "7", "PADDLE_TRAINERS": "b"}
    kept = {"PADDLE_PG_TIMEOUT": "5", "https_proxy": "http://proxy:1", "OMP_NUM_THREADS": "3"}
    found = environment("cpu", left | kept)
    assert not set(left) & set(found) and found.items() >= kept.items()


def test_all_variables_of_paddle_s_launcher_are_set():
    package = importlib.util.find_spec("paddle").submodule_search_locations[0]
    source = Path(package, "distributed/launch/controllers/collective.py").read_text()
    function = source.partition("def _build_pod_with_master")[2].partition("\nclass ")[0]
    theirs = set(re.findall(r"[\"'](PADDLE_\w+)[\"']", function))
    assert "PADDLE_TRAINER_ENDPOINTS" in theirs
    # Of Paddle's own search for a layout.
    assert theirs - {"PADDLE_AUTO_PARALLEL_CONFIG", "PADDLE_AUTO_PARALLEL_STAGE"} <= set(environment("cpu"))


def test_free_ports_are_different_and_within_the_range():
    assert len(set(free_ports(20, {}))) == 20
    with socket.socket() as taken:
        taken.bind(("", 0))
        first = taken.getsockname()[1]
        with pytest.raises(UserError, match="0 free ports, and 1 are needed"):
            free_ports(1, {"PORT_RANGE": f"{first}:{first}"})
    with pytest.raises(UserError, match="PORT_RANGE=abc is not a range"):
        free_ports(1, {"PORT_RANGE": "abc"})


def test_without_a_launcher_nothing_changes(monkeypatch):
    monkeypatch.delenv("PADDLEMIX_LAUNCHER", raising=False)
    streams = sys.stdout, sys.stderr
    begin_worker()
    report_failure(ValueError("x"))
    assert (sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize(
    ("error", "is_users"), [(MissingFileError("x"), True), (OtherProcessError("x"), True), (OSError("x"), False)]
)
def test_a_worker_says_whether_the_user_caused_its_error(tmp_path, monkeypatch, error, is_users):
    """Of whichever class it is: the same command would meet it again."""
    monkeypatch.setattr(worker, "_failure_file", str(tmp_path / "why"))
    report_failure(error)
    assert json.loads((tmp_path / "why").read_text())["is_users"] is is_users


def test_a_worker_whose_terminal_is_gone_goes_on(tmp_path):
    code = (
        "import sys; from paddlemix.launch.worker import begin_worker; begin_worker(); sys.stdin.read();"
        "print('lost'); sys.stderr.write('lost'); open('saved', 'w').close()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PADDLEMIX_LAUNCHER": str(os.getpid())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        process.stderr.close()
        process.stdin.close()
        assert process.wait() == 0
    assert (tmp_path / "saved").exists()
