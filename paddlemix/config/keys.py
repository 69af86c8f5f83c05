"""How one configuration key is declared, and the table that is read back from the declarations.

A key is a dataclass field whose default comes from `key(...)`: name, type and default are the field's own, everything
else is in its metadata.  Knows nothing of any particular key, of files or of errors.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Group = Literal["model", "lora", "data", "training", "logging", "distributed", "generation", "compatibility"]
Status = Literal["used", "ignored"]
PathKind = Literal["local", "place"]

# This order is the one of the help and of saved files.
GROUPS: tuple[Group, ...] = (
    "model",
    "lora",
    "data",
    "training",
    "logging",
    "distributed",
    "generation",
    "compatibility",
)


@dataclass(frozen=True, kw_only=True)
class KeySpec:
    """Everything known about one key.

    Args:
        name: as written in the file.
        kinds: accepted types, of "bool", "int", "float", "str", "list", "list[str]", "dict", "None".
        default: value if nobody sets the key; a list or dict is shared, do not change it.
        group: heading under which the help shows it.
        help: one sentence; for an ignored key why it has no effect and what to set instead.
        unit: of a number, e.g. "tokens"; None for a plain number.
        min, max: inclusive bounds of a number, of each side where given.
        choices: allowed values of a text (of each text in a list); () allows any.
        pattern: regular expression that the whole text must match; `choices` then only shows what it means.
        status: "used", or "ignored": accepted because PaddleMIX or PaddleNLP accept it, without any effect.
        target: "trainer" when PaddleNLP's TrainingArguments gets it under the same name.
        secret: never written to a file.
        path: of a text that names something on the disk: "local", or "place" if an address or a model's name is
            allowed too.
    """

    name: str
    kinds: tuple[str, ...]
    default: Any
    group: Group
    help: str
    unit: str | None = None
    min: float | None = None
    max: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str | None = None
    status: Status = "used"
    target: Literal["trainer"] | None = None
    secret: bool = False
    path: PathKind | None = None


def key(  # noqa: PLR0913 - one argument per fact of a key, always given by name
    default: Any,
    group: Group,
    help: str,
    *,
    unit: str | None = None,
    min: float | None = None,
    max: float | None = None,
    choices: tuple[str, ...] = (),
    pattern: str | None = None,
    status: Status = "used",
    target: Literal["trainer"] | None = None,
    secret: bool = False,
    path: PathKind | None = None,
) -> Any:
    """The dataclass field of one key.

    Args:
        default: its default; a list is copied for every configuration.
        group, help, unit, min, max, choices, pattern, status, target, secret, path: see `KeySpec`.

    Returns:
        A `dataclasses.field`, typed Any so that the class can annotate the value's own type.
    """
    facts = {
        "group": group,
        "help": help,
        "unit": unit,
        "min": min,
        "max": max,
        "choices": choices,
        "pattern": pattern,
        "status": status,
        "target": target,
        "secret": secret,
        "path": path,
    }
    if isinstance(default, list):
        # A shared list could be changed by one configuration for all.
        return dataclasses.field(default_factory=lambda: list(default), metadata=facts)
    return dataclasses.field(default=default, metadata=facts)


def read_specs(config_class: type) -> dict[str, KeySpec]:
    """The keys that a dataclass declares.

    Args:
        config_class: a dataclass whose annotations are text (`from __future__ import annotations`).

    Returns:
        Name -> spec, by group in the order of `GROUPS`, inside a group as declared.  Fields without `key` are skipped.
    """
    # `warnings` and `given` of RunConfig have no group, so they are not keys
    specs = [_read_spec(field) for field in dataclasses.fields(config_class) if "group" in field.metadata]
    # Stable, so that keys stay in the order of their declaration inside a group.
    specs.sort(key=lambda spec: GROUPS.index(spec.group))
    return {spec.name: spec for spec in specs}


def _read_spec(field: dataclasses.Field[Any]) -> KeySpec:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    # Annotations are text because of `from __future__ import annotations`.
    kinds = tuple(part.strip() for part in str(field.type).split("|"))
    return KeySpec(name=field.name, kinds=kinds, default=default, **field.metadata)
