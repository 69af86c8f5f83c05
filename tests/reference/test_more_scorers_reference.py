"""The scorers of MMMU, MathVista, HallusionBench, RefCOCO, GQA, ANLS and of judged answers against the real ones, live.

Run by `make reference`; see `real_scorers.py`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from paddlemix.evaluation.judging.judge_prompts import REVIEW_RULES
from paddlemix.evaluation.judging.mm_vet import grade_request, score_mm_vet
from paddlemix.evaluation.judging.reviews import (
    Comparison,
    bench_context,
    boxes_context,
    parse_pair,
    review_line,
    review_request,
    score_reviews,
)
from paddlemix.evaluation.scoring.answered import LMMS_EVAL, Answered
from paddlemix.evaluation.scoring.gqa import score_gqa
from paddlemix.evaluation.scoring.hallusion_bench import score_hallusion_bench
from paddlemix.evaluation.scoring.mathvista import extract, normalise, score_mathvista
from paddlemix.evaluation.scoring.mmmu import DOMAINS, is_right_open, parse_choice, parse_open, score_mmmu
from paddlemix.evaluation.scoring.refcoco import score_refcoco
from paddlemix.evaluation.scoring.text_similarity import anls, edit_distance
from tests.evaluation.scoring.generated import COUNT, texts, vqa_text, yes_no_text
from tests.reference.llava_package import LLAVA, real_file
from tests.reference.real_scorers import llava_module, lmms_function, lmms_task, quietly, run, write_lines

pytestmark = pytest.mark.reference

_OPEN = (
    *(
        "The answer is ",
        "so ",
        "thus ",
        "is ",
        "= ",
        "could be ",
        "final ",
        "12",
        "1,000",
        "-3.5",
        "1e-3",
        ".5",
        "$4.20",
    ),
    *("x = 3", "5%", "red", "Red car", "a", "B", "\n", ". ", ".", ", ", "result ", "therefore ", "1,00", "2.718281"),
)


@pytest.fixture(scope="module")
def rng() -> random.Random:
    return random.Random(7)


def test_mmmu_choices(rng: random.Random) -> None:
    utils = lmms_task("mmmu.utils")
    pieces = (
        "(A)",
        "(B)",
        "A ",
        "B ",
        "C.",
        "D.",
        "A",
        "B",
        "red car",
        "cat",
        "the",
        "DNA",
        "is",
        ".",
        ",",
        "!",
        "'",
        "E ",
    )
    random.seed(42)
    generator = random.Random(42)
    for _ in range(COUNT):
        options = dict(
            zip("ABCDE", rng.sample(("red car", "cat", "dog", "12", "the blue"), rng.randint(2, 5)), strict=False)
        )
        text = texts(rng, pieces, (" ", " ", ""), 9)
        real = utils.parse_multi_choice_response(text, list(options), options)
        assert parse_choice(text, options, generator) == real, (text, options)


def test_mmmu_open_answers(rng: random.Random) -> None:
    utils = lmms_task("mmmu.utils")
    for _ in range(COUNT):
        text = texts(rng, _OPEN, (" ", "", " ", "\n"), 7)
        answers = [
            rng.choice(("3", "12", "1000", "red", "a", "-3.5", "0.001", "car", "4.2")) for _ in range(rng.randint(1, 2))
        ]
        answer: Any = answers[0] if rng.random() < 0.5 else answers
        assert parse_open(text) == set(utils.parse_open_response(text)), text
        assert is_right_open(text, answer) == utils.eval_open(answer, utils.parse_open_response(text)), (text, answer)


def test_mmmu_as_a_whole(rng: random.Random) -> None:
    utils = lmms_task("mmmu.utils")
    assert {name: list(parts) for name, parts in DOMAINS.items()} == utils.DOMAIN_CAT2SUB_CAT
    subjects = [part for parts in DOMAINS.values() for part in parts]
    asked, results = [], []
    random.seed(42)
    for number in range(600):
        is_open = rng.random() < 0.3
        doc = {
            "id": f"validation_{rng.choice(subjects)}_{number}",
            "question_type": "open" if is_open else "multiple-choice",
            "options": str([] if is_open else ["cat", "dog", "red car"]),
            "answer": "12" if is_open else rng.choice("ABC"),
        }
        text = texts(rng, (*_OPEN, "(A)", "B ", "C."), (" ", ""), 6)
        results.append(utils.mmmu_process_results(doc, [text])["mmmu_acc"])
        record = {**doc, "options": [] if is_open else ["cat", "dog", "red car"]}
        asked.append(Answered(question_id=doc["id"], text=text, record=record))
    assert score_mmmu(asked).metrics["accuracy"] == pytest.approx(
        quietly(utils.mmmu_aggregate_results, results), abs=6e-6
    )


def test_mathvista(rng: random.Random) -> None:
    module = lmms_task("mathvista.mathvista_evals")
    evaluator = module.MathVistaEvaluator()
    evaluator.get_chat_response = lambda prompt, **named: prompt.rsplit("\n\n", 2)[
        -2
    ]  # a judge that repeats the answer
    pieces = (
        "(A)",
        "(b)",
        "B",
        "12",
        "3.14159",
        "2.5",
        "[1, 2]",
        "cat",
        "red car",
        'The answer is "cat".',
        "1e400",
        "nan",
    )
    for number in range(COUNT):
        is_choice = rng.random() < 0.4
        kind = "text" if is_choice else rng.choice(("integer", "float", "list", "text"))
        problem = {
            "question_type": "multi_choice" if is_choice else "free_form",
            "answer_type": kind,
            "choices": rng.sample(("cat", "red car", "dog", "12", "2.5"), rng.randint(2, 5)) if is_choice else None,
            "precision": rng.choice((0, 1, 2)),
            "query": "Q",
            "answer": rng.choice(("cat", "12", "3.1", "2.5", "[1, 2]")),
        }
        text = texts(rng, pieces, (" ",), 2).strip()
        extraction = evaluator.extract_answer(text, problem, quick_extract=True) if text else ""
        assert extract(text, problem) == extraction, (text, problem)
        kinds = [problem[key] for key in ("choices", "question_type", "answer_type", "precision")]
        real = evaluator.normalize_extracted_answer(extraction, *kinds)
        assert normalise(extraction, problem) == real, (text, problem)
        right = score_mathvista([Answered(question_id=number, text=text, record=problem)]).right[0]
        assert bool(right) == evaluator.safe_equal(real, problem["answer"])


def test_hallusion_bench_of_lmms_eval(rng: random.Random) -> None:
    aggregate = lmms_task("hallusion_bench.evaluate_hb").hb_aggregation_result_intern
    for _ in range(25):
        records = [
            {
                "category": rng.choice(("VD", "VS")),
                "subcategory": rng.choice(("chart", "ocr")),
                "set_id": str(rng.randrange(5)),
                "figure_id": str(rng.randrange(3)),
                "question_id": str(rng.randrange(4)),
                "gt_answer": rng.choice("01"),
                "model_prediction": yes_no_text(rng),
            }
            for _ in range(200)
        ]
        asked = [Answered(question_id=n, text=one["model_prediction"], record=one) for n, one in enumerate(records)]
        metrics = score_hallusion_bench(asked, LMMS_EVAL).metrics
        real = {name: aggregate([dict(one) for one in records], name) for name in ("aAcc", "fAcc", "qAcc")}
        assert [metrics["a_acc"], metrics["f_acc"], metrics["q_acc"]] == pytest.approx(list(real.values()), abs=1e-12)


def test_refcoco_of_lmms_eval(rng: random.Random) -> None:
    utils = lmms_task("refcoco.utils_rec")
    asked, docs = [], []
    for number in range(COUNT):
        width, height = rng.randint(50, 640), rng.randint(50, 480)
        box = [
            rng.randrange(width // 2),
            rng.randrange(height // 2),
            rng.randint(1, width // 2),
            rng.randint(1, height // 2),
        ]
        shares = [box[0] / width, box[1] / height, (box[0] + box[2]) / width, (box[1] + box[3]) / height]
        moved = [round(share + rng.uniform(-0.1, 0.1), 2) for share in shares]
        text = rng.choice((f"{moved}", f"It is {moved}.", f"[{moved[0]} {moved[1]}]", "", f"{[0.1, 0.2]} {moved}"))
        record = {"bbox": box, "width": width, "height": height}
        asked.append(Answered(question_id=number, text=text, record=record))
        docs.append(
            utils.refcoco_bbox_rec_process_result({"question_id": number, "answer": "", "bbox": shares}, [text])
        )
    metrics = score_refcoco(asked, LMMS_EVAL).metrics
    names = {"accuracy": "ACC@0.5", "iou": "IoU", "center_accuracy": "Center_ACC"}
    names |= {f"accuracy_at_{limit}": f"ACC@{limit}" for limit in (0.1, 0.3, 0.5, 0.7, 0.9)}
    for own, name in names.items():
        judged = [doc[f"refcoco_{name}"] for doc in docs]
        assert metrics[own] == quietly(utils.refcoco_bbox_rec_aggregation_result, judged, name), own


def test_gqa_of_lmms_eval(rng: random.Random) -> None:
    match = lmms_function("exact_match_hf_evaluate")
    for number in range(COUNT):
        answer = rng.choice(("yes", "red car", "T-shirt", "café", "no"))
        text = rng.choice((str.upper, str.title, lambda one: f"{one}.", lambda one: f" {one}", str))(answer)
        text = text if rng.random() < 0.7 else vqa_text(rng)
        real = match([text], [answer], ignore_case=True, ignore_punctuation=True)["exact_match"]
        asked = [Answered(question_id=number, text=text, record={"answer": answer})]
        assert score_gqa(asked, LMMS_EVAL).metrics["accuracy"] == real, text


def test_anls(rng: random.Random) -> None:
    evaluator = llava_module("m4c_evaluator")["STVQAANLSEvaluator"].__new__(
        llava_module("m4c_evaluator")["STVQAANLSEvaluator"]
    )
    distance: Callable[[str, str], int] = lmms_function("levenshtein_distance")
    evaluator.get_edit_distance = distance
    for _ in range(COUNT // 5):
        texts_ = [vqa_text(rng)[:40] for _ in range(3)]
        answer = rng.choice((texts_[0], texts_[0].upper(), texts_[1][1:] + "x"))
        assert edit_distance(texts_[0], answer) == distance(texts_[0], answer)
        pairs = [one for one in texts_ if one.strip() or answer.strip()]  # it divides by zero for two empty ones
        if pairs:
            real = evaluator.eval_pred_list([{"pred_answer": answer, "gt_answers": pairs}])
            assert anls(answer, pairs) == real


def test_prompts_of_judges() -> None:
    rules = real_file(LLAVA / "llava" / "eval" / "table" / "rule.json")
    real = json.loads(rules.read_text(encoding="utf-8"))
    assert {name: real[name]["prompt"] for name in REVIEW_RULES} == REVIEW_RULES
    assert {real[name]["role"] for name in REVIEW_RULES} == {"Assistant"}
    utils = lmms_task("mmvet.utils")
    one = Answered(question_id="v1_0", text="x = 1", record={"question": "Q?", "answer": "1<AND>2"})
    assert grade_request(one, LMMS_EVAL).user == f"{utils.MM_VET_PROMPT}\nQ? | 1 <AND> 2 | x = 1 |"


@pytest.mark.parametrize("kind", ["bench", "visual"])
def test_reviews(kind: str, rng: random.Random, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    replies = [texts(rng, ("8", "9", "7.5", " ", ", ", ",", "\n", "ten", "10"), ("", " "), 4) for _ in range(120)]
    replies += [f"{rng.randint(1, 10)} {rng.randint(1, 10)}\nGood." for _ in range(120)]
    sent: list[dict[str, Any]] = []

    def create(**named: Any) -> dict[str, Any]:
        sent.append(named)
        return {"choices": [{"message": {"content": replies[len(sent) - 1]}}]}

    openai = types.ModuleType("openai")
    vars(openai)["ChatCompletion"] = types.SimpleNamespace(create=create)
    vars(openai)["error"] = types.SimpleNamespace(RateLimitError=KeyError)
    monkeypatch.setitem(sys.modules, "openai", openai)
    kinds = [rng.choice(("conv", "detail", "complex")) for _ in replies]
    contexts = [
        {"image": f"{n}.jpg", "caption": rng.choice(("One.", ["One.", "Two."]))}
        if kind == "bench"
        else {
            "image": f"{n}.jpg",
            "captions": ["One.", "Two."],
            "instances": [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}],
        }
        for n in range(len(replies))
    ]
    questions = [{"question_id": n, "image": f"{n}.jpg", "text": f"Q {n}?", "category": k} for n, k in enumerate(kinds)]
    answers = [
        [{"question_id": n, "text": f"{who} {n}", "answer_id": f"{who}{n}"} for n in range(len(replies))]
        for who in "ab"
    ]
    rules = {name: {"role": "Assistant", "prompt": prompt} for name, prompt in REVIEW_RULES.items()}
    (tmp_path / "rule.json").write_text(json.dumps(rules))
    files = [write_lines(tmp_path / f"{name}.jsonl", lines) for name, lines in (("q", questions), ("c", contexts))]
    files += [write_lines(tmp_path / f"answers_{n}.jsonl", lines) for n, lines in enumerate(answers)]
    given = ["--question", files[0], "--context", files[1], "--answer-list", files[2], files[3]]
    output = tmp_path / "reviews.jsonl"
    run(f"llava/eval/eval_gpt_review_{kind}.py", *given, "--rule", tmp_path / "rule.json", "--output", output)
    written = [json.loads(line) for line in output.read_text().splitlines()]

    lines = []
    for n, question in enumerate(questions):
        comparison = Comparison(
            question_id=n,
            question=question["text"],
            category=f"llava_bench_{question['category']}" if kind == "bench" else question["category"],
            context=(bench_context if kind == "bench" else boxes_context)(contexts[n]),
            answers=(answers[0][n]["text"], answers[1][n]["text"]),
            answer_ids=(answers[0][n]["answer_id"], answers[1][n]["answer_id"]),
        )
        request = review_request(comparison)
        assert request.messages() == sent[n]["messages"]
        assert (request.temperature, request.max_tokens) == (sent[n]["temperature"], sent[n]["max_tokens"])
        assert parse_pair(replies[n]) == tuple(written[n]["tuple"])
        lines.append(review_line(n + 1, comparison, replies[n]))
    assert lines == written
    score = score_reviews(lines)
    said = run("llava/eval/summarize_gpt_review.py", "--files", output)
    for name, values in {**score.by_category, "all": score.metrics}.items():
        assert f"{name} {values['relative_score']} {values['reference_score']} {values['score']}\n" in said


def test_mm_vet_of_lmms_eval(rng: random.Random) -> None:
    utils = lmms_task("mmvet.utils")
    names = ("rec", "ocr", "know", "gen", "spat", "math")
    capabilities = [rng.sample(names, rng.randint(1, 3)) for _ in range(218)]
    grades = [rng.randint(0, 10) / 10 for _ in capabilities]
    results = [
        {"score": grade, "capabilities": ",".join(names)} for grade, names in zip(grades, capabilities, strict=True)
    ]
    asked = [Answered(question_id=n, text="", record={"capability": one}) for n, one in enumerate(capabilities)]
    assert score_mm_vet(asked, grades).metrics["total"] == pytest.approx(
        utils.mmvet_aggregate_results(results), abs=1e-12
    )
