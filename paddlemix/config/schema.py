"""Every key of a run: the model, what of it trains, LoRA, data and generation; `RunConfig` adds the training keys.

One flat object holds a run.  Names and defaults are those of PaddleMIX and PaddleNLP 3.0.0b4 where they have the key,
so that their files load unchanged; keys that they lack are ours and default to "as the checkpoint says".
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
# PaddleMIX's GenerateArgument parses these keys, and its LLaVA code never reads them
_generation = partial(key, group="generation", status="ignored")

# of a part of the model: no weight trains, adapters train, every weight trains
POLICIES = ("frozen", "lora", "full")


@dataclass(kw_only=True)
class ModelKeys:
    """Which model, how it sees images, and which parts of it train."""

    # Null marks a key that has no default: rules.py reports it as missing with all other faults.
    model_name_or_path: str | None = _model(
        None, help="Directory or name of the model to start from; required.", path="place"
    )
    dtype: str | None = _model(
        None,
        help="Precision of the weights in memory; null: what bf16, fp16 and fp16_opt_level ask for.",
        choices=("float32", "bfloat16", "float16"),
    )
    # PaddleMIX's name; three states, because "not asked for" and "switched off" differ.
    use_flash_attention: bool | None = _model(
        None,
        help="Fused kernels for attention, RMS norm, rotary positions and gates: null uses those of the device that "
        "compute the same as the plain forms for this model, false uses none.",
    )
    # How images are prepared belongs to the checkpoint; a run that changes it is compared with
    # the checkpoint on resuming.
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
    # The three policies replace LLaVA's freeze_* and tune_* switches, whose combinations contradict each other.
    mm_vision_tower: str | None = _model(
        None,
        help="Directory or name of a vision tower, to start from a text-only model; null: the checkpoint's.",
        path="place",
    )
    # Not a key of LLaVA: a tower may be trained at another resolution than its weights were.
    vision_image_size: int | None = _model(
        None,
        help="Side of the tiles that the tower reads; its position embeddings are interpolated. "
        "null: what the checkpoint or the tower says.",
        unit="pixels",
        min=1,
    )
    # A pattern, since the number of layers is part of the name; `choices` is what the help shows.
    mm_projector_type: str | None = _model(
        None,
        help="Projector to build on a text-only model; null: what the checkpoint says.",
        choices=("linear", "mlpNx_gelu", "identity"),
        pattern=r"linear|mlp[1-9]\d*x_gelu|identity",
    )
    mm_vision_select_layer: int | None = _model(
        None,
        help="Tower layer whose output is used, negative from the end (LLaVA: -2); null: what the checkpoint says.",
    )
    mm_vision_select_feature: str | None = _model(
        None,
        help="Tower outputs to use: patch without the class token, cls_patch with it; null: the checkpoint's.",
        choices=("patch", "cls_patch"),
    )
    pretrain_mm_mlp_adapter: str | None = _model(
        None, help="File with a trained projector to start from.", path="local"
    )
    # Ours are policies.  LLaVA's key `vision_tower` is the name of a model, which is mm_vision_tower here.
    vision_tower: str | None = _model(
        None, help="How the vision tower trains; null: frozen unless freeze patterns say otherwise.", choices=POLICIES
    )
    projector: str | None = _model(
        None, help="How the projector trains; null: full unless freeze patterns say otherwise.", choices=POLICIES
    )
    language_model: str | None = _model(
        None, help="How the language model trains; null: lora or full by the key lora.", choices=POLICIES
    )
    # PaddleMIX's way to choose by name; what neither pattern matches follows its part's policy.
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
    lora_path: str | None = _lora(
        None, help="Adapter directory to continue training; its own settings then apply.", path="local"
    )
    # PaddleMIX's defaults.  LLaVA's own scripts train with rank 128 and alpha 256, as our recipes for it do.
    lora_rank: int = _lora(8, help="Rank of each adapter.", min=1)
    # PEFT's scaling, so that adapters mean the same there.
    lora_alpha: int = _lora(16, help="Scale: an adapter's output is multiplied by lora_alpha / lora_rank.", min=1)
    lora_dropout: float = _lora(0.05, help="Share of an adapter's inputs dropped in training.", min=0, max=1)
    lora_target_modules: str | list[str] | None = _lora(
        None,
        help="Regular expressions for the layers that get an adapter; all-linear or null: the linear layers of every "
        "part with policy lora, without the output layer.",
    )
    # PEFT's names and meaning.
    lora_bias: str = _lora(
        "none",
        help="Biases that train too: lora_only of the adapted layers, all of the parts that have adapters.",
        choices=("none", "lora_only", "all"),
    )
    rslora: bool = _lora(False, help="Scale by lora_alpha / sqrt(lora_rank); recommended for high ranks.")
    use_dora: bool = _lora(
        False, help="DoRA: learn the magnitude of each output's weights separately from their direction."
    )
    pissa: bool = _lora(False, help="PiSSA: initialise adapters with the principal components of the weights.")
    # Source: LoRA+ (arXiv 2402.12354), which recommends 16.
    lora_plus_scale: float = _lora(1.0, help="LoRA+: learning rate of lora_B as a multiple of lora_A's.", min=0)
    # Own keys for the tower: its width is a quarter of the language model's, and so are useful ranks.
    vision_lora_rank: int | None = _lora(None, help="Rank of the vision tower's adapters; null: lora_rank.", min=1)
    vision_lora_alpha: int | None = _lora(None, help="Scale of the vision tower's adapters; null: lora_alpha.", min=1)
    quantize_base: str | None = _lora(
        None,
        help="QLoRA: hold the language model's linear layers in 8 or 4 bits while adapters train; null: as in the "
        "checkpoint.",
        choices=("int8", "nf4"),
    )
    use_quick_lora: bool = _lora(
        False, help="The faster order of an adapter's products is always chosen.", status="ignored"
    )


@dataclass(kw_only=True)
class DataKeys:
    """Which samples, and how they are combined into batches."""

    # Its inner structure is checked in structures.py.
    dataset: dict | None = _data(
        None,
        help='{"train": [entry, ...], "eval": [...]}; an entry has data_files (path or path#N, or a list) and may have '
        "name, image_root, chat_template, split, weight, about (a remark), splits.",
    )
    chat_template: str | None = _data(
        None,
        help="Template of the conversations (vicuna_v1, plain, ...) or path of a chat_template.json; an entry's own "
        "takes precedence; null: what the checkpoint says.",
        path="place",
    )
    image_root: str | None = _data(
        None, help="Folder of relative image paths; an entry's own takes precedence.", path="place"
    )
    # LLaVA's 2,048; the placeholder of an image counts as the tokens that it becomes.
    max_length: int = _data(
        2048,
        help="Maximum length of a sample, visual tokens included; with mixtoken also of a row.",
        unit="tokens",
        min=1,
    )
    # PaddleMIX's name for packing.
    mixtoken: bool = _data(
        False, help="Pack several samples into each row of max_length; they do not attend to each other."
    )
    group_by_modality_length: bool = _data(
        False, help="Form steps of samples of similar length, all with or all without images (LLaVA's sampler)."
    )
    group_by_length: bool = _data(False, help="Form batches of samples of similar length in tokens.")
    # Graph compilers and NPU operators prepare each new shape, which costs seconds.
    pad_to_multiple_of: int = _data(
        1, help="Pad a batch's rows to a multiple, for fewer distinct lengths; 1: to its longest.", unit="tokens", min=1
    )
    pad_tiles_to_multiple_of: int = _data(
        1, help="Pad a batch's tiles to a multiple with empty ones; 1: no padding.", unit="tiles", min=1
    )
    on_too_long: str = _data(
        "truncate_turns",
        help="A sample longer than max_length: drop its last question-answer pairs, skip it, or stop. No image is cut.",
        choices=("truncate_turns", "skip", "error"),
    )
    # Stopping is the default: a data set that silently shrinks gives other results.
    on_bad_sample: str = _data(
        "error",
        help="An unusable record or image: stop, or skip it, count it and list it in skipped.jsonl.",
        choices=("error", "skip"),
    )
    max_bad_fraction: float = _data(
        0.01, help="Largest share of bad samples that on_bad_sample skip tolerates.", min=0, max=1
    )
    # Limits against files that are small on disk and huge in memory; 178,956,970 pixels are Pillow's own limit.
    max_image_bytes: int = _data(64 * 1024**2, help="Largest image file or download.", unit="bytes", min=1)
    max_image_pixels: int = _data(178_956_970, help="Largest image, width times height.", unit="pixels", min=1)
    image_timeout: float = _data(30.0, help="Longest wait for a server's next bytes.", unit="seconds", min=0.1)
    image_retries: int = _data(3, help="Further attempts after a failed download.", min=0)
    # Frozen towers only: features of a tower that trains are out of date after a step.
    cache_vision_features: bool = _data(
        False, help="Keep the frozen tower's features of every image on disk, so that it runs in the first epoch only."
    )
    vision_cache_dir: str | None = _data(
        None,
        help="Folder of those features; null: inside the cache folder ($PADDLEMIX_CACHE or ~/.cache/paddlemix).",
        path="local",
    )
    vision_cache_gb: float = _data(
        50.0, help="Limit of the features kept, for all runs that share the folder.", unit="GB", min=0
    )
    # Off, because data from elsewhere must not make a machine query its own network.
    allow_local_network: bool = _data(
        False, help="Allow data to name http(s) addresses of this machine and of the local network."
    )


@dataclass(kw_only=True)
class GenerationKeys:
    """PaddleMIX accepts these in every run, but answers in training are greedy."""

    top_k: int = _generation(1, help="Answers in training are greedy; the chat command has its own flag.")
    top_p: float = _generation(1.0, help="Answers in training are greedy; the chat command has its own flag.")


@dataclass(kw_only=True)
class RunConfig(
    CompatibilityKeys, GenerationKeys, DistributedKeys, LoggingKeys, TrainingKeys, DataKeys, LoraKeys, ModelKeys
):
    """One checked run: a value for every key.  `load_config` makes it; the parent classes declare the keys.

    Args:
        warnings: texts about keys that were set but have no effect; not a key.
        given: names of the keys that the file or the command line sets; not a key.
    """

    # Not keys: without `key` they have no group, and read_specs skips them.
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
    """Names of the keys that are passed to PaddleNLP's TrainingArguments."""
    return [name for name, spec in SPECS.items() if spec.target == "trainer"]
