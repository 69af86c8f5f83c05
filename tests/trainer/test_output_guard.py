"""What a run reads, and that it does not write there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.trainer.output_guard import check_outputs, needed_by_run


def settings(folder: Path, **values: Any) -> RunConfig:
    given = {
        "model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / "out"),
        "do_train": True,
        "dataset": {"train": [{"data_files": [str(folder / "data" / "train.json#5")], "image_root": "https://host/"}]},
        "image_root": str(folder / "pictures"),
        **values,
    }
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def test_all_that_a_run_reads_is_listed_with_its_role(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    resume = tmp_path / "other" / "checkpoint-3"
    found = [(item.role, item.path) for item in needed_by_run(settings(tmp_path), resume)]
    assert ("the run's own model_name_or_path", tmp_path / "model") in found
    assert ("the checkpoint that the run resumes from", resume) in found
    assert ("the data file of dataset.train", tmp_path / "data" / "train.json") in found  # without its number
    assert [path for role, path in found if role == "the image_root"] == [tmp_path / "pictures"]  # no address


@pytest.mark.parametrize("place", ["data", "pictures", "model/out", "."])
def test_the_run_s_folder_is_none_of_these(tmp_path: Path, place: str) -> None:
    for name in ("model", "data", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "train.json").write_text("[]", encoding="utf-8")
    check_outputs(settings(tmp_path), None, own_folder=False)
    with pytest.raises(UserError, match="output_dir"):
        check_outputs(settings(tmp_path, output_dir=str(tmp_path / place)), None, own_folder=False)
