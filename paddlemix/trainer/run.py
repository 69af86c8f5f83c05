"""What the stages of a run pass on: what was loaded and read, and what our Trainer is built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from paddlemix.checkpoints.files.joint_writing import DirectoryFiles
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.config.schema import RunConfig
from paddlemix.datasets.batches import LoadingSettings, RowDataset
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.parallel.layout import Layout
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.trainer.answers.prompts import Prompt
from paddlemix.trainer.batches.vision_cache import VisionCache
from paddlemix.trainer.callbacks.stopping import StopOnSignal
from paddlemix.trainer.paddlenlp_trainer import TrainingArguments
from paddlemix.trainer.reports.skipped import SkipLog
from paddlemix.trainer.resuming.input_identity import InputIdentity
from paddlemix.trainer.run_data import TrainingRows

# A result's files, of the processes of a layout, all of which call it.  The path is where they will be when all are
# written.
ModelFiles = Callable[[Path, Layout], DirectoryFiles]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run before its first step.

    Args:
        device: as paddle names it.
        arguments, layout: PaddleNLP's view of the run, and which process this is; see `begin_processes`.
        loaded: the model, its adapter's layers among it, with what trains marked.
        processor: of the model and the data.
        result_files: of the model or the adapter.
        train, evaluation: the data; None where nothing is trained or evaluated.
        prompts: asked every `sample_steps`.
        inputs: what the run reads; None on processes that save no checkpoint.
        stop: whether a signal has come.
    """

    config: RunConfig
    device: str
    arguments: TrainingArguments
    layout: Layout
    loaded: Pretrained
    processor: LlavaProcessor
    result_files: ModelFiles
    train: TrainingRows | None
    evaluation: SampleDataset | None
    prompts: list[Prompt] = field(default_factory=list)
    inputs: InputIdentity | None = None
    # Made with the run, because the recipe asks it after the Trainer has ended.
    stop: StopOnSignal = field(default_factory=StopOnSignal)

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(str(self.config.output_dir))


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data as the Trainer reads it.

    Args:
        train, evaluation: rows by index; None where nothing is trained or evaluated.
        loading, evaluation_loading: how batches are made of them.
        skips: records the training samples that are left out; None where nothing is trained.
        vision_cache: replaces pixels by the frozen tower's features; None runs the tower.
    """

    train: TrainingRows | None
    evaluation: RowDataset | None
    loading: LoadingSettings
    evaluation_loading: LoadingSettings
    skips: SkipLog | None = None
    vision_cache: VisionCache | None = None
