"""LLaVA-Bench-in-the-Wild, qa90 and MM-Vet: open answers, which a judge compares or grades.

Sources: scripts/v1_5/eval/{llavabench,mmvet}.sh, llava/eval/eval_gpt_review_{bench,visual}.py,
scripts/convert_mmvet_for_eval.py of haotian-liu/LLaVA (commit c121f04); mm-vet.json of yuweihao/MM-Vet;
lmms_eval/tasks/mmvet of lmms-eval 0.7.3.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from paddlemix.errors import UserError
from paddlemix.evaluation.benchmarks.benchmark import Answers, BenchmarkData, Question, Request, Submission
from paddlemix.evaluation.benchmarks.benchmark_files import (
    check_all_there,
    check_keys,
    find_file,
    find_pictures,
    indexed,
    read_json,
    read_lines,
)
from paddlemix.evaluation.benchmarks.vqa_files import plain_questions, write_values
from paddlemix.evaluation.judging.reviews import bench_context, boxes_context
from paddlemix.evaluation.scoring.answered import LLAVA
from paddlemix.evaluation.scoring.submissions import mmvet_submission

BENCH_QUESTIONS = ("questions.jsonl",)
QA90_QUESTIONS = ("qa90_questions.jsonl",)
MM_VET_QUESTIONS = ("llava-mm-vet.jsonl",)
_BENCH_PREFIX = "llava_bench_"  # of categories, in LLaVA's rules for judges
_REASONING = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)


def read_llava_bench(request: Request) -> BenchmarkData:
    """LLaVA-Bench-in-the-Wild with its descriptions of the pictures and GPT-4's answers."""
    folder = request.folder
    paths = [find_file(folder, name) for name in (*BENCH_QUESTIONS, "context.jsonl", "answers_gpt4.jsonl")]
    questions = _compared(paths, "caption", bench_context, _BENCH_PREFIX)
    return BenchmarkData(questions=questions, files=paths, image_root=find_pictures(folder, "images"))


def read_qa90(request: Request) -> BenchmarkData:
    """LLaVA's 90 questions about 30 pictures of COCO, with their captions and boxes and GPT-4's answers."""
    folder = request.folder
    names = (*QA90_QUESTIONS, "caps_boxes_coco2014_val_80.jsonl", "qa90_gpt4_answer.jsonl")
    paths = [find_file(folder, name) for name in names]
    questions = _compared(paths, "captions", boxes_context, "")
    return BenchmarkData(questions=questions, files=paths, image_root=find_pictures(folder, "val2014", "images"))


def _compared(paths: list[Path], context_key: str, describe: Any, prefix: str) -> list[Question]:
    """Questions whose records have `context`, `reference` and `reference_id`, for two answers to be compared."""
    questions_path, context_path, answers_path = paths
    contexts = {}
    for record in read_lines(context_path, "image", context_key):
        contexts[record["image"]] = describe(record)
    answers = indexed(read_lines(answers_path, "question_id", "text"), "question_id", answers_path)
    asked = plain_questions(questions_path)
    check_all_there([question.question_id for question in asked], answers, questions_path, answers_path)
    found = []
    for question in asked:
        image = question.images[0] if question.images else ""
        if image not in contexts:
            raise UserError(f"{context_path} has no description of '{image}', which {questions_path} asks about")
        answer = answers[question.question_id]
        record = {
            **question.record,
            "context": contexts[image],
            "reference": answer["text"],
            "reference_id": answer.get("answer_id", ""),
        }
        found.append(replace(question, record=record, category=f"{prefix}{question.category}"))
    return found


def read_mm_vet(request: Request) -> BenchmarkData:
    """MM-Vet with its right answers, and the file that its own page and script grade."""
    path, answers_path = find_file(request.folder, *MM_VET_QUESTIONS), find_file(request.folder, "mm-vet.json")
    known = read_json(answers_path, dict)
    asked = plain_questions(path)
    check_all_there([_vet_key(question) for question in asked], known, path, answers_path)
    questions = []
    for question in asked:
        record = known[_vet_key(question)]
        check_keys(record, ("question", "answer", "capability"), f"{answers_path}: {_vet_key(question)}")
        text = question.text if request.protocol == LLAVA else f"{_REASONING}{question.text}"
        questions.append(replace(question, record=record, text=text))

    def write(target: Path, answers: Answers) -> None:
        write_values(target, mmvet_submission(answers))

    return BenchmarkData(
        questions=questions,
        files=(path, answers_path),
        image_root=find_pictures(request.folder, "images"),
        submission=Submission(name="mm-vet_results.json", write=write),
    )


def _vet_key(question: Question) -> str:
    return f"v1_{question.question_id}"
