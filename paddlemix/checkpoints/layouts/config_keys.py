"""The keys of every kind of `config.json`, with a rule for each value: read, refused or harmless.

    values = take(read_json(path), ORIGINAL_KEYS, str(path))

Ranges are wide enough for every published model and narrow enough that a slipped digit is outside.
Sources: configuration classes of transformers 4.36 to 5, PaddleNLP 3.0.0b4, LLaVA, LLaVA-NeXT and InternVL.
"""

from __future__ import annotations

from paddlemix.declared import Keys, Rule, choice, either, flag, integer, items, key_names, mapping, number, text
from paddlemix.errors import UserError

FORMAT_KEY, FORMAT_VERSION = "paddlemix_format", 1
TEMPLATE_KEY = "chat_template_name"  # our own key in config.json of layouts that have none
BASE_KEY = "paddlemix_vocab_size"  # our own key in llava-hf's config.json: rows before those that were added

# sizes, all of them bounded: a file may ask for any amount of memory or time otherwise
_WIDTH, _LAYERS, _HEADS, _ROWS = integer(1, 1 << 20), integer(1, 1000), integer(1, 1 << 14), integer(1, 1 << 24)
_SIDE, _DEVIATION, _ID = integer(1, 1 << 16), number(0, 100), integer(-1, 1 << 31)

# What transformers' and PaddleNLP's base classes write into every file, settings of training and of generation
# (`generation_config.json` has its own rules), and what is said twice.
_EVERYWHERE = key_names(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
    attention_dropout attention_probs_dropout_prob attn_implementation auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward classifier_dropout context_parallel_degree cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dpo_config dropout dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id fuse_sequence_parallel_allreduce gradient_checkpointing hidden_dropout id2label
    immediate_clear_past_key_value is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty
    lm_shift_labels long_sequence_init_args long_sequence_strategy_name long_sequence_strategy_type max_length
    max_sequence_length min_length no_recompute_layers no_repeat_ngram_size num_beam_groups num_beams num_choices
    num_return_sequences offload_recompute_inputs output_attentions output_hidden_states output_scores pad_token_id
    paddlenlp_version pipeline_parallel_degree pp_recompute_interval prefix pretraining_tp problem_type pruned_heads
    quantization_config recompute recompute_granularity recompute_use_reentrant refined_recompute
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_parallel_degree
    sep_token_id seq_length sequence_parallel suppress_tokens task_specific_params temperature tensor_parallel_degree
    tensor_parallel_output tensor_parallel_rank tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p unsloth_version unsloth_fixed use_bfloat16 use_cache
    use_cachekv_int8 use_flash_attention use_flash_attention_for_generation use_fused_dropout_add use_fused_linear
    use_fused_linear_cross_entropy use_fused_rms_norm use_fused_rope use_last_token_for_generation virtual_pp_degree
    """
)

_TEXT_READ = {
    "model_type": text,
    "vocab_size": _ROWS,
    "hidden_size": _WIDTH,
    "intermediate_size": integer(1, 1 << 24),
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": integer(1, 1 << 16),
    "hidden_act": text,
    "max_position_embeddings": integer(1, 1 << 31),
    "rms_norm_eps": number(0, 1),
    "rope_theta": number(1e-3, 1e30),
    "rope_scaling": mapping,
    "rope_parameters": mapping,
    "rotary": mapping,
    "attention_bias": flag,
    "attention_output_bias": flag,
    "bias": flag,
    "sliding_window": integer(-(1 << 31), 1 << 31),
    "use_sliding_window": flag,
    "max_window_layers": integer(0, 1 << 16),
    "layer_types": items(text),
    "tie_word_embeddings": flag,
    "initializer_range": _DEVIATION,
    "eos_token_id": either(_ID, items(_ID)),
    "fuse_attention_qkv": flag,
    "fuse_attention_ffn": flag,
}
_ONE = either(choice(1), choice(1.0))
# What other decoders compute beyond ours; a file of a family of ours may carry such a key all the same.
_TEXT_REFUSED = {
    "mlp_bias": choice(False),
    "partial_rotary_factor": _ONE,
    "rope_scaling_factor": _ONE,
    "rope_scaling_type": choice("none"),
    "alibi": choice(False),
    "use_long_sequence_strategies": choice(False),
    "qk_layernorm": choice(False),
    "use_qk_norm": choice(False),
    "qk_norm": choice(False),
    "parallel_attn": choice(False),
    "parallel_residual": choice(False),
    "attn_logit_softcapping": choice(),
    "final_logit_softcapping": choice(),
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "embedding_multiplier": _ONE,
    "residual_multiplier": _ONE,
    "attention_multiplier": choice(),
    "query_pre_attn_scalar": choice(),
    "num_local_experts": _ONE,
    "num_experts": _ONE,
    "mm_resampler_type": choice("identity"),
}
# Mistral and Qwen2 have a window and a number of heads if a file does not mention them, and none if it says null.
_NULLABLE = frozenset({"sliding_window", "num_key_value_heads", "head_dim"})

_VISION_READ = {
    "hidden_size": _WIDTH,
    "intermediate_size": integer(1, 1 << 24),
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "image_size": _SIDE,
    "patch_size": _SIDE,
    "num_channels": choice(3),
    "hidden_act": text,
    "layer_norm_eps": number(0, 1e-3),  # Paddle's layer_norm takes no larger one; an RMS norm takes any
    "initializer_range": _DEVIATION,
    "initializer_factor": _DEVIATION,
    "norm_type": text,
    "qkv_bias": flag,
    "qk_normalization": flag,
    "layer_scale": _DEVIATION,
    "outer_norms": flag,
    "patch_bias": flag,
}
_VISION_HARMLESS = _EVERYWHERE | {"drop_path_rate", "projection_dim", "use_flash_attn", "vocab_size", "eos_token_id"}
_VISION_HARMLESS |= {"tie_word_embeddings", "cross_attention_hidden_size"}


def _read_layer(value: object) -> int:
    """Index of a tower's hidden state; transformers also allows a list of layers, whose features it concatenates."""
    rule = integer(-1000, 1000)
    if isinstance(value, list):
        if len(value) != 1:
            raise UserError(f"{value} joins the features of {len(value)} layers, which is not supported; allowed: one")
        value = value[0]
    return int(rule.read(value))


def _read_tower_name(value: object) -> str:
    [name] = value if isinstance(value, list) else [value]  # a ValueError where a list has none or several
    return str(text.read(name))


_LAYER = Rule("a whole number from -1,000 to 1,000", _read_layer)
_TEMPLATE = either(text, mapping)
PINPOINTS = either(text, items(items(integer(1, 1 << 16), 2, 2)))
_TOWER_NAME = Rule("a text, or a list of one", _read_tower_name)

_LLAVA_READ = {
    "mm_vision_tower": _TOWER_NAME,
    "mm_projector_type": text,
    "mm_vision_select_layer": _LAYER,
    "mm_vision_select_feature": choice("patch", "cls_patch"),
    "mm_patch_merge_type": text,
    "mm_use_im_start_end": flag,
    "unfreeze_mm_vision_tower": flag,
    "image_aspect_ratio": text,
    "image_grid_pinpoints": PINPOINTS,
    TEMPLATE_KEY: _TEMPLATE,
}
# What other LLaVA programs compute between tower and language model beyond ours.
_LLAVA_REFUSED = {
    "mm_dense_connector_type": choice("none"),
    "s2": choice(False),
    "image_fold": choice(),
}
_LLAVA_HARMLESS = key_names(
    """
    add_faster_video add_time_instruction faster_token_stride force_sample freeze_backbone freeze_mm_mlp_adapter
    freeze_mm_vision_resampler image_crop_resolution image_split_resolution lora_alpha lora_enable max_num_frames
    max_window_layers mm_hidden_size mm_newline_position mm_projector_lr mm_resampler_depth mm_resampler_dim
    mm_spatial_pool_mode mm_spatial_pool_stride mm_tunable_parts mm_use_im_patch_token mm_vision_tower_lr
    pos_skipping_range pretrain_mm_mlp_adapter tokenizer_model_max_length tokenizer_padding_side tune_mm_mlp_adapter
    tune_mm_vision_resampler tune_vit_pos_embedding unfreeze_language_model use_mm_proj use_pos_skipping version
    vision_tower vision_tower_pretrained img_size
    """
)

TEXT_KEYS = Keys(_TEXT_READ, _TEXT_REFUSED, _EVERYWHERE, _NULLABLE)
VISION_KEYS = Keys({**_VISION_READ, "model_type": text}, {}, _VISION_HARMLESS)
LANGUAGE_KEYS = Keys({**_TEXT_READ, TEMPLATE_KEY: _TEMPLATE}, _TEXT_REFUSED, _EVERYWHERE | _LLAVA_HARMLESS, _NULLABLE)
ORIGINAL_KEYS = Keys(
    {**_TEXT_READ, **_LLAVA_READ}, {**_TEXT_REFUSED, **_LLAVA_REFUSED}, _EVERYWHERE | _LLAVA_HARMLESS, _NULLABLE
)
HF_KEYS = Keys(
    {
        "model_type": text,
        "text_config": mapping,
        "vision_config": mapping,
        "vision_feature_layer": _LAYER,
        "vision_feature_select_strategy": choice("default", "full"),
        "image_grid_pinpoints": PINPOINTS,
        "tie_word_embeddings": flag,
        "image_token_index": _ID,
        "image_token_id": _ID,
        "eos_token_id": either(_ID, items(_ID)),
        "image_aspect_ratio": text,
        TEMPLATE_KEY: _TEMPLATE,
        BASE_KEY: _ROWS,
    },
    {
        "projector_hidden_act": choice("gelu"),
        "multimodal_projector_bias": choice(True),
        "use_image_newline_parameter": choice(True),
    },
    _EVERYWHERE | {"ignore_index", "image_seq_length", "vocab_size", "hidden_size", "initializer_range"},
)
HF_VISION_KEYS = Keys(
    {**_VISION_READ, "model_type": choice("clip_vision_model", "clip", because="of the towers only CLIP")},
    {},
    _VISION_HARMLESS,
)
OURS_KEYS = Keys(
    {
        FORMAT_KEY: integer(1, 1 << 31),
        "text_config": mapping,
        "vision_config": mapping,
        "mm_projector_type": text,
        "mm_vision_select_layer": _LAYER,
        "mm_vision_select_feature": choice("patch", "cls_patch"),
        "image_newline": flag,
        "eos_token_id": either(_ID, items(_ID)),
    },
    {},
    _EVERYWHERE | {"model_type"},
)
# config.json of the projector that XTuner keeps on its own.
XTUNER_PROJECTOR_KEYS = Keys(
    {"depth": integer(1, 100)},
    {"hidden_act": choice("gelu"), "bias": choice(True)},
    _EVERYWHERE
    | {"model_type", "visual_hidden_size", "llm_hidden_size", "chat_template_name"},  # ours; `xtuner` reads it
)
# Our own processor_config.json.
PROCESSOR_KEYS = Keys(
    {
        "chat_template": _TEMPLATE,
        "mm_use_im_start_end": flag,
        "image_aspect_ratio": text,
        "image_grid_pinpoints": PINPOINTS,
        "mm_patch_merge_type": text,
        "mm_vision_select_feature": choice("patch", "cls_patch"),
        "image_size": _SIDE,
        "patch_size": _SIDE,
        "image_mean": items(number(-1000, 1000), 3, 3),
        "image_std": items(number(-1000, 1000), 3, 3),
        "size": mapping,
        "resample": integer(0, 5),
        "rescale_factor": number(1e-9, 1e6),
        "do_normalize": flag,
        "eos_token_id": items(_ID),
    }
)
# A whole CLIP; old files contain its parts a second time, and those take precedence.
CLIP_KEYS = Keys(
    {"vision_config": mapping, "vision_config_dict": mapping, "model_type": text},
    {},
    _EVERYWHERE | {"text_config", "text_config_dict", "logit_scale_init_value", "projection_dim", "initializer_factor"},
)
