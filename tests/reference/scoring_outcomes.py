"""What the real scorers make of every generated case: the values of `tests/golden/scoring/outcomes.json`."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from tests.evaluation.scoring.generated import MMBENCH_COLUMNS, Case, mmbench_answers, mmbench_rows, parts
from tests.reference.real_scorers import llava_module, lmms_task, quietly, run, write_lines


def vqa(found: list[Case]) -> dict[str, list[Any]]:
    """Processed answers and soft scores."""
    llava, textvqa, vqav2 = llava_module("m4c_evaluator"), lmms_task("textvqa.utils"), lmms_task("vqav2.utils")
    process, evaluator = llava["EvalAIAnswerProcessor"](), llava["TextVQAAccuracyEvaluator"]()

    def score(case: Case) -> float:
        return quietly(evaluator.eval_pred_list, [{"pred_answer": case["text"], "gt_answers": case["answers"]}])

    def lmms(case: Case) -> float:
        doc = {"question_id": 0, "answers": list(case["answers"])}
        return float(textvqa.textvqa_process_results(doc, [case["text"]])["exact_match"])

    def of_vqav2(case: Case) -> tuple[str, float]:
        answers = [{"answer": answer, "answer_id": number} for number, answer in enumerate(case["answers"])]
        outcome = vqav2.vqav2_process_results({"question_id": 0, "answers": answers}, [case["text"]])
        return outcome["submission"]["answer"], float(outcome["exact_match"])

    return {
        "processed": [process(case["text"]) for case in found],
        "score": [score(case) for case in found],
        "lmms_score": [lmms(case) for case in found],
        "vqav2_lmms": [list(of_vqav2(case)) for case in found],
    }


def pope(found: list[Case], folder: Path) -> dict[str, list[Any]]:
    """Yes or no, one file of labels for a hundred answers."""
    evaluate = llava_module("eval_pope")["eval_pope"]
    answers = [{"text": case["text"]} for case in found]
    for start in range(0, len(found), 100):
        part = slice(start, start + 100)
        labels = write_lines(folder / "labels.json", [{"label": case["label"]} for case in found[part]])
        quietly(evaluate, answers[part], labels)
    return {"said": [answer["text"] for answer in answers]}


def science_qa(found: list[Case], folder: Path) -> dict[str, list[Any]]:
    """The letter of each answer, and whether it is right, from the script's own file."""
    problems = {str(n): {"choices": case["choices"], "answer": case["answer"]} for n, case in enumerate(found)}
    judged, _ = run_science_qa(found, problems, folder)
    letters = {one["question_id"]: one["parsed_ans"] for ones in judged.values() for one in ones}
    right = {one["question_id"] for one in judged["correct"]}
    utils = lmms_task("scienceqa.utils")
    lmms = [utils.sqa_process_results(case, [case["text"] or ""])["exact_match"] for case in found]
    return {"letter": [letters[one] for one in problems], "right": [one in right for one in problems], "lmms": lmms}


def run_science_qa(found: list[Case], problems: dict[str, Any], folder: Path) -> tuple[dict[str, Any], str]:
    """eval_science_qa.py over cases: its file of judged answers, and what it prints."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    lines = [
        {"question_id": one, "prompt": "<image>\nQ" if case["has_image"] else "Q", "text": case["text"]}
        for one, case in zip(problems, found, strict=True)
        if case["text"] is not None
    ]
    answers = write_lines(folder / "answers.jsonl", lines)
    out = ("--output-file", folder / "out.json", "--output-result", folder / "result.json")
    said = run("llava/eval/eval_science_qa.py", "--base-dir", folder, "--result-file", answers, *out)
    return json.loads((folder / "out.json").read_text()), said


def mme(found: list[Case]) -> dict[str, list[Any]]:
    """What lmms-eval reads in each answer; MME's own script is in no package."""
    parse = lmms_task("mme.utils").parse_pred_ans
    return {"lmms": [parse(text) for case in found for text in case["texts"]]}


def seed(found: list[Case]) -> dict[str, list[Any]]:
    """Whether each answer is right: the script's comparison is of whole texts; lmms-eval's of first characters."""
    utils = lmms_task("seedbench.utils")

    def lmms(case: Case) -> bool:
        doc = {"answer": case["answer"], "data_type": case["data_type"], "question_id": 0}
        outcome = utils.seed_process_result(doc, [case["text"] or ""])["seed_all"]
        return bool(utils.seed_aggregation_result([outcome]))

    return {"lmms": [lmms(case) for case in found]}


def mmbench(found: list[Case], folder: Path) -> dict[str, list[Any]]:
    """The option that each row's answer chooses, without and with lmms-eval's further reading."""
    evaluator = lmms_task("mmbench.mmbench_evals").MMBench_Evaluator()
    extract = lmms_task("_task_utils.mcq_extract").extract_mcq_answer
    rows = [row for case in found for row in case["rows"]]

    def options(row: Case) -> dict[str, Any]:
        return {letter: row[letter] for letter in "ABCD" if row[letter] is not None}

    sheets = [read_sheet(write_sheet(part, folder / str(number))) for number, part in enumerate(parts(found, 500))]
    return {
        "option": [evaluator.can_infer_option(row["text"]) or None for row in rows],
        "inferred": [evaluator.can_infer(row["text"], copy.copy(options(row))) or None for row in rows],
        "extracted": [extract(row["text"], choices=sorted(options(row))) for row in rows],
        "sheets": [line for sheet in sheets for line in sheet],
    }


def write_sheet(part: Sequence[Case], folder: Path) -> Path:
    """The file that convert_mmbench_for_submission.py writes for some questions."""
    rows = mmbench_rows(part)
    folder.mkdir(parents=True, exist_ok=True)
    table = pandas.DataFrame([{name: row.get(name) for name in MMBENCH_COLUMNS} for row in rows])
    table.to_csv(folder / "dev.tsv", sep="\t", index=False)
    write_lines(folder / "one.jsonl", [{"question_id": one, "text": text} for one, text in mmbench_answers(rows)])
    given = ("--annotation-file", folder / "dev.tsv", "--result-dir", folder, "--upload-dir", folder)
    run("scripts/convert_mmbench_for_submission.py", *given, "--experiment", "one")
    return folder / "one.xlsx"


def read_sheet(path: Path) -> list[list[Any]]:
    """The cells of an Excel file, line by line."""
    import openpyxl

    return [list(line) for line in openpyxl.load_workbook(path, read_only=True).active.iter_rows(values_only=True)]


def outcomes(found: dict[str, list[Case]], folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Of every benchmark."""
    return {
        "vqa": vqa(found["vqa"]),
        "pope": pope(found["pope"], folder / "pope"),
        "science_qa": science_qa(found["science_qa"], folder / "science_qa"),
        "mme": mme(found["mme"]),
        "seed": seed(found["seed"]),
        "mmbench": mmbench(found["mmbench"], folder / "mmbench"),
    }
