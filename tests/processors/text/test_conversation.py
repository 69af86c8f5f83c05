"""Templates: the reference's prompts to the letter, and what is trained marked by construction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paddlemix.datasets.forms.parse import parse_record
from paddlemix.errors import UserError
from paddlemix.processors.text.conversation import Piece, prompt_text, render
from paddlemix.processors.text.known_templates import TEMPLATES, choose_template, get_template, template_names
from paddlemix.sample import Message
from tests.tiny import make_sample

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "conversations.json").read_text(encoding="utf-8"))
CASES = [case for case in GOLDEN if case["version"] in template_names()]
VICUNA = get_template("vicuna_v1")


def read_case(case: dict[str, Any]) -> tuple[Message, ...]:
    record = {"conversations": case["conversations"], "image": "a.png" if case["has_image"] else None}
    return parse_record(record, "golden").messages


def test_every_kind_of_golden_case_is_used() -> None:
    assert {"v1", "llava_v1", "plain"} <= {case["version"] for case in CASES}
    assert len(CASES) == len(GOLDEN)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['version']}-{len(case['prompt'])}")
def test_golden_prompt(case: dict[str, Any]) -> None:
    assert prompt_text(render(get_template(case["version"]), read_case(case))) == case["prompt"]


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_supervised_pieces_are_answer_and_end(template: str) -> None:
    messages = make_sample("<image>\nWhat?", "A cat.").messages
    supervised = "".join(piece.text for piece in render(TEMPLATES[template], messages) if piece.supervised)
    assert supervised == TEMPLATES[template].answer.replace("{content}", "A cat.") + TEMPLATES[template].end


def test_pieces_of_a_conversation() -> None:
    pieces = render(VICUNA, make_sample("<image>\nWhat is it?", "A cat.", "Sure?", "Yes").messages)
    assert pieces == [
        Piece("text", VICUNA.system + " USER: "),
        Piece("image", "<image>", image=0),
        Piece("text", "\nWhat is it? ASSISTANT:"),
        Piece("text", " A cat.", supervised=True),
        Piece("special", "</s>", supervised=True),
        Piece("text", "USER: Sure? ASSISTANT:"),
        Piece("text", " Yes", supervised=True),
        Piece("special", "</s>", supervised=True),
    ]


@pytest.mark.parametrize(
    "question", ["What?\n<image>", "<image>What?", "  <image>\n What? \n", "\n<image> What?", "Wh<image>at?"]
)
def test_single_image_moves_to_the_front(question: str) -> None:
    assert prompt_text(render(VICUNA, make_sample(question, "A").messages)).endswith(
        " USER: <image>\nWhat? ASSISTANT: A</s>"
    )


def test_image_without_words() -> None:
    text = prompt_text(render(VICUNA, make_sample(" <image>\n", "A").messages))
    assert text.endswith(" USER: <image> ASSISTANT: A</s>")


def test_several_images_stay_where_they_are() -> None:
    pieces = render(VICUNA, make_sample("Is <image> like <image>?", "No", "And <image>", "Yes").messages)
    assert [piece.image for piece in pieces if piece.kind == "image"] == [0, 1, 2]
    assert "USER: Is <image> like <image>? ASSISTANT: No</s>USER: <image>\nAnd ASSISTANT" in prompt_text(pieces)


def test_generation_prompt_opens_an_answer() -> None:
    question = Message(role="user", content=("What?",))
    pieces = render(VICUNA, [question], add_generation_prompt=True)
    assert pieces == [Piece("text", VICUNA.system + " USER: What? ASSISTANT:")]
    plain = render(get_template("plain"), [Message(role="user", content=(0, "\nCaption"))], add_generation_prompt=True)
    assert plain == [Piece("image", "<image>", image=0)]


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_generation_prompt_begins_as_training_does(name: str) -> None:
    template, messages = TEMPLATES[name], make_sample("<image>\nOne?", "1", "Two?", "2").messages
    prompt = prompt_text(render(template, messages[:-1], add_generation_prompt=True))
    answer = template.answer.replace("{content}", "2") + template.end + template.after_answer
    assert prompt_text(render(template, messages)) == prompt + answer


def test_system_turn_replaces_the_templates_own() -> None:
    system = Message(role="system", content=("Be brief.",))
    text = prompt_text(render(VICUNA, [system, *make_sample("Q", "A").messages]))
    assert text == "Be brief. USER: Q ASSISTANT: A</s>"
    silent = Message(role="system", content=("",))
    assert prompt_text(render(VICUNA, [silent, *make_sample("Q", "A").messages])) == "USER: Q ASSISTANT: A</s>"


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_system_turn_is_written_or_refused(name: str) -> None:
    template, system = TEMPLATES[name], Message(role="system", content=("Be </s> brief.",))
    messages = [system, *make_sample("Q", "A").messages]
    if not template.first_user:
        with pytest.raises(UserError, match=f"template '{name}' has no place for a system text"):
            render(template, messages)
        return
    pieces = render(template, messages)
    assert any("Be </s> brief." in piece.text for piece in pieces if piece.kind == "text")
    assert not template.system or template.system not in prompt_text(pieces)


def test_aliases_and_unknown_names() -> None:
    assert get_template("v1") is TEMPLATES["vicuna_v1"]
    assert get_template("v0_plain") is TEMPLATES["plain"]
    for name in template_names():
        assert get_template(name).name in TEMPLATES
    with pytest.raises(UserError, match=r"'vicuna_v2' is not one of .*llava_v1.*did you mean 'vicuna_v1'\?"):
        get_template("vicuna_v2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vicuna", "XTuner's is xtuner_vicuna; LLaMA-Factory's is vicuna_v1"),
        ("llama3_chat", "XTuner's is xtuner_llama3_chat"),
        ("llava_next", "LLaMA-Factory's is vicuna_v1"),
        ("llava1_6_vicuna_hf", "ms-swift's is llava_v1"),
        ("llava1_5_hf", "ms-swift's differs from all of them; the nearest is vicuna_v1"),
        ("chatglm3", "XTuner's is not among them; write a chat_template.json of that text"),
    ],
)
def test_other_programs_names_are_answered_with_ours(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        get_template(name)
    assert str(caught.value).startswith(f"conversation template '{name}' is not one of ")
    assert str(caught.value).endswith(f", xtuner_vicuna; {message}")


def test_a_name_of_two_programs_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="paddlemix"):
        assert choose_template("internlm2_chat") is TEMPLATES["internlm2_chat"]
        assert choose_template("internlm2-chat") is TEMPLATES["internlm2_chat"]  # InternVL's own spelling
        assert choose_template("vicuna_v1") is TEMPLATES["vicuna_v1"]
    assert [record.getMessage() for record in caplog.records] == [
        "template 'internlm2_chat' is InternVL's here; XTuner's is xtuner_internlm2_chat"
    ]


@pytest.mark.parametrize("name", ["internlm2_chat", "vicuna", "llama3_chat", "internlm_chat", "phi3_chat"])
def test_a_model_of_xtuner_takes_xtuner_s_template(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="paddlemix"):
        assert choose_template(name, TEMPLATES["xtuner_internlm2_chat"]) is TEMPLATES[f"xtuner_{name}"]
    assert not caplog.records


def user(*content: str | int) -> Message:
    return Message(role="user", content=content)


def assistant(*content: str | int) -> Message:
    return Message(role="assistant", content=content)


@pytest.mark.parametrize(
    ("messages", "open_turn", "message"),
    [
        ([], False, "the conversation is empty; its last turn must be by the assistant"),
        ([user("Q")], False, "ends with a turn of the user; its last turn must be by the assistant"),
        ([user("Q"), assistant("A")], True, "ends with a turn of the assistant; its last turn must be by the user"),
        ([assistant("A")], False, "turn 1 is by the assistant, expected the user"),
        ([user("Q"), user("Q")], False, "turn 2 is by the user, expected the assistant"),
        ([user("Q"), assistant("A", 0)], False, "a turn of the assistant has an image"),
        (
            [Message(role="system", content=(0,)), user("Q"), assistant("A")],
            False,
            "a turn of the system has an image",
        ),
    ],
)
def test_wrong_order(messages: list[Message], open_turn: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        render(VICUNA, messages, open_turn)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (("What?", "A"), "got 0 images and 1 question-answer pairs"),
        (("<image><image>", "A"), "got 2 images and 1 question-answer pairs"),
        (("<image>", "A", "Q", "A"), "got 1 images and 2 question-answer pairs; use vicuna_v1"),
    ],
)
def test_plain_takes_one_image_and_one_caption(turns: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render(get_template("plain"), make_sample(*turns).messages)


# XTuner's own fields: opening of a system text, of a question, what follows an answer, and what stands between rounds.
# Source: InternLM/xtuner xtuner/utils/templates.py (0.1.23)
XTUNER = {
    "xtuner_internlm_chat": ("<|System|>:{}\n", "<|User|>:{}<eoh>\n<|Bot|>:", "<eoa>", "\n"),
    "xtuner_internlm2_chat": (
        "<|im_start|>system\n{}<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
        "\n",
    ),
    "xtuner_llama3_chat": (
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "",
    ),
    "xtuner_phi3_chat": ("<|system|>\n{}<|end|>\n", "<|user|>\n{}<|end|>\n<|assistant|>\n", "<|end|>", "\n"),
    # no end of its own: the tokenizer's is put there, and its beginning before the next round
    "xtuner_vicuna": (
        TEMPLATES["vicuna_v1"].system + " {}\n ",
        "USER: {} ASSISTANT:",
        "</s>",
        "\n<s>",
    ),
}


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", XTUNER)
def test_xtuner_s_templates(name: str, system: str | None) -> None:
    opening, question, end, between = XTUNER[name]
    messages = [Message(role="system", content=(system,))] if system else []
    messages += [
        Message(role="user", content=(0, "What?")),
        Message(role="assistant", content=("A cat.",)),
        Message(role="user", content=("Sure?",)),
        Message(role="assistant", content=("Yes.",)),
    ]
    pieces = render(get_template(name), messages)
    rounds = [question.format(asked) for asked in ("<image>\nWhat?", "Sure?")]
    space = " " if name == "xtuner_vicuna" else ""  # tokenised on its own there, where a word begins
    text = (opening.format(system) if system else "") + rounds[0] + f"{space}A cat.{end}" + between
    text += rounds[1] + f"{space}Yes.{end}"
    assert prompt_text(pieces).removesuffix("\n") == text
    assert "".join(piece.text for piece in pieces if piece.supervised) == f"{space}A cat.{end}{space}Yes.{end}"
