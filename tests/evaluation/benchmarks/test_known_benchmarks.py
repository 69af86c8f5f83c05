"""Every benchmark from its files to its score, without a model: what is asked, an oracle's ceiling, errors."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.benchmarks.benchmark import LETTER, SHORT_ANSWER, Request
from paddlemix.evaluation.benchmarks.known_benchmarks import BENCHMARKS, benchmark_names
from paddlemix.evaluation.evaluation_plan import EvaluationPlan
from paddlemix.evaluation.prepared import Prepared, write_questions
from paddlemix.evaluation.result_file import Result, read_results
from paddlemix.evaluation.score_table import score_table
from paddlemix.evaluation.scored import score_predictions
from tests.evaluation.benchmarks import tiny_benchmarks as tiny

# headline of an oracle: the most that there is
CEILINGS = {"share": 1.0, "percent": 100.0}
SCORED = [name for name, one in BENCHMARKS.items() if one.score is not None and "_test_" not in name]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def right(root: Path) -> dict[str, Any]:
    return tiny.build_all(root)


def prepared(root: Path, output: Path, name: str, protocol: str = "llava") -> Prepared:
    return EvaluationPlan(names=(name,), data_root=root, output=output, protocol=protocol).prepared(name)


def say(one: Prepared, texts: list[str]) -> None:
    """Writes predictions as LLaVA's scripts do."""
    lines = [
        {"question_id": question.question_id, "prompt": question.text, "text": text, "answer_id": "x", "model_id": "m"}
        for question, text in zip(one.questions, texts, strict=True)
    ]
    tiny.write_lines(one.predictions, [{**line, "metadata": {}} for line in lines])


def scored(root: Path, output: Path, name: str, texts: list[str]) -> Result:
    one = prepared(root, output, name)
    say(one, texts)
    results, problems = score_predictions(EvaluationPlan(names=(name,), data_root=root, output=output))
    assert problems == []
    return results[name]


@pytest.mark.parametrize("name", SCORED)
def test_an_oracle_reaches_the_ceiling(name: str, root: Path, right: dict[str, Any], tmp_path: Path) -> None:
    result = scored(root, tmp_path, name, right[name])
    if name == "mme":
        # two tasks of perception and one of cognition, 200 points each
        assert result.metrics == {"perception": 400.0, "cognition": 200.0}
    else:
        assert result.metrics[result.headline] == CEILINGS[result.unit]
    assert result.questions == len(right[name]) and result.protocol == "llava" and result.scored_by == "paddlemix"
    stored = read_results(tmp_path)[name]
    assert stored["metrics"] == dict(result.metrics) and stored["questions"] == result.questions
    assert stored["made_with"] == {}  # another program's predictions do not say


def test_a_model_that_always_says_yes(root: Path, right: dict[str, Any], tmp_path: Path) -> None:
    """The known figures: half right, precision 1/2, recall 1, F1 2/3, 100 % yes; MME half of the answers, no pair."""
    pope = scored(root, tmp_path, "pope", ["Yes"] * 12)
    wanted = {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "yes_ratio": 1.0}
    assert pope.metrics == wanted and pope.by_category == dict.fromkeys(tiny.CATEGORIES, wanted)
    mme = scored(root, tmp_path, "mme", ["Yes"] * 12)
    assert mme.metrics == {"perception": 100.0, "cognition": 50.0}
    table = score_table({"pope": pope, "mme": mme})
    assert re.search(r"^pope +llava +f1 +66\.67 +12 of 8910$", table, re.MULTILINE)
    assert re.search(r"^mme +llava +perception +100\.00 +12 of 2374$", table, re.MULTILINE)
    assert sorted(read_results(tmp_path)) == ["mme", "pope"]


def test_answers_about_other_pictures_are_chance(tmp_path: Path) -> None:
    """An oracle whose pictures were shuffled: yes as often as before, and right half of the time."""
    count = 1000
    folder = tmp_path / "pope"
    texts = tiny.build_pope(folder, count)
    for start in range(0, len(texts), count):
        block = texts[start : start + count]
        random.Random(start).shuffle(block)
        texts[start : start + count] = block
    result = scored(tmp_path, tmp_path / "out", "pope", texts)
    # three standard deviations of 3,000 fair throws
    assert abs(result.metrics["accuracy"] - 0.5) < 3 * 0.5 / 3000**0.5
    assert result.metrics["yes_ratio"] == 0.5


def test_questions_are_asked_in_llavas_words(root: Path, right: dict[str, Any], tmp_path: Path) -> None:
    def texts(name: str, protocol: str = "llava") -> list[str]:
        return [question.text for question in prepared(root, tmp_path, name, protocol).questions]

    assert texts("scienceqa")[0] == f"<image>\nContext: N0.\nWhich is it?\nA. one\nB. two\n{LETTER}"
    assert texts("scienceqa")[2] == f"Context: N2.\nWhich is it?\nA. one\nB. two\n{LETTER}"
    assert texts("mmbench_dev_en")[:2] == [
        f"Which 0?\nA. option0\nB. option1\n{LETTER}",
        f"{tiny.HINTED}\nWhich 1?\nA. option0\nB. option1\n{LETTER}",
    ]
    assert texts("mmbench_dev_cn")[0] == "Which 0?\nA. option0\nB. option1\n请直接回答选项字母。"
    assert texts("refcoco")[0] == "[refer] give me the location of the left one"
    assert texts("mathvista")[0] == (
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: How 1?\nChoices:\n(A) red\n(B) blue"
    )
    assert texts("mathvista")[2] == (
        "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the "
        "final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How 3? (Unit: m)"
    )
    assert texts("mmmu")[0] == f"<image 1> Which 0?\n\n(A) the first\n(B) the second\n\n\n{LETTER}"
    assert texts("mmmu")[1] == f"<image 1> Which 1?\n\n{SHORT_ANSWER}"
    assert texts("hallusionbench") == ["Is it 0?", "Is it 1?"]


def test_lmms_eval_asks_in_other_words(root: Path, right: dict[str, Any], tmp_path: Path) -> None:
    def first(name: str) -> str:
        return prepared(root, tmp_path, name, "lmms-eval").questions[0].text

    assert first("textvqa") == f"What brand is it?\n{SHORT_ANSWER}"
    assert first("vizwiz").startswith("What is this 0?\nWhen the provided")
    assert first("mme") == f"Is it Yes 0?\n{SHORT_ANSWER}"
    # where the release has two spaces before the sentence that is left out, one stays
    assert prepared(root, tmp_path, "mme", "lmms-eval").questions[2].text == f"Is it Yes 1? \n{SHORT_ANSWER}"
    assert first("mmbench_dev_en") == f"Which 0? There are several options:\nA. option0\nB. option1\n\n{LETTER}"
    assert first("mmbench_dev_cn").endswith("\n\n请直接使用所提供的选项字母作为答案回答。")
    assert first("mmvet").startswith("First please perform reasoning")
    assert first("mmmu") == f"<image 1> Which 0?\nA. the first\nB. the second\n\n{LETTER}"
    assert first("mathvista") == f"How 1?\nA. red\nB. blue\n{LETTER}"
    assert first("refcoco").endswith("the region this sentence describes: the left one")


def test_pictures_of_tables_are_stored_once(root: Path, right: dict[str, Any], tmp_path: Path) -> None:
    for name in ("mmbench_dev_en", "ccbench"):
        one = prepared(root, tmp_path, name)
        assert len(one.data.pictures) == 2 and len(one.questions) == 4
        assert [one.questions[place].images for place in (0, 1)] == [one.questions[place].images for place in (2, 3)]


def test_a_limit_keeps_what_counts_together(root: Path, right: dict[str, Any], tmp_path: Path) -> None:
    def ids(name: str, limit: int) -> list[Any]:
        plan = EvaluationPlan(names=(name,), data_root=root, output=tmp_path, limit=limit)
        return [question.question_id for question in plan.prepared(name).questions]

    assert ids("mmbench_dev_en", 1) == [0, 1_000_000]
    assert ids("mme", 3) == ["existence/0000.jpg"] * 2 + ["existence/0001.jpg"] * 2
    assert ids("pope", 5) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="limit 0 must be at least 1"):
        ids("pope", 0)


def test_submissions_are_those_of_the_servers(root: Path, right: dict[str, Any], tmp_path: Path) -> None:
    result = scored(root, tmp_path, "vqav2", ["The Red.", "two", "no,"])
    assert (result.metrics, result.scored_by, result.submission) == ({}, "server", "vqav2/vqav2_submission.json")
    assert json.loads((tmp_path / "vqav2" / "vqav2_submission.json").read_text(encoding="utf-8")) == [
        {"question_id": 7, "answer": ""},
        {"question_id": 262144000, "answer": "red"},
        {"question_id": 262144001, "answer": "2"},
        {"question_id": 262144002, "answer": "no"},
        {"question_id": 8, "answer": ""},
    ]
    scored(root, tmp_path, "vizwiz", ["Unanswerable", "a cat", "Two"])
    written = json.loads((tmp_path / "vizwiz" / "vizwiz_submission.json").read_text(encoding="utf-8"))
    assert [line["answer"] for line in written] == ["unanswerable", "cat", "2"]
    assert written[0]["image"] == "VizWiz_test_00000000.jpg"
    assert "submit vqav2/vqav2_submission.json" in score_table({"vqav2": result})


def test_a_table_for_mmbench_s_server(root: Path, right: dict[str, Any], tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="the extra [eval] is not installed")
    result = scored(root, tmp_path, "mmbench_test_en", ["A", "=B", "A", "B"])
    assert result.metrics == {} and result.scored_by == "server"
    sheet = openpyxl.load_workbook(tmp_path / "mmbench_test_en" / "MMBench_TEST_EN.xlsx").active
    rows = list(sheet.iter_rows(values_only=True))
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "split")
    assert [(row[0], row[6]) for row in rows[1:]] == [(0, "A"), (1, "=B"), (1_000_000, "A"), (1_000_001, "B")]


def _half(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")


def _twice(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    path.write_text(text + text.splitlines(keepends=True)[0], encoding="utf-8")


def _tail(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8")[:-5], encoding="utf-8")


FAULTS: list[tuple[str, str, Callable[[Path], None], str]] = [
    ("pope", "llava_pope_test.jsonl", Path.unlink, "pope: there is no llava_pope_test.jsonl in "),
    (
        "pope",
        "llava_pope_test.jsonl",
        _half,
        "4 labels, and .* 2 questions of category 'popular'; are both files complete",
    ),
    ("pope", "coco/coco_pope_random.json", _half, "has 2 labels, and .* 4 questions of category 'random'"),
    ("pope", "coco/coco_pope_random.json", Path.unlink, "coco_pope_random.json' does not exist"),
    ("textvqa", "llava_textvqa_val_v051_ocr.jsonl", _twice, "is there more than once"),
    ("textvqa", "TextVQA_0.5.1_val.json", _tail, "TextVQA_0.5.1_val.json' is not JSON"),
    ("vqav2", "llava_vqav2_mscoco_test-dev2015.jsonl", _twice, "vqav2: question 262144000 is more than once"),
    ("vqav2", "llava_vqav2_mscoco_test2015.jsonl", _half, "lacks 2 questions"),
    ("gqa", "llava_gqa_testdev_balanced.jsonl", _half, "lacks 2 questions that .* has: 202, 203"),
    ("seed", "llava-seed-bench.jsonl", _half, "lacks 1 questions that .* has: 101"),
    ("mme", "llava_mme.jsonl", lambda path: _one_less(path), "has 1 questions about 'code_reasoning/0001.jpg'"),
    ("mme", "MME_Benchmark_release_version/existence/0000.txt", Path.unlink, "there is no 0000.txt with the answers"),
    ("llava_bench", "context.jsonl", _half, "has no description of '001.jpg'"),
    ("mmvet", "llava-mm-vet.jsonl", _half, "lacks 1 questions that .* has: v1_1"),
    (
        "scienceqa",
        "pid_splits.json",
        lambda path: tiny.write_json(path, {"test": ["4", "5", "6", "9"]}),
        "lacks 1 questions",
    ),
    ("mmbench_dev_en", "mmbench_dev_20230712.tsv", _tail, "has 11 cells, the header 12|is the file whole"),
    ("mmmu", "Art/validation-00000-of-00001.parquet", Path.unlink, "lacks 1 of MMMU's 30 subjects: Art"),
]


def _one_less(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), encoding="utf-8")


@pytest.mark.parametrize(("name", "file", "spoil", "message"), FAULTS, ids=[f"{one[0]}-{one[1]}" for one in FAULTS])
def test_half_a_data_set_is_one_clear_error(
    name: str, file: str, spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    tiny.BUILDERS[name](tmp_path)
    folder = tmp_path / BENCHMARKS[name].folders[0]
    spoil(folder / file)
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)) as caught:
        prepared(tmp_path, tmp_path / "out", name)
    assert "\n" not in str(caught.value)


def test_names() -> None:
    assert benchmark_names("pope, mme,pope") == ["pope", "mme"]
    with pytest.raises(UserError, match="benchmark 'pop' is not one of vqav2, .*did you mean 'pope'"):
        benchmark_names("pop")
    assert set(tiny.BUILDERS) == set(BENCHMARKS)


def test_predictions_must_fit(root: Path, right: dict[str, Any], tmp_path: Path) -> None:
    one = prepared(root, tmp_path, "pope")
    plan = EvaluationPlan(names=("pope",), data_root=root, output=tmp_path)

    def problem() -> str:
        results, problems = score_predictions(plan)
        assert results == {} and not (tmp_path / "result.json").exists()
        return str(problems[0])

    assert "predictions.jsonl' does not exist; predict first" in problem()
    say(one, right["pope"])
    whole = one.predictions.read_text(encoding="utf-8").splitlines(keepends=True)
    one.predictions.write_text("".join(whole[:-2]), encoding="utf-8")
    assert "has no answer to 2 of 12 questions: 10, 11" in problem()
    one.predictions.write_text("".join([*whole, whole[0]]), encoding="utf-8")
    assert "has more than one answer to 1 questions: 0" in problem()
    one.predictions.write_text("".join(whole)[:-20], encoding="utf-8")
    assert "line 12 is not a prediction, or is cut short" in problem()
    # shares of several processes, put together in another order
    one.predictions.write_text("".join([*whole[6:], *whole[:6]]), encoding="utf-8")
    results, problems = score_predictions(plan)
    assert problems == [] and results["pope"].metrics["f1"] == 1.0


def test_a_score_needs_no_pictures(tmp_path: Path) -> None:
    """Of MME's release it needs the text files."""
    for name in ("pope", "refcoco", "scienceqa"):
        texts = tiny.BUILDERS[name](tmp_path / "eval")
        for path in [*(tmp_path / "eval").rglob("*.jpg"), *(tmp_path / "eval").rglob("*.png")]:
            path.unlink()
        for folder in ("pope/val2014", "train2014"):
            if (tmp_path / "eval" / folder).exists():
                (tmp_path / "eval" / folder).rmdir()
        result = scored(tmp_path / "eval", tmp_path / "out", name, texts)
        assert result.metrics[result.headline] == CEILINGS[result.unit]
        with pytest.raises(UserError, match=rf"{name}: (\d) of \1 pictures are not in "):
            write_questions(prepared(tmp_path / "eval", tmp_path / "out2", name), False)


def test_the_folder_of_one_benchmark(root: Path, right: dict[str, Any], tmp_path: Path) -> None:
    assert prepared(root / "pope", tmp_path, "pope").data.files[0].parent == root / "pope"
    plan = EvaluationPlan(names=("pope", "mme"), data_root=root / "pope", output=tmp_path)
    with pytest.raises(UserError, match=r"pope: there is no llava_pope_test.jsonl in .*pope/pope/"):
        plan.prepared("pope")
    with pytest.raises(UserError, match="is not a folder"):
        prepared(root / "none", tmp_path, "pope")
    with pytest.raises(UserError, match="choose another"):
        # its own folder: questions.jsonl would be replaced
        tiny.build_llava_bench(tmp_path / "llava_bench")
        prepared(tmp_path, tmp_path, "llava_bench")


def test_every_reader_reads_both_protocols(root: Path, right: dict[str, Any]) -> None:
    for name, benchmark in BENCHMARKS.items():
        folder = root / benchmark.folders[0]
        for protocol in ("llava", "lmms-eval"):
            if (folder / benchmark.question_files[0]).exists():
                data = benchmark.read(Request(folder=folder, protocol=protocol))
                assert data.questions and all(question.text for question in data.questions), name
            assert benchmark.max_new_tokens[protocol] >= 16
