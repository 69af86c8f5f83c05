"""The tables of docs/coming_from.md, made of the tables of the code.

python -m tests.config.foreign_tables     writes them into the page
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from paddlemix.config.foreign.answers import VALUE, Answer
from paddlemix.config.foreign.flags import FOREIGN_FLAGS
from paddlemix.config.foreign.names import FOREIGN_KEYS
from paddlemix.config.foreign.script_keys import ENTRY_KEYS, VALUES
from paddlemix.config.foreign.templates import FOREIGN_RECIPES, FOREIGN_TEMPLATES, Named

PAGE = Path(__file__).parents[2] / "docs" / "coming_from.md"
_BLOCK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
_SAME = re.compile(r'"(\w+)": \$')


def fill(page: str) -> str:
    """The page with every table made anew."""
    return _BLOCK.sub(lambda block: block[1] + "\n" + "\n".join(table(block[2])) + "\n\n" + block[3], page)


def tables_of(page: str) -> list[str]:
    """Names of the tables that a page has."""
    return [block[2] for block in _BLOCK.finditer(page)]


def table(name: str) -> Iterable[str]:
    """The lines of a table: keys and templates of a program, flags of a command, recipes, values, entries."""
    kind, _, which = name.partition(" ")
    if kind == "keys":
        return _rows("key", ((_code([key]), _words(answer)) for key, answer in FOREIGN_KEYS[which].items()))
    if kind == "flags":
        return _flag_rows(FOREIGN_FLAGS[which])
    if kind == "templates":
        named = ((program, name, of) for program, names in FOREIGN_TEMPLATES.items() for name, of in names.items())
        return ["| of | template | here |", "|---|---|---|", *_template_rows(named)]
    if kind == "recipes":
        rows = [
            f"| {program} | `{theirs}` | `{file}`{f', `{beside}`' if beside else ''} |"
            for program, recipes in FOREIGN_RECIPES.items()
            for theirs, (file, beside) in recipes.items()
        ]
        return ["| of | recipe | here |", "|---|---|---|", *rows]
    pairs = VALUES if kind == "values" else ENTRY_KEYS
    rows = [f"| {program} | `{key}` | {_words(answer)} |" for key, (program, answer) in pairs.items()]
    return ["| of | key | here |", "|---|---|---|", *rows]


def _rows(title: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """One line for each answer, with all names that have it."""
    grouped: dict[str, list[str]] = {}
    for name, words in pairs:
        grouped.setdefault(words, []).append(name)
    return [
        f"| {title} | here |",
        "|---|---|",
        *(f"| {', '.join(names)} | {words} |" for words, names in grouped.items()),
    ]


def _flag_rows(programs: Mapping[str, Mapping[str, Answer]]) -> list[str]:
    grouped: dict[tuple[str, str], list[str]] = {}
    for program, flags in programs.items():
        for name, answer in flags.items():
            grouped.setdefault((program, _words(answer)), []).append("--" + name.replace("_", "-"))
    rows = [f"| {program} | {_code(names)} | {words} |" for (program, words), names in grouped.items()]
    return ["| of | flag | here |", "|---|---|---|", *rows]


def _template_rows(templates: Iterable[tuple[str, str, Named]]) -> list[str]:
    grouped: dict[tuple[str, str], list[str]] = {}
    for program, name, named in templates:
        near = f"`{named.ours}`" if named.exact else f"no such text; the nearest is `{named.ours}`"
        grouped.setdefault((program, near if named.ours else "no such text; write a `chat_template.json`"), []).append(
            name
        )
    return [f"| {program} | {_code(names)} | {words} |" for (program, words), names in grouped.items()]


def _words(answer: Answer) -> str:
    """An answer as the cell of a table."""
    cases: dict[str, list[str]] = {}
    for case, written in answer.values.items():
        cases.setdefault(written, []).append(case)
    parts = [
        f"{_code([written]) if written else 'leave it out'} for {_code(names)}" for written, names in cases.items()
    ]
    if answer.write:
        parts.append(_code([_SAME.sub(r"\1", answer.write) if _SAME.fullmatch(answer.write) else answer.write]))
    said = "; ".join(text for text in (answer.says, answer.otherwise) if text)
    return "; ".join([*parts, said] if said else parts).replace(VALUE, "VALUE").replace("|", "\\|")


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" if name else "no value" for name in names)


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
