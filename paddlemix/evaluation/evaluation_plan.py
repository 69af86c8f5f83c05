"""What is evaluated: benchmarks, their data, a model or the answers that are there.  Runs no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paddlemix.errors import UserError
from paddlemix.evaluation.benchmarks.benchmark import Benchmark, Request
from paddlemix.evaluation.benchmarks.benchmark_files import find_folder
from paddlemix.evaluation.benchmarks.known_benchmarks import BENCHMARKS
from paddlemix.evaluation.judged import JudgePlan
from paddlemix.evaluation.prepared import Prepared, prepare
from paddlemix.evaluation.scoring.answered import LLAVA

if TYPE_CHECKING:
    from paddlemix.generation.predict_job import PredictJob


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is evaluated.

    Args:
        names: of benchmarks.
        output: folder of the results.
        data_root: one folder for each benchmark, or with one name that benchmark's own.
        predict: the model, settings and share of this process; input, output and images are each benchmark's.  None
            scores answers that are there.
        protocol: whose prompts and rules, "llava" or "lmms-eval".
        limit: the first questions of each benchmark alone.
        max_new_tokens: None for the protocol's.
        custom: the user's own data, where `names` has "custom".
        judge: None leaves judged benchmarks without a score.
    """

    names: tuple[str, ...]
    output: Path
    data_root: Path | None = None
    predict: PredictJob | None = None
    protocol: str = LLAVA
    limit: int | None = None
    max_new_tokens: int | None = None
    custom: Benchmark | None = None
    judge: JudgePlan | None = None

    @property
    def overwrite(self) -> bool:
        """Whether earlier answers are forgotten."""
        return self.predict is not None and self.predict.overwrite

    def prepared(self, name: str) -> Prepared:
        """The data of a benchmark, read.

        Raises:
            MissingFileError, UserError: see `prepare`; or no data is named.
        """
        benchmark = self.custom if self.custom is not None and name == self.custom.name else BENCHMARKS.get(name)
        if benchmark is None:
            raise UserError(f"benchmark '{name}' needs --data, the file of your own questions")
        folder = Path()
        if benchmark is not self.custom:
            if self.data_root is None:
                raise UserError(f"benchmark '{name}' needs --data-root, the folder with its data")
            folder = find_folder(benchmark, self.data_root, len(self.names) == 1)
        return prepare(benchmark, Request(folder=folder, protocol=self.protocol), self.limit, self.output / name)
