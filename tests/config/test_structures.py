"""Keys with an inner structure: a fault names the inner key, and paths are read by the rule for paths."""

from __future__ import annotations

from pathlib import Path

from paddlemix.config.structures import check_dataset, check_pairs, check_prompts


def test_faults_of_a_dataset_name_the_inner_key() -> None:
    value = {"train": [{"data_files": "a.json", "weigth": 2}, {"name": "x"}], "evl": [], "eval": {}}
    _, faults = check_dataset(value)
    assert [path for path, _ in faults] == [
        "dataset.train[0].weigth",
        "dataset.train[1].name",
        "dataset.evl",
        "dataset.eval",
    ]
    assert "did you mean 'weight'" in faults[0][1] and "did you mean 'eval'" in faults[2][1]


def test_an_entry_gets_a_name_and_its_home_folder() -> None:
    checked, faults = check_dataset({"train": [{"data_files": ["~/a.json", "b.json"]}]})
    (entry,) = checked["train"]
    assert not faults and entry["name"] == "chatml_dataset"
    assert entry["data_files"] == [str(Path.home() / "a.json"), "b.json"]


def test_pairs_and_prompts() -> None:
    faults = check_pairs("grids", [[336, 672], [336], [0, 1], [1.0, 2]], least=1)
    assert [message.partition(" is ")[0] for _, message in faults] == [
        "grids: item 1",
        "grids: item 2",
        "grids: item 3",
    ]
    checked, faults = check_prompts("prompts", [{"question": "a?", "image": "~/b.png"}, {"question": " "}])
    assert checked == [{"question": "a?", "image": str(Path.home() / "b.png")}] and len(faults) == 1
    assert "is an empty list" in check_prompts("prompts", [])[1][0][1]
