"""The declaration of a key and the table that is read back from it."""

from __future__ import annotations

from dataclasses import dataclass

from paddlemix.config.keys import GROUPS, key, read_specs


@dataclass(kw_only=True)
class Keys:
    rate: float | None = key(None, "training", "A rate.", min=0, unit="per step")
    names: list[str] = key(["a"], "model", "Names.", choices=("a", "b"))
    plain: int = 0


def test_a_table_holds_the_declared_keys_by_group() -> None:
    specs = read_specs(Keys)
    assert list(specs) == ["names", "rate"] and GROUPS.index("model") < GROUPS.index("training")
    assert (specs["rate"].kinds, specs["rate"].min, specs["rate"].unit) == (("float", "None"), 0, "per step")
    assert (specs["names"].kinds, specs["names"].default, specs["names"].choices) == (("list[str]",), ["a"], ("a", "b"))


def test_a_list_is_not_shared_between_configurations() -> None:
    first, second = Keys(), Keys()
    first.names.append("b")
    assert second.names == ["a"]
