"""What must hold between keys of one run.  Each rule is a function; `RULES` lists them.

Single values are already checked.  Where PaddleNLP 3.0.0b4 has the same rule, it would report it later, and alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from paddlemix.config.schema import SPECS, RunConfig
from paddlemix.config.sharing_rules import sharing_faults


@dataclass(frozen=True)
class Conflict:
    """A broken rule.

    Args:
        keys: the keys it is about; the first is the one to change.
        message: what is wrong and what to do.
    """

    keys: tuple[str, ...]
    message: str


def find_conflicts(config: RunConfig) -> list[Conflict]:
    """Every rule that the run breaks, in the order of `RULES`."""
    return [conflict for rule in RULES for conflict in rule(config)]


def _required(config: RunConfig) -> list[Conflict]:
    what = {"model_name_or_path": "a model directory or name", "output_dir": "the folder for the results"}
    return [
        Conflict((name,), f"{name} is missing; set it to {meaning}")
        for name, meaning in what.items()
        if not getattr(config, name)
    ]


def _precision(config: RunConfig) -> list[Conflict]:
    found: list[Conflict] = []
    if config.bf16 and config.fp16:
        found.append(Conflict(("fp16", "bf16"), "bf16 and fp16 are both true; choose one"))
    if config.bf16_full_eval and config.fp16_full_eval:
        message = "bf16_full_eval and fp16_full_eval are both true; choose one"
        found.append(Conflict(("fp16_full_eval", "bf16_full_eval"), message))
    # O2 alone switches nothing on: it says how bf16 or fp16 is done, not whether
    if config.fp16_opt_level == "O2" and not (config.bf16 or config.fp16):
        message = 'fp16_opt_level "O2" needs bf16 or fp16 true; otherwise set "O1"'
        found.append(Conflict(("fp16_opt_level", "bf16", "fp16"), message))
    if config.fp16 and config.scale_loss == 0:
        message = "scale_loss 0 makes every gradient of fp16 0 / 0; leave it out, or set a number above 0"
        found.append(Conflict(("scale_loss", "fp16"), message))
    for flag, opposite in (("bf16", "float16"), ("fp16", "bfloat16")):
        if getattr(config, flag) and config.dtype == opposite:
            found.append(Conflict(("dtype", flag), f'dtype "{opposite}" contradicts {flag} true; remove one of them'))
    return found


def _best_model(config: RunConfig) -> list[Conflict]:
    if not config.load_best_model_at_end:
        return []
    # The best checkpoint can only be found if every saved step was evaluated.
    # Source: PaddleNLP 3.0.0b4, `TrainingArguments.__post_init__`, which raises in the same two cases.
    evaluation, saving = config.resolved_evaluation_strategy, config.save_strategy
    if evaluation != saving:
        keys = ("load_best_model_at_end", "evaluation_strategy", "save_strategy")
        message = f'needs save_strategy ("{saving}") equal to evaluation_strategy ("{evaluation}")'
        return [Conflict(keys, f"load_best_model_at_end {message}")]
    # As PaddleNLP does; otherwise a saved checkpoint may have no evaluation to compare.
    every = config.eval_steps or config.logging_steps
    if evaluation == "steps" and config.save_steps % every:
        keys = ("save_steps", "eval_steps", "load_best_model_at_end")
        message = f"save_steps {config.save_steps} is not a multiple of eval_steps {every}"
        return [Conflict(keys, f"{message}; load_best_model_at_end needs that")]
    return []


def _early_stopping(config: RunConfig) -> list[Conflict]:
    if config.early_stopping_patience is None or config.resolved_evaluation_strategy != "no":
        return []
    message = "early_stopping_patience needs evaluations; set evaluation_strategy to steps or epoch"
    return [Conflict(("early_stopping_patience", "evaluation_strategy"), message)]


def _answers(config: RunConfig) -> list[Conflict]:
    """The keys of answers in training need evaluations or steps at which answers are made."""
    found: list[Conflict] = []
    if config.eval_with_do_generation and config.resolved_evaluation_strategy == "no":
        message = "eval_with_do_generation needs evaluations; set evaluation_strategy to steps or epoch"
        found.append(Conflict(("eval_with_do_generation", "evaluation_strategy"), message))
    if config.sample_prompts and config.sample_steps is None:
        message = "sample_prompts needs sample_steps, the interval at which they are answered"
        found.append(Conflict(("sample_prompts", "sample_steps"), message))
    for key in ("eval_with_do_generation", "sample_steps"):
        # Answers need whole weights on one process, which stage 3 never has.
        if getattr(config, key) and config.sharding.startswith("stage3"):
            message = f'{key} cannot be used with sharding "{config.sharding}": no process has the whole model'
            found.append(Conflict((key, "sharding"), message))
    return found


def _kept_features(config: RunConfig) -> list[Conflict]:
    # A process whose images are all kept would not run the tower, whose weights the others then wait for.
    if not (config.cache_vision_features and config.sharding.startswith("stage3")):
        return []
    message = f'cache_vision_features cannot be used with sharding "{config.sharding}"; set sharding to stage2'
    return [Conflict(("cache_vision_features", "sharding"), message)]


def _data_is_there(config: RunConfig) -> list[Conflict]:
    found = []
    dataset = config.dataset or {}
    if config.do_train and not dataset.get("train"):
        found.append(Conflict(("dataset", "do_train"), "dataset.train is missing; do_train needs at least one entry"))
    if config.resolved_evaluation_strategy != "no" and not dataset.get("eval"):
        # names the key that switched evaluation on, since either does (see `resolved_evaluation_strategy`)
        reason = "do_eval true" if config.do_eval else f'evaluation_strategy "{config.evaluation_strategy}"'
        keys = ("dataset", "do_eval" if config.do_eval else "evaluation_strategy")
        off = "do_eval false" if config.do_eval else 'evaluation_strategy "no"'
        found.append(Conflict(keys, f"dataset.eval is missing; {reason} needs at least one entry, else set {off}"))
    return found


def _something_to_train(config: RunConfig) -> list[Conflict]:
    # max_steps -1, the default, and 0 both mean "by epochs"
    if config.max_steps > 0 or config.num_train_epochs > 0:
        return []
    message = f"max_steps {config.max_steps} and num_train_epochs {config.num_train_epochs:g}: there would be no step"
    return [Conflict(("num_train_epochs", "max_steps"), f"{message}; set one of them above 0")]


def _rates(config: RunConfig) -> list[Conflict]:
    if config.min_learning_rate <= config.learning_rate:
        return []
    message = f"min_learning_rate {config.min_learning_rate:g} is above learning_rate {config.learning_rate:g}"
    return [Conflict(("min_learning_rate", "learning_rate"), f"{message}; lower it")]


def _optimiser(config: RunConfig) -> list[Conflict]:
    """Adam divides by 1 - beta."""
    return [
        Conflict((name,), f"{name} 1 divides by zero in the first step; set it below 1 (default {SPECS[name].default})")
        for name in ("adam_beta1", "adam_beta2")
        if getattr(config, name) == 1
    ]


def _policies(config: RunConfig) -> list[Conflict]:
    # lora false as the default says nothing: a part with policy "lora" then has adapters without it.
    # Only a false that somebody wrote contradicts the policy.
    if config.lora or "lora" not in config.given:
        return []
    return [
        Conflict((name, "lora"), f'{name} "lora" contradicts lora false; set lora true or {name} to frozen or full')
        for name in ("vision_tower", "projector", "language_model")
        if getattr(config, name) == "lora"
    ]


def _one_order(config: RunConfig) -> list[Conflict]:
    keys = tuple(name for name in ("mixtoken", "group_by_length", "group_by_modality_length") if getattr(config, name))
    if len(keys) < 2:
        return []
    message = f"{' and '.join(keys)} are both true; choose one: mixtoken fills rows, the others sort samples"
    return [Conflict(keys, message)]


def _adapters(config: RunConfig) -> list[Conflict]:
    """The keys of adapter kinds: not two kinds at once, and none if no adapter trains."""
    found: list[Conflict] = []
    if config.use_dora and config.pissa:
        found.append(Conflict(("pissa", "use_dora"), "use_dora and pissa are both true; choose one"))
    # An adapter may come from any of three keys.
    policies = (config.vision_tower, config.projector, config.language_model)
    if not (config.lora or config.lora_path or "lora" in policies):
        # compared with the defaults, not with `given`: a file that states a default asks for nothing
        keys = [name for name, plain in _ADAPTER_KEYS.items() if getattr(config, name) != plain]
        message = "needs lora true, or a part with policy lora"
        found += [Conflict((name, "lora"), f"{name} {message}; add that or remove {name}") for name in keys]
    if config.vision_tower in ("frozen", "full"):
        keys = [name for name in ("vision_lora_rank", "vision_lora_alpha") if getattr(config, name) is not None]
        message = f'contradicts vision_tower "{config.vision_tower}"; set it to lora'
        found += [Conflict((name, "vision_tower"), f"{name} {message} or remove {name}") for name in keys]
    return found


def _quantized_base(config: RunConfig) -> list[Conflict]:
    """Codes do not train, and PiSSA has to change the weights that it starts from."""
    if config.quantize_base is None:
        return []
    said, found = f'quantize_base "{config.quantize_base}"', []
    # What the language model does when no policy is given, see trainer/trainable.py.
    if (config.language_model or ("lora" if config.lora or config.lora_path else "full")) == "full":
        message = (
            f"{said} holds the language model in codes, which do not train; set lora true, or language_model frozen"
        )
        found.append(Conflict(("quantize_base", "language_model", "lora"), message))
    if config.pissa:
        message = f"{said} contradicts pissa, which changes the base's weights; remove one of them"
        found.append(Conflict(("quantize_base", "pissa"), message))
    return found


def _noise(config: RunConfig) -> list[Conflict]:
    if config.neftune or config.neftune_noise_alpha == SPECS["neftune_noise_alpha"].default:
        return []
    message = f"neftune_noise_alpha {config.neftune_noise_alpha:g} needs neftune true; add that or remove it"
    return [Conflict(("neftune_noise_alpha", "neftune"), message)]


# Key of an adapter's kind or form -> the value that asks for nothing.
_ADAPTER_KEYS = {
    "lora_bias": "none",
    "rslora": False,
    "use_dora": False,
    "pissa": False,
    "lora_plus_scale": 1.0,
    "vision_lora_rank": None,
    "vision_lora_alpha": None,
}


def _sharing(config: RunConfig) -> list[Conflict]:
    return [Conflict(keys, message) for keys, message in sharing_faults(config)]


# Order is that of messages; no rule depends on another.
RULES: tuple[Callable[[RunConfig], list[Conflict]], ...] = (
    _required,
    _precision,
    _best_model,
    _early_stopping,
    _answers,
    _kept_features,
    _data_is_there,
    _something_to_train,
    _rates,
    _optimiser,
    _policies,
    _one_order,
    _adapters,
    _quantized_base,
    _noise,
    _sharing,
)
