"""Where the parts of a model are that its checkpoint keeps elsewhere: a vision tower, an XTuner model's language model.

Does not check what the directories hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from paddlemix.checkpoints.hub.model_names import is_model_name
from paddlemix.checkpoints.hub.resolve import local_model, resolve_model
from paddlemix.errors import MissingFileError


def find_part(directory: Path, name: str, what: str) -> Path:
    """The directory of a part that a checkpoint keeps elsewhere.

    Args:
        directory: of the checkpoint that names it; a relative path is first tried from here.
        name: as the checkpoint has it; a model's name is downloaded if it is nowhere on this machine.
        what: the part, for messages.

    Raises:
        MissingFileError: says where it looked.
    """
    found = local_part(directory, name)
    if found is not None:
        return found
    message = (
        f"the {what} '{name}' that {directory} names was not found ({searched(_near(directory, name))}); "
        "place its directory at one of these"
    )
    if not is_model_name(name):
        raise MissingFileError(message)
    try:
        return resolve_model(name)
    except MissingFileError as error:
        raise MissingFileError(f"{message}\n{error}") from error


def searched(places: Iterable[Path]) -> str:
    """The places that were searched, for messages: each once, however it is spelled."""
    found: dict[str, str] = {}
    for place in places:
        real, given = os.path.realpath(place), os.path.abspath(place)
        same = os.path.realpath(given) == real  # not where ".." follows a link, which abspath takes for a folder
        found.setdefault(real, given if same else real)
    return f"searched {', '.join(found.values())}"


# Inside the checkpoint, as the path says, by its last part inside, and by its last part beside: checkpoints are moved
# together with their parts, and then only the last part of an absolute path is still right.
def _near(directory: Path, name: str) -> list[Path]:
    return [directory / name, Path(name), directory / Path(name).name, directory.parent / Path(name).name]


def local_part(directory: Path, name: str) -> Path | None:
    """The directory of such a part near the checkpoint or in a cache; None if it is at neither place."""
    candidates = _near(directory, name)
    near = next((candidate for candidate in candidates if os.path.isdir(candidate)), None) or _spelt_otherwise(
        candidates
    )
    return local_model(name) if near is None and is_model_name(name) else near


def _spelt_otherwise(candidates: list[Path]) -> Path | None:
    """A directory whose name differs from a candidate's in case, "-", "_" and a first version's "-V1-0" alone.

    InternVL's README downloads to intern_vit_6b_224px what its scripts read from InternViT-6B-224px; what they read
    from InternViT-6B-448px is published as InternViT-6B-448px-V1-0.
    """
    for candidate in candidates:
        plain = _plain_name(candidate)
        try:
            found = sorted(path for path in candidate.parent.iterdir() if _plain_name(path) == plain and path.is_dir())
        except OSError:  # no such directory, or none that may be read
            continue
        if plain and found:
            return found[0]
    return None


def _plain_name(path: Path) -> str:
    return path.name.lower().replace("-", "").replace("_", "").removesuffix("v10")
