"""A chat template of another program: the template of ours that its markers name, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paddlemix.errors import UserError
from paddlemix.processors.text.declared_template import find_chat_template, template_by_markers

# Source: tokenizer_config.json, chat_template.json and .jinja of the models, shortened to what writes turns
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
CHATML_PLAIN = "{{'<|im_start|>' + message['role'] + '\n'}}{{ content['text'] }}{{'<|im_end|>'}}"
LLAMA_2 = "{% set content = '<<SYS>>\\n' + system_message %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
MISTRAL = "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
LLAMA_3 = "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}"
GEMMA = "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
OTHER = "{{ '[|' + message['role'] + '|]' }}"


@pytest.mark.parametrize(
    ("text", "usual", "name"),
    [
        (LLAVA_HF, "vicuna_v1", "vicuna_v1"),
        (CHATML, "vicuna_v1", "qwen_1_5"),
        ("{{'<|im_end|>\n'}}<|im_start|>", "vicuna_v1", "qwen_1_5"),
        (CHATML_PLAIN, "vicuna_v1", "chatml_direct"),
        (CHATML, "qwen_1_5", "qwen_1_5"),
        (CHATML, "internlm2_chat", "internlm2_chat"),
        (LLAMA_2, "vicuna_v1", "llama_2"),
        (MISTRAL, "mistral_instruct", "mistral_instruct"),
        (LLAMA_2, "mistral_instruct", "mistral_instruct"),
        (LLAMA_3, "vicuna_v1", "llava_llama_3"),
        (GEMMA, "vicuna_v1", "gemma_instruct"),
        (OTHER, "vicuna_v1", "vicuna_v1"),
    ],
)
@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_markers_decide_and_what_is_taken_is_said(
    tmp_path: Path, text: str, usual: str, name: str, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = text if place.endswith("jinja") else json.dumps({"chat_template": text})
    (tmp_path / place).write_text(content)
    for _ in range(2):
        assert template_by_markers(tmp_path, usual) == name
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (name != usual or text == OTHER)
    for words in said:
        assert (
            place in words and f"'{usual}' of the model's family" in words and (name == usual or f"'{name}'" in words)
        )


def test_llavas_own_spelling_of_chatml(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert template_by_markers(tmp_path, "vicuna_v1", {"qwen_1_5": "chatml_direct"}) == "chatml_direct"


def test_where_a_template_is_looked_for(tmp_path: Path) -> None:
    assert find_chat_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert find_chat_template(tmp_path) == ("a", tmp_path / "tokenizer_config.json")
    (tmp_path / "processor_config.json").write_text(json.dumps({"chat_template": {"name": "ours"}}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": None}))
    assert find_chat_template(tmp_path) == ("a", tmp_path / "tokenizer_config.json")
    (tmp_path / "chat_template.jinja").write_text("c")
    assert find_chat_template(tmp_path) == ("c", tmp_path / "chat_template.jinja")
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(UserError, match="tokenizer_config.json: chat_template is neither a text nor"):
        find_chat_template(tmp_path)
