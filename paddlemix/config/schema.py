"""Every key of a run: the model, what of it trains, LoRA, data and generation; `RunConfig` adds the training keys.

One flat object holds a run.  Names and defaults are PaddleMIX's and PaddleNLP 3.0.0b4's wherever those have the key, so
that their files load unchanged; the keys they lack are ours and default to "as the checkpoint says".
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial

from paddlemix.config.keys import KeySpec, key, read_specs
from paddlemix.config.schema_training import CompatibilityKeys, DistributedKeys, LoggingKeys, TrainingKeys

_model = partial(key, group="model")
_lora = partial(key, group="lora")
_data = partial(key, group="data")
_generation = partial(key, group="generation", status="ignored")

POLICIES = ("frozen", "lora", "full")


@dataclass(kw_only=True)
class ModelKeys:
    """Which model, how it sees images, and which parts of it train."""

    model_name_or_path: str | None = _model(None, help="Directory or name of the model to start from; required.")
    dtype: str | None = _model(
        None,
        help="Precision of the weights in memory; null: what bf16, fp16 and fp16_opt_level ask for.",
        choices=("float32", "bfloat16", "float16"),
    )
    use_flash_attention: bool = _model(
        False, help="Fused attention is not available yet; the plain form is computed.", status="ignored"
    )
    image_aspect_ratio: str | None = _model(
        None,
        help="How an image becomes tiles: square crops the centre, pad fills to a square, anyres cuts a grid; "
        "null: what the checkpoint says.",
        choices=("square", "pad", "anyres"),
    )
    image_grid_pinpoints: list | None = _model(
        None,
        help="Grids that anyres may choose from, a list of [width, height]; null: the checkpoint's.",
        unit="pixels",
    )
    mm_patch_merge_type: str | None = _model(
        None,
        help="How tiles are laid out in the sequence; null: what the checkpoint says.",
        choices=("flat", "spatial", "spatial_unpad"),
    )
    mm_vision_tower: str | None = _model(
        None, help="Directory or name of a CLIP tower, to start from a text-only model; null: the checkpoint's."
    )
    mm_projector_type: str | None = _model(
        None,
        help="Projector to build on a text-only model; null: what the checkpoint says.",
        choices=("linear", "mlpNx_gelu", "identity"),
        pattern=r"linear|mlp[1-9]\d*x_gelu|identity",
    )
    mm_vision_select_layer: int | None = _model(
        None, help="Tower layer that is read, negative from the end (LLaVA: -2); null: what the checkpoint says."
    )
    mm_vision_select_feature: str | None = _model(
        None,
        help="Tower outputs that are read: patch without, cls_patch with the class token; null: the checkpoint's.",
        choices=("patch", "cls_patch"),
    )
    pretrain_mm_mlp_adapter: str | None = _model(None, help="File with a trained projector to start from.")
    vision_tower: str | None = _model(
        None, help="How the vision tower trains; null: frozen unless freeze patterns say otherwise.", choices=POLICIES
    )
    projector: str | None = _model(
        None, help="How the projector trains; null: full unless freeze patterns say otherwise.", choices=POLICIES
    )
    language_model: str | None = _model(
        None, help="How the language model trains; null: lora or full by the key lora.", choices=POLICIES
    )
    freeze_include: list[str] | None = _model(
        None, help="Shell patterns of parameter names that do not train, e.g. *llama*."
    )
    freeze_exclude: list[str] | None = _model(
        None, help="Shell patterns of parameter names that train although freeze_include matches."
    )


@dataclass(kw_only=True)
class LoraKeys:
    """Low-rank adapters."""

    lora: bool = _lora(False, help="Train low-rank adapters instead of the language model's own weights.")
    lora_path: str | None = _lora(None, help="Adapter directory to go on from; its own settings then hold.")
    lora_rank: int = _lora(8, help="Rank of each adapter.", min=1)
    lora_alpha: int = _lora(16, help="Scale: an adapter's output is multiplied by lora_alpha / lora_rank.", min=1)
    lora_dropout: float = _lora(0.05, help="Share of an adapter's inputs dropped in training.", min=0, max=1)
    lora_target_modules: list[str] | None = _lora(
        None, help="Regular expressions of the layers that get an adapter; null: the language model's linear layers."
    )


@dataclass(kw_only=True)
class DataKeys:
    """Which samples, and how they are put together."""

    dataset: dict | None = _data(
        None,
        help='{"train": [entry, ...], "eval": [...]}; an entry has data_files and may have name, splits, '
        "chat_template, image_root.",
    )
    chat_template: str | None = _data(
        None,
        help="Template of the conversations (vicuna_v1, plain, ...) or path of a chat_template.json; an entry's own "
        "comes first; null: what the checkpoint says.",
    )
    image_root: str | None = _data(
        None, help="Folder that relative image paths start from; an entry's own comes first."
    )
    max_length: int = _data(2048, help="Longest sample, visual tokens included.", unit="tokens", min=1)
    mixtoken: bool = _data(False, help="Packing is not available yet; rows hold one sample each.", status="ignored")
    group_by_modality_length: bool = _data(
        False, help="Fill batches with samples of like length, with or without images."
    )


@dataclass(kw_only=True)
class GenerationKeys:
    """PaddleMIX parses these with every run, but training generates nothing."""

    top_k: int = _generation(1, help="Training generates nothing; the chat command has its own flag.")
    top_p: float = _generation(1.0, help="Training generates nothing; the chat command has its own flag.")


@dataclass(kw_only=True)
class RunConfig(
    CompatibilityKeys, GenerationKeys, DistributedKeys, LoggingKeys, TrainingKeys, DataKeys, LoraKeys, ModelKeys
):
    """One checked run: a value for every key.  `load_config` makes it; the parent classes declare the keys.

    Args:
        warnings: texts about keys that were set although they have no effect; not a key.
        given: names of the keys that the file or the command line set; not a key.
    """

    warnings: list[str] = field(default_factory=list)
    given: frozenset[str] = frozenset()

    @property
    def resolved_evaluation_strategy(self) -> str:
        """When evaluation happens: "no", "steps" or "epoch".

        Either key switches it on: a strategy alone does, and `do_eval` alone means "steps".
        Source: PaddleNLP 3.0.0b4, `TrainingArguments.__post_init__`.
        """
        if self.do_eval and self.evaluation_strategy == "no":
            return "steps"
        return self.evaluation_strategy


SPECS: dict[str, KeySpec] = read_specs(RunConfig)


def trainer_keys() -> Collection[str]:
    """Names of the keys that PaddleNLP's TrainingArguments gets."""
    return [name for name, spec in SPECS.items() if spec.target == "trainer"]
