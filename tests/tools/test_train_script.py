"""`train.sh`: PaddleMIX's environment variables, and what the launcher makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "paddlemix" / "tools" / "train.sh"
_OF_MACHINES = ("OMPI_", "PADDLE_TRAINER", "PADDLE_NNODES", "NNODES", "NODE_RANK", "MASTER_", "NPROC")


def run_script(folder: Path, *arguments: str, **variables: str) -> str:
    """Its dry run of a script that needs nothing; returns the command of Paddle's launcher."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_OF_MACHINES)}
    (folder / "python").unlink(missing_ok=True)
    (folder / "python").symlink_to(sys.executable)
    (folder / "other.py").touch()
    run = subprocess.run(
        ["sh", str(SCRIPT), *arguments, "--dry-run", "--nproc", "2"],
        cwd=folder,
        env={
            **own,
            "PATH": f"{folder}:{own['PATH']}",
            "script": "other.py",
            "PYTHONPATH": site_packages(),
            **variables,
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stderr.partition("python -m paddle.distributed.launch ")[2].strip()


def site_packages() -> str:
    """The link to the interpreter hides which environment it belongs to."""
    return os.pathsep.join([str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))])


@pytest.mark.parametrize(
    "variables", [{}, {"nnode_set": "1", "OMPI_COMM_WORLD_SIZE": "2"}], ids=["by itself", "one of several runs"]
)
def test_one_machine_has_no_master(tmp_path, variables):
    told = run_script(tmp_path, "a b.json", "x=1", **variables)
    assert told == "--nproc_per_node 2 --log_dir logs/ranks other.py 'a b.json' x=1"


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1", "offset": "1", "master": "10.0.0.1"},
        {"nnode_set": "3", "offset": "2", "master": "10.0.0.1"},
        {
            "PADDLE_TRAINERS_NUM": "3",
            "PADDLE_TRAINER_ID": "2",
            "master": "10.0.0.1",
            "OMPI_COMM_WORLD_SIZE": "8",
            "nnode_set": "5",
            "PADDLE_TRAINER_ENDPOINTS": "a:1,b:2",
        },
    ],
    ids=["mpi", "by hand", "platform"],
)
def test_several_machines_meet_at_paddlemix_s_port(tmp_path, variables):
    told = run_script(tmp_path, "run.json", **variables)
    assert told.startswith("--nnodes 3 --master 10.0.0.1:36677 --rank 2 --nproc_per_node 2 ")


def test_the_script_s_own_command_is_fine_tuning():
    assert "${script:-$here/supervised_finetune.py}" in SCRIPT.read_text()
    assert "CUDA_VISIBLE_DEVICES=" not in SCRIPT.read_text()
