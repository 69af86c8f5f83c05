"""Names of other programs' conversation templates and recipes, and ours.

A template whose text is the same here has `exact`; of another the nearest is named, and said to be that.

Sources: InternLM/xtuner 0.1.23 xtuner/utils/templates.py and configs/llava; ms-swift 4.6.0 swift/template/templates/
llava.py and 2.6.1 swift/llm/utils/template.py; LLaMA-Factory 0.9.5 llamafactory/data/template.py; OpenGVLab/InternVL
2410d1d internvl_chat/internvl/conversation.py and internvl_chat_llava/scripts_internvl.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Named:
    """A template of another program.

    Args:
        ours: our name of it, or of the nearest; None where none is near.
        exact: whether the text is the same.
    """

    ours: str | None
    exact: bool = True


def _none(names: str) -> dict[str, Named]:
    # Known names without a near relative, so that the answer can say so.
    return {name: Named(None) for name in names.split()}


# Many of XTuner's texts differ from LLaVA's in a space or a line break: those have templates of their own here.
XTUNER_TEMPLATES = {
    "internlm_chat": Named("xtuner_internlm_chat"),
    "internlm2_chat": Named("xtuner_internlm2_chat"),
    # qwen_chat has the text of internlm2_chat and one more stop word; wizardlm has that of vicuna
    "qwen_chat": Named("xtuner_internlm2_chat"),
    "llama3_chat": Named("xtuner_llama3_chat"),
    "phi3_chat": Named("xtuner_phi3_chat"),
    "vicuna": Named("xtuner_vicuna"),
    "wizardlm": Named("xtuner_vicuna"),
    "mistral": Named("mistral_instruct", exact=False),
    "mixtral": Named("mistral_instruct", exact=False),
    "zephyr": Named("mistral_zephyr", exact=False),
    "gemma": Named("gemma_instruct", exact=False),
    "llama2_chat": Named("llama_2", exact=False),
    **_none(
        "default moss_sft code_llama_chat chatglm2 chatglm3 baichuan_chat baichuan2_chat wizardcoder deepseek_coder "
        "deepseekcoder deepseek_moe deepseek_v2 minicpm cohere_chat"
    ),
}
# Names of 4.6.0 have underscores (llava1_6_mistral_hf), those of 2.6.1 dashes (llava-mistral).
SWIFT_TEMPLATES = {
    "llava1_5_hf": Named("vicuna_v1", exact=False),  # no system text, a line break before ASSISTANT
    "llava1_5": Named("vicuna_v1", exact=False),
    "llava1_6_vicuna_hf": Named("llava_v1"),
    "llava-vicuna": Named("llava_v1"),
    "llava1_6_mistral_hf": Named("mistral_instruct", exact=False),
    "llava1_6_mistral": Named("mistral_instruct", exact=False),
    "llava-mistral": Named("mistral_instruct", exact=False),
    "llava1_6_yi_hf": Named("chatml_direct", exact=False),
    "llava1_6_yi": Named("chatml_direct", exact=False),
    "llava-yi": Named("chatml_direct", exact=False),
    "llama3_llava_next_hf": Named("xtuner_llama3_chat"),
    "llama3_llava_next": Named("llava_llama_3"),
    "llama3-llava-next": Named("llava_llama_3"),
    "llava_next_qwen_hf": Named("qwen_1_5"),
    "llava_next_qwen": Named("qwen_1_5"),
    "llava-qwen": Named("qwen_1_5"),
    "llava_llama3_hf": Named("xtuner_llama3_chat"),
    "internvl": Named("internlm2_chat", exact=False),
    **_none("default internlm internlm2 chatml llama llama3 qwen2_5"),
}
# Names of `register_template` in llamafactory/data/template.py.
LLAMA_FACTORY_TEMPLATES = {
    "llava": Named("vicuna_v1"),
    "llava_next": Named("vicuna_v1"),
    "vicuna": Named("vicuna_v1"),
    "llava_next_llama3": Named("xtuner_llama3_chat"),
    "llava_next_mistral": Named("mistral_instruct", exact=False),
    "llava_next_qwen": Named("qwen_1_5"),
    "llava_next_yi": Named("xtuner_internlm2_chat"),
    **_none("default empty intern2 llama2 llama3 mistral qwen yi"),
}
# InternVL's file is a copy of LLaVA's with names of its own.
INTERNVL_TEMPLATES = {
    "internlm2-chat": Named("internlm2_chat"),
    "phi3-chat": Named("phi3_chat"),
    "Hermes-2": Named("chatml_direct"),
    **_none("internvl2_5"),
}
# Keys of conv_templates in llava/conversation.py; ours have their names, only v1 is vicuna_v1 here.
LLAVA_TEMPLATES = {
    "v1": Named("vicuna_v1"),
    "v0": Named("v0"),
    "plain": Named("plain"),
    "llava_v1": Named("llava_v1"),
    "mpt": Named("mpt"),
    "chatml_direct": Named("chatml_direct"),
    "mistral_instruct": Named("mistral_instruct"),
    "llava_llama_2": Named("llava_llama_2"),
}
FOREIGN_TEMPLATES = {
    "LLaVA": LLAVA_TEMPLATES,
    "InternVL": INTERNVL_TEMPLATES,
    "XTuner": XTUNER_TEMPLATES,
    "ms-swift": SWIFT_TEMPLATES,
    "LLaMA-Factory": LLAMA_FACTORY_TEMPLATES,
}

# Recipe of another program, without its ending -> the file here, below paddlemix/config/llava/, and what to set beside.
_INTERN_VIT_448 = "mm_vision_tower=OpenGVLab/InternViT-6B-448px-V1-0 mm_vision_select_layer=-4"
_VICUNA_7B = "model_name_or_path=lmsys/vicuna-7b-v1.5"
_PRETRAINED = "model_name_or_path=FOLDER_OF_THE_PRETRAINED_MODEL"
# Recipe files by their stem, with ours and what differs.
FOREIGN_RECIPES = {
    "XTuner": {
        # configs/llava/official: LLaVA's own recipes; our pretrain.json names 13B, so 7B has to be set
        "llava_v15_7b_pretrain": ("pretrain.json", "model_name_or_path=lmsys/vicuna-7b-v1.5"),
        "llava_v15_13b_pretrain": ("pretrain.json", ""),
        "llava_v15_7b_finetune": ("v1_5/sft_argument.json", _PRETRAINED),
        "llava_v15_13b_finetune": ("v1_5/sft_argument.json", _PRETRAINED),
        "llava_v15_7b_finetune_lora": ("v1_5/lora_sft_argument.json", _PRETRAINED),
        "llava_v15_13b_finetune_lora": ("v1_5/lora_sft_argument.json", _PRETRAINED),
        "llava_vicuna_7b_v15_clip_vit_large_p14_336_e1_gpu8_pretrain": ("pretrain.json", _VICUNA_7B),
        "llava_vicuna_13b_v15_clip_vit_large_p14_336_e1_gpu8_pretrain": ("pretrain.json", ""),
        "llava_vicuna_7b_v15_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune": (
            "v1_5/qlora_sft_argument.json",
            "",
        ),
        "llava_vicuna_13b_v15_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune": (
            "v1_5/qlora_sft_argument.json",
            _PRETRAINED,
        ),
        "llava_internlm_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain": ("internlm/pretrain.json", ""),
        "llava_internlm_chat_7b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune": (
            "internlm/qlora_sft_argument.json",
            "",
        ),
        "llava_internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain": ("internlm2/pretrain.json", ""),
        "llava_internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8_finetune": ("internlm2/sft_argument.json", ""),
        "llava_internlm2_chat_7b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune": (
            "internlm2/qlora_sft_argument.json",
            "",
        ),
        "llava_internlm2_chat_20b_clip_vit_large_p14_336_e1_gpu8_pretrain": (
            "internlm2/pretrain.json",
            "model_name_or_path=internlm/internlm2-chat-20b",
        ),
        "llava_internlm2_chat_20b_clip_vit_large_p14_336_e1_gpu8_finetune": (
            "internlm2/sft_argument.json",
            _PRETRAINED,
        ),
        "llava_internlm2_chat_20b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune": (
            "internlm2/qlora_sft_argument.json",
            _PRETRAINED,
        ),
        "llava_llama3_8b_instruct_clip_vit_large_p14_336_e1_gpu8_pretrain": ("llama3/xtuner_pretrain.json", ""),
        "llava_llama3_8b_instruct_full_clip_vit_large_p14_336_lora_e1_gpu8_finetune": (
            "llama3/xtuner_sft_vision_lora.json",
            "",
        ),
    },
    "InternVL": {
        "pretrain_internvit6b_224to336_vicuna7b": ("internvl/pretrain_336.json", ""),
        "pretrain_internvit6b_224to336_vicuna13b": (
            "internvl/pretrain_336.json",
            "model_name_or_path=lmsys/vicuna-13b-v1.5",
        ),
        "finetune_internvit6b_224to336_vicuna7b": ("internvl/sft_336.json", ""),
        "finetune_internvit6b_224to336_vicuna13b": ("internvl/sft_336.json", ""),
        "pretrain_internvit6b_448_v1_5_vicuna13b": ("internvl/pretrain_448.json", ""),
        "pretrain_internvit6b_448_v1_2_vicuna13b": (
            "internvl/pretrain_448.json",
            "mm_vision_tower=OpenGVLab/InternViT-6B-448px-V1-2",
        ),
        "pretrain_internvit6b_448_vicuna7b": ("internvl/pretrain_448.json", f"{_VICUNA_7B} {_INTERN_VIT_448}"),
        "pretrain_internvit6b_448_vicuna13b": ("internvl/pretrain_448.json", _INTERN_VIT_448),
        "finetune_internvit6b_448_v1_5_vicuna13b": ("internvl/sft_448.json", ""),
        "finetune_internvit6b_448_v1_2_vicuna13b": ("internvl/sft_448.json", ""),
        "finetune_internvit6b_448_vicuna7b": ("internvl/sft_448.json", ""),
        "finetune_internvit6b_448_vicuna13b": ("internvl/sft_448.json", ""),
    },
    "LLaVA": {
        "finetune": ("v1_5/sft_argument.json", _PRETRAINED),
        "finetune_lora": ("v1_5/lora_sft_argument.json", _PRETRAINED),
        "finetune_task_lora": ("v1_5/task_lora.json", ""),
        "finetune_qlora": ("v1_5/lora_sft_argument.json", f"{_PRETRAINED} quantize_base=nf4"),
        "pretrain": ("pretrain.json", ""),
    },
}
