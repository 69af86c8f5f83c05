"""The command that checks data: runs and files, its report and exit status, the good records, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.tools import check_data
from paddlemix.tools.common.command import run_command
from tests.conftest import HANG, ROOT
from tests.tiny import make_processor, noise_picture


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A checkpoint's declared files, pictures, `good.json` (3 records), `bad.json` (3, of which one is good)."""
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "processor_config.json").write_text(json.dumps(make_processor(tokenizer).to_dict()))
    tokenizer.save(checkpoint)
    noise_picture(40, 30).save(tmp_path / "0.png")
    good = [
        {"image": "0.png", "conversations": [["<image>\nWhat?", f"A cat {'and a cat ' * count}."]]}
        for count in range(3)
    ]
    bad = [good[0], {"image": "1.png", "conversations": [["<image>\nQ", "A"]]}, {"conversations": [["Q", " "]]}]
    (tmp_path / "good.json").write_text(json.dumps(good))
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    return tmp_path


def check(*arguments: str | Path) -> int:
    return run_command(check_data.main, [*map(str, arguments), "--workers", "1"])


def write_run(folder: Path, **values: Any) -> Path:
    run = {
        "model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / "out"),
        "image_root": str(folder),
        "dataset": {"train": [{"data_files": [str(folder / "good.json"), str(folder / "bad.json")]}]},
        **values,
    }
    path = folder / "run.json"
    path.write_text(json.dumps(run))
    return path


def test_what_looks_like_a_picture_and_is_none_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "doubt.json"
    texts = ("<img>0.png</img>What?", "<|image|>What?", "![](0.png)")
    path.write_text(json.dumps([{"conversations": [[text, "A"]]} for text in texts]))
    report = folder / "report.json"
    assert check(path, "--image-root", folder, "--report", report) == 0
    text = capsys.readouterr().out
    assert "no problem found" not in text
    assert (
        "doubt about records that are used" in text and f"{path} record 2: '![](0.png)' in a question is read" in text
    )
    values = json.loads(report.read_text())
    assert (values["good"], values["problems"]) == (3, [])
    assert [(doubt["count"], doubt["records"][0]["source"]) for doubt in values["doubts"]] == [(2, f"{path} record 1")]


def test_good_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(folder / "good.json", "--image-root", folder) == 0
    text = capsys.readouterr().out
    assert "records     3: 3 good, 0 bad" in text and "no problem found" in text
    assert "forms       pairs 3" in text
    assert "tokens" not in text


def test_problems_are_shown_with_examples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(folder / "good.json", folder / "bad.json", "--image-root", folder) == 1
    text = capsys.readouterr().out
    assert "records     6: 4 good, 2 bad" in text
    assert "       1  image '...' does not exist" in text
    assert f"bad.json record 1: image '{folder / '1.png'}' does not exist" in text
    assert f"duplicates  1 duplicate record: {folder / 'bad.json'} record 0 is" in text


def test_at_most_three_examples_of_a_kind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"conversations": [["Q", " "]]}] * 5
    (folder / "five.json").write_text(json.dumps(records))
    report = folder / "report.json"
    assert check(folder / "five.json", "--report", report) == 1
    assert capsys.readouterr().out.count("the answer is empty, so there is nothing") == 1 + 3
    assert len(json.loads(report.read_text())["problems"][0]["records"]) == 5


def test_lengths_with_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--image-root", folder, "--model-path", folder / "model")
    assert check(folder / "good.json", *files) == 0
    text = capsys.readouterr().out
    assert "tokens      min " in text and "% of them visual" in text
    assert "padding     " in text and "packed to 2,048 (batches of 8)" in text


def test_a_run_is_checked_as_it_reads_its_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = folder / "report.json"
    assert check(write_run(folder, max_length=70), "--report", report) == 1
    found = json.loads(report.read_text())
    assert found["files"] == [str(folder / "good.json"), str(folder / "bad.json")]
    assert (found["records"], found["good"], found["bad"]) == (6, 4, 2)
    assert found["forms"] == {"pairs": 5}
    assert {problem["kind"]: problem["count"] for problem in found["problems"]}["image '...' does not exist"] == 1
    assert found["statistics"]["max_length"] == 70 and found["statistics"]["samples"] == 4
    assert set(found["statistics"]["padding_share"]) == {"plain", "grouped", "packed"}
    assert "records     6" in capsys.readouterr().out


def test_an_entry_has_its_own_template_and_root(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [{"data_files": f"{folder / 'good.json'}#2", "chat_template": "plain", "image_root": str(folder)}]
    run = write_run(folder, dataset={"train": entries, "eval": []}, image_root=str(folder / "nowhere"))
    assert check(run) == 0
    plain = capsys.readouterr().out
    assert check(run, "--chat-template", "vicuna_v1") == 0
    assert capsys.readouterr().out != plain  # other lengths


def test_a_run_without_its_model_is_checked_all_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(folder, model_name_or_path=str(folder / "none"))
    assert check(run) == 1
    text = capsys.readouterr().out
    assert "note        lengths and templates are not checked: " in text and "records     6" in text
    assert check(run, "--model-path", folder / "none") == 2


def test_samples_that_are_too_long(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [["<image>\nWhat?", "A cat."], ["And?", "A dog." * 20]]
    (folder / "long.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}]))
    entries = {"train": [{"data_files": str(folder / "long.json")}]}
    assert check(write_run(folder, dataset=entries, max_length=100)) == 0
    assert "1 good records have more than 100 tokens; their last turns are dropped" in capsys.readouterr().out
    assert check(write_run(folder, dataset=entries, max_length=100, on_too_long="skip")) == 0
    assert "1 of them are skipped" in capsys.readouterr().out
    assert check(write_run(folder, dataset=entries, max_length=100, on_too_long="error")) == 1
    assert check(write_run(folder, dataset=entries), "--max-length", "20") == 1
    assert "max_length is 20" in capsys.readouterr().out


def test_good_records_are_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = folder / "fixed.json"
    assert check(folder / "bad.json", "--image-root", folder, "--fix", fixed) == 1
    assert f"wrote 1 good records to {fixed}" in capsys.readouterr().out
    assert json.loads(fixed.read_text()) == json.loads((folder / "good.json").read_text())[:1]
    assert check(fixed, "--image-root", folder) == 0


def test_a_run_with_two_splits_is_not_mixed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"data_files": str(folder / "good.json")}
    run = write_run(folder, dataset={"train": [entry], "eval": [{"data_files": str(folder / "bad.json")}]})
    assert check(run, "--fix", folder / "fixed.json") == 2
    assert "would mix training and evaluation data" in capsys.readouterr().err
    assert not (folder / "fixed.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json"], "none.json' does not exist"),
        (["good.json", "--fix", "good.json"], "is one of the files that are checked"),
        (["good.json", "--fix", "no/fixed.json"], "does not exist"),
        (["good.json", "--report", "no/report.json"], "does not exist"),
        (["good.json", "--limit", "0"], "--limit 0: must be at least 1"),
        (["good.json", "--chat-template", "plain"], "--chat-template needs --model-path"),
        (["good.json", "--model-path", "none"], "none"),
        (["run.json", "other.json"], "are both files of a run"),
        (["empty.json"], "names no data"),
    ],
)
def test_what_cannot_be_carried_out(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    write_run(folder)
    (folder / "other.json").write_text((folder / "run.json").read_text())
    (folder / "empty.json").write_text(json.dumps({"model_name_or_path": "m", "output_dir": "o"}))
    monkeypatch.chdir(folder)
    assert check(*arguments) == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_it_cleanly(folder: Path) -> None:
    """While both workers wait for a picture whose server never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(HANG)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        record = json.loads((folder / "good.json").read_text())[0]
        many = [{**record, "image": f"{address}/{number}.png"} for number in range(65)]  # two tasks
        (folder / "many.json").write_text(json.dumps(many))
        dataset = {"train": [{"data_files": [str(folder / "many.json")]}]}
        run = write_run(folder, dataset=dataset, allow_local_network=True, image_timeout=10_000)
        process = subprocess.Popen(
            [sys.executable, "-m", "paddlemix", "check-data", run, "--workers", "2", "--fix", folder / "fixed.json"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
            env={**_without_proxies(), "PADDLEMIX_OFFLINE": "0"},
        )
        with silent.accept()[0], silent.accept()[0]:
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            assert len(workers) == 3 and all(map(_leaves_ctrl_c_alone, workers))  # with Python's own tracker
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.strip() == "interrupted", errors
    assert not (folder / "fixed.json").exists()
    while any(map(_is_running, workers)):  # the last of them, Python's own tracker, ends when its pipe is closed
        time.sleep(0.02)


def _without_proxies() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


def _leaves_ctrl_c_alone(pid: str) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    ignored = next(int(line.split()[1], 16) for line in lines if line.startswith("SigIgn:"))
    return bool(ignored >> (signal.SIGINT - 1) & 1)


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False
