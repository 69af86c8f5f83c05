"""Our scorers against the real ones, live: 5,000 generated answers each, and whole files through the real scripts.

Run by `make reference`, which puts llava-torch 1.2.2.post1, scripts of haotian-liu/LLaVA (commit c121f04) and
lmms-eval 0.7.3 into `.venv-reference`.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pandas
import pytest

from paddlemix.evaluation.scoring import vqa_words
from paddlemix.evaluation.scoring.answered import LMMS_EVAL, Answered
from paddlemix.evaluation.scoring.mmbench import score_mmbench
from paddlemix.evaluation.scoring.mme import COGNITION, PERCEPTION, score_mme
from paddlemix.evaluation.scoring.pope import score_pope
from paddlemix.evaluation.scoring.science_qa import score_science_qa
from paddlemix.evaluation.scoring.seed import score_seed, seed_key
from paddlemix.evaluation.scoring.submissions import (
    gqa_submission,
    mmbench_submission,
    mmvet_submission,
    seed_submission,
    vizwiz_submission,
    vqav2_submission,
    write_xlsx,
)
from paddlemix.evaluation.scoring.vqa_answers import score_vqa, textvqa_question
from tests.evaluation.scoring.generated import CASES, Case, blocks, cases, mmbench_answers, mmbench_rows, parts
from tests.evaluation.scoring.our_outcomes import OUTCOMES, science_questions, seed_questions
from tests.evaluation.scoring.test_golden_outcomes import GOLDEN
from tests.reference.real_scorers import llava_module, lmms_task, quietly, run, stand_ins, write_lines
from tests.reference.scoring_outcomes import outcomes, read_sheet, run_science_qa, write_sheet

pytestmark = pytest.mark.reference

NUMBER = r"(\d+\.\d+(?:e-?\d+)?|\d+)"


@pytest.fixture(scope="module")
def found() -> dict[str, list[Case]]:
    return {name: cases(name) for name in CASES}


@pytest.fixture(scope="module")
def real(found: dict[str, list[Case]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Any]]]:
    return outcomes(found, tmp_path_factory.mktemp("real"))


@pytest.mark.parametrize("name", CASES)
def test_every_outcome_is_the_real_scorers(name: str, found: dict[str, list[Case]], real: dict[str, Any]) -> None:
    assert OUTCOMES[name](found[name]) == real[name]


@pytest.mark.parametrize("name", CASES)
def test_the_golden_file_is_what_they_say_today(name: str, real: dict[str, Any]) -> None:
    golden = GOLDEN[name]["outcomes"]
    assert {key: kept["blocks"] for key, kept in golden.items()} == {key: blocks(real[name][key]) for key in golden}


def test_tables_of_words() -> None:
    processor = llava_module("m4c_evaluator")["EvalAIAnswerProcessor"]
    assert processor.CONTRACTIONS == vqa_words.CONTRACTIONS
    assert processor.NUMBER_MAP == vqa_words.NUMBERS
    assert tuple(processor.ARTICLES) == vqa_words.ARTICLES
    assert tuple(processor.PUNCTUATIONS) == vqa_words.PUNCTUATION


# Questions of three categories in the folder that LLaVA's script reads; a label file for each category.
def test_pope_files(found: dict[str, list[Case]], tmp_path: Path) -> None:
    names = ("random", "popular", "adversarial")
    for number, part in enumerate(parts(found["pope"], 500)):
        folder = tmp_path / str(number)
        kinds = [names[place % 3] for place in range(len(part))]
        asked = [{"question_id": place, "category": kind} for place, kind in enumerate(kinds)]
        answers = [{"question_id": place, "text": case["text"]} for place, case in enumerate(part)]
        for name in names:
            labels = [{"label": case["label"]} for case, kind in zip(part, kinds, strict=True) if kind == name]
            write_lines(folder / "coco" / f"coco_pope_{name}.json", labels)
        files = [write_lines(folder / "q.jsonl", asked), write_lines(folder / "a.jsonl", answers)]
        given = ["--annotation-dir", folder / "coco", "--question-file", files[0], "--result-file", files[1]]
        said = run("llava/eval/eval_pope.py", *given)
        score = score_pope(
            [
                Answered(question_id=place, text=case["text"], category=kind, record=case)
                for place, (case, kind) in enumerate(zip(part, kinds, strict=True))
            ]
        )
        for name in names:
            (block,) = [text for text in said.split("Category: ") if text.startswith(f"{name},")]
            printed = [float(re.search(rf"^{key}: {NUMBER}$", block, re.M)[1]) for key in POPE_LINES]  # type: ignore[index]
            assert list(score.by_category[name].values()) == printed


POPE_LINES = ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio")


def test_pope_of_lmms_eval(found: dict[str, list[Case]]) -> None:
    utils = lmms_task("pope.utils")
    for part in parts(found["pope"], 250):
        judged = [
            utils.pope_process_results({"question_id": n, "answer": case["label"]}, [case["text"]])["pope_accuracy"]
            for n, case in enumerate(part)
        ]
        score = score_pope(
            [Answered(question_id=n, text=case["text"], record=case) for n, case in enumerate(part)], LMMS_EVAL
        )
        names = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1_score"}
        names["yes_ratio"] = "yes_ratio"
        assert dict(score.metrics) == {
            own: getattr(utils, f"pope_aggregate_{name}")(judged) for own, name in names.items()
        }
        assert [float(one) for one in score.right] == [one["score"] for one in judged]


def test_science_qa_files(found: dict[str, list[Case]], tmp_path: Path) -> None:
    for number, part in enumerate(parts(found["science_qa"], 250)):
        problems = {str(n): {"choices": case["choices"], "answer": case["answer"]} for n, case in enumerate(part)}
        folder = tmp_path / str(number)
        _, said = run_science_qa(list(part), problems, folder)
        score = score_science_qa(science_questions(list(part)))
        assert json.loads((folder / "result.json").read_text())["acc"] == score.metrics["accuracy"]
        assert f"IMG-Accuracy: {score.metrics['img_accuracy']:.2f}%" in said


def test_textvqa_files(found: dict[str, list[Case]], tmp_path: Path) -> None:
    evaluate = llava_module("eval_textvqa")["prompt_processor"]
    forms = (
        "{q}\nReference OCR token: {o}\nAnswer.",
        "Reference OCR token: {o}\n{q}\nAnswer.",
        "{q}\nAnswer.",
        "OCR tokens: {o}. Question: {q} Short answer:",
    )
    for number, part in enumerate(parts(found["vqa"], 500)):
        rng = random.Random(number)
        prompts = [rng.choice(forms).format(q=f"What is IT {n}?", o=rng.choice(("", "a, b"))) for n in range(len(part))]
        assert [textvqa_question(prompt) for prompt in prompts] == [evaluate(prompt) for prompt in prompts]
        data = [
            {"image_id": f"i{n}", "question": f"What is it {n}?", "answers": part[n]["answers"]}
            for n in range(len(part))
        ]
        (tmp_path / "val.json").write_text(json.dumps({"data": data}))
        lines = [{"question_id": f"i{n}", "prompt": prompts[n], "text": part[n]["text"]} for n in range(len(part))]
        answers = write_lines(tmp_path / "answers.jsonl", lines)
        said = run("llava/eval/eval_textvqa.py", "--annotation-file", tmp_path / "val.json", "--result-file", answers)
        score = score_vqa([Answered(question_id=n, text=case["text"], record=case) for n, case in enumerate(part)])
        assert f"Samples: {len(part)}\nAccuracy: {score.metrics['accuracy']:.2f}%" in said


def test_mme_of_lmms_eval(found: dict[str, list[Case]]) -> None:
    utils = lmms_task("mme.utils")
    assert utils.eval_type_dict == {"Perception": list(PERCEPTION), "Cognition": list(COGNITION)}
    for part in parts(found["mme"], 100):
        asked = [
            Answered(question_id=f"{n}.png", text=text, category=case["category"], record={"answer": answer})
            for n, case in enumerate(part)
            for text, answer in zip(case["texts"], case["answers"], strict=True)
        ]
        judged: dict[str, list[Any]] = {"mme_perception_score": [], "mme_cognition_score": []}
        for one in asked:
            doc = {"question_id": one.question_id, "category": one.category, "answer": one.record["answer"]}
            for name, value in utils.mme_process_results(doc, [one.text]).items():
                judged[name].append(value)
        score = score_mme(asked, LMMS_EVAL)
        for name in ("perception", "cognition"):
            assert score.metrics[name] == utils.mme_aggregate_results(judged[f"mme_{name}_score"])


def test_seed_files(found: dict[str, list[Case]], tmp_path: Path) -> None:
    script = "scripts/convert_seed_for_submission.py"
    # so many that a right answer is in each type: the script fails where one has neither a right nor a missing answer
    for number, part in enumerate(parts(found["seed"], 1000)):
        # ids as in SEED-Bench.json: texts, of which some are numbers
        ids = [str(n) if n % 2 else f"v{n}" for n in range(len(part))]
        questions = [
            {
                "question_id": one,
                "question_type_id": case["type"],
                "data_type": case["data_type"],
                "answer": case["answer"],
            }
            for one, case in zip(ids, part, strict=True)
        ]
        types = {f"type {kind}": kind for kind in range(1, 13)}
        (tmp_path / "seed.json").write_text(json.dumps({"questions": questions, "question_type": types}))
        # the last step, which looks up int("v4") or a missing 5, needs every answer; the score before it does not
        answers = {
            seed_key(one): case["text"] if case["text"] is not None else "none"
            for one, case in zip(ids, part, strict=True)
            if number % 2 or case["text"] is not None
        }
        lines = [{"question_id": one, "text": text} for one, text in answers.items()]
        given = ["--annotation-file", tmp_path / "seed.json", "--result-file", write_lines(tmp_path / "a.jsonl", lines)]
        upload = tmp_path / "upload.jsonl"
        said = run(
            script, *given, "--result-upload-file", upload, failures=() if number % 2 else (KeyError, ValueError)
        )
        score = score_seed(seed_questions(list(part)))
        for name, values in score.by_category.items():
            assert f"{name}: {values['accuracy']:.2f}%" in said
        assert f"Total accuracy: {score.metrics['accuracy']:.2f}%" in said
        for kind in ("image", "video"):
            assert f"{kind} accuracy: {score.metrics[f'{kind}_accuracy']:.2f}%" in said
        if number % 2:
            written = [json.loads(line) for line in upload.read_text().splitlines()]
            assert written == seed_submission(ids, answers)


def test_mmbench_of_lmms_eval(found: dict[str, list[Case]]) -> None:
    evaluator = lmms_task("mmbench.mmbench_evals").MMBench_Evaluator()
    for part in parts(found["mmbench"], 250):
        rows = mmbench_rows(part)
        with stand_ins():  # it imports the further reading when it needs it
            overall, categories, wider = quietly(evaluator.eval_result, rows, "static")
        score = score_mmbench(
            [Answered(question_id=row["index"], text=row["prediction"], record=row) for row in rows], LMMS_EVAL
        )
        assert score.metrics["accuracy"] == pytest.approx(overall * 100, abs=1e-9)
        named = {**categories, **{f"l2-category/{name}": value for name, value in wider.items()}}
        assert {name: one["accuracy"] for name, one in score.by_category.items()} == pytest.approx(
            {name: value * 100 for name, value in named.items()}, abs=1e-9
        )


def test_our_excel_file_reads_like_theirs(found: dict[str, list[Case]], tmp_path: Path) -> None:
    part = found["mmbench"][:200]
    theirs = read_sheet(write_sheet(part, tmp_path))
    read = pandas.read_table(tmp_path / "dev.tsv").astype(object)
    answers: dict[str | int, str] = dict(mmbench_answers(mmbench_rows(part)))
    table = mmbench_submission(list(read.columns), read.to_dict("records"), answers)
    write_xlsx(tmp_path / "ours.xlsx", *table)
    assert read_sheet(tmp_path / "ours.xlsx") == theirs


def test_other_submissions(found: dict[str, list[Case]], tmp_path: Path) -> None:
    texts = [case["text"] for case in found["vqa"]]
    answers: dict[str | int, str] = dict(enumerate(texts))
    lines = [{"question_id": one, "text": text} for one, text in answers.items()]
    # VQAv2: questions of which some have no answer
    merged = tmp_path / "answers" / "dev" / "m" / "merge.jsonl"
    asked = [{"question_id": one, "image": f"{one}.jpg"} for one in range(len(texts) + 50)]
    write_lines(merged, lines)
    write_lines(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", asked)
    run("scripts/convert_vqav2_for_submission.py", "--dir", tmp_path, "--ckpt", "m", "--split", "dev")
    written = json.loads((tmp_path / "answers_upload" / "dev" / "m.json").read_text())
    assert written == vqav2_submission([one["question_id"] for one in asked], answers)
    # VizWiz
    questions = write_lines(tmp_path / "vizwiz.jsonl", asked[: len(texts)])
    given = [
        "--annotation-file",
        questions,
        "--result-file",
        merged,
        "--result-upload-file",
        tmp_path / "up" / "v.json",
    ]
    run("scripts/convert_vizwiz_for_submission.py", *given)
    pairs = [(one["question_id"], one["image"]) for one in asked[: len(texts)]]
    assert json.loads((tmp_path / "up" / "v.json").read_text()) == vizwiz_submission(pairs, answers)
    # GQA and MM-Vet
    run("scripts/convert_gqa_for_eval.py", "--src", merged, "--dst", tmp_path / "gqa.json")
    assert json.loads((tmp_path / "gqa.json").read_text()) == gqa_submission(answers)
    run("scripts/convert_mmvet_for_eval.py", "--src", merged, "--dst", tmp_path / "mmvet.json")
    assert json.loads((tmp_path / "mmvet.json").read_text()) == mmvet_submission(answers)
