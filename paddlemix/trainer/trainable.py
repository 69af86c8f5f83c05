"""What trains: policies per part, PaddleMIX's freeze patterns and LoRA targets, resolved to parameter names.

Parts are the vision tower, the projector and the language model (with output layer and newline vector).  Patterns are
matched against our parameter names and PaddleMIX's.  Source of the pattern rules: PaddleMIX's
paddlemix/utils/freeze_utils.py (fnmatch, include without exclude freezes), PaddleNLP's LoRAModel (regular expression,
whole name).
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from paddle import nn

from paddlemix.checkpoints.layouts.weight_names import PADDLEMIX
from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.parallel.tensor.parts import whole_shape, whole_sides
from paddlemix.peft.lora import linear_names, quantized_layers
from paddlemix.peft.settings import LoRAConfig, is_adapter_weight, is_start_value

PARTS = ("vision_tower", "projector", "language_model")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class TrainingPlan:
    """What a run trains.

    Args:
        policies: "frozen", "lora" or "full" for each part.
        lora_modules: names of the linear layers that get an adapter.
        lora_bias: biases that train with it: "none", "lora_only" or "all", see `LoRAConfig`.
    """

    policies: dict[str, str]
    lora_modules: tuple[str, ...]
    lora_bias: str = "none"


def part_of(name: str) -> str:
    """The part that a parameter or layer belongs to."""
    return next((part for part in PARTS if name.startswith(f"{part}.")), "language_model")


def names_for_patterns(name: str) -> tuple[str, ...]:
    """The spellings of a parameter or layer name that a pattern may match: ours and PaddleMIX's."""
    try:
        # Recipes of PaddleMIX name its parameters; both spellings match.
        return name, PADDLEMIX.to_theirs(name)
    except KeyError:
        return (name,)


def plan_training(model: nn.Layer, config: RunConfig) -> TrainingPlan:
    """Resolves the keys `vision_tower`, `projector`, `language_model`, `lora` and `lora_target_modules`.

    Raises:
        UserError: a LoRA pattern matches no linear layer, or LoRA is asked for and has nothing to adapt.
    """
    # Defaults are LLaVA's second stage: tower frozen, projector trained, language model full or adapted.
    policies = {
        "vision_tower": config.vision_tower or "frozen",
        "projector": config.projector or "full",
        "language_model": config.language_model or ("lora" if config.lora or config.lora_path else "full"),
    }
    if "lora" not in policies.values():
        if config.lora:
            raise UserError(f"lora is true, but no part is left for it ({_said(policies)}); set one of them to lora")
        return TrainingPlan(policies, ())
    modules = _lora_modules(linear_names(model), config, policies)
    if not modules:
        raise UserError(
            f"LoRA has no layer to adapt ({_said(policies)}, lora_target_modules {config.lora_target_modules})"
        )
    # A pattern that names layers of another part adapts that part too.
    for part in {part_of(name) for name in modules}:
        policies[part] = "lora"
    return TrainingPlan(policies, modules, config.lora_bias)


def _said(policies: dict[str, str]) -> str:
    return ", ".join(f"{part} {policy}" for part, policy in policies.items())


def adapter_config(config: RunConfig, plan: TrainingPlan) -> LoRAConfig:
    """Settings of the new adapter that a run asks for.

    Raises:
        UserError: the tower has a rank or scale of its own, but none of its layers gets an adapter.
    """
    tower = PARTS[0]
    own = {"vision_lora_rank": config.vision_lora_rank, "vision_lora_alpha": config.vision_lora_alpha}
    unused = [key for key, value in own.items() if value is not None]
    if unused and not any(part_of(name) == tower for name in plan.lora_modules):
        raise UserError(
            f"{unused[0]} {own[unused[0]]}: no layer of the vision tower gets an adapter; set vision_tower to lora"
        )
    return LoRAConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        modules=plan.lora_modules,
        rslora=config.rslora,
        use_dora=config.use_dora,
        pissa=config.pissa,
        bias=config.lora_bias,
        rank_pattern={} if config.vision_lora_rank is None else {tower: config.vision_lora_rank},
        alpha_pattern={} if config.vision_lora_alpha is None else {tower: config.vision_lora_alpha},
    )


def plan_of_adapter(plan: TrainingPlan, modules: Sequence[str], bias: str = "none") -> TrainingPlan:
    """The plan of a run that continues an adapter: the layers that it adapts are trained through it."""
    return TrainingPlan({**plan.policies, **{part_of(name): "lora" for name in modules}}, tuple(modules), bias)


def check_adapter_keys(config: RunConfig, adapter: LoRAConfig) -> None:
    """Refuses keys that ask for another kind of adapter than the one that a run continues.

    Raises:
        UserError: a key was set to something else.
    """
    for key, found in (
        ("rslora", adapter.rslora),
        ("use_dora", adapter.use_dora),
        ("pissa", adapter.pissa),
        ("lora_bias", adapter.bias),
        ("vision_lora_rank", adapter.rank_of(PARTS[0])),
        ("vision_lora_alpha", adapter.alpha_of(PARTS[0])),
    ):
        wanted = getattr(config, key)
        # Only keys that the user wrote: defaults do not contradict anything.
        if key in config.given and wanted is not None and wanted != found:
            raise UserError(
                f"{key} {json.dumps(wanted)} contradicts the adapter {config.lora_path}, which has "
                f"{json.dumps(found)}; remove {key}, or start a new adapter without lora_path"
            )


def _lora_modules(available: Sequence[str], config: RunConfig, policies: dict[str, str]) -> tuple[str, ...]:
    # A part that is frozen by key stays so, whatever a pattern matches.
    explicit_frozen = {part for part in PARTS if getattr(config, part) == "frozen"}
    targets = config.lora_target_modules
    patterns = [targets] if isinstance(targets, str) else targets
    # The output layer is adapted only where a pattern names it.
    by_default = [name for name in available if policies[part_of(name)] == "lora" and not name.startswith("lm_head")]
    if not patterns:
        return tuple(by_default)
    matched: set[str] = set()
    for pattern in patterns:
        hits = set(by_default if pattern == ALL_LINEAR else (name for name in available if _fullmatch(pattern, name)))
        if not hits:
            examples = ", ".join(names_for_patterns(available[0])) if available else "none"
            raise UserError(
                f"lora_target_modules: '{pattern}' matches no linear layer of the model (layers are named like "
                f"{examples})"
            )
        matched |= {name for name in hits if part_of(name) not in explicit_frozen}
    # Patterns are written for the language model; another part with policy "lora" that none names is taken whole.
    named = {part_of(name) for name in matched}
    matched |= {name for name in by_default if part_of(name) not in named and part_of(name) != "language_model"}
    return tuple(name for name in available if name in matched)


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return any(re.fullmatch(pattern, spelling) for spelling in names_for_patterns(name))
    except re.error as error:
        raise UserError(f"lora_target_modules: '{pattern}' is not a regular expression: {error}") from error


def set_trainable(model: nn.Layer, plan: TrainingPlan, config: RunConfig) -> None:
    """Marks every parameter as trained or frozen.  A policy decides first, then the freeze patterns.

    Raises:
        UserError: a freeze pattern matches no parameter, biases should train and there are none, or nothing is left to
            train.
    """
    names = [name for name, _ in model.named_parameters()]
    included, excluded = (
        _matching(names, patterns, key)
        for patterns, key in ((config.freeze_include, "freeze_include"), (config.freeze_exclude, "freeze_exclude"))
    )
    biases = _trained_biases(names, plan)
    trained = 0
    for name, parameter in model.named_parameters():
        # A policy decides first; freeze_include freezes, freeze_exclude alone trains, both together leave the policy;
        # an adapter's weights train and its start values never do.
        is_adapter = is_adapter_weight(name)
        trains = is_adapter or name in biases or plan.policies[part_of(name)] == "full"
        if name in included and name not in excluded and not is_adapter:
            trains = False
        if name in excluded and name not in included:
            trains = True
        trains = trains and not is_start_value(name)
        parameter.stop_gradient = not trains
        trained += trains
    if not trained:
        raise UserError(
            "nothing trains: every part is frozen; set projector, language_model or vision_tower to lora or full"
        )


def _trained_biases(names: Sequence[str], plan: TrainingPlan) -> set[str]:
    """The biases that train with an adapter."""
    if plan.lora_bias == "none" or not plan.lora_modules:
        return set()
    # "lora_only": biases of adapted layers; "all": every bias of a part that is adapted.
    adapted = {f"{name}.bias" for name in plan.lora_modules}
    parts = {part_of(name) for name in plan.lora_modules}
    every = plan.lora_bias == "all"
    found = {name for name in names if name in adapted or (every and name.endswith(".bias") and part_of(name) in parts)}
    if not found:
        where = f"the {' and '.join(sorted(parts))}" if every else "the adapted layers"
        raise UserError(f'lora_bias "{plan.lora_bias}": {where} have no bias in this model; set lora_bias to none')
    return found


def _matching(names: Iterable[str], patterns: Sequence[str] | None, key: str) -> set[str]:
    found: set[str] = set()
    names = list(names)
    for pattern in patterns or ():
        # A pattern without a match is most often a misspelt one, and would train or freeze something else.
        hits = {name for name in names if any(fnmatch.fnmatchcase(s, pattern) for s in names_for_patterns(name))}
        if not hits:
            blind = not any(part_of(name) == "vision_tower" for name in names)
            raise UserError(
                f"{key}: '{pattern}' matches no parameter of the model (parameters are named like "
                f"{' or '.join(names_for_patterns(names[0]))})"
                + ("; it has no vision tower and so no projector, set mm_vision_tower" if blind else "")
            )
        found |= hits
    return found


def trains_visual_parts(model: nn.Layer) -> bool:
    """Whether anything trains that only an image's features reach: tower, projector or newline vector."""
    names = ("vision_tower.", "projector.", "image_newline")
    return any(name.startswith(names) and not weight.stop_gradient for name, weight in model.named_parameters())


def count_parameters(model: nn.Layer) -> dict[str, tuple[int, int]]:
    """(trained, all) numbers of each part of the whole model, of which a process may have a share."""
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        entry = counts[part_of(name)]
        size = math.prod(whole_shape(parameter))
        entry[1] += size
        entry[0] += 0 if parameter.stop_gradient else size
    # Codes are not parameters, so their layers are counted by the shape of the weight.
    for name, layer in quantized_layers(model):
        counts[part_of(name)][1] += math.prod(whole_sides(layer, layer.weight_shape))
    return {part: (trained, total) for part, (trained, total) in counts.items()}
