"""The means to run several processes: they find each other; what is done to one is done to it alone."""

from __future__ import annotations

import time
from pathlib import Path

from tests.parallel.cluster import Circumstances, Cluster
from tests.parallel.curves import gaps, losses_and_weights
from tests.parallel.launched import Launched
from tests.parallel.rank import Hook
from tests.tiny_world import World


def sum_of_ranks(value: int) -> list[float]:
    """Run on every process."""
    import paddle.distributed as dist

    from paddlemix.parallel.collectives import gathered

    dist.init_parallel_env()
    return [float(number) for number in gathered([value + dist.get_rank()])[:, 0]]


def wait_for_ever() -> None:
    """Run on every process."""
    while True:
        time.sleep(60)


def fail(message: str) -> None:
    """A hook."""
    raise ValueError(message)


def test_processes_find_each_other(cluster: Cluster) -> None:
    outcome = cluster.call(3, f"{__name__}:sum_of_ranks", value=5)
    assert outcome.ok, outcome.told()
    assert outcome.results == [[5.0, 6.0, 7.0]] * 3


def test_a_failure_of_one_ends_all(cluster: Cluster) -> None:
    hook = Hook(f"{__name__}:fail", rank=1, values={"message": "spoilt"})
    outcome = cluster.call(2, f"{__name__}:wait_for_ever", Circumstances(hooks=[hook], patience=0.0))
    assert outcome.statuses == [-9, 1]
    assert "spoilt" in outcome.logs[1] and "spoilt" not in outcome.logs[0]


def test_the_launcher_starts_the_same(tmp_path: Path) -> None:
    run = Launched(tmp_path, 2, f"{__name__}:sum_of_ranks", {"value": 5}, Circumstances())
    status, outcome = run.wait()
    assert status == 0, run.output + outcome.told()
    assert outcome.results == [[5.0, 6.0]] * 2


def test_two_processes_learn_what_one_does(cluster: Cluster, world: World, tmp_path: Path) -> None:
    changes = {"adam_epsilon": 1e-4, "max_steps": 3}
    learned = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        recipe = world.recipe(folder, per_device_train_batch_size=4 // ranks, **changes)
        outcome = cluster.run(ranks, "tools.supervised_finetune", recipe)
        assert outcome.ok, outcome.told()
        learned.append(losses_and_weights(folder / "out"))
    apart = gaps(*learned)
    assert max(apart.loss, apart.weight) < 1e-5, apart  # seen: 5e-7 and 1.2e-7
    assert apart.norm < 1e-4, apart  # of 13
