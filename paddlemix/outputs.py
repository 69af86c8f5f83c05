"""The one guard for what a command writes: never anything that one of its inputs needs, and nothing that is not the
command's own unless a flag says so.

A command describes its outputs (`Output`) and all that its inputs need (`Needed`), and calls `check_output` before it
does anything else.  Places are compared by what is on the disk, so links of both kinds and other spellings of a path
are seen through.  Knows no command, and of file formats only the names by which a folder is a model's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paddlemix.errors import UserError

_LINK_DEPTH = 3  # folders below a model's own in which links that lead out of it are looked for
_JSON_STARTS = (b"[", b"{")
# Any of them beside weights makes a folder a model's or an adapter's.
_MODEL_FILES = {"config.json", "adapter_config.json", "lora_config.json"}  # in a folder beside weights
_WEIGHTS = (".safetensors", ".bin", ".pdparams", ".pth", ".pt")
# Paths are compared by device and inode, since two spellings, a bind mount or a file system that ignores case can name
# the same place.
FileId = tuple[int, int]  # device and inode


@dataclass(frozen=True)
class Needed:
    """What a command reads, or what something that it reads needs.

    Args:
        role: for messages: "the base model", "the data file".
        path: where it is.
        kind: a "model" is a folder in which nothing may change; a "file"; "pictures" is a folder to which files may
            come, but that nothing may replace.
    """

    role: str
    path: Path
    kind: Literal["model", "file", "pictures"]


@dataclass(frozen=True)
class Output:
    """What a command writes.

    Args:
        what: the flag or key that names it.
        path: where.
        kind: a "folder" whose content the command may replace; a "file"; "additions" is a folder to which only files
            of new names come.
    """

    what: str
    path: Path
    kind: Literal["folder", "file", "additions"] = "folder"

    @property
    def noun(self) -> str:
        """What to choose another one of."""
        return "file" if self.kind == "file" else "folder"


def check_output(output: Output, needed: Iterable[Needed]) -> None:
    """Whether writing an output leaves everything alone that the command's inputs need.

    Raises:
        UserError: it is, contains or is inside something needed, or cannot be written there; names both.
    """
    _check_place(output)
    for item in needed:
        for part in (item, *_linked(item)):
            relation = _relation(output, part)
            if relation:
                leads = _leads_to(output.path)
                raise UserError(
                    f"{output.what} '{output.path}'{leads} {relation} {part.role} '{part.path}', which must stay as it "
                    f"is; choose another {output.noun}"
                )


def check_replaceable(output: Output, overwrite: bool, own: bool = False, flag: str = "--overwrite") -> None:
    """Whether a JSON file may be written where a file already exists.

    Args:
        overwrite: whether the user gave `flag`.
        own: whether the existing file was written by the same command.

    Raises:
        UserError: it is not the command's own and the flag is missing, it holds something other than JSON, or it is in
            the folder of a model or adapter.
    """
    path = output.path
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise UserError(f"{output.what} '{path}' exists and is not a regular file; choose another name")
    # Reports of the same command may be replaced without a flag.
    if not (overwrite or own):
        raise UserError(f"{output.what} '{path}' exists; choose another name, or give {flag} to replace it")
    check_not_in_model(output)
    try:
        with path.open("rb") as file:
            # A byte order mark and blank lines may come before the first bracket; 4 KiB of them are more than any
            # writer adds.
            start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError as error:
        raise UserError(
            f"{output.what} '{path}' exists and cannot be read ({error.strerror}); choose another name"
        ) from error
    if start and not start.startswith(_JSON_STARTS):
        raise UserError(
            f"{output.what} '{path}' exists and is not a JSON file, so it is never replaced; choose another name"
        )


def check_not_in_model(output: Output) -> None:
    """Refuses to replace a file in a model's folder, which would then no longer be that model.

    Raises:
        UserError: beside it are the settings and the weights of a model or an adapter.
    """
    path = output.path
    # Both where the name is and where a link leads: replacing the file would change either folder.
    for folder in dict.fromkeys((path.absolute().parent, Path(os.path.realpath(path)).parent)):
        names = set(os.listdir(folder)) if folder.is_dir() else set()
        if names & _MODEL_FILES and any(name.endswith(_WEIGHTS) for name in names):
            raise UserError(
                f"{output.what} '{path}'{_leads_to(path)} exists in the folder of a model or adapter, '{folder}', and "
                "no file there is replaced; choose another place"
            )


@dataclass(frozen=True)
class Pictures:
    """Pictures that the records of a data file name.

    Args:
        data: the data file.
        folders: that they are in.
        names: returns the pictures; reads every record.
    """

    data: str
    folders: Sequence[str]
    names: Callable[[], Iterable[str]]


def check_pictures(output: Output, named: Iterable[Pictures], below: bool = True) -> None:
    """Whether an output folder holds no picture that a record names, by itself or through a link.

    Records are read only where a link beside their pictures leads to a file in the output.

    Args:
        named: the pictures of each data file; a million folders, or links in them, take seconds.
        below: whether pictures in folders inside the output are looked for too.

    Raises:
        UserError: it does; names the folder of the pictures, or the link.
    """
    if not os.path.isdir(output.path):
        return
    places = [parent for parent, _, _ in os.walk(output.path)] if below else [os.fspath(output.path)]
    held = set(map(_file_id, places)) - {None}
    entries = (entry for place in places for entry in _entries(place))
    files = {_file_id(entry.path) for entry in entries if not entry.is_dir(follow_symlinks=False)} - {None}
    given = f"{output.what} '{output.path}'{_leads_to(output.path)}"
    for pictures in named:
        folder = next((folder for folder in pictures.folders if _file_id(folder) in held), None)
        if folder is not None:
            raise UserError(
                f"{given} holds pictures that {pictures.data} names, in '{folder}', which must stay as they are; "
                f"choose another {output.noun}"
            )
        name = _linked_picture(pictures, files)
        if name is not None:
            raise UserError(
                f"{given} holds a picture that {pictures.data} names: the link '{name}' leads to "
                f"'{os.path.realpath(name)}', which must stay as it is; choose another {output.noun}"
            )


def _linked_picture(pictures: Pictures, files: set[FileId | None]) -> str | None:
    """The first picture that is a link to one of some files; None where there is none."""
    if not files:
        return None
    links = (entry for folder in pictures.folders for entry in _entries(folder) if entry.is_symlink())
    if files.isdisjoint(_file_id(link.path) for link in links):
        return None
    return next((name for name in pictures.names() if os.path.islink(name) and _file_id(name) in files), None)


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError:  # no such folder, or none that may be read
        return


def _check_place(output: Output) -> None:
    """Whether there can be such a file or folder."""
    what, path = output.what, output.path
    is_folder = os.path.isdir(path)  # unlike the methods of Path it fails in no folder that may not be looked into
    if os.path.exists(path) and is_folder is (output.kind == "file"):
        raise UserError(f"{what} '{path}' is a {'folder' if is_folder else 'file'}; name a {output.noun}")
    # The nearest folder that exists decides about permission: the ones below it are made by the command.
    existing = path.absolute()
    while not os.path.exists(existing):
        existing = existing.parent
    if existing == path.absolute() and output.kind == "file":
        existing = existing.parent
    if not os.path.isdir(existing):
        raise UserError(f"{what} '{path}' cannot be made: {existing} is a file; choose another {output.noun}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{what} '{path}' cannot be written: no permission in {existing}")


def _relation(output: Output, item: Needed) -> str:
    """How an output would touch something needed, as a verb for the message; "" where it would not."""
    own, theirs = _file_id(output.path), _file_id(item.path)
    # output                     needed              -> relation
    # missing place              the same place      -> is
    # additions                  pictures            -> none: new names beside pictures harm nothing
    # any                        the same inode      -> is
    # any                        a model above it    -> is inside: a model folder is read whole
    # folder                     anything below it   -> contains: the content of the folder may be replaced
    # file                       a file of a model   -> is a file of
    if theirs is None:  # whoever reads it says that it is missing, unless the output would come there
        return "is" if os.path.realpath(output.path) == os.path.realpath(item.path) else ""
    if output.kind == "additions" and item.kind == "pictures":
        return ""
    if own == theirs:
        return "is"
    if item.kind == "model" and theirs in _folders(output.path):
        return "is inside"
    if output.kind == "folder" and own in _folders(item.path):
        return "contains"
    if output.kind == "file" and item.kind == "model" and own is not None and own in _files(item.path):
        return "is a file of"
    return ""


def _file_id(path: str | Path) -> FileId | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _folders(path: Path) -> set[FileId | None]:
    """Every folder that a path is inside of, by its name and by what its links lead to."""
    given, real = Path(os.path.abspath(path)), Path(os.path.realpath(path))
    beside = Path(os.path.realpath(given.parent))  # where a link itself is
    found = {_file_id(folder) for folder in (beside, *beside.parents, *real.parents)}
    return found - {None}


def _files(folder: Path) -> Iterator[FileId | None]:
    for parent, _, names in os.walk(folder):
        yield from (_file_id(Path(parent, name)) for name in names)


def _linked(item: Needed) -> Iterator[Needed]:
    """What links inside a model's folder lead to: a tower, or weights that are kept elsewhere."""
    if item.kind != "model":
        return
    root = Path(os.path.realpath(item.path))
    for parent, folders, names in os.walk(root):
        # Emptying the list in place is how `os.walk` is told not to go deeper.
        if len(Path(parent).relative_to(root).parts) >= _LINK_DEPTH:
            folders.clear()
        for name in (*folders, *names):
            path = Path(parent, name)
            if path.is_symlink() and path.exists() and root not in Path(os.path.realpath(path)).parents:
                yield Needed(
                    f"{name} of {item.role}", Path(os.path.realpath(path)), "model" if path.is_dir() else "file"
                )


def _leads_to(path: Path) -> str:
    given, real = os.path.abspath(path), os.path.realpath(path)
    return "" if given == real else f" (leads to {real})"
