"""File and command line -> `RunConfig`, and back to a file.  Every fault is gathered, then all are shown at once.

Order of precedence: the schema's defaults, the command's own, the file, the command line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paddlemix.config.command_line import Fault, format_help, parse_command_line, split_dry_run
from paddlemix.config.document import Document, read_document
from paddlemix.config.foreign.names import foreign_key, foreign_value, keys_meant
from paddlemix.config.rules import find_conflicts
from paddlemix.config.schema import SPECS, RunConfig
from paddlemix.config.structures import InnerFault, check_dataset, check_pairs, check_prompts
from paddlemix.config.values import check_value, describe, parse_any, parse_text
from paddlemix.errors import UserError, did_you_mean, fit_to_show
from paddlemix.temporary import temporary_file

__all__ = ["ConfigError", "Fault", "format_help", "load_config", "parse_command_line", "save_config", "split_dry_run"]

COMMAND_LINE = "command line"
# sorts after every line of the file
_WHOLE = 10**9  # line of what concerns a whole file
# Other keys refuse a foreign value by their type or their choices.  These two accept any text, so that
# resume_from_checkpoint=True, which transformers knows, would be taken for a folder's name.
_FREE_TEXTS = ("lora_target_modules", "resume_from_checkpoint")  # any text, but not the words of other programs

_STRUCTURES: dict[str, Callable[[Any], tuple[Any, list[InnerFault]]]] = {
    "dataset": check_dataset,
    "image_grid_pinpoints": lambda value: (value, check_pairs("image_grid_pinpoints", value, least=1)),
    "skip_data_intervals": lambda value: (value, check_pairs("skip_data_intervals", value, least=0)),
    "sample_prompts": lambda value: check_prompts("sample_prompts", value),
}


# A broken generator of configurations may write thousands of unknown keys.
_SHOWN_FAULTS = 50


class ConfigError(UserError):
    """A configuration with faults; `str` shows one per line, each once the first fifty of them.

    Args:
        faults: one text each, "lora.json, line 14: learning_rat is not a known key; did you mean 'learning_rate'?".
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__(faults)
        self.faults = [fit_to_show(fault) for fault in dict.fromkeys(faults)]

    def __str__(self) -> str:
        more = len(self.faults) - _SHOWN_FAULTS
        return "\n".join([*self.faults[:_SHOWN_FAULTS], *([f"... and {more} more"] if more > 0 else [])])


@dataclass(frozen=True, order=True)
class _Place:
    """Where a value was set; sorts as a reader meets the places: file by line, whole file, command line.

    Args:
        rank: 0 in the file, 1 on the command line, 2 in the command's own defaults.
        line: from 1; `_WHOLE` when no line can be named.
        source: file or "command line".
    """

    rank: int
    line: int
    source: str

    def __str__(self) -> str:
        return self.source if self.line == _WHOLE else f"{self.source}, line {self.line}"


@dataclass
class _Draft:
    """A configuration while it is put together: later settings replace earlier ones, faults gather."""

    whole: _Place
    lines: Mapping[str, int] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, _Place] = field(default_factory=dict)
    faulty: set[str] = field(default_factory=set)
    faults: list[tuple[_Place, str]] = field(default_factory=list)

    def line_of(self, path: str) -> _Place:
        """Place of a key of the file, given by its path."""
        return _Place(0, self.lines.get(path, _WHOLE), self.whole.source)

    def put(self, name: str, value: object, place: _Place) -> None:
        """Check one value and keep it, or note what is wrong with it."""
        if name not in SPECS:
            self.refuse(name, value, place)
            return
        # value            is a foreign one looked up?
        #   refused          yes: it may be another program's word
        #   accepted, free   yes, and refused if the table has it
        #   accepted, other  no: it is ours, whatever others mean by it
        checked, messages = check_value(SPECS[name], value)
        foreign = foreign_value(name, value, place.rank == 1) if messages or name in _FREE_TEXTS else ""
        if foreign:
            messages = [f"{(messages or [f'{name}: {describe(value)}'])[0]}; this is {foreign}"]
        faults = [(place, message) for message in messages]
        # inner faults have paths and lines of their own, but the command line has no lines
        if not faults and checked is not None and name in _STRUCTURES:
            checked, inner = _STRUCTURES[name](checked)
            faults = [(self.line_of(path) if place.rank == 0 else place, message) for path, message in inner]
        if faults:
            self.faulty.add(name)
            self.faults += faults
        # Also after a fault: the default stands in, so that further faults can still be found.
        self.values[name] = checked
        self.places[name] = place

    def refuse(self, name: str, value: object, place: _Place) -> None:
        """Note a key that is not ours, with what is written here for it where another program has it."""
        foreign = foreign_key(name, value, place.rank == 1)
        self.faults.append((place, foreign or f"{name} is not a known key{did_you_mean(name, SPECS)}"))
        self.faulty |= keys_meant(name)  # what they would set is not missing


def load_config(
    path: str | os.PathLike[str] | None,
    overrides: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
    faults: Iterable[Fault] = (),
) -> RunConfig:
    """The checked configuration of one run.

    Args:
        path: JSON file with one flat object; None when `overrides` give everything.
        overrides: "key=value" texts from the command line; they win over the file.
        defaults: values that the calling command uses if neither file nor command line sets the key.
        faults: of the command line, see `parse_command_line`; raised with all others.

    Returns:
        A value for every key; `given` names the keys that file or command line set, `warnings` those that
        have no effect.

    Raises:
        ConfigError: unknown or repeated keys, wrong types, values out of range, rules between keys; all of them.
        MissingFileError: there is no such file.
        UserError: the file is not a JSON object.
    """
    # Order decides precedence: what is put later replaces what was put earlier.
    document = Document(values={}, lines={})
    draft = _Draft(whole=_Place(1, _WHOLE, COMMAND_LINE))
    faults = list(faults)
    if path is not None:
        document = _read(Path(path), faults)
        draft = _Draft(whole=_Place(0, _WHOLE, os.fspath(path)), lines=document.lines)
    # lowest precedence first: what is put later replaces the value and its place
    for name, value in (defaults or {}).items():
        draft.put(name, value, _Place(2, _WHOLE, "default of the command"))
    for name, value in document.values.items():
        draft.put(name, value, draft.line_of(name))
    for repeated, line, first in document.repeated:
        place = _Place(0, line, draft.whole.source)
        draft.faults.append((place, f"{repeated} is given again, first in line {first}; remove one of them"))
    for override in overrides:
        _put_override(draft, override)
    for fault in faults:
        draft.faults.append((_Place(1, _WHOLE, COMMAND_LINE), fault.message))
        # the key that a bad flag would have set is not also reported as missing
        draft.faulty |= fault.keys
    return _finish(draft)


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write the resolved configuration as a JSON file that `load_config` reads again.

    Holds every key that has an effect, by group, except secrets.  The file appears whole or not at all.

    Args:
        config: what to write.
        path: the file; missing folders are made, an existing file is replaced.

    Raises:
        UserError: the place cannot be written to.
    """
    # without ignored keys: reading the file again does not repeat their warnings
    values = {name: getattr(config, name) for name, spec in SPECS.items() if spec.status == "used" and not spec.secret}
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed at the end: a reader finds the old file or the new one.
        with temporary_file(target) as temporary:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                # the bytes are on the disk before the name is: after a power cut the old file is there, or the new one
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another place") from error


def _read(path: Path, faults: list[Fault]) -> Document:
    """The file; if it cannot be read, the faults of the command line are reported with it."""
    try:
        return read_document(path)
    except UserError as error:
        if not faults:
            raise
        raise ConfigError([str(error), *(f"{COMMAND_LINE}: {fault.message}" for fault in faults)]) from error


def _put_override(draft: _Draft, override: str) -> None:
    place = _Place(1, _WHOLE, COMMAND_LINE)
    name, equals, text = override.partition("=")
    if not equals:
        draft.faults.append((place, f"'{override}' is not key=value"))
    else:
        draft.put(name, parse_text(SPECS[name], text) if name in SPECS else parse_any(text), place)


def _finish(draft: _Draft) -> RunConfig:
    """The configuration of a draft without faults.

    Raises:
        ConfigError: there are faults, of single values or between keys.
    """
    # the command's own defaults are not "given": nobody is warned of a key that they did not write
    given = {name: place for name, place in draft.places.items() if place.rank < 2}
    config = RunConfig(**draft.values, given=frozenset(given))
    # before the rules, which would report the missing evaluation data as a fault
    notes = _without_evaluation(config, given)
    for conflict in find_conflicts(config):
        # A conflict between a faulty key and another would be a second message about one mistake.
        if draft.faulty.isdisjoint(conflict.keys):  # a wrong value was reported already; its default may break rules
            place = next((given[name] for name in conflict.keys if name in given), draft.whole)
            draft.faults.append((place, conflict.message))
    if draft.faults:
        raise ConfigError([f"{place}: {message}" for place, message in sorted(draft.faults, key=lambda item: item[0])])
    config.warnings = [
        f"{place}: {name} has no effect here. {SPECS[name].help}{_instead(name, getattr(config, name))}"
        for name, place in sorted(given.items(), key=lambda item: item[1])
        if SPECS[name].status == "ignored" and getattr(config, name) != SPECS[name].default
    ]
    config.warnings += [*notes, *_without_feature_cache(config, given)]
    return _normalised(config)


def _without_evaluation(config: RunConfig, given: Mapping[str, _Place]) -> list[str]:
    """Switches evaluation off if the command line replaces `dataset` by one without eval and only the file asks for
    evaluation: the data that the file meant are gone.

    Returns:
        A note about it; in every other case missing evaluation data are a fault, see `rules.py`.
    """
    asking = [key for key in ("evaluation_strategy", "do_eval") if key in given]
    replaced = "dataset" in given and given["dataset"].rank == 1 and not (config.dataset or {}).get("eval")
    if config.resolved_evaluation_strategy == "no" or not replaced or any(given[key].rank == 1 for key in asking):
        return []
    was = config.resolved_evaluation_strategy
    config.evaluation_strategy, config.do_eval = "no", False
    return [f"{given['dataset']}: dataset has no eval, so nothing is evaluated, though the file says {json.dumps(was)}"]


def _without_feature_cache(config: RunConfig, given: Mapping[str, _Place]) -> list[str]:
    """Warnings about keys of the feature cache while there is none."""
    if config.cache_vision_features:
        return []
    return [
        f"{given[name]}: {name} has no effect without cache_vision_features true; set that, or remove {name}"
        for name in ("vision_cache_dir", "vision_cache_gb")
        if name in given and getattr(config, name) != SPECS[name].default
    ]


def _instead(name: str, value: object) -> str:
    foreign = foreign_value(name, value)
    return f" This is {foreign}." if foreign else ""


def _normalised(config: RunConfig) -> RunConfig:
    """The configuration with the spellings of `report_to` unified: a list of trackers, [] for none."""
    trackers = [config.report_to] if isinstance(config.report_to, str) else config.report_to
    config.report_to = [tracker for tracker in trackers if tracker != "none"]
    return config
