"""A tiny data set of each benchmark, drawn, in the layout that it is published in; and what an oracle would say.

`build_all(root)` makes a folder like `playground/data/eval`.  Builders return the right answers by question id and
text; those of benchmarks that only a server or a judge scores are of no use and are left out.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paddlemix.evaluation.benchmarks.benchmark import LETTER, SHORT_ANSWER
from paddlemix.evaluation.benchmarks.exam_files import SUBJECTS
from tests.tiny import draw_picture

CATEGORIES = ("adversarial", "popular", "random")
MME_TASKS = ("existence", "OCR", "code_reasoning")
HINTED = "Look at the picture."


def picture(path: Path, seed: int = 0) -> str:
    """Draws a picture; its name comes back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        draw_picture(30 + seed % 5, 28, seed).save(path)
    return path.name


def picture_text(seed: int) -> str:
    """A picture in base64."""
    buffer = io.BytesIO()
    draw_picture(30, 28 + seed % 3, seed).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def build_vqav2(folder: Path) -> None:
    records = [
        {
            "question_id": 262144000 + number,
            "image": picture(folder / "test2015" / f"COCO_test2015_{number:012}.jpg", number),
            "text": f"What is number {number}?\n{SHORT_ANSWER}",
            "category": "default",
        }
        for number in range(3)
    ]
    write_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", records)
    more = [{**records[0], "question_id": 7}, {**records[0], "question_id": 8}]
    write_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", [more[0], *records, more[1]])


def build_gqa(folder: Path) -> list[str]:
    records, known, right = [], {}, []
    kinds = [("verify", "obj", "yes"), ("query", "attr", "red"), ("query", "rel", "left"), ("choose", "attr", "blue")]
    for number, (structural, semantic, answer) in enumerate(kinds):
        image = picture(folder / "data" / "images" / f"n{number}.jpg", number)
        text = f"Question {number}?"
        records.append({"question_id": f"20{number}", "image": image, "text": f"{text}\n{SHORT_ANSWER}"})
        known[f"20{number}"] = {
            "question": text,
            "answer": answer,
            "imageId": f"n{number}",
            "types": {"structural": structural, "semantic": semantic},
            "groups": {"global": "colour"},
        }
        right.append(f"{answer.capitalize()}.")
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", records)
    write_json(folder / "data" / "testdev_balanced_questions.json", known)
    return right


def build_vizwiz(folder: Path) -> None:
    hint = "When the provided information is insufficient, respond with 'Unanswerable'."
    records = [
        {
            "question_id": number,
            "image": picture(folder / "test" / f"VizWiz_test_{number:08}.jpg", number),
            "text": f"What IS this {number}?\n{hint}\n{SHORT_ANSWER}",
            "category": "default",
        }
        for number in range(3)
    ]
    write_lines(folder / "llava_test.jsonl", records)


def build_scienceqa(folder: Path) -> list[str]:
    """Two questions with a picture and one without."""
    records, problems = [], {}
    for number in range(3):
        name = str(4 + number)
        words = f"Context: N{number}.\nWhich is it?\nA. one\nB. two"
        record: dict[str, Any] = {"id": name, "conversations": [{"from": "human", "value": words}, {"from": "gpt"}]}
        if number < 2:
            picture(folder / "images" / "test" / name / "image.png", number)
            record |= {"image": f"{name}/image.png"}
            record["conversations"][0]["value"] = f"<image>\n{words}"
        records.append(record)
        problems[name] = {
            "choices": ["one", "two"],
            "answer": number % 2,
            "subject": "natural science",
            "split": "test",
        }
    write_json(folder / "llava_test_CQM-A.json", records)
    write_json(folder / "problems.json", {**problems, "1": {"choices": ["x"], "answer": 0, "split": "train"}})
    write_json(folder / "pid_splits.json", {"test": list(problems), "train": ["1"]})
    return ["A", "B", "A"]


def build_textvqa(folder: Path) -> list[str]:
    """Two questions about one picture, one about another, without OCR tokens."""
    asked = [
        ("ab", "What BRAND is it?", "Nokia, 3310", "nokia"),
        ("ab", "what year?", "", "1999"),
        ("cd", "Who?", "", "me"),
    ]
    records, data = [], []
    for number, (image, question, tokens, answer) in enumerate(asked):
        picture(folder / "train_images" / f"{image}.jpg", number)
        text = f"{question}\nReference OCR token: {tokens}\n{SHORT_ANSWER}"
        records.append({"question_id": image, "image": f"{image}.jpg", "text": text, "category": "default"})
        data.append({"image_id": image, "question": question, "question_id": number, "answers": [answer] * 10})
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", records)
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": data})
    return [answer for *_, answer in asked]


def build_pope(folder: Path, count: int = 4) -> list[str]:
    """Of each category as many "yes" as "no"."""
    records, right = [], []
    for place, category in enumerate(CATEGORIES):
        labels = []
        for number in range(count):
            image = picture(folder / "val2014" / f"COCO_val2014_{number % 8:012}.jpg", number)
            text = f"Is there a thing {number} in the imange?"
            question_id = place * count + number
            records.append(
                {"question_id": question_id, "image": image, "text": f"{text}\n{SHORT_ANSWER}", "category": category}
            )
            labels.append(
                {"question_id": number + 1, "image": image, "text": text, "label": "yes" if number % 2 else "no"}
            )
            right.append(labels[-1]["label"].capitalize())
        write_lines(folder / "coco" / f"coco_pope_{category}.json", labels)
    write_lines(folder / "llava_pope_test.jsonl", records)
    return right


def build_mme(folder: Path) -> list[str]:
    """Both layouts of the release: files beside the pictures, and in folders of their own."""
    release, records, right = folder / "MME_Benchmark_release_version", [], []
    for place, task in enumerate(MME_TASKS):
        for number in range(2):
            inner = "images/" if task == "OCR" else ""
            image = f"{task}/{inner}{number:04}.jpg"
            picture(release / image, place * 2 + number)
            space = "  " if number else " "  # some of the release's questions have two spaces there
            lines = []
            for answer in ("Yes", "No"):
                text = f"Is it {answer} {number}?"
                lines.append(f"{text}{space}Please answer yes or no.\t{answer}\n")
                records.append(
                    {"question_id": image, "image": image, "text": f"{text}\n{SHORT_ANSWER}", "category": task}
                )
                right.append(answer)
            answers = release / task / ("questions_answers_YN" if inner else "") / f"{number:04}.txt"
            answers.parent.mkdir(exist_ok=True)
            answers.write_text("".join(lines), encoding="utf-8")
    write_lines(folder / "llava_mme.jsonl", records)
    return right


def mmbench_rows(has_answers: bool, is_short: bool, options: int = 2) -> list[dict[str, Any]]:
    """Two questions, each with its rotations; the second one's pictures are stored once if `is_short`."""
    rows = []
    for turn in range(options):
        for number in range(2):
            names = [f"option{(place + turn) % options}" for place in range(options)]
            letters = dict(zip("ABCD", names, strict=False))
            first = picture_text(number)
            rows.append(
                {
                    "index": number + turn * 1_000_000,
                    "question": f"Which {number}?",
                    "hint": HINTED if number else "",
                    **{letter: letters.get(letter, "") for letter in "ABCD"},
                    **(
                        {"answer": next(letter for letter, name in letters.items() if name == "option0")}
                        if has_answers
                        else {}
                    ),
                    "category": "object_localization" if number else "ocr",
                    "image": str(number) if is_short and turn else first,
                    "source": "drawn",
                    "l2-category": "finegrained_perception",
                    "comment": "",
                    "split": "dev",
                }
            )
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def build_mmbench(folder: Path, name: str, has_answers: bool = True, is_short: bool = False) -> list[str]:
    rows = mmbench_rows(has_answers, is_short)
    write_table(folder / name, rows)
    return [row.get("answer", "A") for row in rows]


def build_seed(folder: Path) -> list[str]:
    """Two pictures and a frame of a video; ids as the files have them, texts there and numbers here."""
    types = {"Scene Understanding": 1, "Action Recognition": 10}
    records, questions = [], []
    for number, (kind, data_type) in enumerate(((1, "image"), (1, "image"), (10, "video"))):
        place = "SEED-Bench-image" if data_type == "image" else "SEED-Bench-video-image"
        picture(folder / place / f"{number}.png", number)
        question_id = f"v{kind}_{number}" if data_type == "video" else str(100 + number)
        text = f"What {number}?\nA. a\nB. b\nC. c\nD. d\n{LETTER}"
        records.append({"question_id": question_id, "image": f"{place}/{number}.png", "text": text})
        choices = {f"choice_{letter}": letter for letter in "abcd"}
        questions.append(
            {
                "question_id": question_id,
                "question_type_id": kind,
                "data_type": data_type,
                "answer": "ABC"[number],
                **choices,
            }
        )
    write_lines(folder / "llava-seed-bench.jsonl", records)
    write_json(folder / "SEED-Bench.json", {"questions": questions, "question_type": types})
    return ["A", "B", "C"]


def build_llava_bench(folder: Path) -> None:
    records, contexts, answers = [], [], []
    for number, category in enumerate(("conv", "detail", "complex")):
        image = picture(folder / "images" / f"00{number}.jpg", number)
        records.append({"question_id": number, "image": image, "text": f"Describe {number}.", "category": category})
        contexts.append({"id": number, "image": image, "caption": f"Caption {number}."})
        answers.append(
            {"question_id": number, "prompt": "", "text": f"GPT-4 says {number}.", "answer_id": f"id{number}"}
        )
    write_lines(folder / "questions.jsonl", records)
    write_lines(folder / "context.jsonl", contexts)
    write_lines(folder / "answers_gpt4.jsonl", answers)


def build_qa90(folder: Path) -> None:
    records, contexts, answers = [], [], []
    for number, category in enumerate(("conv", "detail", "complex")):
        image = picture(folder / "val2014" / f"COCO_val2014_{number:012}.jpg", number)
        records.append({"question_id": number, "image": image, "text": f"What {number}?", "category": category})
        instances = [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}]
        contexts.append({"id": number, "image": image, "captions": ["One.", "Two."], "instances": instances})
        answers.append({"question_id": number, "text": f"GPT-4 says {number}.", "answer_id": f"id{number}"})
    write_lines(folder / "qa90_questions.jsonl", records)
    write_lines(folder / "caps_boxes_coco2014_val_80.jsonl", contexts)
    write_lines(folder / "qa90_gpt4_answer.jsonl", answers)


def build_mmvet(folder: Path) -> None:
    records, known = [], {}
    for number in range(2):
        image = picture(folder / "images" / f"v1_{number}.png", number)
        records.append({"question_id": number, "image": image, "text": f"What is x {number}?"})
        known[f"v1_{number}"] = {
            "imagename": image,
            "question": f"What is x {number}?",
            "answer": "-1<AND>-5",
            "capability": ["ocr", "math"] if number else ["rec"],
        }
    write_lines(folder / "llava-mm-vet.jsonl", records)
    write_json(folder / "mm-vet.json", known)


def build_mmmu(folder: Path) -> list[str]:
    """One question of each of the 30 subjects; one is open and one has two pictures."""
    import pyarrow
    import pyarrow.parquet

    right = []
    for number, subject in enumerate(SUBJECTS):
        is_open = number == 1
        images = {f"image_{place}": None for place in range(1, 8)}
        images |= {
            f"image_{place}": {"bytes": base64.b64decode(picture_text(number)), "path": "x.png"}
            for place in (1, 2)[: 1 + (number == 2)]
        }
        row = {
            "id": f"validation_{subject}_1",
            "question": f"<image 1> Which {number}?",
            "options": "[]" if is_open else "['the first', 'the second']",
            "answer": "42" if is_open else "B",
            "question_type": "open" if is_open else "multiple-choice",
            **images,
        }
        right.append("The answer is 42." if is_open else "(B)")
        path = folder / subject / "validation-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    return right


def build_mathvista(folder: Path) -> list[str]:
    shared = {"unit": None, "precision": None, "choices": None, "metadata": {"task": "math word problem"}}
    kinds: list[dict[str, Any]] = [
        {"question_type": "multi_choice", "answer_type": "text", "choices": ["red", "blue"], "answer": "blue"},
        {"question_type": "free_form", "answer_type": "integer", "answer": "7"},
        {"question_type": "free_form", "answer_type": "float", "precision": 1.0, "answer": "1.5", "unit": "m"},
    ]
    problems = {}
    for number, kind in enumerate(kinds, 1):
        picture(folder / "images" / f"{number}.jpg", number)
        problems[str(number)] = {
            **shared,
            **kind,
            "pid": str(number),
            "question": f"How {number}?",
            "image": f"images/{number}.jpg",
        }
    write_json(folder / "annot_testmini.json", problems)
    return ["(B) blue", "7", "1.5"]


def build_hallusionbench(folder: Path) -> list[str]:
    """Two questions on one figure, one without a picture, which is of another split."""
    records, right = [], []
    for number in range(3):
        name = f"hallusion_bench/VD/figure/0_{number}.png"
        record = {
            "category": "VD", "subcategory": "figure", "visual_input": "1", "set_id": "0", "figure_id": "1",
            "question_id": str(number), "question": f"Is it {number}?", "gt_answer": str(number % 2),
            "filename": None if number == 2 else f"./{name}",
        }  # fmt: skip
        records.append(record)
        if number < 2:
            picture(folder / name, number)
            right.append("Yes, it is." if number % 2 else "No.")
    write_json(folder / "HallusionBench.json", records)
    return right


def build_refcoco(folder: Path, name: str, splits: tuple[str, ...]) -> list[str]:
    right = []
    for place, split in enumerate(splits):
        number = 581857 + place
        picture(folder.parent / "train2014" / f"COCO_train2014_{number:012}.jpg", place)
        record = {
            "img_id": f"COCO_train2014_{number:012}_{place}", "sents": "the left one", "bbox": [10, 10, 20, 10],
            "height": 40, "width": 50,
        }  # fmt: skip
        write_json(folder / f"{name}_{split}.json", [record])
        right.append("{<20><25><60><50>}")
    return right


BUILDERS: dict[str, Callable[[Path], Any]] = {
    "vqav2": lambda root: build_vqav2(root / "vqav2"),
    "gqa": lambda root: build_gqa(root / "gqa"),
    "vizwiz": lambda root: build_vizwiz(root / "vizwiz"),
    "scienceqa": lambda root: build_scienceqa(root / "scienceqa"),
    "textvqa": lambda root: build_textvqa(root / "textvqa"),
    "pope": lambda root: build_pope(root / "pope"),
    "mme": lambda root: build_mme(root / "MME"),
    "mmbench_dev_en": lambda root: build_mmbench(root / "mmbench", "mmbench_dev_20230712.tsv"),
    "mmbench_dev_cn": lambda root: build_mmbench(root / "mmbench_cn", "mmbench_dev_cn_20231003.tsv"),
    "mmbench_test_en": lambda root: build_mmbench(root / "mmbench", "MMBench_TEST_EN.tsv", False, True),
    "mmbench_test_cn": lambda root: build_mmbench(root / "mmbench_cn", "MMBench_TEST_CN.tsv", False, True),
    "ccbench": lambda root: build_mmbench(root / "ccbench", "CCBench.tsv", True, True),
    "seed": lambda root: build_seed(root / "seed_bench"),
    "llava_bench": lambda root: build_llava_bench(root / "llava-bench-in-the-wild"),
    "qa90": lambda root: build_qa90(root / "coco2014_val_qa_eval"),
    "mmvet": lambda root: build_mmvet(root / "mm-vet"),
    "mmmu": lambda root: build_mmmu(root / "mmmu"),
    "mathvista": lambda root: build_mathvista(root / "mathvista"),
    "hallusionbench": lambda root: build_hallusionbench(root / "hallusionbench"),
    "refcoco": lambda root: build_refcoco(root / "refcoco", "refcoco", ("val", "testA", "testB")),
    "refcoco_plus": lambda root: build_refcoco(root / "refcoco+", "refcoco+", ("val", "testA", "testB")),
    "refcocog": lambda root: build_refcoco(root / "refcocog", "refcocog", ("val", "test")),
}


def build_all(root: Path) -> dict[str, Any]:
    """All of them below one folder; the right answers by benchmark, in the order of the questions."""
    return {name: build(root) for name, build in BUILDERS.items()}
