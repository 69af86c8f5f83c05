"""What a conversation template is: the fields of one way to write a conversation, and the marks in its texts.

The templates themselves are data in `known_templates.py`; `conversation.py` renders them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

CONTENT, SYSTEM, IMAGE = "{content}", "{system}", "{image}"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"


@dataclass(frozen=True, kw_only=True)
class Template:
    """One way to write a conversation down: `first_user answer between user answer ...`.

    Args:
        name: the key users give in JSON or with `--conv-mode`.
        system: the text for `{system}`; "" for none.
        first_user: the first question, with `{system}` and `{content}`; used where there is a system text.
        user: every other question, with `{content}`.
        assistant: what opens an answer; generation starts after it.
        answer: the answer, with `{content}`; trained.
        end: what ends an answer; trained, and ends generation.
        after_answer: what follows every end, not trained.
        between: what precedes every question but the first.
        image: how an image is written, with `{image}`.
        stop: further texts that end generation.
        captions: the question is replaced by its image (projector pretraining).
    """

    name: str
    system: str = ""
    first_user: str = ""
    user: str
    assistant: str
    answer: str = CONTENT
    end: str
    after_answer: str = ""
    between: str = ""
    image: str = IMAGE
    stop: tuple[str, ...] = ()
    captions: bool = False


# Tokens that have an id of their own where a vocabulary knows them; recognised in templates, never in content.
SPECIAL_TOKENS = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Bot|>", "<eoh>", "<eoa>", "<|system|>", "<|user|>"),
    *("<|assistant|>", "<|end|>", IMAGE_START, IMAGE_END),
    *("<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<eos>", "<bos>"),  # of users' own files
)


def with_image_markers(template: Template) -> Template:
    """The template for models with `mm_use_im_start_end`: `<im_start>` and `<im_end>` right around every image.

    Source: haotian-liu/LLaVA llava/train/train.py, preprocess_multimodal (commit c121f04).
    """
    return replace(template, image=template.image.replace(IMAGE, f"{IMAGE_START}{IMAGE}{IMAGE_END}"))
