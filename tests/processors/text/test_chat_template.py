"""`chat_template` values: PaddleMIX's three spellings, other files of PaddleNLP's kind, and what checkpoints store."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paddlemix.errors import MissingFileError, UserError
from paddlemix.processors.llava import processor_from_dict
from paddlemix.processors.text.chat_template import read_template, resolve_template, template_value
from paddlemix.processors.text.conversation import prompt_text, render
from paddlemix.processors.text.known_templates import TEMPLATES, get_template
from paddlemix.processors.text.template import Template
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.sample import Message
from tests.tiny import make_processor, make_sample


@pytest.fixture
def resolve(tmp_path: Path) -> Any:
    """A function that writes a file's content and resolves its path."""

    def resolve(content: Any) -> Template:
        path = tmp_path / "chat_template.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return resolve_template(str(path))

    return resolve


@pytest.mark.parametrize(
    "conversation",
    [
        ["USER{{user}}", "ASSISTANT{{bot}}"],
        ["USER: {{user}} ", "ASSISTANT: {{bot}}"],
        ["USER: {{user}} ", "ASSISTANT: {{bot}}</s>"],
        ["\nUSER: {{ user }}", " ASSISTANT:{{ bot }} </s>\n"],
    ],
)
def test_roles_of_paddlemix_are_vicuna(resolve: Any, conversation: list[str]) -> None:
    for more in ({}, {"system": "You are kind."}, {"query": "USER: {{query}} ASSISTANT:"}):
        assert resolve({"conversation": conversation, **more}) is TEMPLATES["vicuna_v1"]


def test_names() -> None:
    assert resolve_template("llava_v1") is get_template("llava_v1")
    with pytest.raises(UserError, match="conversation template 'vicuna' is not one of"):
        resolve_template("vicuna")


QWEN = {
    "system": "You are a helpful assistant.",
    "conversation": ["\n<|im_start|>user\n{{user}}<|im_end|>\n<|im_start|>assistant\n", "{{bot}}<|im_end|>"],
    "query": "\n<|im_start|>user\n{{query}}<|im_end|>\n<|im_start|>assistant\n",
}
LLAMA = {"system": "<<SYS>>{{system}}<</SYS>>", "conversation": ["[INST] {{user}} [/INST]", " {{bot}} </s><s>"]}
PLAIN_TEXT = {"conversation": ["Human: {{user}}\n", "Assistant: {{bot}}\n###\n"]}


@pytest.mark.parametrize(
    ("content", "prompt", "trained"),
    [
        (
            QWEN,
            "You are a helpful assistant."
            "\n<|im_start|>user\n<image>\nOne?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>"
            "\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>",
            ["1", "<|im_end|>", "2", "<|im_end|>"],
        ),
        (LLAMA, "[INST] <image>\nOne? [/INST] 1 </s><s>[INST] Two? [/INST] 2 </s><s>", [" 1 ", "</s>", " 2 ", "</s>"]),
        (
            PLAIN_TEXT,
            "Human: <image>\nOne?\nAssistant: 1\n###\nHuman: Two?\nAssistant: 2\n###\n",
            [" 1\n###\n", " 2\n###\n"],
        ),
    ],
)
def test_other_files_are_templates_of_their_own(resolve: Any, content: Any, prompt: str, trained: list[str]) -> None:
    template = resolve(content)
    pieces = render(template, make_sample("<image>\nOne?", "1", "Two?", "2").messages)
    assert prompt_text(pieces) == prompt
    assert [piece.text for piece in pieces if piece.supervised] == trained
    question = render(template, make_sample("<image>\nOne?", "1").messages[:1], add_generation_prompt=True)
    assert prompt.startswith(prompt_text(question))
    assert template.name == "chat_template.json"


def test_system_text_of_a_record(resolve: Any) -> None:
    messages = [Message(role="system", content=("Be brief.",)), *make_sample("Q", "A").messages]
    assert prompt_text(render(resolve(LLAMA), messages)).startswith("<<SYS>>Be brief.<</SYS>>[INST] Q")
    assert prompt_text(render(resolve(QWEN), messages)).startswith("Be brief.\n<|im_start|>user\nQ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], 'it has no "conversation": [user, assistant], two texts'),
        ({"system": "x"}, 'it has no "conversation"'),
        ({"conversation": ["{{user}}"]}, 'it has no "conversation"'),
        ({"conversation": ["{{user}}", 3]}, 'it has no "conversation"'),
        ({**QWEN, "sistem": ""}, "the key 'sistem' is not one of system, conversation, query; did you mean 'system'?"),
        (
            {"conversation": ["Q {{index}} {{user}}", "{{bot}}</s>"]},
            '"conversation"[0] has {{index}}; only {{user}} is',
        ),
        ({"conversation": ["{% if x %}{{user}}{% endif %}", "{{bot}}</s>"]}, '"conversation"[0] has {% if x %}; only'),
        ({"conversation": ["{{user|trim}}", "{{bot}}</s>"]}, '"conversation"[0] has {{user|trim}}; only'),
        ({"conversation": ["{{user}}", "{{answer}}</s>"]}, '"conversation"[1] has {{answer}}; only {{bot}} is allowed'),
        ({"conversation": ["Q", "{{bot}}</s>"]}, '"conversation"[0] has {{user}} 0 times, expected once'),
        ({"conversation": ["{{user}}{{user}}", "{{bot}}</s>"]}, '"conversation"[0] has {{user}} 2 times'),
        ({"conversation": ["Q {{user}}", "A {{bot}}"]}, '"" follows {{bot}}, so nothing would end an answer'),
        ({"conversation": ["Q {{user}}", "A {{bot}}\n"]}, '"\\n" follows {{bot}}, so nothing would end an answer'),
        (
            {"conversation": ["{content} {{user}}", "{{bot}}</s>"]},
            "text user has {content} 2 times",
        ),
        ({**QWEN, "system": "It is {{date}}."}, '"system" has {{date}}; only {{system}} is allowed there'),
        ({**QWEN, "system": 3}, '"system" is 3, expected text'),
        ({**QWEN, "query": "{{query}}\nanswer:"}, 'but "conversation" opens an answer with "\\n<|im_start|>user'),
        ({**QWEN, "query": "{{user}}"}, '"query" has {{user}}; only {{query}} is allowed there'),
        ({**QWEN, "query": []}, '"query" is [], expected text'),
    ],
)
def test_file_that_cannot_be_used(resolve: Any, content: Any, message: str) -> None:
    with pytest.raises(UserError, match="chat_template.json': .*" + re.escape(message)):
        resolve(content)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"chat_template 'no.json' does not exist \(looked from"):
        resolve_template("no.json")
    (tmp_path / "broken.json").write_bytes(b'{"conversation": [')
    with pytest.raises(UserError, match="broken.json' is not JSON in UTF-8"):
        resolve_template(str(tmp_path / "broken.json"))
    (tmp_path / "latin.json").write_bytes('"é"'.encode("latin-1"))
    with pytest.raises(UserError, match="latin.json' is not JSON in UTF-8"):
        resolve_template(str(tmp_path / "latin.json"))


@pytest.mark.parametrize("content", [QWEN, LLAMA, PLAIN_TEXT])
def test_a_files_template_is_stored_with_the_checkpoint(
    resolve: Any, content: Any, tokenizer: Tokenizer, tokenizer_directory: Path
) -> None:
    processor = replace(make_processor(tokenizer), template=resolve(content))
    values = json.loads(json.dumps(processor.to_dict()))
    assert isinstance(values["chat_template"], dict)
    again = processor_from_dict(values, tokenizer_directory)
    assert (again.template, again.to_dict()) == (processor.template, values)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_known_templates_are_stored_by_name(name: str) -> None:
    assert template_value(TEMPLATES[name]) == name
    assert read_template(name) is TEMPLATES[name]
    changed = replace(TEMPLATES[name], end="<end>", stop=("a", "b"))
    assert read_template(json.loads(json.dumps(template_value(changed)))) == changed


FIELDS = {"name": "mine", "user": "{content}", "assistant": "", "end": "</s>"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "chat_template is 3, expected a template's name or its fields"),
        ({}, "chat_template lacks name, user, assistant, end"),
        ({**FIELDS, "ending": "x"}, "chat_template has the field 'ending', allowed: name, system"),
        ({**FIELDS, "end": None}, "chat_template.end is null, which is of the wrong type"),
        ({**FIELDS, "stop": "x"}, 'chat_template.stop is "x", which is of the wrong type'),
        ({**FIELDS, "captions": 1}, "chat_template.captions is 1"),
        ({**FIELDS, "answer": "x"}, "the template's text answer has {content} 0 times, expected once"),
        ({**FIELDS, "image": ""}, "the template's text image has {image} 0 times"),
        ({**FIELDS, "user": "x"}, "the template's text user has {content} 0 times"),
    ],
)
def test_stored_value_that_is_not_allowed(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_template(value)
