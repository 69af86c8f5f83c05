"""Our Trainer: PaddleNLP's loop with parts of our own.  At each it is said what PaddleNLP's version does wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import paddle

from paddlemix.config.schema import RunConfig
from paddlemix.datasets.batches import RowDataset
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.trainer.answers.answering import AnswerScores
from paddlemix.trainer.batches.dataloader import BatchLoader, Inputs, model_inputs
from paddlemix.trainer.callbacks.meters import Meters, StepReport
from paddlemix.trainer.evaluator import EvaluationShare, Evaluator, Scores
from paddlemix.trainer.loss import LossModel
from paddlemix.trainer.optim import build_optimizer, build_schedule, set_learning_rates
from paddlemix.trainer.paddlenlp_trainer import TrainingArguments
from paddlemix.trainer.processes import SharingTrainer
from paddlemix.trainer.resuming.best_checkpoint import best_metric
from paddlemix.trainer.resuming.checkpoint_folders import completed_steps
from paddlemix.trainer.resuming.input_identity import InputIdentity
from paddlemix.trainer.resuming.restoring import load_best, load_finished, load_training_state
from paddlemix.trainer.resuming.saving import broken_by_a_step, save_checkpoint
from paddlemix.trainer.run import ModelFiles, RunData
from paddlemix.trainer.run_data import batch_sampler
from paddlemix.trainer.steps.clipping import MeasuredNorm
from paddlemix.trainer.steps.exchange import EvaluationStopped, StepExchange
from paddlemix.trainer.steps.loss_scale import StepScaler
from paddlemix.trainer.steps.step_losses import StepLosses, broken_weight


class LlavaTrainer(SharingTrainer):
    """Trains a LossModel.

    Args:
        model: the model and its loss; parameters that do not train have `stop_gradient` set.
        config: the run.
        arguments: PaddleNLP's view of the same run.
        data: training and evaluation set.
        model_files: of the model's or adapter's own files.
        callbacks: PaddleNLP callbacks.
    """

    lr_scheduler: Any
    optimizer: Any
    scaler: Any
    control: Any

    def __init__(
        self,
        model: LossModel,
        config: RunConfig,
        arguments: TrainingArguments,
        data: RunData,
        model_files: ModelFiles,
        callbacks: list[Any],
    ) -> None:
        self.config, self.loading, self.model_files = config, data.loading, model_files
        self.rows, self.skips, self.vision_cache = data.train, data.skips, data.vision_cache
        self.own_checkpoints: list[str] = []  # names of those that this run wrote, also before it was resumed
        self._loader: BatchLoader | None = None
        self.exchange = StepExchange(lambda: self.layout, self.get_train_dataloader, self.skips)
        self._step_losses = StepLosses(self._why_not_finite, self.exchange)
        self._step_tokens = 0  # supervised ones of the step, of all processes
        self._clip: MeasuredNorm | None = None
        self._evaluator = Evaluator(self._score, data.evaluation_loading, self.exchange.between_batches)
        meters = Meters(
            tokens_seen=lambda: self.exchange.tokens_seen,
            positions=lambda: self.exchange.counts,
            take_norm=lambda: None if self._clip is None else self._clip.take(),
        )
        self.report = StepReport(meters, arguments.device)
        self.answer_scores: AnswerScores | None = None  # set where evaluations let the model answer
        self.input_identity: InputIdentity | None = None  # set where checkpoints say what the run reads
        self.evaluation_due = False  # a signal has broken it off: the run that resumes makes it first
        self.evaluations: list[float] = []  # of the metric that decides which checkpoint is best, oldest first
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=data.train.rows if data.train else None,
            eval_dataset=data.evaluation,
            data_collator=list,  # batches are collated by the loader
            callbacks=callbacks,
        )
        self.exchange.guard(self.callback_handler)

    # ---- data ----

    def get_train_dataloader(self) -> BatchLoader:
        """PaddleNLP's shuffles by global random state and reads all earlier batches again to resume."""
        if self._loader is None:
            assert self.rows is not None
            sampler = batch_sampler(self.config, self.rows, self.args.dataset_rank, self.args.dataset_world_size)
            others = self.exchange if self.layout.several else None
            self._loader = BatchLoader(self.rows.rows, sampler, self.loading, others)
        return self._loader

    # ---- one step ----

    def create_scheduler(self, num_training_steps: int) -> paddle.optimizer.lr.LRScheduler:
        """PaddleNLP's rounds the warm-up down and has no floor."""
        if self.lr_scheduler is None:
            self.lr_scheduler = build_schedule(self.config, num_training_steps)
        return self.lr_scheduler

    def create_optimizer(self, lr_scheduler: Any = None) -> paddle.optimizer.Optimizer:
        """PaddleNLP's has one rate for all parts."""
        if self.optimizer is None:
            model, schedule = self.model.model, lr_scheduler or self.lr_scheduler
            set_learning_rates(model, self.config)
            self.optimizer = build_optimizer(self.model.model, self.config, schedule, self.layout, self._step_losses)
            self._clip = self.optimizer._grad_clip
            if self.layout.several:
                self.exchange.watch.look_at(model)
            if self.do_grad_scaling:
                self.scaler.clip = self._clip
        return self.optimizer

    def _wrap_amp_model(self, args: Any, model: Any) -> None:
        """PaddleNLP's, with one loss scaler for every layout, that reads from the device once per step."""
        super()._wrap_amp_model(args, model)
        if self.do_grad_scaling:
            self.scaler = StepScaler(args.scale_loss, self._step_losses, args.dataset_world_size)

    def training_step(self, model: Any, inputs: Inputs, step_control: int = 0) -> paddle.Tensor:
        """Forward and backward pass of one micro-batch."""
        model.train()
        if self.skips is not None:
            self.skips.add(inputs["skipped"])
        if step_control == 0:
            self._step_tokens = self.exchange.supervised(inputs["num_supervised"])
        total = self._divisor(inputs)
        with self.autocast_smart_context_manager():
            loss_sum, _ = model(**self._model_inputs(inputs))
        # Gradients are averaged over processes, so each counts its share of the sum.
        share = self.args.dataset_world_size / max(total, 1)
        self._step_losses.add(loss_sum, share, inputs["sources"])
        loss = loss_sum * share
        if self.do_grad_scaling:
            self.scaler.scale(loss_sum * self.scaler.own_share(share)).backward()
        else:
            loss.backward()
        return loss.detach()

    def _divisor(self, inputs: Inputs) -> int:
        """What a micro-batch's summed loss is divided by, so that those of a step add up to the step's loss: supervised
        tokens of all, unless `loss_reduction` asks for the mean of micro-batch means, which weighs tokens unevenly.
        """
        if self.config.loss_reduction == "tokens":
            return self._step_tokens
        parts = self.args.gradient_accumulation_steps * self.args.dataset_world_size
        return int(inputs["loss_index"].shape[0]) * parts

    def _model_inputs(self, inputs: Inputs) -> Inputs:
        """The model's inputs of a batch, with tower features in place of pixels where they are kept."""
        if self.vision_cache is not None:
            inputs = self.vision_cache.complete(inputs)
        return model_inputs(inputs)

    def _check_loss_valid(self, loss: paddle.Tensor) -> None:
        """Called before the optimiser's step; PaddleNLP's checks only where an environment variable says so."""
        self._step_losses.end_step(self.state.global_step)

    def _nested_gather(self, tensors: paddle.Tensor) -> paddle.Tensor:
        """PaddleNLP's asks all processes for the loss to report, which they have told already."""
        return tensors

    def _get_item_from_loss(self, loss: paddle.Tensor) -> float:
        """The loss since the last report, of all processes, which is on the host already."""
        return self._step_losses.take_total()

    def _why_not_finite(self) -> str | None:
        """Whether an earlier step is to blame for a loss that is NaN or infinite, in words."""
        name = broken_weight(self.model.model)
        return None if name is None else broken_by_a_step(self, f"the weight '{name}'", "NaN or infinity")

    def log(self, logs: dict[str, Any], **named: Any) -> None:
        """Passes a report to all callbacks, trackers among them; PaddleNLP's has its own measures of speed."""
        if "loss" in logs:
            logs = {key: logs[key] for key in ("loss", "learning_rate")} | self.report.values(self.state.global_step)
        super().log(logs, **named)

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and accuracy per supervised token over the evaluation set, and metrics of answers where asked for.

        PaddleNLP's averages the means of batches.

        Returns:
            `eval_loss`, `eval_token_accuracy` (0..1), `eval_runtime` (seconds); with `answer_scores` also
            `eval_exact_match` and `eval_rouge_l` (0..1, means over samples).  Nothing where a signal broke it off.
        """
        dataset = eval_dataset or self.eval_dataset
        if dataset is None:
            raise UserError("evaluation needs dataset.eval in the JSON file")
        started = time.time()
        try:
            with self.report.pause():
                values = self._evaluation_values(dataset)
        except EvaluationStopped:
            return self._break_off_evaluation()
        values["runtime"] = round(time.time() - started, 3)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        if metric_key_prefix == "eval":
            self.evaluations.append(metrics[best_metric(self.config)])
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _break_off_evaluation(self) -> dict[str, float]:
        # An evaluation may take longer than whoever sent the signal waits: the checkpoint comes first.
        logger.warning(
            "the evaluation of step %d is broken off; the same command makes it first", self.state.global_step
        )
        self.evaluation_due = self.control.should_save = self.control.should_training_stop = True
        return {}

    def _evaluation_values(self, dataset: RowDataset) -> dict[str, float]:
        share = EvaluationShare.of(
            self.layout,
            batch_size=self.args.per_device_eval_batch_size,
            max_batches=self.args.max_evaluate_steps,
            host_every=self.args.eval_accumulation_steps,
        )
        self.model.eval()
        loss, right, count = self._evaluator.sums(dataset, share)
        self.model.train()
        values = {"loss": loss / max(count, 1), "token_accuracy": right / max(count, 1)}
        return values | (
            self.answer_scores.means(share, self.exchange.between_batches) if self.answer_scores is not None else {}
        )

    def _score(self, inputs: Inputs) -> Scores:
        """Summed loss and right guesses of a batch, without gradients."""
        with paddle.no_grad(), self.autocast_smart_context_manager():
            loss_sum, right = self.model(**self._model_inputs(inputs))
        return loss_sum, right

    # ---- checkpoints ----

    def _save_checkpoint(self, model: Any, metrics: dict[str, float] | None = None) -> None:
        """PaddleNLP writes in place, so that a killed run leaves half a checkpoint, and keeps pickles."""
        with self.report.pause():
            save_checkpoint(self, metrics)

    def run(self, resume: Path | None) -> dict[str, float]:
        """Trains, from a checkpoint where one is given; ends with the best checkpoint's weights where asked to.

        Returns:
            `steps` done in all, and `train_loss`, nats per supervised token over the steps of this call.
        """
        before = completed_steps(resume) if resume is not None else 0
        if resume is not None and before >= self._total_steps():  # PaddleNLP's loop would make one step more
            logger.info("%s is the end of this run: nothing is left to train", resume)
            load_finished(self, resume)
            if self.evaluation_due:  # made by `CatchUp`, and reported
                self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
                self.callback_handler.on_train_end(self.args, self.state, self.control)
            results: dict[str, float] = {"steps": before}
        else:
            if self.skips is not None:
                self.skips.start(resumed=resume is not None)
            output = self.train(resume_from_checkpoint=str(resume) if resume is not None else None)
            # PaddleNLP divides the loss of this call by the steps of all calls, and has only this process's share of it
            steps = max(output.global_step - before, 1)
            loss = output.training_loss * (output.global_step / steps)
            if self.layout.several:
                loss = self._step_losses.all_steps / steps
            results = {"train_loss": loss, "steps": output.global_step}
        self.exchange.settle()
        if self.config.load_best_model_at_end:
            load_best(self)
        return results

    def _total_steps(self) -> int:
        """Optimiser steps of the whole run, as PaddleNLP counts them."""
        if self.config.max_steps > 0:
            return self.config.max_steps
        return int(self.get_train_dataloader().sampler.steps_per_epoch * self.config.num_train_epochs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str | None = None) -> None:
        """The model's weights are read together with the optimiser's, see `_load_optimizer_and_scheduler`."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Weights, optimiser, schedule and the place in the data."""
        if checkpoint is not None:
            step, loader = load_training_state(self, Path(checkpoint)), self.get_train_dataloader()
            loader.start_at(step - step % loader.sampler.steps_per_epoch if self.config.ignore_data_skip else step)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: random numbers of a step depend on seed and step alone (`callbacks.SeedEachStep`)."""
