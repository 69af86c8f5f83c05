"""Sizes of published language models, as data.

Sources: the `config.json` of each repository as named at its entry; values that they leave out are those of the
family's configuration class, see `paddlemix.checkpoints.layouts.families`.
"""

from __future__ import annotations

from dataclasses import replace

from paddlemix.models.configuration import DecoderConfig

# Source: lmsys/vicuna-7b-v1.5 config.json; Llama-2-7B's sizes (Touvron et al. 2023, "Llama 2", appendix A)
_VICUNA_7B = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
# Source: lmsys/vicuna-13b-v1.5 config.json; Llama-2-13B's sizes
_VICUNA_13B = replace(
    _VICUNA_7B,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
)
# Source: mistralai/Mistral-7B-v0.1 config.json; Jiang et al. 2023, "Mistral 7B", table 1
_MISTRAL_7B_V01 = DecoderConfig(
    model_type="mistral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    sliding_window=4096,
)
# Source: mistralai/Mistral-7B-Instruct-v0.2 config.json: no window, slower positions
_MISTRAL_7B_V02 = replace(_MISTRAL_7B_V01, sliding_window=None, rope_theta=1e6)
# Source: 01-ai/Yi-34B and NousResearch/Nous-Hermes-2-Yi-34B config.json
_YI_34B = DecoderConfig(
    vocab_size=64000,
    hidden_size=7168,
    intermediate_size=20480,
    num_hidden_layers=60,
    num_attention_heads=56,
    num_key_value_heads=8,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=5e6,
)
# Source: meta-llama/Meta-Llama-3-8B config.json
_LLAMA_3_8B = DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
)
# Source: meta-llama/Llama-3.1-8B config.json: the same with a longer context
_LLAMA_31_8B = replace(
    _LLAMA_3_8B,
    max_position_embeddings=131072,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
# Source: Qwen/Qwen1.5-7B-Chat config.json
_QWEN_15_7B = DecoderConfig(
    model_type="qwen2",
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    attention_bias=True,
    attention_output_bias=False,
)
# Source: Qwen/Qwen1.5-72B-Chat config.json
_QWEN_15_72B = replace(
    _QWEN_15_7B,
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=24576,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=64,
)
# Source: Qwen/Qwen1.5-110B-Chat config.json
_QWEN_15_110B = replace(_QWEN_15_72B, intermediate_size=49152, num_key_value_heads=8)
# Source: Qwen/Qwen2-7B-Instruct config.json; Yang et al. 2024, "Qwen2", table 1
_QWEN_2_7B = replace(
    _QWEN_15_7B,
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)
# Source: Qwen/Qwen2-72B-Instruct config.json; table 1 as above
_QWEN_2_72B = replace(_QWEN_15_72B, intermediate_size=29568, num_key_value_heads=8)
# Source: internlm/internlm-chat-7b config.json
_INTERNLM_7B = DecoderConfig(
    model_type="internlm",
    vocab_size=103168,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_scaling={"rope_type": "dynamic", "factor": 1.0},
    attention_bias=True,
)
# Source: internlm/internlm2-chat-7b config.json; Cai et al. 2024, "InternLM2", table 2
_INTERNLM2_7B = DecoderConfig(
    model_type="internlm2",
    vocab_size=92544,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    rope_scaling={"rope_type": "dynamic", "factor": 2.0},
)
# Source: internlm/internlm2-chat-20b config.json; table 2 as above
_INTERNLM2_20B = replace(
    _INTERNLM2_7B, hidden_size=6144, intermediate_size=16384, num_hidden_layers=48, num_attention_heads=48
)

LANGUAGE_MODELS: dict[str, DecoderConfig] = {
    "vicuna-7b-v1.5": _VICUNA_7B,
    "vicuna-13b-v1.5": _VICUNA_13B,
    "mistral-7b-v0.1": _MISTRAL_7B_V01,
    "mistral-7b-instruct-v0.2": _MISTRAL_7B_V02,
    "yi-34b": _YI_34B,
    "nous-hermes-2-yi-34b": _YI_34B,
    "llama-3-8b-instruct": _LLAMA_3_8B,
    "llama-3.1-8b-instruct": _LLAMA_31_8B,
    "qwen1.5-7b-chat": _QWEN_15_7B,
    "qwen1.5-72b-chat": _QWEN_15_72B,
    "qwen1.5-110b-chat": _QWEN_15_110B,
    "qwen2-7b-instruct": _QWEN_2_7B,
    "qwen2-72b-instruct": _QWEN_2_72B,
    "internlm-chat-7b": _INTERNLM_7B,
    "internlm2-chat-7b": _INTERNLM2_7B,
    "internlm2-chat-20b": _INTERNLM2_20B,
}
# Name it is published under -> its entry above.  Source: the Hugging Face repositories.
LANGUAGE_MODEL_NAMES: dict[str, str] = {
    "lmsys/vicuna-7b-v1.5": "vicuna-7b-v1.5",
    "lmsys/vicuna-13b-v1.5": "vicuna-13b-v1.5",
    "mistralai/Mistral-7B-v0.1": "mistral-7b-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.2": "mistral-7b-instruct-v0.2",
    "01-ai/Yi-34B": "yi-34b",
    "NousResearch/Nous-Hermes-2-Yi-34B": "nous-hermes-2-yi-34b",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama-3-8b-instruct",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b-instruct",
    "Qwen/Qwen1.5-7B-Chat": "qwen1.5-7b-chat",
    "Qwen/Qwen1.5-72B-Chat": "qwen1.5-72b-chat",
    "Qwen/Qwen1.5-110B-Chat": "qwen1.5-110b-chat",
    "Qwen/Qwen2-7B-Instruct": "qwen2-7b-instruct",
    "Qwen/Qwen2-72B-Instruct": "qwen2-72b-instruct",
    "internlm/internlm-chat-7b": "internlm-chat-7b",
    "internlm/internlm2-chat-7b": "internlm2-chat-7b",
    "internlm/internlm2-chat-20b": "internlm2-chat-20b",
}
