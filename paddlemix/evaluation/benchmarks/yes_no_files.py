"""POPE, MME and HallusionBench: questions that are answered by yes or no, with labels in files of their own.

Sources: llava/eval/eval_pope.py and scripts/v1_5/eval/{pope,mme}.sh of haotian-liu/LLaVA (commit c121f04);
convert_answer_to_mme.py of LLaVA's eval.zip; HallusionBench.json of tianyi-lab/HallusionBench; lmms_eval/tasks/{pope,
mme,hallusion_bench} of lmms-eval 0.7.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from paddlemix.errors import MissingFileError, UserError
from paddlemix.evaluation.benchmarks.benchmark import SHORT_ANSWER, BenchmarkData, Question, Request
from paddlemix.evaluation.benchmarks.benchmark_files import find_file, find_pictures, read_json, read_lines
from paddlemix.evaluation.benchmarks.vqa_files import plain_questions
from paddlemix.evaluation.scoring.answered import LLAVA, group
from paddlemix.evaluation.scoring.mme import release_question
from paddlemix.json_files import read_text

POPE_QUESTIONS = ("llava_pope_test.jsonl",)
MME_QUESTIONS = ("llava_mme.jsonl",)
_MME_RELEASE = "MME_Benchmark_release_version"
_MME_ASKS = " Please answer yes or no."
HALLUSION_QUESTIONS = ("HallusionBench.json",)
_HALLUSION_KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer", "filename")
_MME_BYTES = 1 << 20  # of a picture's questions


def read_pope(request: Request) -> BenchmarkData:
    """POPE on COCO: labels are paired with the questions of their category by position.

    Raises:
        MissingFileError, UserError: a file is missing or broken, or a category has not as many labels as questions
            (the official scorer would leave the rest out).
    """
    path = find_file(request.folder, *POPE_QUESTIONS)
    questions = plain_questions(path)
    labelled: dict[int, Question] = {}
    files = [path]
    for category, places in group(question.category for question in questions).items():
        labels_path = request.folder / "coco" / f"coco_pope_{category}.json"
        labels = read_lines(labels_path, "label")
        files.append(labels_path)
        if len(labels) != len(places):
            raise UserError(
                f"{labels_path} has {len(labels)} labels, and {path} {len(places)} questions of category "
                f"'{category}'; are both files complete?"
            )
        for place, label in zip(places, labels, strict=True):
            question = questions[place]
            _check_same_picture(question, label, labels_path)
            text = question.text if request.protocol == LLAVA else question.text.strip()
            labelled[place] = replace(question, record={**question.record, "label": label["label"]}, text=text)
    return BenchmarkData(
        questions=[labelled[place] for place in range(len(questions))],
        files=files,
        image_root=find_pictures(request.folder, "val2014"),
    )


def _check_same_picture(question: Question, label: dict[str, object], path: Path) -> None:
    # labels that have moved by one line would still make a score
    named = label.get("image")
    if named is not None and question.images and Path(str(named)).name != Path(question.images[0]).name:
        raise UserError(
            f"{path}: the label of question {question.question_id!r} is about {named}, the question about "
            f"{question.images[0]}; the files are not in the same order"
        )


def read_mme(request: Request) -> BenchmarkData:
    """MME: two questions for each picture, whose answers are in text files beside the pictures."""
    path = find_file(request.folder, *MME_QUESTIONS)
    release = find_pictures(request.folder, _MME_RELEASE)
    known: dict[Path, dict[str, str]] = {}
    questions = []
    for question in plain_questions(path):
        answers_path = _mme_answers(release, str(question.question_id))
        if answers_path not in known:
            known[answers_path] = _read_mme_answers(answers_path)
        asked = release_question(question.text, known[answers_path])
        if asked not in known[answers_path]:
            raise UserError(f"{answers_path} has no answer to the question {asked!r} of {path}")
        record = {**question.record, "answer": known[answers_path][asked]}
        text = question.text
        if request.protocol != LLAVA:
            # lmms-eval takes the sentence and one space away: where the release has two, one stays
            text = f"{asked.replace(_MME_ASKS, '')}\n{SHORT_ANSWER}"
        # both questions of a picture count together
        questions.append(replace(question, record=record, text=text, unit=question.question_id))
    _check_pairs(questions, path)
    return BenchmarkData(questions=questions, files=(path, *known), image_root=release, ids_repeat=True)


def _mme_answers(release: Path, question_id: str) -> Path:
    """The text file of a picture, in either layout of the release: beside it, or in a folder of its own."""
    category, file = question_id.split("/")[0], f"{question_id.split('/')[-1].split('.')[0]}.txt"
    for folder in ("questions_answers_YN", ""):
        if (release / category / folder / file).is_file():
            return release / category / folder / file
    raise MissingFileError(f"there is no {file} with the answers to question '{question_id}' in {release / category}")


def _read_mme_answers(path: Path) -> dict[str, str]:
    answers = {}
    for number, line in enumerate(read_text(path, _MME_BYTES).splitlines(), 1):
        question, tab, answer = line.partition("\t")
        if not tab:
            raise UserError(f"'{path}' line {number} is not a question, a tab and an answer")
        answers[question] = answer.strip()
    return answers


def _check_pairs(questions: Sequence[Question], path: Path) -> None:
    for unit, places in group(question.unit for question in questions).items():
        if len(places) != 2:
            raise UserError(f"{path} has {len(places)} questions about '{unit}', and MME has two about each picture")


def read_hallusion_bench(request: Request) -> BenchmarkData:
    """HallusionBench's questions with a picture ("VD", "VS" with `visual_input` 1 or 2), asked in their own words."""
    path = find_file(request.folder, *HALLUSION_QUESTIONS)
    questions = []
    for number, record in enumerate(read_json(path, list)):
        source = f"{path} record {number}"
        if not isinstance(record, dict):
            raise UserError(f"{source} is not an object")
        # questions without a picture belong to another split
        if not record.get("filename"):
            continue
        lacking = [key for key in _HALLUSION_KEYS if key not in record]
        if lacking:
            raise UserError(f"{source} has no {', '.join(lacking)}")
        parts = (record[key] for key in ("category", "subcategory", "set_id", "figure_id", "question_id"))
        questions.append(
            Question(
                question_id="_".join(map(str, parts)),
                text=record["question"],
                images=(str(record["filename"]).removeprefix("./"),),
                category=str(record["category"]),
                record=record,
            )
        )
    return BenchmarkData(questions=questions, files=(path,), image_root=_hallusion_root(request.folder, questions))


def _hallusion_root(folder: Path, questions: Sequence[Question]) -> Path:
    """The folder that the names of the pictures start from: they begin with "hallusion_bench/"."""
    if questions and not (folder / questions[0].images[0]).is_file():
        # unpacked with a folder around it
        for place in sorted(path for path in folder.iterdir() if path.is_dir()):
            if (place / questions[0].images[0]).is_file():
                return place
    return folder
