"""Keys of other programs' training files and scripts, and what to write here: LLaVA, transformers, InternVL.

`toolchain_keys.py` has those of ms-swift, XTuner and LLaMA-Factory; `answers.py` says how a line is
read.

Sources: haotian-liu/LLaVA c121f04 llava/train/train.py; LLaVA-VL/LLaVA-NeXT df17966 llava/train/train.py;
transformers 4.55.4 TrainingArguments; OpenGVLab/InternVL 2410d1d internvl_chat_llava/llava/train/train.py and
internvl_chat/internvl/train/internvl_chat_finetune.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from paddlemix.config.foreign.answers import Answer, each, policy, same, says, switch
from paddlemix.config.foreign.templates import LLAVA_TEMPLATES, Named

# Answers that several programs share; `toolchain_keys.py` takes them from here.
TRAIN_FILES = '"dataset": {"train": [{"data_files": $}]}'
EVAL_FILES = '"dataset": {"eval": [{"data_files": $}]}'
# 8 and 4 bits mean QLoRA there; 16 and 32 are no quantisation, the default here.
BITS = Answer(values={"4": '"quantize_base": "nf4"', "8": '"quantize_base": "int8"', "16": "", "32": "", "null": ""})
# Recognised by the file's name, as DeepSpeed's files are usually called (zero3_offload.json): the file itself is not
# read.  There is no offload to the host here.
SHARDING = Answer(
    values={
        "*zero1*": '"sharding": "stage1"',
        "*zero2*": '"sharding": "stage2"',
        "*zero3*": '"sharding": "stage3"',
    },
    says="sharding splits over cards what DeepSpeed's stages split; on one card leave it out",
)
# Answers that several keys share have names, so that their words stay the same.
RECOMPUTE = same("recompute")
# For switches that have no counterpart and change nothing that is trained.
NOT_HERE = says("paddlemix has no equivalent; leave it out")
ALWAYS = says("leave it out, it is always so here")
NOTHING_UPLOADED = says("nothing is uploaded; use the hub's own tool on output_dir")
# Several programs shrink large images first, which loses detail for anyres.
NO_RESIZING = says("images are never shrunk before they are cut into tiles; leave it out")


def template_answer(names: Mapping[str, Named]) -> Answer:
    """The answer for a key that names a template by another program's names."""
    # Names whose text has no counterpart here are left to the template's own error.
    values = {name: f'"chat_template": "{named.ours}"' for name, named in names.items() if named.ours}
    return Answer(values=values, write='"chat_template": $')


# Declared in LLaVA's train.py: freeze_backbone, tune_mm_mlp_adapter and mm_use_* by ModelArguments; data_path,
# image_folder, lazy_preprocess and is_multimodal by DataArguments; lora_*, bits, quant_type, double_quant,
# model_max_length, freeze_mm_mlp_adapter and cache_dir by TrainingArguments.
LLAVA = {
    "lora_enable": same("lora"),
    "lora_r": same("lora_rank"),
    "lora_weight_path": same("lora_path"),
    "bits": BITS,
    "quant_type": Answer(values={"nf4": '"quantize_base": "nf4"'}, otherwise="quantize_base has nf4 and int8"),
    "double_quant": says("leave it out; the scales of nf4 are always held in 8 bits"),
    "data_path": Answer(write=TRAIN_FILES),
    "image_folder": same("image_root"),
    "lazy_preprocess": ALWAYS,
    "is_multimodal": says("leave it out; each record says whether it has an image"),
    "model_max_length": same("max_length", "visual tokens included"),
    # false is left out: language_model null already means lora or full
    "freeze_backbone": switch('"language_model": "frozen"'),
    "tune_mm_mlp_adapter": switch(
        '"language_model": "frozen", "vision_tower": "frozen", "projector": "full"', says="`pretrain` sets these itself"
    ),
    "freeze_mm_mlp_adapter": policy("projector"),
    "unfreeze_mm_vision_tower": policy("vision_tower", frozen_when=False),
    "mm_use_im_start_end": Answer(
        values={"false": ""}, otherwise="a model keeps what its config.json says; a new projector is made without"
    ),
    "mm_use_im_patch_token": says("leave it out; images need no token of their own"),
    "cache_dir": says("where downloads are kept is said by HF_HOME"),
    "mpt_attn_impl": says("MPT models are not read"),
    "group_by_varlen": same("group_by_length"),
}
# Declared in LLaVA-NeXT's train.py: mm_* by ModelArguments, the rest by DataArguments.
LLAVA_NEXT = {
    "mm_tunable_parts": Answer(
        values={
            "mm_mlp_adapter": '"language_model": "frozen", "vision_tower": "frozen", "projector": "full"',
            "mm_mlp_adapter,mm_language_model": '"language_model": "full", "projector": "full"',
            "mm_vision_tower,mm_mlp_adapter,mm_language_model": (
                '"vision_tower": "full", "projector": "full", "language_model": "full"'
            ),
        }
    ),
    "image_crop_resolution": says("vision_image_size is the side of the tower's tiles"),
    "video_folder": says("videos are not read"),
    "frames_upbound": says("videos are not read"),
    "mm_resampler_type": says("there is no resampler between tower and projector"),
}

# TrainingArguments of transformers 4.55.4 that PaddleNLP's lacks.  A name that both have is a key of ours and must not
# be here: it would never be looked up.
_PLAIN_TRANSFORMERS = """dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor ddp_backend
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_timeout save_safetensors logging_nan_inf_filter eval_do_concat_batches
    batch_eval_metrics include_inputs_for_metrics include_for_metrics log_level log_level_replica tf32
    half_precision_backend fp16_backend
    use_ipex jit_mode_eval tpu_num_cores tpu_metrics_debug torch_empty_cache_steps accelerator_config
    debug use_legacy_prediction_loop length_column_name ray_scope mp_parameters use_mps_device
    gradient_checkpointing_kwargs
        include_tokens_per_second use_reentrant_gc eval_use_gather_object restore_callback_states_from_checkpoint
    full_determinism fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap liger_kernel_config
    eval_delay torchdynamo torch_compile torch_compile_backend torch_compile_mode"""
# TrainingArguments of transformers, which all these scripts build on.
TRANSFORMERS = {
    "deepspeed": SHARDING,
    # any other text switches FSDP on; full_shard, the usual one, splits the weights as stage3 does
    "fsdp": Answer(values={"": "", "false": "", "[]": "", "*": '"sharding": "stage3"'}),
    "gradient_checkpointing": RECOMPUTE,
    "eval_strategy": same("evaluation_strategy"),
    "use_cpu": switch('"device": "cpu"'),
    "data_seed": says("seed decides the order of the data too"),
    "per_gpu_train_batch_size": same("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": same("per_device_eval_batch_size"),
    "save_only_model": same("ignore_save_lr_and_optim"),
    "include_num_input_tokens_seen": same("count_trained_tokens"),
    # true is the mean over the tokens of all devices, false the mean of the devices' means
    "average_tokens_across_devices": switch('"loss_reduction": "tokens"', '"loss_reduction": "micro_batch"'),
    "lr_scheduler_kwargs": says("num_cycles, lr_end, power and min_learning_rate are keys of their own"),
    "optim_args": says("adam_beta1, adam_beta2 and adam_epsilon are keys of their own"),
    "eval_on_start": says("evaluation begins after the first eval_steps or epoch"),
    "label_smoothing_factor": says("labels are not smoothed; leave it out"),
    "adafactor": switch('"optim": "adamw"', says="the one optimiser"),
    "auto_find_batch_size": says("`--dry-run` says what fits; set per_device_train_batch_size"),
    "optim_target_modules": NOT_HERE,
    "use_liger_kernel": same("use_flash_attention", "paddle's fused kernels"),
    **each(_PLAIN_TRANSFORMERS, NOT_HERE),
    **each(
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision "
        "push_to_hub_model_id push_to_hub_organization push_to_hub_token",
        NOTHING_UPLOADED,
    ),
}

# Declared in internvl_chat_finetune.py: paths, freeze_*, unfreeze_*, use_*_lora, vision_select_layer, grad_checkpoint
# and drop_path_rate by ModelArguments; sizes, conv_style, meta_path, tiles and packing by DataTrainingArguments.
INTERNVL = {
    "vision_path": same("mm_vision_tower"),
    "llm_path": same("model_name_or_path"),
    "mlp_path": same("pretrain_mm_mlp_adapter"),
    "freeze_llm": policy("language_model"),
    "freeze_mlp": policy("projector"),
    "freeze_backbone": policy("vision_tower"),
    "unfreeze_vit_layers": says('the tower trains whole ("vision_tower": "full") or not at all'),
    "unfreeze_lm_head": says('the output layer trains with "language_model": "full"'),
    "tune_vit_pos_embedding": says('positions train with the whole tower: "vision_tower": "full"'),
    # 0 is off, any other number the rank
    "use_llm_lora": Answer(values={"0": "", "*": '"lora": true, "lora_rank": $'}, says="its number is the rank"),
    "use_backbone_lora": Answer(
        values={"0": "", "*": '"vision_tower": "lora", "vision_lora_rank": $'}, says="its number is the rank"
    ),
    "vision_select_layer": same("mm_vision_select_layer"),
    "force_image_size": same("vision_image_size"),
    "grad_checkpoint": RECOMPUTE,
    "drop_path_rate": says("the tower drops no layers; leave it out"),
    "max_seq_length": same("max_length"),
    "conv_style": same("chat_template"),
    "meta_path": says(
        'write its entries into dataset: {"train": [{"data_files": ANNOTATION, "image_root": ROOT, "weight": '
        "REPEAT_TIME}]}"
    ),
    "dynamic_image_size": switch('"image_aspect_ratio": "anyres"', '"image_aspect_ratio": "pad"'),
    "max_dynamic_patch": says("image_grid_pinpoints lists the grids that anyres may choose from"),
    "min_dynamic_patch": says("image_grid_pinpoints lists the grids that anyres may choose from"),
    "use_thumbnail": says("anyres always puts the whole image before its tiles"),
    "use_packed_ds": same("mixtoken"),
    "max_packed_tokens": same("max_length"),
    "use_data_resampling": says("give entries of dataset a weight"),
    "normalize_type": says("pixels are normalised as the tower's preprocessor_config.json says"),
    "use_liger": same("use_flash_attention", "paddle's fused kernels"),
    "strict_mode": Answer(values={"true": '"on_too_long": "error"', "false": ""}),
    "loss_reduction_all_gather": ALWAYS,
    **each("down_sample_ratio ps_version", says("InternVL's pixel shuffle is not part of LLaVA's models")),
    **each("min_num_frame max_num_frame", says("videos are not read")),
    **each("use_fast_tokenizer num_images_expected max_buffer_size log_freq replacement allow_overflow", NOT_HERE),
}

# Values of our own keys that are another program's.
VALUES = {
    "resume_from_checkpoint": (
        "transformers",
        Answer(
            values={"true": "", "false": '"overwrite_output_dir": true'},
            says="a run resumes from the newest checkpoint in output_dir without being asked",
        ),
    ),
    # a policy here, a model's name in LLaVA; reached only by a value that is not a policy
    "vision_tower": ("LLaVA", same("mm_vision_tower")),
    "optim": ("transformers", Answer(values={"adamw_*": '"optim": "adamw"', "paged_adamw*": '"optim": "adamw"'})),
    "dataset": ("ms-swift and LLaMA-Factory", Answer(write=TRAIN_FILES)),
    "dtype": (
        "ms-swift",
        Answer(
            values={
                "bf16": '"dtype": "bfloat16"',
                "fp16": '"dtype": "float16"',
                "fp32": '"dtype": "float32"',
                "auto": "",
            }
        ),
    ),
    "device": (
        "torch",
        Answer(values={"cuda": '"device": "gpu"', "cuda:*": '"device": "gpu"', "mps": '"device": "cpu"'}),
    ),
    "lora_target_modules": (
        "ms-swift",
        Answer(values={"ALL": '"lora_target_modules": "all-linear"', "DEFAULT": '"lora_target_modules": "all-linear"'}),
    ),
    "image_aspect_ratio": (
        "LLaVA-NeXT",
        Answer(
            values={"anyres_max_*": '"image_aspect_ratio": "anyres"'},
            says="another computation: all tokens of every tile are kept, where LLaVA-NeXT shrinks those of many tiles",
        ),
    ),
    "image_grid_pinpoints": (
        "LLaVA",
        says("write a list of [width, height], e.g. [[336, 672], [672, 336], [672, 672]]"),
    ),
    "lr_scheduler_type": (
        "transformers",
        Answer(
            values={
                "cosine_with_min_lr": '"lr_scheduler_type": "cosine"',
                "cosine_with_restarts": '"lr_scheduler_type": "cosine"',
            },
            says="min_learning_rate is the least rate, num_cycles the waves",
        ),
    ),
    "version": ("LLaVA", template_answer(LLAVA_TEMPLATES)),
}
# Keys of an entry of `dataset` in InternVL's meta file, LLaVA-NeXT's list and LLaMA-Factory's dataset_info.json.
ENTRY_KEYS = {
    "annotation": ("InternVL", same("data_files")),
    "root": ("InternVL", same("image_root")),
    "repeat_time": ("InternVL", same("weight")),
    "data_augment": ("InternVL", NOT_HERE),
    "json_path": ("LLaVA-NeXT", same("data_files")),
    "sampling_strategy": ("LLaVA-NeXT", says('"split": "[:1000]" takes the first records')),
    "file_name": ("LLaMA-Factory", same("data_files")),
    "formatting": ("LLaMA-Factory", says("leave it out; the form of records is recognised")),
    "columns": ("LLaMA-Factory", says("leave it out; the form of records is recognised")),
    "tags": ("LLaMA-Factory", says("leave it out; the form of records is recognised")),
    "path": ("XTuner", same("data_files")),
    "data_path": ("LLaVA", same("data_files")),
    "image_folder": ("LLaVA", same("image_root")),
}
