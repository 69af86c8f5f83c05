"""The keys whose value has an inner structure: `dataset`, and the lists of pairs.

A fault comes with the path of the inner key it is about ("dataset.train[0].data_files"), so that the caller can name
the line.
"""

from __future__ import annotations

import re
from typing import Any

from paddlemix.config.foreign.names import foreign_entry_key
from paddlemix.config.values import describe
from paddlemix.errors import UserError, did_you_mean
from paddlemix.paths import user_place

InnerFault = tuple[str, str]  # path, message

SPLITS = ("train", "eval")
DEFAULT_DATASET_NAME = "chatml_dataset"
# A share with % or a number of records.
_BOUND = r"(?:\d+(?:\.\d+)?%|\d+)"
# the syntax of Hugging Face datasets, "train[:90%]"; the word before the bracket decides nothing
SLICE = re.compile(rf"\w*\[(?P<first>{_BOUND})?:(?P<last>{_BOUND})?\]")  # of an entry's `split`: "[:90%]"
_REMARK = "about"  # for readers; decides nothing
# where None is listed, null counts as "not given"
_ENTRY_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "data_files": (str, list),
    "splits": (str, list, type(None)),
    "chat_template": (str, type(None)),
    "image_root": (str, type(None)),
    "split": (str, type(None)),
    "weight": (int, float, type(None)),
    _REMARK: (str, type(None)),
}
_PLACES = ("data_files", "chat_template", "image_root")  # the ones that name a file, a folder or an address


def check_dataset(value: dict[str, Any]) -> tuple[dict[str, Any], list[InnerFault]]:
    """The `dataset` key.

    Args:
        value: {"train": [entry, ...], "eval": [entry, ...]}, each optional; an entry is an object with `data_files`
            (text or list of texts, required), `name`, `image_root`, `chat_template`, `split`, `weight`,
            `about`, `splits`.

    Returns:
        The same with every entry's `name` filled in, and the faults.
    """
    checked: dict[str, Any] = {}
    faults: list[InnerFault] = []
    for split, entries in value.items():
        path = f"dataset.{split}"
        # Unknown splits are faults, not ignored: a misspelt "eval" would mean a run without evaluation.
        if split not in SPLITS:
            faults.append((path, f"{path} is not a known key{did_you_mean(split, SPLITS)} (allowed: train, eval)"))
        elif not isinstance(entries, list):
            faults.append((path, f"{path}: expected a list of entries, got {describe(entries)}; put it in [ ]"))
        else:
            results = [_check_entry(f"{path}[{index}]", path, entry) for index, entry in enumerate(entries)]
            faults += [fault for _, found in results for fault in found]
            # Entries with faults are kept as they are: the run stops anyway, and later checks see all keys.
            checked[split] = [
                _with_places(entry, f"{path}[{index}]", faults) if isinstance(entry, dict) and not found else entry
                for index, (entry, found) in enumerate(results)
            ]
    return checked, faults


def _with_places(entry: dict[str, Any], path: str, faults: list[InnerFault]) -> dict[str, Any]:
    """An entry whose paths are as the rule for paths reads them; adds those that it refuses to `faults`."""

    def read(key: str, text: str) -> str:
        try:
            return user_place(text, f"{path}.{key}")
        except UserError as error:
            faults.append((f"{path}.{key}", str(error)))
            return text

    # an empty or missing path is not a place; a missing `data_files` was reported before
    found = {key: entry[key] for key in _PLACES if entry.get(key)}
    places = {
        key: [read(key, text) for text in value] if isinstance(value, list) else read(key, value)
        for key, value in found.items()
    }
    return {**entry, **places}


def check_pairs(name: str, value: list[Any], least: int) -> list[InnerFault]:
    """A list of pairs of whole numbers.

    Args:
        name: the key.
        value: e.g. [[336, 672], [672, 336]].
        least: smallest number allowed.

    Returns:
        One fault per item that is not such a pair.
    """
    return [
        (name, f"{name}: item {index} is {item!r}; expected two whole numbers of at least {least}, e.g. [336, 672]")
        for index, item in enumerate(value)
        if not _is_pair(item, least)
    ]


def check_prompts(name: str, value: list[Any]) -> tuple[list[Any], list[InnerFault]]:
    """A list of questions, each with an image or without.

    Args:
        name: the key.
        value: e.g. [{"image": "bus.jpg", "question": "What is this?"}]; `image` may be missing or null.

    Returns:
        The same with the images' paths as the rule for paths reads them; one fault per item that is not such an object,
        one for an empty list.
    """
    # null asks for the default records; an empty list could mean that too, or no questions at all
    if not value:
        return value, [(name, f"{name} is an empty list; remove it, or add an object with question and image")]
    checked, faults = [], list[InnerFault]()
    for index, item in enumerate(value):
        try:
            if not _is_prompt(item):
                raise UserError(
                    f'{name}: item {index} is {item!r}; expected an object like {{"image": path, "question": text}}'
                )
            image = item.get("image")
            checked.append({**item, "image": user_place(image, f"{name}[{index}].image")} if image else item)
        except UserError as error:
            faults.append((name, str(error)))
    return checked, faults


def _is_prompt(item: object) -> bool:
    if not isinstance(item, dict) or not item.keys() <= {"image", "question"}:
        return False
    question, image = item.get("question"), item.get("image")
    return isinstance(question, str) and bool(question.strip()) and (image is None or isinstance(image, str))


def _is_pair(item: object, least: int) -> bool:
    # `type`, not `isinstance`: True is an int in Python, but not a side of a grid
    return isinstance(item, list) and len(item) == 2 and all(type(side) is int and side >= least for side in item)


def _check_entry(path: str, parent: str, entry: object) -> tuple[dict[str, Any], list[InnerFault]]:
    """One entry of a split; `path` is its own, `parent` that of the split, whose line is known."""
    if not isinstance(entry, dict):
        return {}, [(parent, f"{path}: expected an object, got {describe(entry)}")]
    faults = [fault for key, value in entry.items() for fault in _check_entry_key(f"{path}.{key}", key, value)]
    if not entry.get("data_files") and not any(place == f"{path}.data_files" for place, _ in faults):
        # the line of the entry's first key: an entry without a key has no line, then it is the split's
        place = next((f"{path}.{key}" for key in entry), parent)
        faults.append((place, f"{path}: data_files is missing; give the JSON file or a list of them"))
    return {"name": DEFAULT_DATASET_NAME, **entry}, faults


def _check_entry_key(path: str, key: str, value: object) -> list[InnerFault]:
    if key not in _ENTRY_KINDS:
        allowed = ", ".join(name for name in _ENTRY_KINDS if name != _REMARK)
        # Before the spelling hint: another program's key is never a misspelling of ours.
        foreign = foreign_entry_key(key, value)
        if foreign:
            return [(path, f"{path}: {foreign}")]
        return [(path, f"{path}: {key} is not a known key{did_you_mean(key, _ENTRY_KINDS)} (allowed: {allowed})")]
    # bool apart, since it passes for an int: weight true is a mistake, not 1
    if not isinstance(value, _ENTRY_KINDS[key]) or isinstance(value, bool):
        kinds = _ENTRY_KINDS[key]
        wanted = "text or a list of texts" if list in kinds else "a number" if float in kinds else "text"
        return [(path, f"{path}: expected {wanted}, got {describe(value)}")]
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        return [(path, f"{path}: expected a list of texts, got {value!r}")]
    # Infinite weights pass JSON's reader.
    if key == "weight" and isinstance(value, int | float) and not 0 < value < float("inf"):
        return [(path, f"{path}: {value} is not above 0; 0.5 takes half of the records, 2 takes each twice")]
    if key == "split" and isinstance(value, str) and not SLICE.fullmatch(value):
        return [(path, f"{path}: '{value}' is not a slice; write [:90%], [90%:], [100:200] or the like")]
    return []
