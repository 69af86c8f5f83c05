"""Model names -> directories: a directory as it is, else a local cache that has the model, else a download.

    resolve_model("liuhaotian/llava-v1.5-7b")  # e.g. ~/.paddlemix/models/liuhaotian/llava-v1.5-7b

Knows where models are kept, not what they hold nor how files come over the network (`download.py`).

Sources: PaddleMIX's cache folders (its documentation); huggingface_hub's cache layout
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from paddlemix.checkpoints.files.directories import writing
from paddlemix.checkpoints.files.weight_files import WEIGHT_FILES, read_json
from paddlemix.checkpoints.hub.download import download_model
from paddlemix.checkpoints.hub.model_names import ModelName, candidates
from paddlemix.checkpoints.hub.needed_files import ADAPTER_WEIGHT_FILES, DECLARATIONS, SMALL_FILE, shards_of
from paddlemix.checkpoints.layouts.file_names import CONFIG_FILE
from paddlemix.checkpoints.layouts.xtuner_layout import conversion_hint
from paddlemix.errors import MissingFileError, UserError, did_you_mean
from paddlemix.models.presets import PUBLISHED_NAMES
from paddlemix.network.failures import UnreachableError
from paddlemix.network.switches import offline_switch
from paddlemix.paths import user_path

KNOWN_NAMES = (
    *PUBLISHED_NAMES,
    "llava-hf/llava-1.5-7b-hf",
    "llava-hf/llava-1.5-13b-hf",
    "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-hf/llava-v1.6-vicuna-13b-hf",
)


def resolve_model(name_or_path: str | Path) -> Path:
    """The directory of a model.

    Args:
        name_or_path: an existing directory, or a name: `paddlemix/...` on PaddleMIX's server, else `owner/name` on
            Hugging Face or on the hub of PADDLEMIX_HUB; `modelscope:` or `huggingface:` before it decides, and
            `@revision` after it names a branch, a tag or a commit.  A name is looked for in the caches of PaddleMIX,
            PaddleNLP and the hub, then downloaded unless PADDLEMIX_OFFLINE or HF_HUB_OFFLINE is 1.

    Raises:
        MissingFileError: it is nowhere and cannot be downloaded; lists every place that was tried.
        UserError: a download cannot be written.
    """
    # | name_or_path                     | what is returned                       |
    # |----------------------------------|----------------------------------------|
    # | a directory                      | it                                     |
    # | a name that a cache has whole    | the cache's directory                  |
    # | another name                     | a download into the first of its places|
    # | anything else                    | an error that suggests a name          |
    name = str(name_or_path)
    path = user_path(name, "the model") if name else None
    if path is not None and path.is_dir():
        return path
    parsed = ModelName.parse(name)
    if parsed is None:
        hint = conversion_hint(path) if path is not None and path.exists() else ""
        kind = "is a file" if path is not None and path.is_file() else "does not exist"
        raise MissingFileError(f"model directory '{name}' {kind} (looked from {Path.cwd()}){hint or _suggestion(name)}")
    found = local_model(name)
    if found is not None:
        return found
    try:
        _check_download_allowed(name)
        return download_model(parsed, parsed.places()[0], lambda: local_model(name))
    except UnreachableError as error:
        raise MissingFileError(_not_found(name, str(error))) from error


def local_model(name: str) -> Path | None:
    """The first cache that has the whole model, without any network; None if none has.

    Args:
        name: see `is_model_name`.

    Raises:
        UserError: PaddleMIX's two halves of a cached model cannot be joined because its folder cannot be written.
    """
    parsed = ModelName.parse(name)
    if parsed is None:
        return None
    places = parsed.places()
    if parsed.hub != "modelscope":
        weights, rest = places[:2]  # of PaddleMIX, of PaddleNLP
        if _lacks(weights) == CONFIG_FILE and (rest / CONFIG_FILE).is_file():
            _copy_small_files(rest, weights)  # PaddleMIX keeps weights in the first, all else in the second
    return next((path for path in places if _lacks(path) is None), None)


def _lacks(directory: Path) -> str | None:
    """What a directory lacks to be a whole model or adapter; None for nothing."""
    if not directory.is_dir():
        return "no such directory"
    # a model is declared by config.json, an adapter by any of the three
    declared: tuple[str, ...] = DECLARATIONS[:1]
    if not any(_holds(directory, name) for name in WEIGHT_FILES):
        if not any((directory / name).is_file() for name in ADAPTER_WEIGHT_FILES):
            return "weights"
        declared = DECLARATIONS
    return None if any((directory / name).is_file() for name in declared) else declared[0]


def _holds(directory: Path, weights: str) -> bool:
    index = directory / f"{weights}.index.json"
    try:
        return all((directory / shard).is_file() for shard in shards_of(read_json(index)))
    except UserError:  # no index, or a damaged one
        return (directory / weights).is_file()


def _copy_small_files(source: Path, target: Path) -> None:
    """Copies every missing file that is not a weight, `config.json` last: it completes the directory."""
    names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    with writing(target):
        for name in sorted(filter(SMALL_FILE.fullmatch, names), key=lambda name: name == CONFIG_FILE):
            if not (target / name).exists() and not name.endswith(".index.json"):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                # under a name of its own: several processes may complete the same directory
                temporary = target / f"{name}.{os.getpid()}"
                shutil.copyfile(source / name, temporary)
                os.replace(temporary, target / name)


def _not_found(name: str, reason: str) -> str:
    lines = [f"model '{name}' is not on this machine and was not downloaded: {reason}", "searched:"]
    lines.append(f"  {Path.cwd() / name} (no such directory)")
    for place in candidates(name):
        lacks = _lacks(place)
        lines.append(f"  {place} ({lacks if lacks == 'no such directory' else f'incomplete: no {lacks}'})")
    lines.append(
        f"to install it by hand, copy its files (config.json, tokenizer, weights) into {candidates(name)[0]}, or use "
        "the path of a directory that holds them"
    )
    same = [other for other, kind in PUBLISHED_NAMES.items() if kind == PUBLISHED_NAMES.get(name) and other != name]
    if same:
        lines.append(f"the same model is published as {', '.join(same)}")
    return "\n".join(lines) + _suggestion(name)


def _suggestion(name: str) -> str:
    if name in KNOWN_NAMES:
        return ""
    without_owner = [known for known in KNOWN_NAMES if known.endswith(f"/{name}")]
    return did_you_mean(name, KNOWN_NAMES) if not without_owner else f"; did you mean '{without_owner[0]}'?"


def _check_download_allowed(name: str) -> None:
    switch = offline_switch()
    if switch is not None:
        raise UnreachableError(f"{switch} forbids network access")
    owner = name.split("/")[0]
    # "runs/checkpoint-5" with a typo looks like owner/name; nobody wants to wait for a hub's answer to that
    if name not in KNOWN_NAMES and Path(owner).is_dir():
        raise UnreachableError(f"the folder '{owner}' exists in {Path.cwd()}, so this is taken as a path in it")
