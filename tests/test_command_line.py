"""The front door: the table of commands, one-line errors, exit statuses, and running a command file by its path."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

import paddlemix
from paddlemix import __main__ as front_door
from paddlemix.errors import MissingFileError, UserError
from paddlemix.tools.common import command
from paddlemix.tools.common.command import run_command
from tests.conftest import HANG

ROOT = Path(__file__).resolve().parent.parent


def run_python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=HANG)


def raising(error: BaseException):
    """A command that raises `error`."""

    def main(argv: list[str]) -> int:
        raise error

    return main


def test_status_and_arguments_pass_through() -> None:
    seen = []
    assert run_command(lambda argv: seen.append(argv), ["a", "b"]) == 0
    assert seen == [["a", "b"]]
    assert run_command(lambda argv: 3, []) == 3


def test_arguments_default_to_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--flag"])
    assert run_command(lambda argv: len(argv), None) == 1


@pytest.mark.parametrize("error", [UserError("rank=0 is not >= 1"), MissingFileError("a.json: no such file")])
def test_a_user_error_is_one_line_and_status_2(error: UserError, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(error), []) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {error.args[0]}\n"


def test_the_traceback_comes_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PADDLEMIX_TRACEBACK", "1")
    assert run_command(raising(UserError("bad")), []) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Traceback") and captured.err.endswith("error: bad\n")


def test_ctrl_c_is_one_line_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), SystemExit(4), BrokenPipeError("worker")])
def test_any_other_exception_keeps_its_traceback(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        run_command(raising(error), [])
    assert caught.value is error


@pytest.mark.parametrize("lines", [1, 100_000], ids=["lost at the last flush", "lost while printing"])
def test_a_reader_that_goes_away_is_no_error(lines: int) -> None:
    script = (
        "import sys, time\n"
        "from paddlemix.tools.common.command import run_command\n"
        "sys.stdin.readline()\n"  # wait until the reader is gone
        f"raise SystemExit(run_command(lambda argv: [print('line') for _ in range({lines})] and 0))\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait(timeout=HANG) == 141
        assert process.stderr.read() == b""


def test_help_lists_every_command() -> None:
    result = run_python("-m", "paddlemix", "--help")
    assert result.returncode == 0 and result.stderr == ""
    for name, entry in front_door.COMMANDS.items():
        assert f"  {name} " in result.stdout and entry.summary in result.stdout


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert front_door.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: paddlemix")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert front_door.main(["--version"]) == 0
    assert capsys.readouterr().out == f"paddlemix {paddlemix.__version__}\n"


def test_an_unknown_command_gets_a_suggestion() -> None:
    result = run_python("-m", "paddlemix", "fintune", "x.json")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: 'fintune' is not a paddlemix command; did you mean 'finetune'?")
    assert result.stderr.count("\n") == 1


def test_a_command_gets_its_arguments_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fake = types.ModuleType("fake_command")
    fake.main = lambda argv: seen.append((sys.argv[0], argv)) or 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_command", fake)
    monkeypatch.setattr(sys, "argv", ["paddlemix"])
    monkeypatch.setitem(front_door.COMMANDS, "fake", front_door.Command("fake_command", "for this test"))
    assert front_door.main(["fake", "a", "--b"]) == 5
    assert seen == [("paddlemix fake", ["a", "--b"])]


def test_an_unknown_public_name_is_named() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_pretraind'.*load_pretrained"):
        paddlemix.load_pretraind  # noqa: B018
    assert {"load_pretrained", "ChatSession", "__version__"} <= set(dir(paddlemix))


@pytest.mark.parametrize("name", list(front_door.COMMANDS))
def test_every_command_file_runs_by_its_path(name: str, tmp_path: Path) -> None:
    path = ROOT / (front_door.COMMANDS[name].module.replace(".", "/") + ".py")
    result = run_python(str(path), "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "usage" in result.stdout


def documented_pattern(depth: int) -> str:
    """The beginning of a command file as the docstring of `_command` gives it, for a file `depth` folders down."""
    lines = textwrap.dedent(command.__doc__.partition("begins with\n")[2].partition("(`parents[3]`")[0])
    return lines.strip().replace("parents[2]", f"parents[{depth}]") + "\n"


@pytest.mark.parametrize("folder", ["tools", "examples/llava"])
def test_the_documented_beginning_works_uninstalled_and_hides_no_library(folder: str, tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "paddlemix"
    (package / "tools" / "common").mkdir(parents=True)
    (package / folder).mkdir(parents=True, exist_ok=True)
    shared = ("tools/__init__.py", "tools/common/__init__.py", "tools/common/command.py")
    (package / "launch").mkdir()
    worker = ("launch/__init__.py", "launch/variables.py", "launch/worker.py")
    for file in ("__init__.py", "errors.py", "paths.py", *shared, *worker):
        shutil.copy(ROOT / "paddlemix" / file, package / file)
    (package / folder / "wave.py").write_text("raise SystemExit('a neighbour hides the library')\n")
    script = package / folder / "x.py"
    body = "import wave\nimport paddlemix\nprint(paddlemix.__file__)\nraise SystemExit(run_command(lambda argv: 7))\n"
    script.write_text(documented_pattern(len(Path(folder).parts) + 1) + body)

    result = run_python(str(script), cwd=tmp_path)

    assert (result.returncode, result.stderr) == (7, "")
    assert Path(result.stdout.strip()) == package / "__init__.py"


@pytest.mark.parametrize("seed", ["1" + "0" * 30, "-1", "1.5", "two", "9223372036854775808", "9" * 5000])
def test_a_seed_that_is_none_is_refused(seed: str) -> None:
    from paddlemix.tools.common.chat_arguments import build_chat_parser

    arguments = ["--model-path", "m", "--image-file", "i.png", f"--seed={seed}"]
    with pytest.raises(UserError, match="is not a seed; give a whole number from 0 to 9223372036854775807") as caught:
        build_chat_parser().parse_args(arguments)
    assert len(str(caught.value)) < 250
    most = build_chat_parser().parse_args([*arguments[:4], "--seed=9223372036854775807"])
    assert most.seed == 2**63 - 1
