"""Answers and files that no model has written: pieces that the scorers' rules turn on, put together by a seed.

`tests/golden/scoring/` has what the real scorers make of them, `tests/reference/make_scoring_golden.py` wrote it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

COUNT = 5000
SEED = 20231003

Case = dict[str, Any]

_WORDS = tuple(
    word
    for line in (
        "red blue White-House house cat dogs a an the The A AN none zero one two ten Ten dont Dont cant Im ive",
        "its it's isn't Tom's let's somebody'd couldnt've yall'd've 'ow'sat twas 3 3.5 1,000 2,5 10 50% $5 3. .5",
        'e.g. U.S.A. yes no Yes No maybe café 红色 ß İ naïve x_y a/b (left) [1] {ok} "quoted" <b> c++ a=b',
        "back\\slash `tick` me@home semi;colon what? stop! -1 -- -",
    )
    for word in line.split()
)
_GAPS = (" ", " ", " ", " ", "", "  ", "\n", "\t", ", ", ". ", "-", "; ", ",", "... ", " .")
_YES_NO = (
    *("Yes", "No", "no", "not", "No", "no", "yes", "Yes", "No.", "no.", "Yes,", "No, "),
    *("Yes", "No", "yes", "no", "NO", "YES", "not", "Not", "Nothing", "know", "noted", "yesterday", "y", "n", "N", "Y"),
    *("there", "is", "a", "cat", "Absolutely", "sure", "eyes", "none", "否", "是", "don't", "cannot", "No,", "no,yes"),
    *("yes.", "No.", "y.", "n.", "y.e.s", "n.o", "", ".", ",", "\n", "Noyes", "yesno"),
)
_LETTERS = (*"ABCDEFGZ", *"abcde", "Ａ", "É")
_CHOICE_PIECES = (
    *("The answer is ", "the answer is ", "answer is ", "I choose ", "The best option is ", "选", "答案是", "정답은 "),
    *(
        ".",
        ". ",
        ", ",
        ":",
        ")",
        ").",
        "(",
        " ",
        "  ",
        "\n",
        "!",
        "?",
        "'",
        '"',
        ";",
        "It is ",
        "a cat",
        "DNA ",
        "A ",
        "",
    ),
    *("because ", "both A and B", "A B C D", "None of the above ", "Failed to obtain answer via API", "Apple", "nan"),
)
_OPTIONS = ("cat", "dog", "a cat", "red", "Red car", "car", "1", "12", "none", "nan", "None of them", "A", "红色", "")
_TASKS = ("existence", "count", "OCR", "code_reasoning", "text_translation")


_PHRASES = (
    *("The answer is ", "the correct answer is ", "Correct answer is ", "best answer is ", "the correct option is "),
    *("best option is ", "The choice is ", "correct choice is ", "I choose ", "i select", "I pick ", "my answer is "),
    *("My choice is ", "옵션", "정답은 ", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def texts(rng: random.Random, pieces: Sequence[str], gaps: Sequence[str], most: int) -> str:
    """Up to `most` pieces with gaps between them, seldom none."""
    found = [rng.choice(pieces) for _ in range(max(rng.randint(0, most), rng.randint(0, 9) > 0))]
    return "".join(piece + (rng.choice(gaps) if place < len(found) - 1 else "") for place, piece in enumerate(found))


def vqa_text(rng: random.Random) -> str:
    """An answer with the marks, numbers and contractions that processing knows."""
    if rng.random() < 0.03:  # more periods than are replaced
        return texts(rng, ("a.", "b", "3.", "...", ". "), ("", " ", "."), 60)
    return texts(rng, _WORDS, _GAPS, 6)


def vqa_case(rng: random.Random) -> Case:
    """An answer and ten references of which some are forms of it."""
    pool = [vqa_text(rng) for _ in range(rng.randint(1, 4))]
    forms: tuple[Callable[[str], str], ...] = (str, str.upper, str.lower, lambda text: f"the {text}.", str.strip)
    drawn = [rng.choice(forms)(rng.choice(pool)) for _ in range(11)]
    return {"text": drawn[0], "answers": drawn[1:]}


def yes_no_text(rng: random.Random) -> str:
    """An answer to a yes-or-no question."""
    if rng.random() < 0.4:
        return rng.choice(_YES_NO)
    return texts(rng, _YES_NO, (" ", " ", " ", "", ". ", ", ", "\n"), 5)


def pope_case(rng: random.Random) -> Case:
    """An answer and its label."""
    return {"text": yes_no_text(rng), "label": rng.choice(("yes", "no"))}


def mme_case(rng: random.Random) -> Case:
    """Two answers to the questions of an image."""
    return {
        "category": rng.choice(_TASKS),
        "answers": [rng.choice(("Yes", "No")) for _ in range(2)],
        "texts": [yes_no_text(rng) for _ in range(2)],
    }


def choice_text(rng: random.Random) -> str:
    """An answer to a question with options."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice("ABCD" if kind < 0.25 else _LETTERS)
    if kind < 0.55:
        return rng.choice(_LETTERS) + rng.choice((". ", ".", ". It", ":")) + texts(rng, _CHOICE_PIECES, ("",), 3)
    if kind < 0.6:  # two sentences, of the same letter or of two
        return " ".join(f"The answer is {rng.choice(_LETTERS)}." for _ in range(2))
    if kind < 0.66:  # a letter inside of a word after a phrase, the last word not a letter
        before = rng.choice(("", "(A) ", "B. ", "C: ", "not (D) "))
        return before + rng.choice(_PHRASES) + "x" + rng.choice("ABCD") + rng.choice(("x", "xBx", " or so", "."))
    if kind < 0.7:  # a letter between marks
        marked = rng.choice(("", "(", ":")) + rng.choice("ABCDE") + rng.choice(("", ".", ",", ":", ")", ")."))
        if rng.random() < 0.5:
            mark = rng.choice(",.!?;:'\"")
            return f"{mark}{rng.choice('ABCD')}, not ({rng.choice('ABCD')}){mark}"
        return rng.choice(("", "It is ", "I see A cat ")) + marked + rng.choice(("", " indeed", " I think so"))
    if kind < 0.78:
        return rng.choice(("", "So. ")) + "The answer is " + rng.choice(_LETTERS) + texts(rng, _CHOICE_PIECES, ("",), 3)
    return texts(rng, (*_CHOICE_PIECES, *_LETTERS), ("", "", " "), 7)


def science_case(rng: random.Random) -> Case:
    """An answer to a question of ScienceQA; some have a picture, some no answer."""
    choices = [f"choice {number}" for number in range(rng.randint(2, 5))]
    answer = rng.randrange(len(choices))
    return {
        "text": None if rng.random() < 0.03 else "ABCDE"[answer] if rng.random() < 0.2 else choice_text(rng),
        "has_image": rng.random() < 0.5,
        "choices": choices,
        "answer": answer,
    }


def seed_case(rng: random.Random) -> Case:
    """An answer to a question of SEED-Bench."""
    kind, answer = rng.randint(1, 12), rng.choice("ABCD")
    return {
        "text": None if rng.random() < 0.03 else answer if rng.random() < 0.3 else choice_text(rng),
        "answer": answer,
        "type": kind,
        "data_type": "image" if kind < 10 else "video",
    }


def mmbench_case(rng: random.Random) -> Case:
    """A question of MMBench with an answer to each rotation of its options; None is no option."""
    options = [rng.choice(_OPTIONS) for _ in range(rng.randint(2, 4))]
    right = rng.randrange(len(options))
    rows = []
    for turn in range(rng.choice((1, len(options)))):
        turned = options[turn:] + options[:turn]
        answer = "ABCD"[(right - turn) % len(options)]
        is_meant = rng.random() < 0.7
        text = (
            rng.choice((answer, f"{answer}.", f"({answer})", f"The answer is {answer}"))
            if is_meant
            else choice_text(rng)
        )
        padded = [*turned, *[None] * (4 - len(turned))]
        rows.append({"text": text, "answer": answer, **dict(zip("ABCD", padded, strict=True))})
    return {"category": rng.choice(("ocr", "counting")), "l2": rng.choice(("perception", "logic")), "rows": rows}


CASES: dict[str, Callable[[random.Random], Case]] = {
    "vqa": vqa_case,
    "pope": pope_case,
    "science_qa": science_case,
    "mme": mme_case,
    "seed": seed_case,
    "mmbench": mmbench_case,
}


def cases(name: str, count: int = COUNT) -> list[Case]:
    """The cases of a benchmark, the same every time."""
    rng = random.Random(f"{name} {SEED}")
    return [CASES[name](rng) for _ in range(count)]


MMBENCH_COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"),
    *("comment", "split"),
)
_ROTATION = 1_000_000


def mmbench_rows(part: Sequence[Case]) -> list[Case]:
    """The rows of MMBench's table for some questions, and under "prediction" the answer to each."""
    return [
        {
            "index": number + turn * _ROTATION,
            "question": f"What is {number}?",
            "category": case["category"],
            "l2-category": case["l2"],
            "image": "x",
            "source": "s",
            "split": "dev",
            **{key: value for key, value in row.items() if key != "text"},
            "prediction": row["text"],
        }
        for number, case in enumerate(part)
        for turn, row in enumerate(case["rows"])
    ]


def mmbench_answers(rows: Sequence[Case]) -> list[tuple[int, str]]:
    """Lines of answers to rows: some have none, some two of which the later one counts."""
    lines = [(row["index"], row["prediction"]) for place, row in enumerate(rows) if place % 17]
    return [(index, "an earlier answer") for index, _ in lines[:3]] + lines


def parts(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Values in pieces, each for a file."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def rounded(value: Any) -> Any:
    """A value whose floats have nine decimals: Python 3.12 adds floats more exactly than versions before it."""
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 9) if isinstance(value, float) else value


def digest(values: Any) -> str:
    """Sixteen digits that differ where the values do."""
    text = json.dumps(values, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def blocks(values: Sequence[Any], size: int = 100) -> list[str]:
    """A digest of each block of values, so that a difference is found without storing the values."""
    return [digest(part) for part in parts(rounded(list(values)), size)]
