"""The known conversation templates as data, and their names; a family is added here and nowhere else.

Sources: haotian-liu/LLaVA llava/conversation.py (commit c121f04); LLaVA-VL/LLaVA-NeXT (df17966) for llama_3, qwen and
gemma; OpenGVLab/InternVL internvl_chat_llava (2410d1d) for internlm, internlm2 and phi3; InternLM/xtuner
xtuner/utils/templates.py (0.1.23) for those that begin with xtuner_.
"""

from __future__ import annotations

from paddlemix.config.foreign.names import foreign_template, other_templates
from paddlemix.config.foreign.templates import XTUNER_TEMPLATES
from paddlemix.errors import UserError, did_you_mean
from paddlemix.log import logger
from paddlemix.processors.text.template import CONTENT, IMAGE, SYSTEM, Template

_XTUNER = "xtuner_"  # what names of XTuner's templates begin with


_CHAT = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
_CURIOUS_USER, _CURIOUS_HUMAN = _CHAT.format(who="user"), _CHAT.format(who="human")
_VISION_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_TAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAMA_2_TAG_SYSTEM = (
    "Answer the questions about the visual content that the user provides."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
_ORCA_SYSTEM = (
    "You are MistralOrca, a large language model trained by Alignment Lab AI. Write out your reasoning step-by-step "
    "to be sure you get the right answers!"
)
_QWEN_25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_INTERNLM_SYSTEM = (
    "A chat between a curious <|User|> and an <|Bot|>. The <|Bot|> gives helpful, detailed, and polite answers to the "
    "<|User|>'s questions.\n\n"
)
_TAGGED_IMAGE = f"<Image>{IMAGE}</Image>"


def _vicuna(name: str, system: str, image: str = IMAGE) -> Template:
    """`system USER: q ASSISTANT: a</s>USER: q ASSISTANT: a</s>`"""
    return Template(
        name=name,
        system=system,
        first_user=f"{SYSTEM} USER: {CONTENT} ",
        user=f"USER: {CONTENT} ",
        assistant="ASSISTANT:",
        answer=f" {CONTENT}",
        end="</s>",
        image=image,
    )


def _hashes(name: str, system: str, image: str = IMAGE) -> Template:
    """`system###Human: q###Assistant: a###`"""
    return Template(
        name=name,
        system=system,
        first_user=f"{SYSTEM}###Human: {CONTENT}###",
        user=f"Human: {CONTENT}###",
        assistant="Assistant:",
        answer=f" {CONTENT}",
        end="###",
        image=image,
    )


def _inst(name: str, system: str, between: str, image: str = IMAGE) -> Template:
    """`[INST] <<SYS>>system<</SYS>>q [/INST] a </s>[INST] q [/INST] a </s>`"""
    return Template(
        name=name,
        system=system,
        first_user=f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{CONTENT} [/INST]",
        user=f"[INST] {CONTENT} [/INST]",
        assistant="",
        answer=f" {CONTENT} ",
        end="</s>",
        between=between,
        image=image,
    )


def _chatml(name: str, system: str, after: str = "") -> Template:
    """`<|im_start|>system\\nsystem<|im_end|><|im_start|>user\\nq<|im_end|><|im_start|>assistant\\na<|im_end|>`

    Source of the further stops: InternVL's Hermes-2 and internlm2-chat; Qwen1.5's and Yi's generation_config.json.
    """
    user = f"<|im_start|>user\n{CONTENT}<|im_end|>{after}"
    return Template(
        name=name,
        system=system,
        first_user=f"<|im_start|>system\n{SYSTEM}<|im_end|>{after}{user}",
        user=user,
        assistant="<|im_start|>assistant\n",
        end="<|im_end|>",
        after_answer=after,
        stop=("<|im_start|>", "<|endoftext|>"),
    )


def _llama_3(name: str, system: str) -> Template:
    user = f"<|start_header_id|>user<|end_header_id|>\n\n{CONTENT}<|eot_id|>"
    return Template(
        name=name,
        system=system,
        first_user=f"<|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>{user}",
        user=user,
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        stop=("<|end_of_text|>",),  # Source: Meta-Llama-3-8B-Instruct generation_config.json, eos_token_id
    )


_TEMPLATES = (
    _vicuna("vicuna_v1", _CURIOUS_USER),
    _vicuna("llava_v1", _CURIOUS_HUMAN),
    _vicuna("v1_mmtag", _TAG_SYSTEM, _TAGGED_IMAGE),
    _hashes("v0", _CURIOUS_HUMAN),
    _hashes("v0_mmtag", _TAG_SYSTEM, _TAGGED_IMAGE),
    _inst("llama_2", _LLAMA_2_SYSTEM, between="<s>"),
    _inst("llava_llama_2", _VISION_SYSTEM, between="<s>"),
    _inst("llava_llama_2_simple", "Answer the questions about the visual content that the user provides.", "<s>"),
    _inst("llava_llama_2_mmtag", _LLAMA_2_TAG_SYSTEM, "<s>", _TAGGED_IMAGE),
    _inst("mistral_instruct", "", between=""),
    _chatml("chatml_direct", "Answer the questions."),
    _chatml("mpt", _MPT_SYSTEM),
    _chatml("mistral_orca", _ORCA_SYSTEM),
    _chatml("qwen_1_5", "You are a helpful assistant.", after="\n"),
    _chatml("qwen_2_5", _QWEN_25_SYSTEM, after="\n"),
    _chatml("internlm2_chat", "You are an AI assistant whose name is InternLM (书生·浦语)."),
    _llama_3("llava_llama_3", _VISION_SYSTEM),
    Template(
        name="mistral_zephyr",
        system="You are a helpful AI assistant.",
        first_user=f"<|system|>\n{SYSTEM}</s><|user|>\n{CONTENT}</s>",
        user=f"<|user|>\n{CONTENT}</s>",
        assistant="<|assistant|>\n",
        end="</s>",
    ),
    Template(
        name="gemma_instruct",
        user=f"<start_of_turn>user\n{CONTENT}<end_of_turn>\n",
        assistant="<start_of_turn>model\n",
        end="<end_of_turn>\n",
    ),
    Template(
        name="internlm",
        system=_INTERNLM_SYSTEM,
        first_user=f"{SYSTEM}<s><|User|>:{CONTENT}<eoh>\n",
        user=f"<s><|User|>:{CONTENT}<eoh>\n",
        assistant="<|Bot|>:",
        end="<eoa>",
        after_answer="\n",
        stop=("<s>", "<|User|>"),
    ),
    Template(
        name="xtuner_internlm_chat",
        first_user=f"<|System|>:{SYSTEM}\n<|User|>:{CONTENT}<eoh>\n",
        user=f"<|User|>:{CONTENT}<eoh>\n",
        assistant="<|Bot|>:",
        end="<eoa>",
        after_answer="\n",
    ),
    _chatml("xtuner_internlm2_chat", "", after="\n"),
    _llama_3("xtuner_llama3_chat", ""),
    Template(
        name="xtuner_vicuna",  # LLaVA's data have no system text, so what it writes around one is not there either
        first_user=f"{_CURIOUS_USER} {SYSTEM}\n USER: {CONTENT} ",
        user=f"USER: {CONTENT} ",
        assistant="ASSISTANT:",
        answer=f" {CONTENT}",
        end="</s>",
        after_answer="\n",
        between="<s>",
    ),
    Template(
        name="internvl_zh",
        user=f"<human>: {CONTENT} ",
        assistant="<bot>:",
        answer=f" {CONTENT}",
        end="</s>",
    ),
    Template(
        name="phi3_chat",
        system="You are an AI assistant whose name is Phi-3.",
        first_user=f"<|system|>\n{SYSTEM}<|end|><|user|>\n{CONTENT}<|end|>",
        user=f"<|user|>\n{CONTENT}<|end|>",
        assistant="<|assistant|>\n",
        end="<|end|>",
    ),
    Template(
        name="xtuner_phi3_chat",
        first_user=f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\n{CONTENT}<|end|>\n",
        user=f"<|user|>\n{CONTENT}<|end|>\n",
        assistant="<|assistant|>\n",
        end="<|end|>",
        after_answer="\n",
    ),
    Template(name="plain", user=IMAGE, assistant="", end="\n", captions=True),
)
_ALIASES = {
    "v1": "vicuna_v1",
    "default": "v0",
    "llava_v0": "v0",
    "llava_v0_mmtag": "v0_mmtag",
    "llava_v1_mmtag": "v1_mmtag",
    "llava_mistral_instruct": "mistral_instruct",
    "mistral_direct": "chatml_direct",
    "Hermes-2": "chatml_direct",
    "qwen_2": "qwen_1_5",
    "llama_3": "llava_llama_3",
    "internlm2-chat": "internlm2_chat",
    "internlm2": "internlm2_chat",
    "phi3-chat": "phi3_chat",
    "v0_plain": "plain",
}
TEMPLATES = {template.name: template for template in _TEMPLATES}


def template_names() -> list[str]:
    """Every name that `get_template` takes."""
    return sorted([*TEMPLATES, *_ALIASES])


def get_template(name: str) -> Template:
    """Looks a template up.

    Raises:
        UserError: no template has this name; lists those that exist.
    """
    # names of other programs lead here only where they mean the same text; all others get a hint
    template = TEMPLATES.get(_ALIASES.get(name, name))
    if template is None:
        names, foreign = template_names(), foreign_template(name)
        hint = f"; {foreign}" if foreign else did_you_mean(name, names)
        raise UserError(f"conversation template '{name}' is not one of {', '.join(names)}{hint}")
    return template


def choose_template(name: str, own: Template | None = None) -> Template:
    """As `get_template`, of a name that a person wrote.

    Args:
        name: as written.
        own: the template of the model that it is for: an XTuner model takes XTuner's template of the name.  Elsewhere a
            warning says where another program calls another text so.
    """
    xtuner = XTUNER_TEMPLATES.get(name)
    # an XTuner model was trained with XTuner's text of this name, which is not LLaVA's
    if own is not None and own.name.startswith(_XTUNER) and xtuner is not None and xtuner.exact and xtuner.ours:
        return TEMPLATES[xtuner.ours]
    template = get_template(name)
    others = other_templates(name, template.name)
    if others:
        logger.warning("template '%s' is %s", name, others)
    return template
