"""Who may import whom: the table of docs/architecture.md as data, held against every import of the package.

The source is parsed, not imported; only the last tests start interpreters, to see what an import really loads.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import HANG

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "paddlemix"

# A room is a folder or a file right below the package.  It may import every room of the levels below its own.
LEVELS = (
    ("__main__",),
    ("tools", "examples"),
    ("demo", "doctor", "dry_run"),
    ("serve", "evaluation", "trainer"),
    ("generation",),
    ("checkpoints", "peft", "datasets"),
    ("parallel",),
    ("models", "processors", "network", "launch"),
    ("config", "sample", "device", "log", "cache", "cached_table", "identity", "out_of_memory", "progress_bar"),
    ("outputs",),
    ("declared", "locks", "paths"),
    ("json_files", "table_files", "temporary"),
    ("lfs", "file_locks"),
    ("errors",),
    ("__init__",),
)
# Importer and imported of one level.
SAME_LEVEL = {
    *(("examples", "tools"), ("trainer", "evaluation"), ("checkpoints", "peft"), ("device", "log")),
    *(("identity", "cached_table"), ("identity", "log"), ("cached_table", "cache"), ("cached_table", "log")),
    *(("identity", "progress_bar"), ("progress_bar", "log")),
}

# The rooms inside checkpoints/, folders and files alike, in the same way: each imports the levels below its own.
CHECKPOINT_LEVELS = (
    ("convert",),
    ("load", "model_identity"),
    ("adapters", "new_projector", "sizes"),
    ("base_model", "pretrained"),
    ("identity",),
    ("projector_file", "quantized"),
    ("source", "weight_check"),
    ("hub",),
    ("layouts",),
    ("files",),
)

# Library -> the rooms or files that may name it, even inside a function.
ONLY_IN = {
    "paddlenlp": ("trainer/paddlenlp_trainer.py",),
    "transformers": ("processors/text/tokenizer.py",),
    "torch": (),
}
# Importing these rooms and modules loads neither paddle nor paddlenlp, directly or through others.
WITHOUT_PADDLE = (
    *(
        "processors",
        "network",
        "launch",
        "datasets",
        "config",
        "sample",
        "log",
        "cache",
        "out_of_memory",
        "paths",
        "errors",
    ),
    *("cached_table", "declared", "identity", "lfs", "locks", "outputs", "progress_bar"),
    *("file_locks", "json_files", "table_files", "temporary"),
    *(
        "demo.pictures",
        "demo.scene_data",
        "demo.scenes",
        "demo.digits",
        "demo.vocabulary",
        "demo.results",
        "evaluation.metrics",
        "evaluation.scoring",
        "evaluation.judging",
    ),
)


@dataclass(frozen=True)
class Import:
    """One imported name.

    Args:
        file: the importing file, relative to the package, "models/llava.py".
        importer, imported: dotted module names; `imported` is a submodule where the name is one.
        name: what is taken out of `imported`; "" for the module itself, "*" for a star import.
        line: 1-based.
    """

    file: str
    importer: str
    imported: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{PACKAGE}/{self.file}:{self.line} imports {self.imported}{' ' + self.name if self.name else ''}"


def find_modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module of the package directory."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = (PACKAGE, *path.relative_to(package).with_suffix("").parts)
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def read_imports(package: Path) -> list[Import]:
    """Every import of every module of the package directory, those inside functions too."""
    modules = find_modules(package)
    found = []
    for importer, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        file = path.relative_to(package).as_posix()
        parent = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        for line, imported, name in walk_imports(tree, parent):
            if f"{imported}.{name}" in modules:
                imported, name = f"{imported}.{name}", ""
            found.append(Import(file, importer, imported, name, line))
    return found


def walk_imports(tree: ast.Module, parent: str) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of each import statement and each `import_module("literal")`.

    Args:
        tree: a parsed module.
        parent: the package that its relative imports start from.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = parent.split(".")[: len(parent.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield from ((node.lineno, base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value), ""


def room_of(module: str) -> str:
    """The room that a module of ours belongs to: "models" for paddlemix.models.llava."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def rooms_allowed(levels: tuple[tuple[str, ...], ...] = LEVELS) -> dict[str, set[str]]:
    """Room -> the rooms it may import, itself included."""
    allowed = {}
    for depth, level in enumerate(levels):
        lower = {room for below in levels[depth + 1 :] for room in below}
        for room in level:
            beside = {imported for importer, imported in SAME_LEVEL if importer == room}
            allowed[room] = {room} | lower | beside
    return allowed


def wrong_edges_inside(imports: list[Import], room: str, levels: tuple[tuple[str, ...], ...]) -> list[str]:
    """The imports between the rooms inside a room that its table does not allow, and rooms that it does not know."""
    allowed, wrong = rooms_allowed(levels), []
    inside = f"{PACKAGE}.{room}."
    for edge in imports:
        if not edge.importer.startswith(inside):
            continue
        importer = edge.importer.removeprefix(inside).split(".")[0]
        if importer not in allowed:
            wrong.append(f"{PACKAGE}/{edge.file}: '{importer}' is not in the table of {room}")
        elif edge.imported.startswith(inside):
            target = edge.imported.removeprefix(inside).split(".")[0]
            if target not in allowed[importer]:
                wrong.append(f"{edge}: {importer} may not import {target}")
    return wrong


def is_ours(module: str) -> bool:
    return module == PACKAGE or module.startswith(PACKAGE + ".")


def wrong_edges(imports: list[Import]) -> list[str]:
    """The imports between rooms that the table does not allow, and rooms that it does not know."""
    allowed = rooms_allowed()
    wrong = []
    for edge in imports:
        room, target = room_of(edge.importer), room_of(edge.imported)
        if room not in allowed:
            wrong.append(f"{PACKAGE}/{edge.file}: '{room}' is no room of the table")
        elif is_ours(edge.imported) and target not in allowed[room]:
            wrong.append(f"{edge}: {room} may not import {target}")
        elif edge.imported == PACKAGE and edge.name not in ("__version__", ""):
            wrong.append(f"{edge}: import it from the module that defines it")
    return wrong


def wrong_libraries(imports: list[Import]) -> list[str]:
    """The imports of a library outside the files that may know it."""
    wrong = []
    for edge in imports:
        library = edge.imported.split(".")[0]
        if library in ONLY_IN and not edge.file.startswith(ONLY_IN[library]):
            wrong.append(f"{edge}: {library} belongs to {', '.join(ONLY_IN[library]) or 'no file of the package'}")
    return wrong


def find_cycle(imports: list[Import]) -> list[str]:
    """The modules of one circle of imports, [] when there is none."""
    graph: dict[str, set[str]] = {}
    for edge in imports:
        if is_ours(edge.imported) and edge.imported != edge.importer:
            graph.setdefault(edge.importer, set()).add(edge.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return read_imports(ROOT / PACKAGE)


def test_every_import_is_in_the_table(imports: list[Import]) -> None:
    assert wrong_edges(imports) == []


def test_every_import_inside_checkpoints_is_in_its_table(imports: list[Import]) -> None:
    assert wrong_edges_inside(imports, "checkpoints", CHECKPOINT_LEVELS) == []


def test_every_library_stays_in_its_room(imports: list[Import]) -> None:
    assert wrong_libraries(imports) == []


def test_no_import_goes_in_a_circle(imports: list[Import]) -> None:
    assert find_cycle(imports) == []


def test_no_star_import(imports: list[Import]) -> None:
    assert [str(edge) for edge in imports if edge.name == "*"] == []


@pytest.fixture
def write_package(tmp_path: Path):
    """A function that writes {file: source} as a package and reads its imports."""

    def write(files: dict[str, str]) -> list[Import]:
        for name, source in files.items():
            path = tmp_path / PACKAGE / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        return read_imports(tmp_path / PACKAGE)

    return write


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        ("models/a.py", "from paddlemix.config.schema import RunConfig", True),
        ("models/a.py", "from paddlemix.trainer import recipe", False),
        ("models/a.py", "from paddlemix.processors import image", False),
        ("models/a.py", "def f():\n    from paddlemix.trainer import recipe", False),
        ("models/a.py", "from ..trainer.recipe import train", False),
        ("models/a.py", "from . import b", True),
        ("checkpoints/a.py", "import paddlemix.peft.lora", True),
        ("peft/a.py", "import paddlemix.checkpoints.files.weight_files", False),
        ("datasets/a.py", "import paddlemix.processors.images.image_spec", True),
        ("errors.py", "import paddlemix.sample", False),
        ("tools/a.py", "from paddlemix import __version__", True),
        ("tools/a.py", "from paddlemix import load_pretrained", False),
        ("utils/a.py", "import os", False),
    ],
)
def test_the_table_tells_right_from_wrong(write_package, file: str, source: str, allowed: bool) -> None:
    neighbours = {"trainer/recipe.py": "", "processors/images/image_spec.py": "", "models/b.py": "", "peft/lora.py": ""}
    assert (wrong_edges(write_package({**neighbours, file: source})) == []) is allowed


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        ("checkpoints/convert/a.py", "from paddlemix.checkpoints.load import load_base", True),
        ("checkpoints/files/a.py", "from paddlemix.checkpoints.files import b", True),
        ("checkpoints/files/a.py", "from paddlemix.checkpoints.layouts.b import c", False),
        ("checkpoints/source.py", "def f():\n    from paddlemix.checkpoints import load", False),
        ("checkpoints/identity/a.py", "from ..pretrained import b", False),
        ("checkpoints/new.py", "import os", False),
        ("models/a.py", "from paddlemix.checkpoints.load import load_base", True),  # the other table's to refuse
    ],
)
def test_the_table_of_checkpoints_tells_right_from_wrong(write_package, file: str, source: str, allowed: bool) -> None:
    rooms = {"checkpoints/load.py": "", "checkpoints/files/b.py": "", "checkpoints/layouts/b.py": ""}
    found = wrong_edges_inside(write_package({**rooms, file: source}), "checkpoints", CHECKPOINT_LEVELS)
    assert (found == []) is allowed


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        ("trainer/paddlenlp_trainer.py", "from paddlenlp.trainer import Trainer", True),
        ("models/a.py", "def f():\n    import paddlenlp", False),
        ("models/a.py", "import importlib\nimportlib.import_module('paddlenlp.peft')", False),
        ("processors/text/tokenizer.py", "import transformers", True),
        ("processors/images/image_spec.py", "from transformers import CLIPImageProcessor", False),
        ("checkpoints/a.py", "import torch", False),
    ],
)
def test_a_library_outside_its_room_is_seen(write_package, file: str, source: str, allowed: bool) -> None:
    assert (wrong_libraries(write_package({file: source})) == []) is allowed


def test_a_circle_is_seen_through_relative_imports(write_package) -> None:
    found = find_cycle(write_package({"models/a.py": "from . import b", "models/b.py": "from .a import f"}))
    assert set(found) == {"paddlemix.models.a", "paddlemix.models.b"}


def run_python(source: str) -> str:
    """What a fresh interpreter at the root of the checkout prints; fails with its errors."""
    result = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.strip()


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "{'numpy', 'paddle', 'paddlenlp', 'PIL', 'transformers'}"
    assert run_python(f"import sys, paddlemix; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_rooms_without_paddle_load_none() -> None:
    light = tuple(f"{PACKAGE}.{entry}." for entry in WITHOUT_PADDLE)
    names = [name for name in find_modules(ROOT / PACKAGE) if f"{name}.".startswith(light)]
    script = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    loaded = sorted({{"paddle", "paddlenlp", "huggingface_hub"}} & set(sys.modules))
    if loaded:
        print(name, "loads", *loaded)
        break
"""
    assert run_python(script) == ""


def test_every_module_imports() -> None:
    script = f"""
import importlib
for name in {list(find_modules(ROOT / PACKAGE))}:
    try:
        importlib.import_module(name)
    except BaseException as error:
        print("broken:", name, type(error).__name__, error)
"""
    broken = [line for line in run_python(script).splitlines() if line.startswith("broken:")]
    assert broken == []
