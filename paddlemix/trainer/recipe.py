"""The one recipe: from a checked configuration to a trained model or adapter.

Pretraining, full fine-tuning and LoRA differ in the configuration alone.  Everything that can be wrong with the input
is found before anything is written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.adapters.adapter import AdapterSettings, read_adapter, write_adapter
from paddlemix.checkpoints.adapters.base_check import base_digests, base_mark
from paddlemix.checkpoints.adapters.base_places import base_reference
from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.identity.declared_identity import computed_values
from paddlemix.checkpoints.load import apply_adapter, load_base
from paddlemix.checkpoints.pretrained import Pretrained, write_model
from paddlemix.checkpoints.projector_file import NEW_PARTS
from paddlemix.config.load import save_config
from paddlemix.config.schema import RunConfig, trainer_keys
from paddlemix.datasets.batches import LoadingSettings
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.device import check_dtype, report_settings, select_device, set_seed
from paddlemix.errors import Stopped, UserError
from paddlemix.log import logger, process_rank
from paddlemix.memory import out_of_memory_explained
from paddlemix.models.kernels.fused import KernelSizes, choose_kernels
from paddlemix.peft.lora import add_lora
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.trainer.answers.answering import Answerer, AnswerScores
from paddlemix.trainer.answers.questions import Question
from paddlemix.trainer.callbacks.progress import (
    CURVE_FILE,
    METRICS_FILE,
    Progress,
    SeedEachStep,
    draw_loss_curve,
    shows_bar,
)
from paddlemix.trainer.callbacks.samples import SAMPLES_FILE, ShowAnswers, sample_questions
from paddlemix.trainer.callbacks.stopping import StopEarly, StopOnSignal
from paddlemix.trainer.checks import check_devices, check_flat_buffers, check_steps, process_count
from paddlemix.trainer.compat import PrinterCallback, ProgressCallback, TrainingArguments
from paddlemix.trainer.inputs import check_run_pictures
from paddlemix.trainer.loss import LossModel
from paddlemix.trainer.neftune import add_neftune
from paddlemix.trainer.output import (
    RUN_CONFIG_FILE,
    clear_earlier_run,
    continues_in,
    find_resume_point,
    publish,
    remove_leftovers,
    sole_writer,
)
from paddlemix.trainer.reports.model_card import CardFacts, write_model_card
from paddlemix.trainer.reports.names import describe_adapter, describe_environment
from paddlemix.trainer.reports.skipped import SkipLog
from paddlemix.trainer.reports.start import report_parts, report_sample
from paddlemix.trainer.reports.trackers import TrackedArguments, resolve_trackers
from paddlemix.trainer.resuming.checkpoint_check import check_checkpoint
from paddlemix.trainer.resuming.input_identity import InputIdentity, check_same_inputs
from paddlemix.trainer.resuming.same_recipe import check_same_recipe
from paddlemix.trainer.resuming.saving import best_metric, saved_recipe, what_is_left
from paddlemix.trainer.run_data import TrainingRows, arrange, check_data_files, read_samples
from paddlemix.trainer.run_model import base_spec, compute_dtype, processor_of_run, remedies, weight_dtype
from paddlemix.trainer.trainable import (
    adapter_config,
    check_adapter_keys,
    count_parameters,
    plan_of_adapter,
    plan_training,
    set_trainable,
)
from paddlemix.trainer.trainer import LlavaTrainer, ModelWriter, RunData
from paddlemix.trainer.vision_cache import VisionCache, open_store


@dataclass
class _Run:
    """What the stages of a run hand on."""

    config: RunConfig
    device: str
    loaded: Pretrained
    processor: LlavaProcessor
    write_result: ModelWriter
    train: TrainingRows | None
    evaluation: SampleDataset | None
    questions: list[Question] = field(default_factory=list)  # asked every sample_steps
    inputs: InputIdentity | None = None  # of the process that saves a training's checkpoints
    stop: StopOnSignal = field(default_factory=StopOnSignal)


def run_recipe(config: RunConfig) -> dict[str, float]:
    """Trains and evaluates as a configuration says.

    Args:
        config: checked, see `paddlemix.config.load.load_config`.

    Returns:
        `train_loss` and `steps` of a training, the metrics of a last evaluation.

    Raises:
        UserError: anything that is wrong with the configuration's paths, model, data or device.
    """
    for warning in config.warnings:
        logger.warning(warning)
    if not config.do_train and config.resolved_evaluation_strategy == "no":
        raise UserError(
            "there is nothing to do: do_train is false and no evaluation is asked for; set do_train to true"
        )
    device = select_device(config.device)
    check_dtype(compute_dtype(config), device)
    check_flat_buffers(config, device)
    best_metric(config)
    check_devices(config, process_count())
    config.report_to = resolve_trackers(config)
    check_data_files(config)
    with sole_writer(config) as take_folder:
        resume = find_resume_point(config)
        if resume is not None:
            check_checkpoint(resume, with_optimizer=not config.ignore_load_lr_and_optim)
            check_same_recipe(resume, saved_recipe(resume), config)
        set_seed(config.seed)
        with out_of_memory_explained(f"loading {config.model_name_or_path} on {device}", remedies(config)):
            run = _prepare(config, device, resume)
        if resume is not None and run.inputs is not None:
            check_same_inputs(run.inputs, resume, config.allow_changed_recipe)
        _report_start(run)
        take_folder(resume)
        return _execute(run, resume)


def _prepare(config: RunConfig, device: str, resume: Path | None) -> _Run:
    spec = base_spec(config)
    loaded = load_base(spec, weight_dtype(config))
    loaded.processor = processor = processor_of_run(config, loaded.processor, loaded.model.config)
    if processor is None:
        raise UserError(f"{spec.model} has no tokenizer files; copy tokenizer.model from the model it was made of")
    train = arrange(config, _read(loaded, config, "train", resume)) if config.do_train else None
    if train is not None:
        check_steps(config, len(train.rows), process_count())
    wants_evaluation = config.resolved_evaluation_strategy != "no"
    evaluation = _read(loaded, config, "eval", resume) if wants_evaluation else None
    questions = []
    if train is not None and config.sample_steps is not None:
        questions = sample_questions(config, processor, evaluation or train.samples)
    write_result, digests = _add_training(config, spec, loaded)
    inputs = None
    if train is not None and process_rank() == 0:
        data = {"train": train.samples} | ({} if evaluation is None else {"eval": evaluation})
        inputs = InputIdentity(data, loaded, digests)
    return _Run(config, device, loaded, processor, write_result, train, evaluation, questions, inputs)


def _read(loaded: Pretrained, config: RunConfig, split: str, resume: Path | None) -> SampleDataset:
    assert loaded.processor is not None
    samples = read_samples(config, split, loaded.processor, loaded.model.config.vision is not None)
    check_run_pictures(config, samples, own_folder=resume is not None and continues_in(config, resume))
    return samples


def _add_training(config: RunConfig, spec: BaseSpec, loaded: Pretrained) -> tuple[ModelWriter, dict[str, str]]:
    """Adds LoRA where asked for and marks what trains.

    Returns:
        The function that writes the result's files, and the digests of an adapter's base.
    """
    model, mark = loaded.model, base_mark(loaded)
    plan = plan_training(model, config)
    # a projector that was begun beside the base is nowhere else
    carried = {name for name, _ in model.named_parameters() if loaded.begun and name.startswith(NEW_PARTS)}
    if config.lora_path:
        earlier = read_adapter(Path(config.lora_path))
        check_adapter_keys(config, earlier.config)
        loaded.adapter, carried = apply_adapter(loaded, earlier).adapter, carried | earlier.tensors().keys()
        plan = plan_of_adapter(plan, earlier.config.modules, earlier.config.bias)
    elif plan.lora_modules:
        loaded.adapter = adapter_config(config, plan)
        add_lora(model, loaded.adapter)
    set_trainable(model, plan, config)
    if loaded.adapter is None:
        return lambda directory, _: write_model(loaded, directory), {}
    adapter, digests = loaded.adapter, base_digests(loaded) if process_rank() == 0 else {}  # this rank writes

    def write_result(directory: Path, place: Path) -> None:
        reference, values = base_reference(spec, place), computed_values(model.config)
        settings = AdapterSettings(adapter, reference, mark, frozenset(carried), digests, values)
        write_adapter(model, loaded.processor, settings, directory)

    return write_result, digests


def _report_start(run: _Run) -> None:
    report_settings(run.device)
    sizes = KernelSizes.of(run.loaded.model.config.text)
    for line in choose_kernels(run.config.use_flash_attention, run.device, compute_dtype(run.config), sizes):
        logger.info("%s", line)
    report_parts(run.loaded.model)
    if run.train is not None:
        report_sample(run.train.samples)
    if run.evaluation is not None:
        logger.info("%d evaluation samples", len(run.evaluation))


def _execute(run: _Run, resume: Path | None) -> dict[str, float]:
    config = run.config
    output_dir = Path(str(config.output_dir))
    if config.do_train and process_rank() == 0:
        remove_leftovers(output_dir)
        if resume is None or not continues_in(config, resume):  # only what may go is there: see find_resume_point
            clear_earlier_run(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, output_dir / RUN_CONFIG_FILE)
    trainer = _build_trainer(run)
    results: dict[str, float] = {}
    if config.do_train:
        if run.inputs is not None:
            run.inputs.start()
        try:
            with out_of_memory_explained(
                lambda: f"training on {run.device}, in step {trainer.state.global_step + 1}", remedies(config)
            ):
                results |= trainer.run(resume)
        finally:
            run.stop.restore()  # also where the run ends by an error
            if run.inputs is not None:
                run.inputs.close()
        if run.stop.received is not None:
            raise Stopped(run.stop.received)
        if trainer.skips is not None and trainer.skips.count:
            logger.warning("%d samples were left out, see %s", trainer.skips.count, trainer.skips.path)
        if process_rank() == 0:
            if not (output_dir / CURVE_FILE).is_file():  # an earlier start was killed behind the last step
                draw_loss_curve(output_dir / METRICS_FILE, output_dir / CURVE_FILE)
            with what_is_left("the result", trainer):
                publish(output_dir, lambda directory: run.write_result(directory, output_dir))
            write_model_card(_card_facts(run, trainer, results), output_dir / METRICS_FILE, output_dir / SAMPLES_FILE)
            logger.info("saved to %s", output_dir)
    elif run.evaluation is not None:
        with out_of_memory_explained(f"evaluating on {run.device}", remedies(config)):
            results |= trainer.evaluate()
        logger.info(" ".join(f"{name} {value:.4f}" for name, value in results.items()))
    return results


def _card_facts(run: _Run, trainer: LlavaTrainer, results: dict[str, float]) -> CardFacts:
    adapter, splits = run.loaded.adapter, (("train", run.train and run.train.samples), ("eval", run.evaluation))
    return CardFacts(
        config=run.config,
        parts=count_parameters(run.loaded.model),
        adapter=None if adapter is None else describe_adapter(adapter),
        has_tower=run.loaded.model.config.vision is not None,
        files=[(split, path, count) for split, data in splits if data for path, count in data.files],
        skipped=trainer.skips.count if trainer.skips is not None else 0,
        results=results,
        environment=describe_environment(run.device, trainer.args.world_size),
    )


def _build_trainer(run: _Run) -> LlavaTrainer:
    config, spec = run.config, run.processor.image_spec
    arguments = _training_arguments(config, run.device)
    has_tower = run.loaded.model.config.vision is not None
    tile = (1, 3, spec.tile_size, spec.tile_size)
    loading = LoadingSettings(
        tokens_per_tile=spec.tokens_per_tile,
        dummy_tile=tile if has_tower and arguments.world_size > 1 else None,
        num_workers=config.dataloader_num_workers,
        pad_to_multiple_of=config.pad_to_multiple_of,
        pad_tiles_to_multiple_of=config.pad_tiles_to_multiple_of,
    )
    model = LossModel(run.loaded.model)
    run.loaded.model.language_model.enable_recompute = config.recompute
    if config.neftune:
        add_neftune(run.loaded.model.language_model, config.neftune_noise_alpha)
    output_dir = Path(str(config.output_dir))
    skips = SkipLog(output_dir, run.train) if run.train else None
    store = open_store(config, run.loaded.model)
    for samples in (run.train.samples if run.train else None, run.evaluation):
        if samples is not None:
            samples.features = store
    cache = VisionCache(store, run.loaded.model.vision_tower) if store is not None else None
    data = RunData(train=run.train, evaluation=run.evaluation, loading=loading, skips=skips, vision_cache=cache)
    trainer = LlavaTrainer(model, config, arguments, data, run.write_result, [SeedEachStep(), run.stop])
    trainer.input_identity = run.inputs
    if config.early_stopping_patience is not None:
        trainer.add_callback(StopEarly(config, lambda: trainer.evaluations))
    trainer.add_callback(Progress(output_dir, trainer.report, shows_bar(config.disable_tqdm)))
    _add_answers(run, trainer)
    for callback in (PrinterCallback, ProgressCallback):  # ours shows the same and more
        trainer.remove_callback(callback)
    return trainer


def _add_answers(run: _Run, trainer: LlavaTrainer) -> None:
    """The parts of a run that let the model answer: samples in the log, metrics of evaluations."""
    config = run.config
    answerer = Answerer(run.loaded.model, config.max_new_tokens, trainer.autocast_smart_context_manager)
    if config.eval_with_do_generation and run.evaluation is not None:
        batch_size, most = config.per_device_eval_batch_size, config.max_evaluate_steps
        trainer.answer_scores = AnswerScores(answerer, run.evaluation, batch_size, most)
    if run.questions and config.sample_steps is not None:
        output_dir = Path(str(config.output_dir))
        trainer.add_callback(ShowAnswers(run.questions, answerer, config.sample_steps, output_dir, trainer.report))


def _training_arguments(config: RunConfig, device: str) -> TrainingArguments:
    """PaddleNLP's view of the run; what our trainer does itself is switched off there."""
    values: dict[str, Any] = {name: getattr(config, name) for name in trainer_keys()}
    values |= {
        "device": device.split(":")[0],
        "remove_unused_columns": False,
        "load_best_model_at_end": False,
        "unified_checkpoint": False,
        "recompute": False,
        "evaluation_strategy": config.resolved_evaluation_strategy,
        "resume_from_checkpoint": None,
        "ignore_load_lr_and_optim": False,  # would begin to count steps anew
        "overwrite_output_dir": True,
        "release_grads": True,  # zeroed ones would stay in memory while the next activations are made
        "logging_dir": config.logging_dir or os.path.join(str(config.output_dir), "logs"),
    }
    return TrackedArguments(**values)
