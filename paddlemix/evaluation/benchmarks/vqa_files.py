"""VQAv2, GQA, VizWiz and TextVQA: a question with a short answer, in LLaVA's files of questions.

LLaVA's files have the whole prompts.  lmms-eval's differ in TextVQA (no OCR tokens, another case) and VizWiz (case).

Source: scripts/v1_5/eval/{vqav2,gqa,vizwiz,textvqa}.sh of haotian-liu/LLaVA (commit c121f04);
lmms_eval/tasks/{vqav2,gqa,vizwiz_vqa,textvqa} of lmms-eval 0.7.3.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from paddlemix.cache import replacing
from paddlemix.errors import UserError
from paddlemix.evaluation.benchmarks.benchmark import (
    SHORT_ANSWER,
    Answers,
    BenchmarkData,
    Id,
    Question,
    Request,
    Submission,
)
from paddlemix.evaluation.benchmarks.benchmark_files import (
    check_all_there,
    check_keys,
    find_file,
    find_pictures,
    read_json,
    read_lines,
)
from paddlemix.evaluation.scoring.answered import LLAVA
from paddlemix.evaluation.scoring.submissions import gqa_submission, vizwiz_submission, vqav2_submission
from paddlemix.evaluation.scoring.vqa_answers import textvqa_question

VQAV2_QUESTIONS = ("llava_vqav2_mscoco_test-dev2015.jsonl",)
_VQAV2_ALL = "llava_vqav2_mscoco_test2015.jsonl"
GQA_QUESTIONS = ("llava_gqa_testdev_balanced.jsonl",)
_GQA_ANSWERS = "testdev_balanced_questions.json"
VIZWIZ_QUESTIONS = ("llava_test.jsonl",)
TEXTVQA_QUESTIONS = ("llava_textvqa_val_v051_ocr.jsonl",)
_TEXTVQA_ANSWERS = "TextVQA_0.5.1_val.json"


def plain_questions(path: Path) -> list[Question]:
    """The questions of one of LLaVA's files, their records as they are.

    Raises:
        MissingFileError, UserError: see `read_lines`.
    """
    return [
        Question(
            question_id=record["question_id"],
            text=record["text"],
            images=(record["image"],) if record.get("image") else (),
            category=str(record.get("category") or ""),
            record=record,
        )
        for record in read_lines(path, "question_id", "text")
    ]


def write_values(path: Path, values: Any) -> None:
    """Writes a JSON file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8", errors="backslashreplace")


def read_vqav2(request: Request) -> BenchmarkData:
    """VQAv2 test-dev, which a server scores; its file needs the questions of the whole of test2015."""
    path = find_file(request.folder, *VQAV2_QUESTIONS)
    whole = find_file(request.folder, _VQAV2_ALL)
    questions = plain_questions(path)
    all_ids: list[Id] = [record["question_id"] for record in read_lines(whole, "question_id")]
    lost = {question.question_id for question in questions} - set(all_ids)
    if lost:
        raise UserError(f"{whole} lacks {len(lost)} questions that {path} has, so the server would refuse the answers")

    def write(target: Path, answers: Answers) -> None:
        write_values(target, vqav2_submission(all_ids, answers))

    return BenchmarkData(
        questions=questions,
        files=(path, whole),
        image_root=find_pictures(request.folder, "test2015"),
        has_references=False,
        submission=Submission(name="vqav2_submission.json", write=write),
    )


def read_gqa(request: Request) -> BenchmarkData:
    """GQA's testdev_balanced, with GQA's own file of questions and answers in `data/`."""
    path = find_file(request.folder, *GQA_QUESTIONS)
    answers_path = find_file(request.folder, f"data/{_GQA_ANSWERS}", _GQA_ANSWERS, f"data/questions/{_GQA_ANSWERS}")
    known = read_json(answers_path, dict)
    asked = plain_questions(path)
    check_all_there([str(question.question_id) for question in asked], known, path, answers_path)
    questions = []
    for question in asked:
        record = known[str(question.question_id)]
        check_keys(record, ("answer",), f"{answers_path}: question {question.question_id}")
        questions.append(_with(question, record, question.text))

    def write(target: Path, answers: Answers) -> None:
        write_values(target, gqa_submission(answers))

    return BenchmarkData(
        questions=questions,
        files=(path, answers_path),
        image_root=find_pictures(request.folder, "data/images", "images"),
        submission=Submission(name="testdev_balanced_predictions.json", write=write),
    )


def read_vizwiz(request: Request) -> BenchmarkData:
    """VizWiz's test set, which a server scores."""
    path = find_file(request.folder, *VIZWIZ_QUESTIONS)
    asked = plain_questions(path)
    # lmms-eval: `str.capitalize`, which also makes all other letters small
    questions = asked if request.protocol == LLAVA else [_capitalised(question) for question in asked]

    def write(target: Path, answers: Answers) -> None:
        pairs = [(question.question_id, question.images[0]) for question in questions]
        write_values(target, vizwiz_submission(pairs, answers))

    return BenchmarkData(
        questions=questions,
        files=(path,),
        image_root=find_pictures(request.folder, "test"),
        has_references=False,
        submission=Submission(name="vizwiz_submission.json", write=write),
    )


def _capitalised(question: Question) -> Question:
    first, line_end, rest = question.text.partition("\n")
    return _with(question, question.record, f"{first.capitalize()}{line_end}{rest}")


def read_textvqa(request: Request) -> BenchmarkData:
    """TextVQA's validation set.  A question's id is that of its picture; references are found by both, as the official
    scorer finds them."""
    path = find_file(request.folder, *TEXTVQA_QUESTIONS)
    answers_path = find_file(request.folder, _TEXTVQA_ANSWERS)
    data = read_json(answers_path, dict).get("data")
    if not isinstance(data, list):
        raise UserError(f"{answers_path} has no list 'data'")
    for number, record in enumerate(data):
        check_keys(record, ("image_id", "question", "answers"), f"{answers_path} record {number}")
    known = {(record["image_id"], record["question"].lower()): record for record in data}
    asked = plain_questions(path)
    keys = [(question.question_id, textvqa_question(question.text)) for question in asked]
    check_all_there(keys, known, path, answers_path)
    # the official scorer looks an answer up, so that equal questions about one picture have equal references
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise UserError(f"{path}: question {twice[0][1]!r} about picture {twice[0][0]!r} is there more than once")
    questions = []
    for question, key in zip(asked, keys, strict=True):
        record = known[key]
        text = question.text
        if request.protocol != LLAVA:  # no OCR tokens
            text = f"{record['question'].capitalize()}\n{SHORT_ANSWER}"
        questions.append(_with(question, record, text))
    return BenchmarkData(
        questions=questions,
        files=(path, answers_path),
        image_root=find_pictures(request.folder, "train_images"),
        ids_repeat=True,
    )


def _with(question: Question, record: Any, text: str) -> Question:
    """The question in other words, with another record."""
    return replace(question, record=record, text=text)
