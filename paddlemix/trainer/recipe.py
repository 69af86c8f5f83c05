"""The one recipe, top to bottom: what happens in a run, in order.

    check      keys, device, trackers; then the processes join, and data files: nothing is loaded yet
    resume     which checkpoint the run continues, whether it is whole and of the same recipe
    prepare    model, processor, data, adapter: everything that can be wrong with the input
    report     environment, kernels, what trains, a sample as the model will see it
    train      the first writes into `output_dir`, the steps, the result and its card

Pretraining, full fine-tuning and LoRA differ in the configuration alone.
"""

from __future__ import annotations

from pathlib import Path

from paddlemix.checkpoints.files.joint_writing import joint_directory, write_files
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.config.schema import RunConfig
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.device import check_dtype, select_device, set_seed
from paddlemix.launch.process_rules import check_devices
from paddlemix.launch.worker import report_begin
from paddlemix.log import logger, process_rank
from paddlemix.models.kernels.fused import KernelSizes, choose_kernels
from paddlemix.out_of_memory import out_of_memory_explained
from paddlemix.parallel.collectives import together
from paddlemix.trainer.add_training import add_training_to_run
from paddlemix.trainer.build_trainer import build_trainer
from paddlemix.trainer.callbacks.progress import CURVE_FILE, METRICS_FILE, draw_loss_curve
from paddlemix.trainer.callbacks.samples import SAMPLES_FILE, sample_prompts
from paddlemix.trainer.checks import check_flat_buffers, check_steps, check_task, started_processes
from paddlemix.trainer.joint_start import agreed_resume_point, check_same_keys, check_same_run, note_job
from paddlemix.trainer.output import begin_output, continues_in, publishing, sole_writer
from paddlemix.trainer.output_guard import check_run_pictures
from paddlemix.trainer.processes import Processes, begin_processes
from paddlemix.trainer.reports.model_card import facts_of_run, write_model_card
from paddlemix.trainer.reports.start import report_start
from paddlemix.trainer.reports.trackers import resolve_trackers
from paddlemix.trainer.resuming.input_identity import InputIdentity, check_same_inputs
from paddlemix.trainer.resuming.saving import what_is_left
from paddlemix.trainer.run import Run
from paddlemix.trainer.run_data import arrange, check_data_files, read_samples
from paddlemix.trainer.run_model import compute_dtype, load_start, remedies
from paddlemix.trainer.trainer import LlavaTrainer


def run_recipe(config: RunConfig) -> dict[str, float]:
    """Trains and evaluates as a configuration says.

    Args:
        config: checked, see `paddlemix.config.load.load_config`.

    Returns:
        `train_loss` and `steps` of a training, the metrics of a last evaluation.

    Raises:
        UserError: anything that is wrong with the configuration's paths, model, data or device.
    """
    device = _check(config)
    processes = begin_processes(config, device)
    check_same_keys(config)
    # From here on an error of one process ends all of them, at the end of the block in which it occurs.
    with together():
        check_data_files(config)
    with sole_writer(config) as take_folder:
        resume = agreed_resume_point(config, processes[1].data_size)
        set_seed(config.seed)  # before the model: a new projector and new adapters are drawn from here
        with together(), out_of_memory_explained(f"loading {config.model_name_or_path} on {device}", remedies(config)):
            run = _prepare(config, device, processes, resume)
        check_same_run(run)
        with together():
            if resume is not None and run.inputs is not None:
                check_same_inputs(run.inputs, resume, config.allow_changed_recipe)
            sizes = KernelSizes.of(run.loaded.model.config.text)
            report_start(run, choose_kernels(config.use_flash_attention, device, compute_dtype(config), sizes))
            take_folder(resume)
        return _train(run, resume) if config.do_train else _evaluate(run)


def _check(config: RunConfig) -> str:
    """Refuses what can be refused by keys alone; returns the device, which is set."""
    for warning in config.warnings:
        logger.warning(warning)
    check_task(config)
    device = select_device(config.device)
    check_dtype(compute_dtype(config), device)
    check_flat_buffers(config, device)
    check_devices(config, started_processes(), device)
    config.report_to = resolve_trackers(config)
    return device


def _prepare(config: RunConfig, device: str, processes: Processes, resume: Path | None) -> Run:
    """Loads the model, reads the data, adds the adapter; writes nothing.

    The processor comes before the data, which it measures; the adapter after it, so that data errors come early.
    """
    arguments, layout = processes
    spec, loaded, processor = load_start(config, layout)
    train = arrange(config, _read(loaded, config, "train", resume)) if config.do_train else None
    if train is not None:
        check_steps(config, len(train.rows), layout.data_size)
    evaluation = _read(loaded, config, "eval", resume) if config.resolved_evaluation_strategy != "no" else None
    prompts = sample_prompts(config, processor, evaluation or train.samples) if train is not None else []
    result_files, digests = add_training_to_run(config, spec, loaded)
    inputs = None
    if train is not None and process_rank() == 0:  # the process that saves checkpoints
        data = {"train": train.samples} | ({} if evaluation is None else {"eval": evaluation})
        inputs = InputIdentity(data, loaded, digests)
    return Run(
        config=config,
        device=device,
        arguments=arguments,
        layout=layout,
        loaded=loaded,
        processor=processor,
        result_files=result_files,
        train=train,
        evaluation=evaluation,
        prompts=prompts,
        inputs=inputs,
    )


def _read(loaded: Pretrained, config: RunConfig, split: str, resume: Path | None) -> SampleDataset:
    assert loaded.processor is not None
    samples = read_samples(config, split, loaded.processor, loaded.model.config.vision is not None)
    check_run_pictures(config, samples, own_folder=resume is not None and continues_in(config, resume))
    return samples


def _train(run: Run, resume: Path | None) -> dict[str, float]:
    """From the first file in `output_dir` to the published result."""
    with together():
        if process_rank() == 0:
            begin_output(run.config, resume)
        trainer = build_trainer(run)
    note_job(run.output_dir)
    report_begin()
    if run.inputs is not None:
        run.inputs.start()
    try:
        with out_of_memory_explained(
            lambda: f"training on {run.device}, in step {trainer.state.global_step + 1}", remedies(run.config)
        ):
            results = trainer.run(resume)
        run.stop.check_ended()
        if trainer.skips is not None and trainer.skips.count:
            logger.warning("%d samples were left out, see %s", trainer.skips.count, trainer.skips.path)
        _publish(run, trainer, results)
    finally:
        run.stop.restore()  # also where the run ends by an error
        if run.inputs is not None:
            run.inputs.close()
    run.stop.check_received()  # while the result was being written
    return results


def _publish(run: Run, trainer: LlavaTrainer, results: dict[str, float]) -> None:
    """Called by every process: each may hold a share of the result."""
    output_dir, metrics, layout = run.output_dir, run.output_dir / METRICS_FILE, trainer.layout
    with what_is_left("the result", trainer), joint_directory(publishing(output_dir), layout) as directory:
        write_files(directory, run.result_files(output_dir, layout), layout)
    with together():
        if layout.rank == 0:
            if not (output_dir / CURVE_FILE).is_file():  # an earlier start was killed after the last step
                draw_loss_curve(metrics, output_dir / CURVE_FILE)
            skipped = trainer.skips.count if trainer.skips is not None else 0
            write_model_card(facts_of_run(run, results, skipped, layout.world_size), metrics, output_dir / SAMPLES_FILE)
    logger.info("saved to %s", output_dir)


def _evaluate(run: Run) -> dict[str, float]:
    trainer = build_trainer(run)
    report_begin()
    with out_of_memory_explained(f"evaluating on {run.device}", remedies(run.config)):
        results = trainer.evaluate()
        trainer.exchange.settle()
    logger.info(" ".join(f"{name} {value:.4f}" for name, value in results.items()))
    return results
