"""The launcher's flags and variables."""

from __future__ import annotations

import pytest

from paddlemix.errors import UserError
from paddlemix.launch.options import LaunchOptions, take_options


def test_flags_are_separated_from_the_command_s_own():
    argv = ["run.json", "--devices", "0, 1", "lora_rank=8", "--max-restart=2", "--log_dir", "logs", "--lora", "true"]
    options, rest = take_options(argv, {})
    assert rest == ["run.json", "lora_rank=8", "--lora", "true"]
    assert options.devices == ("0", "1") and options.restarts == 2 and str(options.log_dir) == "logs"
    assert (options.nodes, options.master, options.node, options.processes) == (1, None, None, None)


@pytest.mark.parametrize("flag", ["--gpus", "--npus", "--xpus", "--devices"])
def test_a_list_of_cards_may_have_the_kind_as_its_flag(flag):
    assert take_options([flag, "2,3"], {})[0].devices == ("2", "3")


def test_a_dry_run_is_a_flag_of_both():
    assert take_options(["--dry-run", "run.json"], {}) == (LaunchOptions(is_dry=True), ["run.json"])


@pytest.mark.parametrize(
    "environment",
    [
        {"PADDLE_NNODES": "2", "PADDLE_MASTER": "10.0.0.1:29500", "PADDLE_RANK": "1", "PADDLE_NPROC_PER_NODE": "4"},
        {"NNODES": "2", "MASTER_ADDR": "10.0.0.1", "NODE_RANK": "1", "NPROC_PER_NODE": "4"},
        {
            "SLURM_STEP_NUM_NODES": "2",
            "SLURM_NODEID": "1",
            "MASTER_ADDR": "10.0.0.1",
            "MASTER_PORT": "29500",
            "NPROC_PER_NODE": "4",
        },
    ],
)
def test_variables_of_others_stand_in_for_flags(environment):
    options, _ = take_options([], environment)
    assert (options.nodes, options.node, options.processes) == (2, 1, 4)
    assert options.master == ("10.0.0.1", 29500)


def test_flags_win_over_variables():
    environment = {
        "NNODES": "4",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "1",
        "NODE_RANK": "3",
        "PADDLE_DEVICES": "7",
        "NPROC_PER_NODE": "8",
    }
    argv = ["--nnodes", "2", "--master", "10.0.0.2:99", "--rank", "1", "--devices", "0"]
    options, _ = take_options(argv, environment)
    assert (options.nodes, options.master, options.node, options.devices) == (2, ("10.0.0.2", 99), 1, ("0",))


SRUN = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("argv", "environment", "words"),
    [
        ([], SRUN, "srun has started this command 2 times (SLURM_STEP_NUM_TASKS=2)"),
        ([], SRUN | {"SLURM_STEP_NUM_NODES": "1", "MASTER_ADDR": "a"}, "srun has started this command 2 times"),
        ([], {"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started this command 2 times"),
        (["--master", "a:1"], {"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started this command 2 times"),
    ],
)
def test_launchers_that_do_not_know_of_each_other_are_refused(argv, environment, words):
    with pytest.raises(UserError, match="--nnodes N --master IP:PORT, for several runs give --nnodes 1") as error:
        take_options(argv, environment)
    assert words in str(error.value)


def test_launchers_that_are_told_how_many_machines_there_are_may_be_started_by_any_program():
    assert take_options(["--master", "a:1"], SRUN)[0].nodes == 2
    assert take_options(["--nnodes", "1"], SRUN)[0].nodes == 1  # a run on each
    assert take_options([], {"OMPI_COMM_WORLD_SIZE": "2", "NNODES": "2", "MASTER_ADDR": "a"})[0].nodes == 2
    # One task of an allocation of several nodes.
    assert take_options([], SRUN | {"SLURM_STEP_NUM_TASKS": "1"})[0].nodes == 1


def test_both_forms_of_a_master_may_say_the_same():
    both = {"NNODES": "2", "PADDLE_MASTER": "10.0.0.1:99", "MASTER_ADDR": "10.0.0.1"}
    for environment in (both, both | {"MASTER_PORT": "99"}):
        assert take_options([], environment)[0].master == ("10.0.0.1", 99)
    # A flag leaves the environment's aside, and one machine meets nobody.
    assert take_options(["--master", "a:1"], both)[0].master == ("a", 1)
    assert take_options([], both | {"NNODES": "1", "MASTER_ADDR": "localhost"})[0].master is None


def test_one_machine_needs_no_master_and_heeds_no_number():
    # A script of several machines that is run on one exports all of them.
    options, _ = take_options([], {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "3"})
    assert (options.nodes, options.master, options.node) == (1, None, None)
    # Without a master SLURM's numbers say nothing: the user may use one machine of several.
    assert take_options([], {"SLURM_STEP_NUM_NODES": "8", "SLURM_NODEID": "3"})[0].nodes == 1


@pytest.mark.parametrize(
    ("argv", "environment", "parts"),
    [
        (["--nnodes", "2"], {}, ["--nnodes=2 needs --master IP:PORT"]),
        (["--nnodes", "2:4", "--master", "a:1"], {}, ["--nnodes=2:4 is a range"]),
        (["--nnodes", "2", "--master", "10.0.0.1"], {}, ["--master=10.0.0.1 has no port"]),
        (["--nnodes", "2", "--master", "a:1", "--rank", "2"], {}, ["--rank=2 is not a whole number of 0 to 1"]),
        (["--master", "etcd://a:1"], {}, ["etcd", "give IP:PORT"]),
        (["--devices", "0,1", "--nproc", "3"], {}, ["--devices names 2 cards and --nproc 3 processes"]),
        (["--devices", "0,0"], {}, ["names a card twice"]),
        (["--devices", "0,,1"], {}, ["is not a list of cards"]),
        (["--devices"], {}, ["--devices needs a value"]),
        (["--nproc", "0", "--max-restart", "x"], {}, ["--nproc=0 is not", "--max-restart=x is not"]),
        ([], {"NNODES": "2", "PADDLE_NNODES": "4", "PADDLE_MASTER": "a:1"}, ["PADDLE_NNODES=4 and NNODES=2 differ"]),
        (
            [],
            {"NNODES": "2", "MASTER_ADDR": "1.2.3.4", "PADDLE_MASTER": "127.0.0.1:29731"},
            ["PADDLE_MASTER=127.0.0.1:29731 and MASTER_ADDR=1.2.3.4 differ"],
        ),
        (
            ["--nnodes", "2", "--master", "127.0.0.1:29732", "--master-addr", "10.0.0.9", "--master-port", "5"],
            {},
            ["--master=127.0.0.1:29732 and --master-addr=10.0.0.9 differ", "and --master-port=5 differ"],
        ),
        (["--nnodes", "2"], {"PADDLE_MASTER": "a:1", "MASTER_PORT": "2"}, ["PADDLE_MASTER=a:1 and MASTER_PORT=2"]),
    ],
)
def test_wrong_options_are_named_with_what_is_allowed(argv, environment, parts):
    with pytest.raises(UserError) as error:
        take_options(argv, environment)
    assert all(part in str(error.value) for part in parts), str(error.value)
