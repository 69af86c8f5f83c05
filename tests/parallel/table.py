"""The trainings that every layout of processes must repeat, and how they are run once each.

All have four samples in an optimiser step, so that a case has the same samples in every layout:

    table = Table(cluster, world, folder)
    check_equal(table.trained("full"), table.trained("full", Layout(2, "stage1")))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.npu.cases import LORA_WITHOUT_DROPOUT
from tests.parallel.cluster import Cluster, Where
from tests.parallel.curves import Learned, gaps, losses_and_weights
from tests.parallel.rank import Hook
from tests.tiny import PINPOINTS
from tests.tiny_world import World
from tests.training_cases import build_start

SAMPLES = 4  # of an optimiser step
MAX_GAP = 1e-5  # of losses and weights; seen are 1e-6 and 2e-7
SLICED = 64  # numbers; larger weights are sliced by stage3, so most of the tiny model's
# With Adam's own epsilon the last bit of a gradient near zero decides the sign of a whole update.
_ALL = {"adam_epsilon": 1e-4, "max_steps": 3, "per_device_train_batch_size": 2}
_BF16 = {"bf16": True, "fp16_opt_level": "O2", "amp_master_grad": True}
_SAVINGS = {"per_device_train_batch_size": 1, "recompute": True, "cache_vision_features": True}

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {**LORA_WITHOUT_DROPOUT, "learning_rate": 0.02},
    "lora at a usual rate": LORA_WITHOUT_DROPOUT,
    "kept features in bfloat16": {"dtype": "bfloat16", "cache_vision_features": True},
    "random lora": {**LORA_WITHOUT_DROPOUT, "lora_dropout": 0.2, "neftune": True},
    "packed": {"mixtoken": True, "per_device_train_batch_size": 1, "max_length": 180},
    "packed, all kinds of savings": {"mixtoken": True, "max_length": 180, **_SAVINGS},
    "modality": {"group_by_modality_length": True},  # of data with whole steps of texts
    "texts": {},
    "qlora": {**LORA_WITHOUT_DROPOUT, "quantize_base": "nf4"},
    "recompute": {"recompute": True},
    "accumulation": {"per_device_train_batch_size": 1, "sharding_parallel_degree": 2},  # of no sharding: no effect
    "tower of 1.6": {"vision_tower": "full", "per_device_train_batch_size": 1},
    "evaluation": {"evaluation_strategy": "steps", "eval_steps": 2},  # five samples, in batches of two
    "bf16": _BF16,
    "bf16 plain": {**_BF16, "use_flash_attention": False},  # without paddle's fused operators
    "bf16 plain lora": {**_BF16, **LORA_WITHOUT_DROPOUT, "use_flash_attention": False},
    "bf16 lora": {**_BF16, **LORA_WITHOUT_DROPOUT},
}


@dataclass(frozen=True)
class Layout:
    """How many processes share what.

    Args:
        ranks: processes.
        sharding: as in a recipe; "" for data parallel alone.
        where: see `tests.parallel.cluster.Circumstances`.
        tensor: processes that compute one model together.
    """

    ranks: int = 1
    sharding: str = ""
    where: Where = "cpu"
    tensor: int = 1

    def __str__(self) -> str:
        return f"{self.ranks} {self.where} {self.sharding or 'dp'} tp {self.tensor}"


ALONE = Layout()


@dataclass(frozen=True)
class Trained:
    """A training that has ended well.

    Args:
        learned: losses, norms, weights.
        evaluations: step -> loss and accuracy.
        collectives: of each rank, see `tests.parallel.cluster.Outcome`.
        logs: of each rank.
    """

    learned: Learned
    evaluations: dict[int, list[float]]
    collectives: list[dict[str, list[int]]]
    logs: list[str]


@dataclass
class Table:
    """Runs cases in layouts, each once.

    Args:
        cluster: runs them.
        world: what they start from.
        folder: for their results, empty.
    """

    cluster: Cluster
    world: World
    folder: Path
    _done: dict[tuple[str, Layout], Trained] = field(default_factory=dict)

    def trained(self, case: str, layout: Layout = ALONE) -> Trained:
        """The training of a case in a layout.

        Raises:
            AssertionError: it has failed, with the ends of its logs.
        """
        if (case, layout) not in self._done:
            self._done[case, layout] = self._train(case, layout)
        return self._done[case, layout]

    def _train(self, case: str, layout: Layout) -> Trained:
        folder = self.folder / f"{case} {layout}"
        values = {**_ALL, **CASES[case], **self._data(case)}
        values |= {"device": "cpu" if layout.where == "cpu" else "npu", "sharding": layout.sharding}
        values |= self._shares(values["per_device_train_batch_size"], layout.ranks // layout.tensor)
        values |= {"tensor_parallel_degree": layout.tensor} if layout.tensor > 1 else {}
        recipe = self.world.recipe(folder, **values)
        hook = Hook("tests.parallel.hooks:slice_weights", values={"largest": SLICED})
        hooks = [hook] if layout.sharding == "stage3" else []
        outcome = self.cluster.run(
            layout.ranks, "tools.supervised_finetune", recipe, where=layout.where, hooks=hooks, limit=300
        )
        assert outcome.ok, f"{case}, {layout}\n{outcome.told()}"
        out = folder / "out"
        return Trained(losses_and_weights(out), _evaluations(out), outcome.collectives, outcome.logs)

    @staticmethod
    def _shares(batch_size: int, replicas: int) -> dict[str, int]:
        """The same four samples of a step over more or fewer processes."""
        size = min(batch_size, SAMPLES // replicas)
        return {"per_device_train_batch_size": size, "gradient_accumulation_steps": SAMPLES // (size * replicas)}

    def _data(self, case: str) -> dict[str, Any]:
        if case in ("modality", "texts"):
            return {"dataset": {"train": [{"data_files": str(self._texts(with_pictures=case == "modality"))}]}}
        return self._start_of_1_6() if case == "tower of 1.6" else {}

    def _texts(self, with_pictures: bool) -> Path:
        """The world's texts without a picture, several times; its other records once where asked for."""
        path = self.folder / f"texts-{with_pictures}.json"
        if not path.exists():
            records = json.loads((self.world.data / "train.json").read_text(encoding="utf-8"))
            texts = [record for record in records if "image" not in record]
            others = [record for record in records if "image" in record]
            path.write_text(json.dumps([*(texts * 3), *(others if with_pictures else [])]), encoding="utf-8")
        return path

    def _start_of_1_6(self) -> dict[str, Any]:
        start = self.folder / "start of 1.6"
        if not start.exists():
            start.mkdir()
            build_start(start, any_resolution=True)
        return {
            "model_name_or_path": str(start / "hf"),
            "dataset": {"train": [{"data_files": str(start / "train.json")}]},
            "image_root": str(start),
            "chat_template": "vicuna_v1",
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": [list(grid) for grid in PINPOINTS],
        }


def _evaluations(out: Path) -> dict[int, list[float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found: Mapping[int, list[float]] = {
        line["step"]: [line["eval_loss"], line["eval_token_accuracy"]] for line in lines if "eval_loss" in line
    }
    return dict(found)


def check_equal(one: Trained, other: Trained) -> None:
    """Two trainings learned the same: losses, norms, weights and evaluations."""
    apart = gaps(one.learned, other.learned)
    assert max(apart.loss, apart.weight) < MAX_GAP, apart
    assert apart.norm < 1e-5 * max(one.learned.norms.values()) + 1e-5, apart
    assert one.evaluations.keys() == other.evaluations.keys()
    for step, values in one.evaluations.items():
        pairs = zip(values, other.evaluations[step], strict=True)
        assert max(abs(mine - its) for mine, its in pairs) < MAX_GAP, (step, values, other.evaluations[step])
