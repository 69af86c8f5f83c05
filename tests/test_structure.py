"""The shape of the package: sizes of folders and files, names, tests that name files, comments, and plain words.

Reads text only; nothing of the package is imported.
"""

from __future__ import annotations

import ast
import re
import tokenize
from collections import Counter, defaultdict
from pathlib import Path

from tests.test_architecture import PACKAGE, ROOT, walk_imports

MAX_FILES = 20  # of a folder
MAX_LINES = 300  # of a file
SOURCES = (".py", ".c", ".h")
FILES = (*SOURCES, ".json", ".md")  # what is written by hand; no caches, no built libraries

# A name of files in several rooms, and what makes it plain which is which.
SAME_NAMES = {
    "checks.py": "device/: of the environment; trainer/: of a run's keys",
    "llava.py": "processors/: what prepares its input; models/: the model",
    "load.py": "config/: a run's file; checkpoints/: a model",
    "model.py": "demo/: the demo's; dry_run/: one without weights",
    "predict.py": "generation/: the work; tools/: its command",
    "quantize.py": "peft/: the work; tools/: its command",
    "settings.py": "peft/: of adapters; device/: of the environment",
    "sizes.py": "checkpoints/: of a model; datasets/images/: of pictures",
}

# Files that no test names: who tests them.
UNNAMED = {
    "checkpoints/adapters/xtuner_adapter.py": "tests/checkpoints/layouts/test_xtuner_layout.py by loading its adapters",
    "config/command_line.py": "tests/config/ and tests/tools/ by command lines",
    "config/foreign/toolchain_keys.py": "tests/config/foreign/ by the names it declares",
    "config/rules.py": "tests/config/test_load.py by files that break them",
    "config/schema_training.py": "tests/config/ by the keys that it declares",
    "device/state.py": "tests/trainer/ by runs that are repeated exactly",
    "doctor/slow.py": "tests/doctor/test_card.py by the lines of a card's table",
    "doctor/tiny_runs.py": "tests/doctor/ by the checks that are made of them",
    "evaluation/answered_questions.py": "tests/evaluation/benchmarks/ by predictions that do not fit",
    "evaluation/benchmarks/benchmark_files.py": "tests/evaluation/benchmarks/ by benchmarks that it reads",
    "evaluation/benchmarks/box_files.py": "tests/evaluation/benchmarks/ by benchmarks that it reads",
    "evaluation/benchmarks/choice_files.py": "tests/evaluation/benchmarks/ by benchmarks that it reads",
    "evaluation/benchmarks/open_answer_files.py": "tests/evaluation/benchmarks/ by benchmarks that it reads",
    "evaluation/benchmarks/vqa_files.py": "tests/evaluation/benchmarks/ by benchmarks that it reads",
    "evaluation/benchmarks/yes_no_files.py": "tests/evaluation/benchmarks/ by benchmarks that it reads",
    "tools/common/sample_logits.py": "tests/tools/test_merge.py by the check of a merge",
    "tools/common/sample_view.py": "tests/tools/test_show_data.py by its output",
    "trainer/run.py": "every test of a run: it is what the stages of the recipe pass on",
    "trainer/paddlenlp_trainer.py": "every test of a run: the trainer inherits from what it imports",
}

# The least share of the lines of *.py that carry a comment: they say why, at the hard lines.
MIN_COMMENTS = 0.05

# Words of other languages' word order: after, is, is not a, N, available.
GLOSSARY = re.compile(r"behind|stands|is no |so many|that is there")
MAX_GLOSSARY = 100
PAGES = ("README.md", "README_zh.md", "docs/*.md", "benchmarks/**/*.md", "benchmarks/**/*.py")  # and the package


def package_files(*kinds: str) -> list[str]:
    """The files of the package of some kinds, relative to it, sorted."""
    paths = (path for path in (ROOT / PACKAGE).rglob("*") if path.suffix in kinds)
    return sorted(path.relative_to(ROOT / PACKAGE).as_posix() for path in paths)


def room(file: str) -> str:
    """The folder or file right below the package that a file is in."""
    return file.partition("/")[0]


def lines_of(file: str) -> int:
    """The number of lines of a file of the package."""
    return len((ROOT / PACKAGE / file).read_text(encoding="utf-8").splitlines())


def commented_lines(path: Path) -> int:
    """The number of a module's lines that hold a comment that is not for a tool."""
    with path.open("rb") as file:
        comments = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    return len([token for token in comments if not re.match(r"# ?(type:|noqa|pragma)", token.string)])


def named_by_tests() -> tuple[set[str], str]:
    """The modules that a test imports, and the whole text of all tests."""
    imported: set[str] = set()
    texts = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path == Path(__file__):
            continue
        texts.append(path.read_text(encoding="utf-8"))
        parent = ".".join(path.relative_to(ROOT).parts[:-1])
        for _, module, name in walk_imports(ast.parse(texts[-1]), parent):
            imported |= {module, f"{module}.{name}"}
    return imported, "\n".join(texts)


def test_no_folder_holds_many_files() -> None:
    counts = Counter(Path(file).parent.as_posix() for file in package_files(*FILES))
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}


def test_no_file_is_long() -> None:
    assert {file: lines_of(file) for file in package_files(*SOURCES) if lines_of(file) > MAX_LINES} == {}


def test_in_a_room_no_two_files_share_a_name() -> None:
    found = Counter((room(file), Path(file).name) for file in package_files(*SOURCES))
    assert ["/".join(place) for place, count in found.items() if count > 1 and place[1] != "__init__.py"] == []


def test_across_rooms_a_name_is_shared_only_where_it_is_plain_which_is_which() -> None:
    rooms = defaultdict(set)
    for file in package_files(*SOURCES):
        rooms[Path(file).name].add(room(file))
    shared = {name: where for name, where in rooms.items() if len(where) > 1 and name != "__init__.py"}
    assert {name: where for name, where in shared.items() if name not in SAME_NAMES} == {}


def test_a_reason_for_a_shared_name_goes_with_its_files() -> None:
    names = [Path(file).name for file in package_files(*SOURCES)]
    assert [name for name in SAME_NAMES if names.count(name) < 2] == []


def test_every_source_file_is_named_by_a_test() -> None:
    """By a test in the same place, by an import, or by its path or dotted name in a text."""
    imported, text = named_by_tests()
    unnamed = []
    for file in package_files(".py"):
        path = Path(file)
        module = ".".join((PACKAGE, *path.with_suffix("").parts))
        has_mirror = (ROOT / "tests" / path.parent / f"test_{path.name}").is_file()
        if path.name == "__init__.py" or has_mirror or module in imported:
            continue
        if f"{PACKAGE}/{file}" not in text and not re.search(rf"{re.escape(module)}\b", text):
            unnamed.append(file)
    assert sorted(unnamed) == sorted(UNNAMED)


def test_lines_have_comments() -> None:
    paths = [ROOT / PACKAGE / file for file in package_files(".py")]
    comments = sum(commented_lines(path) for path in paths)
    total = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    assert comments / total >= MIN_COMMENTS, f"{comments} of {total} lines have a comment"


def test_texts_use_plain_words() -> None:
    files = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    files += [ROOT / PACKAGE / file for file in package_files(*SOURCES, ".md")]
    counts = {str(path.relative_to(ROOT)): len(GLOSSARY.findall(path.read_text(encoding="utf-8"))) for path in files}
    found = {name: count for name, count in counts.items() if count}
    assert sum(found.values()) <= MAX_GLOSSARY, found
