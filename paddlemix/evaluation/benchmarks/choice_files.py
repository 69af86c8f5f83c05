"""ScienceQA and SEED-Bench: questions with lettered options, in LLaVA's files.

Sources: llava/eval/{model_vqa_science,eval_science_qa}.py, scripts/convert_seed_for_submission.py of haotian-liu/LLaVA
(commit c121f04).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from paddlemix.cache import replacing
from paddlemix.errors import UserError
from paddlemix.evaluation.benchmarks.benchmark import LETTER, Answers, BenchmarkData, Question, Request, Submission
from paddlemix.evaluation.benchmarks.benchmark_files import (
    check_all_there,
    check_keys,
    find_file,
    find_pictures,
    read_json,
)
from paddlemix.evaluation.benchmarks.vqa_files import plain_questions
from paddlemix.evaluation.scoring.seed import seed_key
from paddlemix.evaluation.scoring.submissions import seed_submission
from paddlemix.sample import IMAGE_TOKEN

SCIENCE_QUESTIONS = ("llava_test_CQM-A.json",)
SEED_QUESTIONS = ("llava-seed-bench.jsonl",)
_SEED_ANSWERS = "SEED-Bench.json"
_VIDEO = "video"


def read_science_qa(request: Request) -> BenchmarkData:
    """ScienceQA's test split, with and without pictures; the published figure is of those with one."""
    folder = request.folder
    path = find_file(folder, *SCIENCE_QUESTIONS)
    problems_path, splits_path = find_file(folder, "problems.json"), find_file(folder, "pid_splits.json")
    problems, split = read_json(problems_path, dict), read_json(splits_path, dict).get("test")
    if not isinstance(split, list):
        raise UserError(f"{splits_path} has no list 'test'")
    questions = []
    for number, record in enumerate(read_json(path, list)):
        check_keys(record, ("id", "conversations"), f"{path} record {number}")
        questions.append(_science_question(record, f"{path} record {number}"))
    check_all_there([str(one.question_id) for one in questions], map(str, split), path, splits_path)
    whole = []
    for one in questions:
        problem = problems.get(str(one.question_id))
        check_keys(problem, ("choices", "answer"), f"{problems_path}: problem {one.question_id}")
        whole.append(replace(one, record=problem, category=str(problem.get("subject") or "")))
    return BenchmarkData(
        questions=whole,
        files=(path, problems_path, splits_path),
        image_root=find_pictures(folder, "images/test") if any(one.images for one in whole) else None,
    )


def _science_question(record: dict[str, Any], source: str) -> Question:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict) or "value" not in turns[0]:
        raise UserError(f"{source}: 'conversations' does not begin with a question")
    words = str(turns[0]["value"]).replace(IMAGE_TOKEN, "").strip()
    image = record.get("image")
    # the mark stays in the prompt: by it the scorer knows which questions had a picture
    shown = f"{IMAGE_TOKEN}\n{words}" if image else words
    return Question(question_id=record["id"], text=f"{shown}\n{LETTER}", images=(image,) if image else ())


def read_seed(request: Request) -> BenchmarkData:
    """SEED-Bench: pictures, and of videos the middle frame.  LLaVA's file without its videos is SEED-Bench's image
    part; any other part of it is refused."""
    path, answers_path = find_file(request.folder, *SEED_QUESTIONS), find_file(request.folder, _SEED_ANSWERS)
    whole = read_json(answers_path, dict)
    check_keys(whole, ("questions", "question_type"), str(answers_path))
    types = {number: name for name, number in whole["question_type"].items()}
    known: dict[Any, Any] = {}
    for number, record in enumerate(whole["questions"]):
        check_keys(
            record, ("question_id", "question_type_id", "data_type", "answer"), f"{answers_path} question {number}"
        )
        known[seed_key(record["question_id"])] = record
    asked = plain_questions(path)
    keys = [seed_key(question.question_id) for question in asked]
    has_video = any(known[key]["data_type"] == _VIDEO for key in keys if key in known)
    wanted = [key for key, record in known.items() if has_video or record["data_type"] != _VIDEO]
    check_all_there(keys, wanted, path, answers_path)
    questions = [
        replace(question, record=known[key], category=types.get(known[key]["question_type_id"], ""))
        for question, key in zip(asked, keys, strict=True)
    ]
    ids = [known[key]["question_id"] for key in wanted]

    def write(target: Path, answers: Answers) -> None:
        lines = seed_submission(ids, {seed_key(one): text for one, text in answers.items()})
        with replacing(target) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    return BenchmarkData(
        questions=questions,
        files=(path, answers_path),
        image_root=request.folder,
        submission=Submission(name="seed_submission.jsonl", write=write),
    )
