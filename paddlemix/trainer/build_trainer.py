"""Our Trainer of a run: the model with its loss, the data, the callbacks."""

from __future__ import annotations

from dataclasses import replace

from paddlemix.trainer.answers.answering import Answerer, AnswerScores
from paddlemix.trainer.batches.vision_cache import VisionCache, open_store
from paddlemix.trainer.callbacks.progress import Progress, shows_bar
from paddlemix.trainer.callbacks.samples import ShowAnswers
from paddlemix.trainer.callbacks.seeding import SeedEachStep
from paddlemix.trainer.callbacks.stopping import CatchUp, StopEarly
from paddlemix.trainer.loss import LossModel
from paddlemix.trainer.neftune import add_neftune
from paddlemix.trainer.paddlenlp_trainer import PrinterCallback, ProgressCallback
from paddlemix.trainer.reports.skipped import SkipLog
from paddlemix.trainer.run import Run, RunData
from paddlemix.trainer.run_data import loading_settings
from paddlemix.trainer.trainable import trains_visual_parts
from paddlemix.trainer.trainer import LlavaTrainer


def build_trainer(run: Run) -> LlavaTrainer:
    """The Trainer of a run, with everything that acts between its steps.

    Raises:
        UserError: `cache_vision_features` does not fit the model.
    """
    config, decoder = run.config, run.loaded.model.language_model
    decoder.enable_recompute = config.recompute
    if config.neftune:
        add_neftune(decoder, config.neftune_noise_alpha)
    data = _run_data(run)
    # Seeds before anything of a step draws a number.
    callbacks = [SeedEachStep(), run.stop]
    trainer = LlavaTrainer(LossModel(run.loaded.model), config, run.arguments, data, run.result_files, callbacks)
    trainer.layout = run.layout
    trainer.exchange.received = lambda: run.stop.received
    run.stop.decided = lambda: trainer.exchange.stop
    trainer.input_identity = run.inputs
    if config.early_stopping_patience is not None:
        trainer.add_callback(StopEarly(config, lambda: trainer.evaluations))
    trainer.add_callback(Progress(run.output_dir, trainer.report, shows_bar(config.disable_tqdm)))
    _add_answers(run, trainer)
    trainer.add_callback(CatchUp(trainer))
    for callback in (PrinterCallback, ProgressCallback):  # ours shows the same and more
        trainer.remove_callback(callback)
    return trainer


def _run_data(run: Run) -> RunData:
    """The run's data with its limits, its record of skipped samples and its cache of tower features."""
    config, spec, has_tower = run.config, run.processor.image_spec, run.loaded.model.config.vision is not None
    store = open_store(config, run.loaded.model, run.layout.data_size)
    for samples in (run.train.samples if run.train else None, run.evaluation):
        if samples is not None:
            samples.features = store
    blank, loading = (1, 3, spec.tile_size, spec.tile_size), loading_settings(config, run.processor)
    # Where weights are shared out (stage3) all processes have to call the same layers, or those that do wait for ever.
    alike = replace(loading, dummy_tile=blank) if has_tower and run.layout.stage == "stage3" else loading
    return RunData(
        train=run.train,
        evaluation=run.evaluation,
        loading=replace(loading, dummy_tile=blank) if trains_visual_parts(run.loaded.model) else alike,
        evaluation_loading=alike,
        skips=SkipLog(run.output_dir, run.train, run.layout) if run.train else None,
        vision_cache=VisionCache(store, run.loaded.model.vision_tower, run.layout) if store is not None else None,
    )


def _add_answers(run: Run, trainer: LlavaTrainer) -> None:
    """What lets the model answer: samples in the log, metrics of evaluations."""
    config = run.config
    answerer = Answerer(run.loaded.model, config.max_new_tokens, trainer.autocast_smart_context_manager)
    if config.eval_with_do_generation and run.evaluation is not None:
        trainer.answer_scores = AnswerScores(answerer, run.evaluation)
    if run.prompts and config.sample_steps is not None:
        show = ShowAnswers(
            run.prompts, answerer, config.sample_steps, run.output_dir, trainer.report, layout=run.layout
        )
        trainer.add_callback(show)
