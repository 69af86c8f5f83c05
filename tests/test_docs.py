"""The pages against the code: what they name exists, their commands parse, their examples load.

Reads text and configuration only; no paddle, no model.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from paddlemix.__main__ import COMMANDS
from paddlemix.config.load import load_config, parse_command_line, split_dry_run
from paddlemix.config.schema import SPECS
from paddlemix.datasets.forms.parse import parse_record
from paddlemix.errors import UserError
from paddlemix.processors.text.known_templates import template_names
from tests.test_architecture import CHECKPOINT_LEVELS, LEVELS

ROOT = Path(__file__).resolve().parent.parent
READMES = (ROOT / "README.md", ROOT / "README_zh.md")
PAGES = sorted(
    [*READMES, *(ROOT / "docs").glob("*.md"), *(ROOT / "paddlemix").rglob("*.md")], key=lambda path: path.as_posix()
)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)")
SCRIPT = re.compile(r"(?:python|--gpus \S+) (paddlemix/\S+\.py)([^|\n`]*)")
RECORD = "train.json record 17"


def read_page(path: Path) -> str:
    """A page without its comments."""
    return COMMENT.sub("", path.read_text(encoding="utf-8"))


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page, those of the given languages or all."""
    return [body for language, body in FENCE.findall(read_page(path)) if not languages or language in languages]


def headings(path: Path) -> list[str]:
    """The marks of a page's headings in order: ["#", "##", ...]."""
    return re.findall(r"^(#+) ", FENCE.sub("", read_page(path)), re.MULTILINE)


def script_calls() -> list[tuple[str, str]]:
    """(file, arguments) of every `python paddlemix/...` on any page."""
    return sorted({(file, rest.strip()) for page in PAGES for file, rest in SCRIPT.findall(read_page(page))})


def json_examples(kind: type) -> list[Any]:
    """Values of the JSON blocks on all pages that are of a kind: records are lists, configurations objects."""
    values = [json.loads(body) for page in PAGES for body in blocks(page, "json")]
    return [value for value in values if isinstance(value, kind)]


def test_both_readmes_have_the_same_shape() -> None:
    english, chinese = READMES
    assert headings(english) == headings(chinese)
    assert blocks(english) == blocks(chinese)
    assert len(blocks(english)) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page: Path) -> None:
    targets = [target for target in LINK.findall(FENCE.sub("", read_page(page))) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize(("file", "arguments"), script_calls())
def test_a_command_runs_as_it_is_written(file: str, arguments: str) -> None:
    assert (ROOT / file).is_file()
    argv = shlex.split(arguments)
    if not argv or argv == ["--help"] or argv[0].startswith("CONFIG"):
        return
    if argv[0].endswith(".json"):
        path, overrides = parse_command_line(split_dry_run(argv)[0], file, "")
        assert path is not None
        load_config(ROOT / path, overrides)
        return
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    module.build_parser().parse_args(argv)


def test_every_page_is_searched_for_commands() -> None:
    files = {file for file, _ in script_calls()}
    wanted = ("tools/supervised_finetune", "tools/merge_lora_params", "examples/llava/pretrain")
    assert files >= {f"paddlemix/{name}.py" for name in (*wanted, "examples/llava/run_predict_multiround")}


def test_paddlemix_commands_and_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    for page in PAGES:
        code = "\n".join([*blocks(page, "bash"), *re.findall(r"`([^`\n]+)`", FENCE.sub("", read_page(page)))])
        assert set(re.findall(r"^make (\w+)", code, re.MULTILINE)) <= targets, page
        assert set(re.findall(r"^paddlemix ([a-z][\w-]*)", code, re.MULTILINE)) <= COMMANDS.keys(), page


@pytest.mark.parametrize("values", json_examples(dict))
def test_example_configurations_load(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model_name_or_path": "model", "output_dir": "out", **values}), encoding="utf-8")
    assert load_config(path).warnings == []


@pytest.mark.parametrize("records", json_examples(list))
def test_example_records_are_read(records: list[dict[str, Any]]) -> None:
    samples = [parse_record(record, RECORD) for record in records]
    assert all(sample.messages[-1].role == "assistant" for sample in samples)


def test_keys_named_in_the_configuration_page_exist() -> None:
    named = re.findall(r"`([a-z]+(?:_[a-z]+)+)`", FENCE.sub("", read_page(ROOT / "docs" / "configuration.md")))
    assert [name for name in named if name not in SPECS] == []
    assert len(named) > 30


def test_the_configuration_page_says_of_each_key_whether_it_has_an_effect() -> None:
    """The table of keys without effect is the schema's, key by key: no more and no fewer."""
    page = read_page(ROOT / "docs" / "configuration.md")
    table = page.partition("## Read, but without effect today")[2]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    assert len(named) == len(set(named))
    assert set(named) == {name for name, spec in SPECS.items() if spec.status == "ignored"}


def test_defaults_on_the_configuration_page_are_the_schema_s() -> None:
    page = read_page(ROOT / "docs" / "configuration.md")
    table = page.partition("| key | default | effect | source |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines() if line.startswith("| `")]
    said = {name: default for cell, default in rows for name in re.findall(r"`(\w+)`", cell)}
    assert len(said) == 8
    shown = {name: SPECS[name].default for name in said}
    assert said == {name: item if isinstance(item, str) else json.dumps(item) for name, item in shown.items()}


def test_every_template_is_on_the_data_page() -> None:
    page = read_page(ROOT / "docs" / "data.md")
    assert [name for name in template_names() if f"`{name}`" not in page] == []


def test_files_named_on_the_architecture_page_exist() -> None:
    existing = {
        path.relative_to(ROOT).as_posix() for room in ("paddlemix", "tests") for path in (ROOT / room).rglob("*.py")
    }
    named = re.findall(r"`([\w/]+\.py)`", read_page(ROOT / "docs" / "architecture.md"))
    assert [name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in existing)] == []
    assert len(named) > 20


def test_every_file_of_a_room_is_on_the_architecture_page() -> None:
    """A row is a room or a sub-room.  Rooms of commands have a file for each, and the demo a story of its own."""
    rows = re.findall(r"^\| `([\w/]+)/`[^|]*\|(.*)\|$", read_page(ROOT / "docs" / "architecture.md"), re.MULTILINE)
    named = {f"{folder}/{file}" for folder, text in rows for file in re.findall(r"`([\w/]+\.(?:py|c))`", text)}
    files = [path for kind in ("py", "c") for path in sorted((ROOT / "paddlemix").glob(f"*/**/*.{kind}"))]
    places = [path.relative_to(ROOT / "paddlemix") for path in files if path.name != "__init__.py"]
    expected = [place for place in places if place.parts[0] not in ("demo", "tools", "examples")]
    assert [place.as_posix() for place in expected if place.as_posix() not in named] == []


def test_the_architecture_page_has_one_row_for_each_room_and_sub_room() -> None:
    """Tables that name folders below the package; `examples/` shares the row of `tools/`."""
    page = read_page(ROOT / "docs" / "architecture.md")
    rows = re.findall(r"^\| `([\w/]+)/`[^|]*\|", page, re.MULTILINE)
    folders = {path.parent.relative_to(ROOT / "paddlemix") for path in (ROOT / "paddlemix").rglob("*.py")}
    rooms = [folder.as_posix() for folder in folders if folder.parts and folder.parts[0] != "examples"]
    assert sorted(rows) == sorted(rooms)


def test_the_architecture_page_shows_the_table_that_is_tested() -> None:
    tables = {"errors": LEVELS, "weight_check": CHECKPOINT_LEVELS}
    for name, levels in tables.items():
        shown = [body.split("\n") for body in blocks(ROOT / "docs" / "architecture.md", "text") if name in body]
        assert shown == [[", ".join(level) for level in levels] + [""]]


FAULTY_RECORDS: list[dict[str, Any]] = [
    {"conversation": []},
    {"conversations": []},
    {"conversations": [["q", "a"], {"from": "human", "value": "q"}]},
    {"conversations": [["q"]]},
    {"conversations": [{"from": "human"}]},
    {"conversations": [{"from": "bot", "value": "q"}]},
    {"conversations": [{"from": "human", "value": 3}]},
    {"conversations": [{"from": "gpt", "value": "a"}]},
    {"conversations": [["q", " "]]},
    {"conversations": [{"from": "human", "value": "q"}]},
    {"conversations": [["\ud800", "a"]]},
    {"conversations": [["q", "a"]], "image": 3},
    {"conversations": [["q", "a"]], "image": "a.png"},
]


@pytest.mark.parametrize("record", FAULTY_RECORDS, ids=ascii)
def test_every_error_of_a_record_is_on_the_data_page(record: dict[str, Any]) -> None:
    with pytest.raises(UserError) as raised:
        parse_record(record, RECORD)
    text = str(raised.value).removeprefix(f"{RECORD}: ")
    assert [message for message in documented_messages() if message.match(text)], text


def documented_messages() -> list[re.Pattern[str]]:
    """The first cells of the data page's tables, `...` standing for any text, N and M for a number."""
    page = read_page(ROOT / "docs" / "data.md")
    page = page[page.index("## Every error") :]
    cells = re.findall(r"^\| `(.+?)`[^|]* \|", page, re.MULTILINE)
    patterns = [re.escape(cell).replace(r"\.\.\.", ".*") for cell in cells]
    return [re.compile(re.sub(r"\b[NM]\b", r"\\d+", pattern), re.DOTALL) for pattern in patterns]
