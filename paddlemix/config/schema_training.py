"""The keys of the training loop, of logging and of distributed runs, and those that are accepted without effect.

Names, types and defaults are those of PaddleNLP 3.0.0b4's TrainingArguments and of PaddleMIX's argument groups, except:
`logging_steps` 10 (theirs 500), `report_to` nothing, `device` whatever the machine has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from paddlemix.config.keys import key

# with target "trainer" PaddleNLP's TrainingArguments gets the key; without, only our own code reads it
_training = partial(key, group="training", target="trainer")
_training_own = partial(key, group="training")
_logging = partial(key, group="logging", target="trainer")
_logging_own = partial(key, group="logging")
_distributed = partial(key, group="distributed", target="trainer")
_ignored = partial(key, group="compatibility", status="ignored")

STRATEGIES = ("no", "steps", "epoch")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")
# PaddleNLP names five (adafactor, adamw_mini, ...); here there is one
OPTIMIZERS = ("adamw",)
SHARDING = ("", "stage1", "stage2", "stage3")
REPORTERS = ("none", "all", "visualdl", "tensorboard", "wandb")


@dataclass(kw_only=True)
class TrainingKeys:
    """Steps, optimiser, schedule, precision, evaluation and checkpoints."""

    output_dir: str | None = _training(
        None, help="Folder for checkpoints and the trained model; required.", path="local"
    )
    # Without it a run resumes from the newest checkpoint, so that a restarted job continues by itself.
    overwrite_output_dir: bool = _training(False, help="Start from scratch although output_dir holds a checkpoint.")
    resume_from_checkpoint: str | None = _training(
        None, help="Checkpoint folder to resume from; null: the newest in output_dir.", path="local"
    )
    do_train: bool = _training(False, help="Train.")
    do_eval: bool = _training(False, help="Evaluate; an evaluation_strategy other than no does the same.")
    # PaddleNLP's default is 1, transformers' 3.
    num_train_epochs: float = _training(1.0, help="Passes over the training data.", unit="epochs", min=0)
    max_steps: int = _training(-1, help="Optimiser steps; above 0 it replaces num_train_epochs.", unit="steps", min=-1)
    per_device_train_batch_size: int = _training(8, help="Rows per device and pass.", unit="samples", min=1)
    per_device_eval_batch_size: int = _training(8, help="Rows per device in evaluation.", unit="samples", min=1)
    gradient_accumulation_steps: int = _training(1, help="Passes per optimiser step.", unit="passes", min=1)
    # The mean over a whole step does not depend on how samples fall into passes; the mean of means
    # does, and is there to reproduce LLaVA's curves.
    loss_reduction: str = _training_own(
        "tokens",
        help="A step's loss: tokens, the mean over all its supervised tokens; micro_batch, the mean of the means of "
        "its passes and devices, as in the original LLaVA.",
        choices=("tokens", "micro_batch"),
    )
    neftune: bool = _training_own(False, help="NEFTune: uniform noise on the embeddings in training.")
    neftune_noise_alpha: float = _training_own(5.0, help="NEFTune's strength; needs neftune true.", min=0)
    # Off as in PaddleNLP: it costs a third more time.
    recompute: bool = _training(False, help="Recompute activations in the backward pass, to save memory.")
    # numpy accepts 32 bits only.
    seed: int = _training(42, help="Random seed of weights, shuffling and dropout.", min=0, max=2**32 - 1)
    # A pattern, because the number of cards is not known here; device/choice.py refuses missing ones.
    device: str | None = _training(
        None,
        help="Device, or one card of it; null: an available accelerator, otherwise the CPU.",
        choices=("gpu", "npu", "cpu", "xpu", "gpu:0"),
        pattern=r"(gpu|npu|cpu|xpu)(:\d+)?",
    )

    learning_rate: float = _training(5e-5, help="Peak learning rate.", min=0)
    # LLaVA's keys for rates by part.
    mm_projector_lr: float | None = _training_own(
        None, help="The projector's learning rate; null: learning_rate.", min=0
    )
    mm_vision_tower_lr: float | None = _training_own(
        None, help="The vision tower's learning rate; null: learning_rate.", min=0
    )
    # Own key: PaddleMIX's eta_min has no effect on its schedule.
    min_learning_rate: float = _training_own(0.0, help="Lower bound of the schedule.", min=0)
    lr_scheduler_type: str = _training("linear", help="Shape of the schedule after warm-up.", choices=SCHEDULES)
    # Both as in transformers, where the number of steps wins too.
    warmup_ratio: float = _training(0.0, help="Warm-up as a share of all steps.", min=0, max=1)
    warmup_steps: int = _training(0, help="Warm-up steps; above 0 they override warmup_ratio.", unit="steps", min=0)
    # half a wave: the rate falls once, from its peak to 0
    num_cycles: float = _training(0.5, help="Number of cosine waves in the schedule.", min=0)
    lr_end: float = _training(1e-7, help="Final learning rate of the polynomial schedule.", min=0)
    power: float = _training(1.0, help="Power of the polynomial schedule.", min=0)

    # One optimiser; other programs' names of AdamW lead here, see config/foreign.
    optim: str = _training("adamw", help="Optimiser.", choices=OPTIMIZERS)
    weight_decay: float = _training(0.0, help="Weight decay; biases and norms have none.", min=0)
    adam_beta1: float = _training(0.9, help="Decay rate of the gradient's running mean.", min=0, max=1)
    adam_beta2: float = _training(0.999, help="Decay rate of the squared gradient's running mean.", min=0, max=1)
    adam_epsilon: float = _training(1e-8, help="Added to the denominator.", min=0)
    max_grad_norm: float = _training(1.0, help="Norm to which gradients are clipped; 0: no clipping.", min=0)
    flatten_param_grads: bool | None = _training(False, help="Flat parameter and gradient buffers: refused where true.")
    offload_optim: bool | None = _training(False, help="Keep optimiser states in host memory between steps.")
    release_grads: bool | None = _ignored(False, help="Gradients are freed after every step anyway.")

    # O1 keeps float32 weights and lets autocast choose; O2 also holds weights in half precision.
    bf16: bool = _training(False, help="Compute in bfloat16.")
    fp16: bool = _training(False, help="Compute in float16 with loss scaling.")
    fp16_opt_level: str = _training(
        "O1", help="O1: float32 weights, O2: weights in bf16 or fp16 too, O0: off.", choices=("O0", "O1", "O2")
    )
    amp_master_grad: bool = _training(False, help="With O2: float32 gradients for clipping and the update.")
    # PaddleNLP's initial scale; it is halved whenever a gradient is not finite.
    scale_loss: float = _training(32768.0, help="Initial loss scale of fp16.", min=0)
    bf16_full_eval: bool = _ignored(False, help="Evaluation computes as training does; set bf16.")
    fp16_full_eval: bool = _ignored(False, help="Evaluation computes as training does; set fp16.")
    amp_custom_black_list: list[str] | None = _training(
        None,
        help="Operators that autocast computes in float32, by paddle's old names (matmul_v2, not matmul). Not reached: "
        "fused kernels and the backward pass of hand-written layers.",
    )
    amp_custom_white_list: list[str] | None = _training(
        None, help="Operators that autocast always computes in low precision, by paddle's old names."
    )

    # "no" or a strategy; do_eval alone means "steps", see RunConfig.resolved_evaluation_strategy.
    evaluation_strategy: str = _training("no", help="When to evaluate.", choices=STRATEGIES)
    eval_steps: int | None = _training(None, help="Interval for steps; null: logging_steps.", unit="steps", min=1)
    eval_accumulation_steps: int | None = _training(
        None, help="Evaluation passes after which results move to host memory.", unit="passes", min=1
    )
    max_evaluate_steps: int = _training(
        -1, help="Limit of batches in one evaluation, over all processes; -1: none.", unit="batches", min=-1
    )
    eval_with_do_generation: bool = _training_own(
        False, help="Evaluations also let the model answer, greedily, and report exact match and ROUGE-L."
    )
    max_new_tokens: int = _training_own(
        128, help="Maximum length of an answer in evaluations and samples.", unit="tokens", min=1
    )
    minimum_eval_times: int | None = _training(
        None, help="Shorten eval_steps to evaluate at least this many times.", min=1
    )
    load_best_model_at_end: bool | None = _training(False, help="Finish with the checkpoint that evaluated best.")
    metric_for_best_model: str | None = _training(None, help="Metric that defines the best; null: the loss.")
    greater_is_better: bool | None = _training(None, help="Whether a larger value of that metric is better.")
    early_stopping_patience: int | None = _training_own(
        None, help="Stop after this many evaluations without improvement; null: never.", min=1
    )
    early_stopping_threshold: float = _training_own(0.0, help="Smallest improvement that counts.", min=0)

    # Checkpoints hold optimiser states, so save_total_limit matters for disks.
    save_strategy: str = _training("steps", help="When to save a checkpoint.", choices=STRATEGIES)
    save_steps: int = _training(500, help="Interval for steps.", unit="steps", min=1)
    save_total_limit: int | None = _training(None, help="Number of checkpoints to keep; null or 0: all.", min=0)
    ignore_save_lr_and_optim: bool | None = _training(False, help="Do not save the optimiser state.")
    ignore_load_lr_and_optim: bool | None = _training(False, help="Resume without the optimiser state.")
    # A changed recipe is refused by default: the curve of a resumed run would not be one run's.
    allow_changed_recipe: bool = _training_own(
        False, help="Resume although keys, data, pictures or base that change the result differ from the checkpoint's."
    )
    ignore_data_skip: bool = _training(False, help="Resume at the first sample instead of the next one.")
    skip_data_intervals: list | None = _training(
        None, help="Steps whose batches are skipped, a list of [first, last].", unit="steps"
    )
    dataloader_num_workers: int = _training(0, help="Processes that prepare samples; 0: the main one.", min=0)


@dataclass(kw_only=True)
class LoggingKeys:
    """What is reported, where and how often."""

    logging_strategy: str = _logging("steps", help="When to log.", choices=STRATEGIES)
    # PaddleNLP's 500 hides the first minutes, in which most mistakes show.
    logging_steps: int = _logging(10, help="Interval for steps.", unit="steps", min=1)
    logging_first_step: bool = _logging(False, help="Log the first step too.")
    logging_dir: str | None = _logging(None, help="Folder for logs; null: inside output_dir.", path="local")
    log_on_each_node: bool = _logging(True, help="Every machine logs, not only the first.")
    disable_tqdm: bool | None = _logging(
        None, help="One line per report in place of a bar; null: if there is no terminal."
    )
    # None by default: nothing is sent anywhere unasked.
    report_to: str | list[str] = _logging([], help="Trackers that also get the numbers.", choices=REPORTERS)
    sample_steps: int | None = _logging_own(
        None, help="Interval at which sample_prompts are answered, in the log and samples.jsonl.", unit="steps", min=1
    )
    sample_prompts: list | None = _logging_own(
        None, help='[{"image": path, "question": text}, ...]; null: the first two records of eval, otherwise of train.'
    )
    run_name: str | None = _logging(None, help="Name of the run for trackers; null: output_dir.")
    # Written by no saved configuration; better exported as WANDB_API_KEY.
    wandb_api_key: str | None = _logging(None, help="Key of the wandb tracker; never written to a file.", secret=True)
    wandb_http_proxy: str | None = _logging(None, help="Proxy of the wandb tracker.")
    skip_memory_metrics: bool = _logging(True, help="Do not log memory use.")
    skip_profile_timer: bool | None = _logging(True, help="Do not log the time of each phase.")
    metrics_output_path: str | None = _logging(
        None, help="Folder for a JSON file of metrics per process.", path="local"
    )
    count_trained_tokens: bool = _logging(False, help="Count the tokens seen.")
    pad_token_id: int = _logging(0, help="Token id that count_trained_tokens leaves out.", min=0)


@dataclass(kw_only=True)
class DistributedKeys:
    """How a run is distributed over devices; without a launcher these have no effect."""

    # The launcher's own; kept because scripts pass it on.
    local_rank: int = _distributed(-1, help="Set by the launcher; do not set it.", min=-1)
    sharding: str = _distributed(
        "",
        help="What is sharded: stage1 optimiser states, stage2 also gradients, stage3 also weights.",
        choices=SHARDING,
        pattern=r"(stage[123]( offload)?)?",  # offload has an error of its own, which says what to use instead
    )
    # PaddleNLP's names; its TrainingArguments sets Fleet up from them.
    sharding_parallel_degree: int = _distributed(-1, help="Devices that share one copy; -1: all.", min=-1)
    sharding_degree: int = _distributed(-1, help="Old name of sharding_parallel_degree.", min=-1)
    sharding_comm_buffer_size_MB: int = _distributed(-1, help="Fused gradient buffer; -1: all.", unit="MB", min=-1)
    sharding_parallel_config: str = _distributed("", help="Not available; do not set it.")
    save_sharded_model: bool = _ignored(False, help="The first process saves the whole model.")
    load_sharded_model: bool = _ignored(False, help="Checkpoints hold the whole model.")
    save_sharding_stage1_model_include_freeze_params: bool | None = _ignored(
        False, help="Checkpoints hold the whole model."
    )
    data_parallel_config: str = _distributed("", help="Not available; do not set it.")
    ddp_find_unused_parameters: bool | None = _distributed(None, help="Look for weights without a gradient.")
    tensor_parallel_config: str = _distributed("", help="Not available; do not set it.")
    pipeline_parallel_config: str = _distributed("", help="PaddleNLP's pipeline options.")
    force_reshard_pp: bool | None = _ignored(False, help="No LLaVA decoder here is split into a pipeline.")
    hybrid_parallel_topo_order: str | None = _distributed(
        None, help="Order of the process groups.", choices=("pp_first", "sharding_first")
    )
    tensor_parallel_degree: int = _distributed(-1, help="Devices that each hold a part of one model; -1: 1.", min=-1)
    # The decoder here does not spread its layers or split a sequence, and has no experts: more than 1 is an error.
    pipeline_parallel_degree: int = _distributed(-1, help="Not available; do not set it.", min=-1)
    sep_parallel_degree: int = _distributed(-1, help="Not available; do not set it.", min=-1)
    context_parallel_degree: int = _distributed(-1, help="Not available; do not set it.", min=-1)
    expert_parallel_degree: int = _distributed(-1, help="No experts here; do not set it.", min=-1)
    expert_tensor_parallel_degree: int = _distributed(-1, help="No experts here; do not set it.", min=-1)


@dataclass(kw_only=True)
class CompatibilityKeys:
    """Keys of PaddleMIX and PaddleNLP that change nothing here; setting one to another value gives a warning.

    Source: PaddleMIX 6afaf05d `paddlemix/trainer/argument.py`, PaddleNLP 3.0.0b4 `TrainingArguments`.
    """

    # Declared so that PaddleMIX's files load; each says in its help what to set instead.
    text_model_name_or_path: str | None = _ignored(None, help="LLaVA's language model is part of model_name_or_path.")
    prefix_tuning: bool = _ignored(False, help="Prefix tuning was never built for LLaVA; set lora.")
    num_prefix_tokens: int = _ignored(128, help="Prefix tuning was never built for LLaVA.")
    from_aistudio: bool = _ignored(False, help="Models come from a directory or a name.")
    save_to_aistudio: bool = _ignored(False, help="Nothing is uploaded; use the hub's own tool on output_dir.")
    aistudio_repo_id: str | None = _ignored(None, help="Nothing is uploaded.")
    aistudio_repo_private: bool = _ignored(True, help="Nothing is uploaded.")
    aistudio_repo_license: str = _ignored("Apache License 2.0", help="Nothing is uploaded.")
    aistudio_token: str | None = _ignored(None, help="Nothing is uploaded; remove it from the file.", secret=True)

    task_name: str | None = _ignored(None, help="Name the files in dataset.")
    splits: str | list[str] | None = _ignored(None, help="Give splits inside an entry of dataset.")
    src_length: int = _ignored(1024, help="One limit holds for a whole sample: max_length.")
    lazy: bool = _ignored(False, help="Samples are always read on demand.")
    lazy_data_processing: bool | None = _ignored(True, help="Samples are always read on demand.")
    save_generation_output: bool = _ignored(False, help="samples.jsonl keeps the answers to sample_prompts.")
    version: str | None = _ignored(None, help="The template is chat_template; pretraining uses plain.")

    unified_checkpoint: bool | None = _ignored(False, help="Checkpoints are in safetensors anyway.")
    unified_checkpoint_config: str | None = _ignored("", help="Checkpoints have one form.")
    ckpt_quant_stage: str = _ignored("O0", help="Optimiser states are saved as they are.")
    use_async_save: bool | None = _ignored(False, help="Checkpoints are complete when the next step begins.")
    ordered_save_group_size: int = _ignored(0, help="One process saves.")
    output_signal_dir: str | None = _ignored(None, help="Checkpoints are complete when they appear.")
    prediction_loss_only: bool = _ignored(False, help="Evaluation reports loss and token accuracy.")
    dataloader_drop_last: bool = _ignored(False, help="The last step of an epoch is filled, nothing is dropped.")
    save_on_each_node: bool = _ignored(False, help="The first process saves.")

    benchmark: bool = _ignored(False, help="Speed is always logged.")
    profiler_options: str | None = _ignored(None, help="Profiling is PaddleMIX's own; set skip_profile_timer false.")
    warmup_start_lr: float = _ignored(1e-6, help="Warm-up starts at 0.")
    eta_min: float = _ignored(1e-5, help="Set min_learning_rate.")
    lr_scheduler_name: str = _ignored("CosineDecayWithWarmup", help="Set lr_scheduler_type.")

    no_cuda: bool = _ignored(False, help="Set device to cpu.")
    do_predict: bool = _ignored(False, help="Run the predict command on the trained model.")
    do_export: bool = _ignored(False, help="Run the convert command on the trained model.")
    past_index: int = _ignored(-1, help="No LLaVA model carries a state between batches.")
    remove_unused_columns: bool | None = _ignored(True, help="A batch holds only the model's inputs.")
    label_names: list[str] | None = _ignored(None, help="A batch's labels are known.")
    distributed_dataloader: bool | None = _ignored(False, help="Every process reads its own share of the data.")
    refined_recompute: str = _ignored("", help="Set recompute.")
    sequence_parallel: bool = _ignored(False, help="No LLaVA decoder here splits a sequence.")
    sequence_parallel_config: str = _ignored("", help="No LLaVA decoder here splits a sequence.")
    fuse_sequence_parallel_allreduce: bool = _ignored(False, help="No LLaVA decoder here splits a sequence.")
    split_inputs_sequence_dim: bool = _ignored(True, help="No LLaVA decoder here splits a sequence.")
    use_expert_parallel: bool | None = _ignored(False, help="No LLaVA decoder here has experts.")
    expert_max_capacity: int | None = _ignored(2**32, help="No LLaVA decoder here has experts.")
    expert_min_capacity: int | None = _ignored(1, help="No LLaVA decoder here has experts.")
    enable_auto_parallel: bool | None = _ignored(False, help="Set sharding instead of automatic parallelism.")
    auto_parallel_resume_form_hybrid_parallel: bool | None = _ignored(False, help="There is no automatic parallelism.")
    sharding_parallel_mesh_dimension: str = _ignored("dp", help="There is no automatic parallelism.")
    to_static: bool | None = _ignored(False, help="Training runs dynamically.")
    pdc_download_ckpt: bool | None = _ignored(False, help="Checkpoints are read from local folders.")
    pdc_download_timeout: int | None = _ignored(300, help="Checkpoints are read from local folders.")
