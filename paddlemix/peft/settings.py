"""An adapter's settings: rank, scale, kind and the layers it adapts, in memory and in a file.

Knows no layer.  Names are PaddleNLP's where it has them (`rslora`, `pissa`), else PEFT's (`use_dora`, `rank_pattern`).
Sources: Hu et al. 2021, "LoRA"; Kalajdzievski 2023, "rsLoRA"; Liu et al. 2024, "DoRA"; Meng et al. 2024, "PiSSA".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from paddlemix.declared import Keys, flag, integer, items, mapping_of, number, take, text
from paddlemix.errors import UserError, did_you_mean

BIASES = ("none", "lora_only", "all")
# Last parts of the names of an adapter's own weights.  Start values are stored, but never trained.
WEIGHTS, MAGNITUDE, STARTS = ("lora_A", "lora_B"), "lora_magnitude_vector", ("lora_A_start", "lora_B_start")

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Settings of one adapter; `modules` are the full names of the adapted layers.

    Args:
        r: rank, >= 1.
        lora_alpha: scaling is lora_alpha / r, with `rslora` lora_alpha / sqrt(r).
        lora_dropout: 0..1, on the adapter's input while training.
        modules: names of the linear layers, e.g. "language_model.layers.0.self_attn.q_proj".
        rslora: rank-stabilised scaling.
        use_dora: learn the length of each output's weights apart from their direction.
        pissa: begin with the principal components of the weights.
        bias: biases of the base that also train: "none", "lora_only" of the adapted layers, "all" of their parts.
        rank_pattern, alpha_pattern: other values of r and lora_alpha for a layer or for all layers below a name, e.g.
            {"vision_tower": 64}; the longest name that matches a layer counts.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    modules: tuple[str, ...] = ()
    rslora: bool = False
    use_dora: bool = False
    pissa: bool = False
    bias: str = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # messages use the names of a run's keys, which is where almost all settings come from
        for where, rank in {"": self.r, **self.rank_pattern}.items():
            if rank < 1:
                raise UserError(f"lora_rank {rank}{f' of {where}' if where else ''} must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout {self.lora_dropout} must be at least 0 and below 1")
        if self.bias not in BIASES:
            hint = did_you_mean(str(self.bias), BIASES)
            raise UserError(f"lora_bias {self.bias!r} is not one of {', '.join(BIASES)}{hint}")
        if self.use_dora and self.pissa:
            raise UserError("use_dora and pissa are both true; choose one")

    @property
    def scaling(self) -> float:
        """The factor of the low-rank product, unless a pattern overrides it."""
        return self._scaling(self.r, self.lora_alpha)

    def rank_of(self, module: str) -> int:
        """Rank of a layer."""
        return _longest(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        """`lora_alpha` of a layer."""
        return _longest(self.alpha_pattern, module, self.lora_alpha)

    def scaling_of(self, module: str) -> float:
        """The factor of a layer's low-rank product."""
        return self._scaling(self.rank_of(module), self.alpha_of(module))

    def _scaling(self, rank: int, alpha: float) -> float:
        # rsLoRA: with the root the update's size does not depend on the rank
        return alpha / rank**0.5 if self.rslora else alpha / rank

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `lora_config_from_dict` reads them."""
        # "scaling" is written for other readers (PaddleMIX); ours computes it
        return {**asdict(self), "modules": list(self.modules), "scaling": self.scaling}


# Types and absurd values; `LoRAConfig` checks the rest, wherever the settings come from.
_RANK, _ALPHA = integer(-(1 << 16), 1 << 16), number(-1e6, 1e6)
SETTINGS_KEYS = {
    "r": _RANK,
    "lora_alpha": _ALPHA,
    "lora_dropout": number(-1e6, 1e6),
    "modules": items(text),
    "rslora": flag,
    "use_dora": flag,
    "pissa": flag,
    "bias": text,
    "rank_pattern": mapping_of(_RANK),
    "alpha_pattern": mapping_of(_ALPHA),
}


def lora_config_from_dict(values: Mapping[str, Any]) -> LoRAConfig:
    """Reads an adapter's settings; keys that older files lack have the values of a plain adapter.

    Raises:
        UserError: a key is missing or a value is not allowed.
    """
    # the file has keys of other readers too (the base, PEFT's), which are not ours to judge
    own = {key: value for key, value in values.items() if key in SETTINGS_KEYS}
    found = take(own, Keys(SETTINGS_KEYS), "the adapter's settings cannot be understood")
    for key in ("r", "lora_alpha", "modules"):
        if key not in found:
            raise UserError(f"the adapter's settings have no key '{key}'")
    return LoRAConfig(**{**found, "modules": tuple(found["modules"]), "lora_alpha": float(found["lora_alpha"])})


def is_adapter_weight(name: str) -> bool:
    """Whether a parameter's full name is that of an adapter's own weight, start values included."""
    return name.rpartition(".")[2] in (*WEIGHTS, MAGNITUDE, *STARTS)


def is_start_value(name: str) -> bool:
    """Whether a parameter is a start value that an adapter keeps and does not train."""
    return name.rpartition(".")[2] in STARTS


def _longest(pattern: Mapping[str, _Number], module: str, otherwise: _Number) -> _Number:
    # "a.b" is below "a", "ab" is not
    fitting = [name for name in pattern if module == name or module.startswith(f"{name}.")]
    return pattern[max(fitting, key=len)] if fitting else otherwise
