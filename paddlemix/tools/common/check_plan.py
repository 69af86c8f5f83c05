"""What `paddlemix check-data` checks: the data files of a run's JSON, or data files by themselves.

Decides nothing about records; reads configurations and processors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.datasets.checking.record_checker import DataFile
from paddlemix.datasets.images.sources import ImageSettings
from paddlemix.datasets.record_selection import split_count
from paddlemix.errors import UserError
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.text.chat_template import resolve_template
from paddlemix.tools.common.processor import open_processor, processor_of_run

# Either of them; records of any form have neither.
_RUN_KEYS = {"dataset", "model_name_or_path"}
_LARGEST_CONFIG = 4 * 1024**2  # bytes; a larger file is data


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What the command line sets; None for what it does not.

    Args:
        image_root, model, chat_template, max_length: in place of a run's own.
    """

    image_root: str | None = None
    model: str | None = None
    chat_template: str | None = None
    max_length: int | None = None


@dataclass
class CheckPlan:
    """What to check.

    Args:
        files: the data files, each once for every way it is read.
        images: limits on image files.
        max_length: maximum length of a sample in tokens; None if nothing sets it.
        on_too_long: the run's policy.
        splits: of the run that have entries, "train" and "eval"; empty without a run.
        models: names and folders of the checkpoints that are read.
        notes: what could not be checked as the user may expect, one text each.
    """

    files: list[DataFile] = field(default_factory=list)
    images: ImageSettings = field(default_factory=ImageSettings)
    max_length: int | None = None
    on_too_long: str = "truncate_turns"
    splits: tuple[str, ...] = ()
    models: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_plan(inputs: Sequence[str], options: CheckOptions) -> CheckPlan:
    """Tells runs' JSON files from data files and lists what they name.

    Args:
        inputs: paths, at least one; at most one of them is a run's JSON.

    Raises:
        MissingFileError, UserError: a configuration or the checkpoint of `options` cannot be used, or there are
            several configurations.
    """
    plan = CheckPlan(max_length=options.max_length)
    runs = [path for path in inputs if is_run_file(path)]
    if len(runs) > 1:
        raise UserError(f"{' and '.join(runs)} are both files of a run; check them one at a time")
    for path in runs:
        _plan_run(plan, load_config(path), path, options)
    rest = [path for path in inputs if path not in runs]
    if rest:
        plan.models += [options.model] if options.model else []
        processor = open_processor(options.model, options.chat_template) if options.model else None
        if processor is None and options.chat_template:
            raise UserError("--chat-template needs --model-path: templates are checked with a tokenizer")
        plan.files += [DataFile(path=path, image_root=options.image_root, processor=processor) for path in rest]
    # A file that is listed twice and read alike is checked once.
    plan.files = list(dict.fromkeys(plan.files))
    return plan


def is_run_file(path: str) -> bool:
    """Whether a file is a run's JSON: an object with `dataset` or `model_name_or_path`."""
    file = Path(path)
    # Data files may be gigabytes; no configuration is.
    if not file.is_file() or file.stat().st_size > _LARGEST_CONFIG:
        return False
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(values, dict) and bool(values.keys() & _RUN_KEYS)


def _plan_run(plan: CheckPlan, config: RunConfig, path: str, options: CheckOptions) -> None:
    plan.images = ImageSettings(
        max_bytes=config.max_image_bytes,
        max_pixels=config.max_image_pixels,
        timeout=config.image_timeout,
        retries=config.image_retries,
        allow_local_network=config.allow_local_network,
    )
    plan.max_length = options.max_length or config.max_length
    plan.on_too_long = config.on_too_long
    names = (options.model, config.model_name_or_path, config.lora_path, config.mm_vision_tower)
    plan.models += [name for name in names if name]
    dataset = config.dataset or {}
    plan.splits = tuple(split for split, entries in dataset.items() if entries)
    entries = [entry for split in plan.splits for entry in dataset[split]]
    if not entries:
        raise UserError(f"{path} names no data: its key dataset is missing or empty")
    own: LlavaProcessor | None = None
    try:
        own = processor_of_run(config, options.model, options.chat_template)
    except UserError as error:
        if options.model:
            raise
        # Records and images can still be checked without a tokenizer.
        plan.notes.append(f"lengths and templates are not checked: {error}")

    @cache
    def processor_for(template: str | None) -> LlavaProcessor | None:
        # An entry's own template comes before the run's, the flag's before both.
        if own is None or template is None or options.chat_template:
            return own
        return replace(own, template=resolve_template(template, own.template))

    for entry in entries:
        plan.files += _entry_files(entry, options.image_root or config.image_root, processor_for)


def _entry_files(
    entry: dict[str, Any], image_root: str | None, processor_for: Callable[[str | None], LlavaProcessor | None]
) -> Iterator[DataFile]:
    names = entry["data_files"]
    processor = processor_for(entry.get("chat_template"))
    for name in [names] if isinstance(names, str) else names:
        path, _ = split_count(name)
        root = entry.get("image_root") or image_root
        yield DataFile(path=path, form=entry.get("name"), image_root=root, processor=processor)
