"""What trains: policies, PaddleMIX's freeze patterns and LoRA targets, each down to the parameter's name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.models.llava import LlavaModel
from paddlemix.peft.lora import LoRAConfig, add_lora
from paddlemix.trainer.trainable import (
    TrainingPlan,
    _matching,
    adapter_config,
    check_adapter_keys,
    count_parameters,
    part_of,
    plan_of_adapter,
    plan_training,
    set_trainable,
)
from tests.conftest import ROOT
from tests.tiny_models import tiny_llava, tiny_model, tiny_text

RECIPES = ROOT / "paddlemix" / "config" / "llava"
LAYERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "o_proj")


def settings(**values: Any) -> RunConfig:
    given = {"model_name_or_path": "model", "output_dir": "out", **values}
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def shipped(path: str, *keys: str) -> dict[str, Any]:
    values = json.loads((RECIPES / path).read_text(encoding="utf-8"))
    return {key: values[key] for key in keys}


def planned(config: RunConfig, model: LlavaModel | None = None) -> tuple[LlavaModel, TrainingPlan]:
    """A model with its adapters added and its parameters marked."""
    model = model or tiny_model()
    plan = plan_training(model, config)
    if plan.lora_modules:
        add_lora(model, LoRAConfig(r=2, modules=plan.lora_modules))
    set_trainable(model, plan, config)
    return model, plan


def trained(config: RunConfig) -> set[str]:
    return {name for name, parameter in planned(config)[0].named_parameters() if not parameter.stop_gradient}


def names(*prefixes: str) -> set[str]:
    return {name for name, _ in tiny_model().named_parameters() if name.startswith(prefixes)}


LANGUAGE = ("language_model.", "lm_head", "image_newline")
PROJECTOR = ("projector.",)


def test_the_shipped_freeze_keys_of_pretraining_train_exactly_the_projector() -> None:
    keys = shipped("pretrain.json", "freeze_include", "freeze_exclude")
    assert trained(settings(**keys)) == names("projector.")


@pytest.mark.parametrize("recipe", ["v1_5/lora_sft_argument.json", "v1_6/lora_sft_argument.json"])
def test_the_shipped_lora_targets_are_the_language_models_linear_layers(recipe: str) -> None:
    config = settings(**shipped(recipe, "lora", "lora_target_modules"), vision_tower="frozen")
    plan = plan_training(tiny_model(), config)
    wanted = {
        f"language_model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
        for layer in range(2)
        for name in LAYERS
    }
    assert set(plan.lora_modules) == wanted
    assert trained(config) == names("projector.") | {f"{name}.lora_{side}" for name in wanted for side in "AB"}


@pytest.mark.parametrize(
    ("values", "prefixes"),
    [
        ({}, (*LANGUAGE, *PROJECTOR)),
        ({"vision_tower": "full"}, ("",)),
        ({"language_model": "frozen"}, PROJECTOR),
        ({"projector": "frozen"}, LANGUAGE),
        ({"freeze_include": ["lm_head*"]}, ("language_model.", "image_newline", *PROJECTOR)),
        ({"freeze_include": ["language_model.*"]}, ("lm_head", "image_newline", *PROJECTOR)),
        (
            {"freeze_include": ["llama.layers.0.*"]},
            ("language_model.layers.1", "language_model.norm", "language_model.em"),
        ),
        ({"freeze_include": ["*"], "freeze_exclude": ["*mm_projector*"]}, PROJECTOR),
        ({"language_model": "frozen", "freeze_exclude": ["lm_head*"]}, ("lm_head", *PROJECTOR)),
    ],
)
def test_policies_and_freeze_patterns(values: dict[str, Any], prefixes: tuple[str, ...]) -> None:
    expected = names(*prefixes)
    if values == {"freeze_include": ["llama.layers.0.*"]}:
        expected |= names("lm_head", "image_newline", "projector.")
    assert trained(settings(**values)) == expected


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({}, {"language_model"}),
        ({"lora_target_modules": ["all-linear"]}, {"language_model"}),
        ({"lora_target_modules": "all-linear", "vision_tower": "lora"}, {"language_model", "vision_tower"}),
        ({"lora_target_modules": ["all-linear", "projector.*"]}, {"language_model", "projector"}),
        ({"lora_target_modules": "llama.vision_tower.*q_proj"}, {"vision_tower"}),
        ({"vision_tower": "lora"}, {"language_model", "vision_tower"}),
        ({"vision_tower": "lora", "projector": "lora"}, {"language_model", "vision_tower", "projector"}),
        ({"vision_tower": "lora", "language_model": "frozen"}, {"vision_tower"}),
        (
            {"vision_tower": "lora", "lora_target_modules": ["llama.layer.*q_proj.*"]},
            {"language_model", "vision_tower"},
        ),
        ({"lora_target_modules": [".*q_proj"]}, {"language_model", "vision_tower"}),
        ({"lora_target_modules": [".*q_proj"], "vision_tower": "frozen"}, {"language_model"}),
        ({"lora_target_modules": ["llama.vision_tower.*q_proj"]}, {"vision_tower"}),
    ],
)
def test_which_parts_get_adapters(values: dict[str, Any], parts: set[str]) -> None:
    model, plan = planned(settings(lora=True, **values))
    assert {part_of(name) for name in plan.lora_modules} == parts
    assert not any(name.startswith("lm_head") for name in plan.lora_modules)
    for name, parameter in model.named_parameters():  # beside the adapters, only a part with policy "full" trains
        is_adapter = name.endswith(("lora_A", "lora_B"))
        whole = part_of(name) == "projector" and "projector" not in parts
        assert parameter.stop_gradient is not (is_adapter or whole)


def test_a_tied_or_text_only_model_can_be_planned() -> None:
    model, _ = planned(settings(), tiny_model(tiny_llava(vision=None, text=tiny_text(tie_word_embeddings=True))))
    assert all(not parameter.stop_gradient for parameter in model.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_target_modules": ["llama.layer.*w_proj.*"]}, "'llama.layer.*w_proj.*' matches no linear layer"),
        ({"lora_target_modules": [".*q_proj", "q_proj"]}, "'q_proj' matches no linear layer"),
        ({"lora_target_modules": ["(q_proj"]}, r"'\(q_proj' is not a regular expression"),
        ({"lora_target_modules": ["lm_head"], "language_model": "frozen", "vision_tower": "lora"}, None),
        ({"language_model": "full"}, "lora is true, but no part is left for it"),
        ({"language_model": "frozen"}, "lora is true, but no part is left for it"),
        ({"lora_target_modules": ["vision_tower.*q_proj"], "vision_tower": "frozen"}, "LoRA has no layer to adapt"),
    ],
)
def test_lora_that_adapts_nothing_is_refused(values: dict[str, Any], message: str | None) -> None:
    if message is None:  # one part's patterns match a frozen part only: the other is adapted
        assert {part_of(name) for name in planned(settings(lora=True, **values))[1].lora_modules} == {"vision_tower"}
        return
    with pytest.raises(UserError, match=message):
        planned(settings(lora=True, **values))


@pytest.mark.parametrize("key", ["freeze_include", "freeze_exclude"])
def test_a_freeze_pattern_that_matches_nothing_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"{key}: '\*mm_projektor\*' matches no parameter .* named like \S+ or \S+"):
        trained(settings(**{key: ["*", "*mm_projektor*"]}))


def test_a_model_without_a_tower_is_why_a_pattern_matches_nothing() -> None:
    for names, said in ((["language_model.norm.weight"], True), (["vision_tower.class_embedding"], False)):
        with pytest.raises(UserError, match="matches no parameter of the model") as caught:
            _matching(names, ["*mm_projector*"], "freeze_include")
        assert ("it has no vision tower" in str(caught.value)) == said


def test_a_run_that_trains_nothing_is_refused() -> None:
    for values in ({"freeze_include": ["*"]}, {"language_model": "frozen", "projector": "frozen"}):
        with pytest.raises(UserError, match="nothing trains"):
            trained(settings(**values))


def test_counts_of_each_part() -> None:
    model, _ = planned(settings(language_model="frozen"))
    counts = count_parameters(model)
    total = sum(int(parameter.size) for parameter in model.parameters())
    assert sum(entry[1] for entry in counts.values()) == total
    assert counts["projector"][0] == counts["projector"][1] > 0
    assert counts["vision_tower"][0] == counts["language_model"][0] == 0


QUERY = "vision_tower.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("values", "biases"),
    [
        ({}, ()),
        ({"lora_bias": "lora_only"}, (f"{QUERY}.bias",)),
        ({"lora_bias": "all"}, ("vision_tower.",)),
        ({"lora_bias": "all", "freeze_include": ["*norm*.bias"]}, ("vision_tower.layers.", "vision_tower.p")),
    ],
)
def test_biases_that_train_beside_adapters(values: dict[str, Any], biases: tuple[str, ...]) -> None:
    found = trained(settings(lora=True, lora_target_modules=[QUERY], projector="frozen", **values))
    frozen = "freeze_include" in values
    wanted = {
        name for name in names(*biases or ("none",)) if name.endswith(".bias") and not (frozen and "norm" in name)
    }
    assert found == wanted | {f"{QUERY}.lora_A", f"{QUERY}.lora_B"}


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_are_not_there(bias: str) -> None:
    with pytest.raises(
        UserError, match=f'lora_bias "{bias}": the .* have no bias in this model; set lora_bias to none'
    ):
        trained(settings(lora=True, lora_bias=bias))


def test_start_values_of_an_adapter_never_train() -> None:
    model, config = tiny_model(), settings(lora=True, freeze_exclude=["*lora_A_start*"], projector="frozen")
    plan = plan_training(model, config)
    add_lora(model, LoRAConfig(r=2, pissa=True, modules=plan.lora_modules))
    set_trainable(model, plan, config)
    found = {name.rpartition(".")[2] for name, value in model.named_parameters() if not value.stop_gradient}
    assert found == {"lora_A", "lora_B"}


def test_the_settings_of_a_new_adapter() -> None:
    given = {"lora_rank": 4, "lora_alpha": 6, "lora_dropout": 0.1, "rslora": True, "use_dora": True}
    config = settings(lora=True, vision_tower="lora", vision_lora_rank=2, vision_lora_alpha=3, lora_bias="all", **given)
    plan = plan_training(tiny_model(), config)
    adapter = adapter_config(config, plan)
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.bias) == (4, 6, 0.1, "all")
    assert adapter.rslora and adapter.use_dora and not adapter.pissa
    assert adapter.modules == plan.lora_modules
    assert (adapter.rank_of(QUERY), adapter.alpha_of(QUERY), adapter.rank_of("lm_head")) == (2, 3, 4)


def test_a_rank_of_the_tower_without_adapters_there_is_refused() -> None:
    config = settings(lora=True, vision_lora_rank=2)
    with pytest.raises(
        UserError, match="vision_lora_rank 2: no layer of the vision tower gets an adapter; set vision_"
    ):
        adapter_config(config, plan_training(tiny_model(), config))


def test_going_on_with_an_adapter() -> None:
    adapter = LoRAConfig(r=2, use_dora=True, bias="lora_only", modules=(QUERY,))
    config = settings(lora_path="earlier", use_dora=True, lora_plus_scale=2.0, projector="frozen")
    check_adapter_keys(config, adapter)
    model = tiny_model()
    plan = plan_of_adapter(plan_training(model, config), adapter.modules, adapter.bias)
    add_lora(model, adapter)
    set_trainable(model, plan, config)
    own = {f"{QUERY}.{name}" for name in ("lora_A", "lora_B", "lora_magnitude_vector", "bias")}
    assert {name for name, parameter in model.named_parameters() if not parameter.stop_gradient} == own


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pissa": True}, "pissa true contradicts the adapter earlier, which has false; remove pissa, or start a new"),
        ({"use_dora": False}, "use_dora false contradicts the adapter earlier, which has true"),
        ({"lora_bias": "all"}, 'lora_bias "all" contradicts the adapter earlier, which has "none"'),
        ({"vision_lora_rank": 4}, "vision_lora_rank 4 contradicts the adapter earlier, which has 2"),
    ],
)
def test_keys_that_contradict_the_adapter(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_adapter_keys(settings(lora_path="earlier", **values), LoRAConfig(r=2, use_dora=True, modules=(QUERY,)))
