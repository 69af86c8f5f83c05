"""Files of an entry as parts, and the share of bad samples that a run accepts; data sets are in `test_mixture.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paddlemix.datasets.data_parts import check_bad_share, open_parts
from paddlemix.datasets.data_settings import DataSettings
from paddlemix.errors import UserError

GOOD = {"conversations": [["Q", "A"]]}


def test_what_cannot_be_read_is_left_out_of_its_part(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD, {"id": 1}, GOOD, {"id": 2}]))
    chosen: Any = []
    entry = {"data_files": str(path), "split": "[:75%]", "chat_template": "v1", "image_root": "r"}
    [part] = open_parts(entry, lambda name: chosen.append(name), DataSettings(on_bad_sample="skip"))
    assert (part.rows.tolist(), part.image_root, chosen) == ([0, 2], "r", ["v1"])
    [(source, reason)] = part.unreadable  # record 3 is not in the split
    assert source == f"{path} record 1" and "its form is not known" in reason
    with pytest.raises(UserError, match="record 1: .*and 1 more bad records in this file"):
        list(open_parts(entry, lambda name: chosen.append(name), DataSettings()))


def test_the_share_of_bad_samples() -> None:
    check_bad_share(1, 100, 0.01, "r")
    with pytest.raises(
        UserError, match="2 of 100 samples cannot be used, max_bad_fraction 0.01 allows 1; the first: r"
    ):
        check_bad_share(2, 100, 0.01, "r")
