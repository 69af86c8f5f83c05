"""Keys of ms-swift, XTuner and LLaMA-Factory, and what to write here; `answers.py` says how a line is read.

Sources: ms-swift 2.6.1 swift/llm/utils/argument.py and 4.6.0 swift/arguments/; Megatron-LM
megatron/training/arguments.py; InternLM/xtuner 0.1.23 xtuner/configs/llava/; LLaMA-Factory 0.9.5
llamafactory/hparams/; PEFT's LoraConfig.
"""

from __future__ import annotations

from paddlemix.config.foreign.answers import Answer, each, policy, same, says, switch
from paddlemix.config.foreign.script_keys import (
    ALWAYS,
    BITS,
    EVAL_FILES,
    LLAVA,
    NO_RESIZING,
    NOT_HERE,
    TRAIN_FILES,
    template_answer,
)
from paddlemix.config.foreign.templates import LLAMA_FACTORY_TEMPLATES, SWIFT_TEMPLATES, XTUNER_TEMPLATES

# Sampling and mixing are properties of an entry here, not of the run.
_SOME = says('"data_files": "PATH#N" takes N records of a file')
_SPLIT = says('give "split": "[:99%]" to the entry of train and "[99%:]" to that of eval')
_WEIGHTS = says("give each entry of dataset a weight")
_ONE_FORM = says("quantize_base has one form of nf4 and one of int8; leave it out")
# Ours are regular expressions over whole names, theirs are endings.
_TARGETS = Answer(
    values={"all": '"lora_target_modules": "all-linear"', "all-linear": '"lora_target_modules": "all-linear"'},
    otherwise='lora_target_modules are regular expressions of whole names, e.g. [".*q_proj", ".*v_proj"]',
)
# What is trained is not a switch here: every answer and its end token.
_ANSWERS_ALONE = says("answers alone are trained, and all of them; leave it out")
_SYSTEM = says("a record's own system turn, or a chat_template of yours, sets the system text")
_LORA_MATRICES = says("only LoRA and its kinds are built here; set lora true")
# Memory is why these optimisers are chosen there, so the answer names what saves memory here.
_OPTIMISERS = says('"optim": "adamw" is the one optimiser; LoRA or quantize_base take less memory')
# Their dtype is that of the weights, which is O2 here.
_PRECISION = {
    "*bfloat16": '"bf16": true, "fp16_opt_level": "O2"',
    "*float16": '"fp16": true, "fp16_opt_level": "O2"',
    "bf16": '"bf16": true, "fp16_opt_level": "O2"',
    "fp16": '"fp16": true, "fp16_opt_level": "O2"',
    "*float32": '"dtype": "float32"',
    "fp32": '"dtype": "float32"',
    "auto": "",
}
_BY_ADAPTERS = '"lora" trains adapters on it'
# Their word for how a model is trained.
_ADAPTER = Answer(
    values={"lora": '"lora": true', "full": '"lora": false'}, otherwise="only LoRA and full training are built here"
)


# 2.6.1 declares its keys in SftArguments of argument.py; 4.6.0 splits them over the files of swift/arguments/.
# Where a key changed its name, both are here: sft_type and train_type became tuner_type.
SWIFT = {
    **each("sft_type train_type tuner_type", _ADAPTER),
    "model_type": says("leave it out; the checkpoint's config.json says what it is"),
    **each("model model_id_or_path", same("model_name_or_path")),
    "model_revision": says('write it after the name: "model_name_or_path": "owner/name@REVISION"'),
    **each("template template_type", template_answer(SWIFT_TEMPLATES)),
    "adapters": same("lora_path"),
    "custom_train_dataset_path": Answer(write=TRAIN_FILES),
    **each("val_dataset custom_val_dataset_path", Answer(write=EVAL_FILES)),
    **each("split_dataset_ratio dataset_test_ratio", _SPLIT),
    **each("train_dataset_sample val_dataset_sample", _SOME),
    **each("train_dataset_mix_ratio interleave_prob", _WEIGHTS),
    "dataset_seed": says("seed decides the order of the data too"),
    "columns": says("the supported forms of records are in docs/data.md"),
    **each("check_dataset_strategy strict", says('"on_bad_sample": "error" stops at a bad record, "skip" counts it')),
    "truncation_strategy": Answer(
        values={
            "delete": '"on_too_long": "skip"',
            "raise": '"on_too_long": "error"',
            "*": '"on_too_long": "truncate_turns"',
        },
        says="no image is ever cut",
    ),
    "target_modules": _TARGETS,
    **each("target_regex lora_target_regex", same("lora_target_modules")),
    **each("modules_to_save lora_modules_to_save", says('the projector trains whole unless "projector" is "frozen"')),
    "lora_dropout_p": same("lora_dropout"),
    "lora_bias_trainable": Answer(
        values={"none": "", "all": '"lora_bias": "all"'}, otherwise="lora_bias is none, lora_only or all"
    ),
    **each("lorap_lr_ratio lora_lr_ratio", same("lora_plus_scale")),
    "use_rslora": same("rslora"),
    # true and gaussian both begin with B at zero, so training starts from the same model as here
    **each("init_weights init_lora_weights", Answer(values={"true": "", "gaussian": "", "pissa*": '"pissa": true'})),
    "lora_dtype": says("adapters are held in the precision of the run; leave it out"),
    # false trains the part whole, or puts adapters on it where the run is a LoRA run; hence the remark
    "freeze_vit": policy("vision_tower", says=_BY_ADAPTERS),
    "freeze_aligner": policy("projector", says=_BY_ADAPTERS),
    "freeze_llm": policy("language_model", says=_BY_ADAPTERS),
    "vit_lr": same("mm_vision_tower_lr"),
    "aligner_lr": same("mm_projector_lr"),
    "freeze_parameters": says('freeze_include takes shell patterns of names, e.g. ["*llama*"]'),
    **each(
        "trainable_parameters additional_trainable_parameters",
        says("freeze_exclude takes shell patterns of names that train although freeze_include matches them"),
    ),
    "freeze_parameters_ratio": says("parts are frozen whole: vision_tower, projector, language_model"),
    **each("quant_bits quantization_bit", BITS),
    **each(
        "quant_method bnb_4bit_quant_type bnb_4bit_comp_dtype bnb_4bit_compute_dtype bnb_4bit_use_double_quant "
        "bnb_4bit_quant_storage",
        _ONE_FORM,
    ),
    "torch_dtype": Answer(values=_PRECISION),
    "use_flash_attn": same("use_flash_attention"),
    "attn_impl": Answer(values={"flash*": '"use_flash_attention": true', "*": ""}),
    **each("vit_gradient_checkpointing vit_use_gc", says("recompute holds for the language model; leave it out")),
    "packing": same("mixtoken"),
    **each("lazy_tokenize streaming", ALWAYS),
    "eval_batch_size": same("per_device_eval_batch_size"),
    "neftune_alpha": Answer(write='"neftune": true, "neftune_noise_alpha": $'),
    "early_stop_interval": same("early_stopping_patience"),
    "only_save_model": same("ignore_save_lr_and_optim"),
    "resume_only_model": switch('"ignore_load_lr_and_optim": true'),
    "predict_with_generate": same("eval_with_do_generation"),
    "min_lr": same("min_learning_rate"),
    "system": _SYSTEM,
    **each("max_pixels rescale_image", NO_RESIZING),
    **each("loss_scale use_loss_scale", _ANSWERS_ALONE),
    "sequence_parallel_size": says("sequences are not split over cards"),
    # Its Megatron side, and PaddleFormers, name it as Megatron-LM does.
    "tensor_model_parallel_size": same("tensor_parallel_degree"),
    "vllm_tensor_parallel_size": says(
        "a training answers with the processes it has; chat and predict --tensor-parallel"
    ),
    "pipeline_model_parallel_size": says(
        "layers are not spread over cards; tensor_parallel_degree or sharding stage3 split them"
    ),
    **each("use_galore galore_rank galore_target_modules lisa_activated_layers lisa_step_interval", _OPTIMISERS),
    **each("vera_rank boft_block_size fourier_n_frequency reft_rank adalora_target_r adalora_init_r", _LORA_MATRICES),
    "use_hf": says('PADDLEMIX_HUB=modelscope or huggingface in the environment, or "modelscope:owner/name"'),
    "rlhf_type": says("preferences are not trained; `finetune` trains on answers"),
    **each(
        """dataset_num_proc preprocess_num_proc add_version add_output_dir_suffix create_checkpoint_symlink
        tuner_backend train_backend ignore_args_error check_model check_model_is_latest custom_register_path
        external_plugins acc_strategy load_args load_data_args self_cognition_sample model_name model_author device_map
        model_kwargs dataset_shuffle test_oom_error load_from_cache_file""",
        NOT_HERE,
    ),
}

# Variables of a configuration in Python, fields of its `model`, and flags of `xtuner train`: work_dir, resume,
# launcher, cfg_options.
XTUNER = {
    "llm_name_or_path": same("model_name_or_path"),
    "visual_encoder_name_or_path": same("mm_vision_tower"),
    "pretrained_pth": says(
        "convert it first (`xtuner convert pth_to_hf CONFIG PTH FOLDER`); the folder is a model_name_or_path"
    ),
    "data_root": same("image_root"),
    "prompt_template": template_answer(XTUNER_TEMPLATES),
    "batch_size": same("per_device_train_batch_size"),
    "accumulative_counts": same("gradient_accumulation_steps"),
    "max_epochs": same("num_train_epochs"),
    "lr": same("learning_rate"),
    "betas": says("adam_beta1 and adam_beta2 are two keys"),
    "max_norm": same("max_grad_norm"),
    "optim_type": says('"optim": "adamw" is the one optimiser; leave it out'),
    "evaluation_freq": same("sample_steps"),
    "evaluation_inputs": says('sample_prompts: [{"image": PATH, "question": TEXT}], with sample_steps'),
    "evaluation_images": says('sample_prompts: [{"image": PATH, "question": TEXT}], with sample_steps'),
    "SYSTEM": _SYSTEM,
    "freeze_visual_encoder": policy("vision_tower"),
    "llm_lora": says('"lora": true with lora_rank, lora_alpha and lora_dropout'),
    "visual_encoder_lora": says('"vision_tower": "lora" with vision_lora_rank and vision_lora_alpha'),
    "quantization_config": says('"quantize_base": "nf4" holds the language model in 4 bits'),
    "visual_select_layer": same("mm_vision_select_layer"),
    "pad_image_to_square": switch('"image_aspect_ratio": "pad"', '"image_aspect_ratio": "square"'),
    "work_dir": same("output_dir"),
    "resume": same("resume_from_checkpoint"),
    "launcher": says("start it with `paddlemix launch`"),
    "cfg_options": says("key=value after the file"),
    "offline_processed_text_folder": ALWAYS,
    "optim_wrapper": says("learning_rate, weight_decay, max_grad_norm and gradient_accumulation_steps are keys"),
    "param_scheduler": says("lr_scheduler_type, warmup_ratio and warmup_steps are keys"),
}

# Declared below llamafactory/hparams/ in ModelArguments (quantization_*, flash_attn, compute_dtype, image_*_pixels),
# DataArguments (template, cutoff_len, *_dir, val_size, packing) and FinetuningArguments (stage, lora_*, freeze_*,
# pissa_init, early_stopping_steps).
LLAMA_FACTORY = {
    "stage": Answer(
        values={"sft": ""},
        says="conversations are trained by `finetune`, captions by `pretrain`; nothing else is built",
    ),
    "finetuning_type": _ADAPTER,
    "template": template_answer(LLAMA_FACTORY_TEMPLATES),
    "cutoff_len": same("max_length", "visual tokens included"),
    "lora_target": _TARGETS,
    "additional_target": says('the projector trains whole unless "projector" is "frozen"'),
    "adapter_name_or_path": same("lora_path"),
    "dataset_dir": says("data_files are paths; there is no list of registered names"),
    "media_dir": same("image_root"),
    "eval_dataset": Answer(write=EVAL_FILES),
    "val_size": _SPLIT,
    "max_samples": _SOME,
    **each("mix_strategy interleave_probs", _WEIGHTS),
    "quantization_bit": BITS,
    **each("quantization_method quantization_type double_quantization", _ONE_FORM),
    "use_rslora": same("rslora"),
    "pissa_init": same("pissa"),
    "loraplus_lr_ratio": same("lora_plus_scale"),
    "freeze_vision_tower": policy("vision_tower"),
    "freeze_multi_modal_projector": policy("projector"),
    "freeze_language_model": policy("language_model"),
    "flash_attn": Answer(values={"fa2": '"use_flash_attention": true', "*": ""}),
    **each("packing neat_packing", same("mixtoken")),
    **each("image_max_pixels image_min_pixels", NO_RESIZING),
    **each("train_on_prompt mask_history", _ANSWERS_ALONE),
    "pure_bf16": switch('"bf16": true, "fp16_opt_level": "O2"'),
    "compute_dtype": Answer(values=_PRECISION),
    "disable_gradient_checkpointing": switch('"recompute": false', '"recompute": true'),
    "early_stopping_steps": same("early_stopping_patience"),
    "default_system": _SYSTEM,
    "cache_dir": LLAVA["cache_dir"],
    **each("plot_loss compute_accuracy", says("leave it out: loss curve and token accuracy are always written")),
    **each("use_galore use_apollo use_badam use_muon use_adam_mini", _OPTIMISERS),
    **each("use_llama_pro oft_rank freeze_trainable_layers", _LORA_MATRICES),
    "enable_liger_kernel": same("use_flash_attention", "paddle's fused kernels"),
    "use_swanlab": says("report_to names trackers: visualdl, tensorboard, wandb"),
    "pref_loss": says("preferences are not trained; `finetune` trains on answers"),
    "streaming": ALWAYS,
    **each(
        """overwrite_cache preprocessing_num_workers preprocessing_batch_size tokenized_path trust_remote_code
        use_unsloth use_fast_tokenizer resize_vocab low_cpu_mem_usage infer_backend upcast_layernorm shift_attn
        rope_scaling create_new_adapter print_param_status disable_shuffling""",
        NOT_HERE,
    ),
}

# Names of LoraConfig, which users copy from Python code.
PEFT = {
    "r": same("lora_rank"),
    "bias": same("lora_bias"),
    "task_type": says("leave it out"),
    "init_lora_weights": SWIFT["init_lora_weights"],
    "target_modules": _TARGETS,
    "use_rslora": same("rslora"),
}
