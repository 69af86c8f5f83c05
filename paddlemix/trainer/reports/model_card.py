"""The `README.md` that a run writes with its result: what was trained, on what, with what result, how to use it.

The form of its head is that of model hubs (YAML between two lines of dashes).
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paddlemix import __version__
from paddlemix.config.schema import SPECS, RunConfig
from paddlemix.errors import UserError
from paddlemix.log import logger, read_metrics
from paddlemix.trainer.reports.descriptions import describe_adapter, describe_environment
from paddlemix.trainer.resuming.best_checkpoint import best_metric, is_better
from paddlemix.trainer.run import Run
from paddlemix.trainer.trainable import count_parameters

CARD_FILE = "README.md"
MARKER = "<!-- Written by paddlemix. Without this line the file is yours: no run replaces or removes it. -->"
# what makes a recipe comparable with others, shown whatever its value
_ALWAYS = (
    *("learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
    *("bf16", "fp16", "seed"),
)
_ELSEWHERE = ("dataset", "output_dir", "overwrite_output_dir", "do_train", "resume_from_checkpoint")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says and the files of the run do not.

    Args:
        config: the run.
        parts: part -> (trained, all) parameters.
        adapter: what kind of adapter the result is, in words; None for a whole model.
        has_tower: whether the result reads images.
        files: (split, path, samples taken of it).
        skipped: training samples left out.
        results: `train_loss` and `steps`.
        environment: (what, version or name) of machine and software.
    """

    config: RunConfig
    parts: dict[str, tuple[int, int]]
    adapter: str | None
    has_tower: bool
    files: Sequence[tuple[str, str, int]]
    skipped: int
    results: dict[str, float]
    environment: Sequence[tuple[str, str]] = field(default=())


def facts_of_run(run: Run, results: dict[str, float], skipped: int, processes: int) -> CardFacts:
    """The facts of a run that has ended.

    Args:
        results: see `CardFacts`.
        skipped: training samples left out.
        processes: of the run.
    """
    adapter, splits = run.loaded.adapter, (("train", run.train and run.train.samples), ("eval", run.evaluation))
    return CardFacts(
        config=run.config,
        parts=count_parameters(run.loaded.model),
        adapter=None if adapter is None else describe_adapter(adapter),
        has_tower=run.loaded.model.config.vision is not None,
        files=[(split, path, count) for split, data in splits if data for path, count in data.files],
        skipped=skipped,
        results=results,
        environment=describe_environment(run.device, processes),
    )


def is_own_card(path: Path) -> bool:
    """Whether a file is a card that a run wrote."""
    try:
        return MARKER in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def write_model_card(facts: CardFacts, metrics_path: Path, samples_path: Path) -> None:
    """Writes the card into the run's output_dir; a README.md of another origin is kept, and the log says so.

    Args:
        metrics_path, samples_path: the run's reports and answers; either may be missing.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(str(facts.config.output_dir)) / CARD_FILE
    # A README.md is often written by hand; only one with our marker is replaced.
    if path.exists() and not is_own_card(path):
        logger.warning("%s was not written by a run and is kept; no model card is written", path)
        return
    metrics = read_metrics(metrics_path) if metrics_path.is_file() else []
    samples = read_metrics(samples_path) if samples_path.is_file() else []
    has_curve = path.with_name("loss.png").is_file()
    try:
        path.write_text(render_card(facts, metrics, samples, has_curve), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; free some space") from error


def render_card(
    facts: CardFacts, metrics: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]], has_curve: bool
) -> str:
    """The card's text, Markdown.

    Args:
        metrics: lines of `metrics.jsonl`.
        samples: lines of `samples.jsonl`.
        has_curve: whether `loss.png` is next to it.
    """
    sections = [
        _head(facts),
        _introduction(facts),
        _section("How to use it", _commands(facts)),
        _section("What was trained", _parts(facts)),
        _section("Recipe", _recipe(facts.config)),
        _section("Data", _data(facts)),
        _section("Results", _results(facts, metrics, has_curve)),
        _section("Answers", _answers(samples)),
        _section("Environment", _table(("what", "which"), facts.environment)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(facts: CardFacts) -> str:
    tags = json.dumps(["llava", "paddlepaddle", *(["lora"] if facts.adapter else [])])
    task = "image-text-to-text" if facts.has_tower else "text-generation"
    values = {"base_model": json.dumps(facts.config.model_name_or_path), "library_name": "paddlemix"}
    lines = [f"{key}: {value}" for key, value in {**values, "pipeline_tag": task, "tags": tags}.items()]
    return "\n".join(["---", *lines, "---", "", MARKER])


def _introduction(facts: CardFacts) -> str:
    config = facts.config
    name = config.run_name or Path(str(config.output_dir)).resolve().name
    kind = f"{facts.adapter} for" if facts.adapter else "Model trained from"
    beside = [f"vision tower `{config.mm_vision_tower}`"] if config.mm_vision_tower else []
    beside += [f"projector `{config.pretrain_mm_mlp_adapter}`"] if config.pretrain_mm_mlp_adapter else []
    beside += [f"adapter `{config.lora_path}` to begin with"] if config.lora_path else []
    extra = f", with {', '.join(beside)}" if beside else ""
    return f"# {_inline(name)}\n\n{kind} `{config.model_name_or_path}`{extra}. Trained with paddlemix {__version__}."


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_inline(str(cell)) for cell in line)} |" for line in lines)


def _inline(text: str) -> str:
    """A text that fits one cell."""
    # A vertical bar would end the cell, a tag would be rendered.
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _commands(facts: CardFacts) -> str:
    config = facts.config
    # As the user wrote it: commands are run from where the training was.
    given = str(config.output_dir).rstrip("/")
    here = shlex.quote(given)
    lines = []
    if facts.has_tower:
        lines += [f"paddlemix chat --model-path {here} --image-file IMAGE"]
    if facts.adapter:
        merged = shlex.quote(f"{given}-merged")
        lines += [
            f"paddlemix merge-lora --lora_path {here} --merge_model_path {merged}",
            f"paddlemix convert --input {merged} --output {shlex.quote(f'{given}-hf')} --to hf",
        ]
    else:
        lines += [f"paddlemix convert --input {here} --output {shlex.quote(f'{given}-hf')} --to hf"]
    again = shlex.quote(f"{given}/run_config.json")
    lines += [f"paddlemix finetune {again} output_dir={shlex.quote(f'{given}-again')}"]
    meaning = ["talk with it"] if facts.has_tower else []
    meaning += ["fold the adapter into its base"] if facts.adapter else []
    meaning += ["write it in llava-hf's layout"]
    return f"These commands {', '.join(meaning)} and train it again:\n\n```bash\n" + "\n".join(lines) + "\n```"


def _parts(facts: CardFacts) -> str:
    rows = [(part, f"{total:,}", f"{trained:,}") for part, (trained, total) in facts.parts.items() if total]
    return _table(("part", "parameters", "trained"), rows)


def _recipe(config: RunConfig) -> str:
    shown = [
        (f"`{name}`", f"`{json.dumps(getattr(config, name), ensure_ascii=False)}`")
        for name, spec in SPECS.items()
        if spec.status == "used" and not spec.secret and name not in _ELSEWHERE and _is_shown(name, config)
    ]
    text = "The usual keys, and those that differ from their defaults; `run_config.json` has all of them."
    return f"{text}\n\n{_table(('key', 'value'), shown)}"


def _is_shown(name: str, config: RunConfig) -> bool:
    # Defaults change between versions, so what matters is shown even where it was not set.
    return name in _ALWAYS or getattr(config, name) != SPECS[name].default


def _data(facts: CardFacts) -> str:
    table = _table(("split", "file", "samples"), [(split, f"`{path}`", f"{n:,}") for split, path, n in facts.files])
    left_out = f"{facts.skipped:,} training samples were left out; `skipped.jsonl` names them."
    return f"{table}\n\n{left_out if facts.skipped else 'No training sample was left out.'}"


def _results(facts: CardFacts, metrics: Sequence[dict[str, Any]], has_curve: bool) -> str:
    # `metrics.jsonl` mixes reports of training, evaluations and samples; their keys tell them apart.
    training = [item for item in metrics if "loss" in item]
    rows = [("optimiser steps", f"{facts.results['steps']:,}")]
    # Missing where a finished run was started again and made no step.
    if "train_loss" in facts.results:
        rows.append(("mean loss of the steps since the last start", f"{facts.results['train_loss']:.4f}"))
    if training:
        last = training[-1]
        rows.append((f"loss at step {last['step']}", f"{last['loss']:.4f}"))
        # The first report includes warming up, so the mean would be too low.
        speed = statistics.median(item["tokens_per_second"] for item in training)
        rows.append(("tokens per second, median", f"{speed:,.0f}"))
        rows.append(("image tokens, padding", f"{last['image_token_share']:.1%}, {last['padding_share']:.1%}"))
        rows.append(("peak memory", f"{last['memory_gib']:.2f} GiB"))
    table = _table(("training", ""), rows)
    parts = [table, _evaluations(facts.config, metrics), "![Loss over steps](loss.png)" if has_curve else ""]
    return "\n\n".join(part for part in parts if part)


def _evaluations(config: RunConfig, metrics: Sequence[dict[str, Any]]) -> str:
    reports = [item for item in metrics if "eval_loss" in item]
    if not reports:
        return ""
    metric = best_metric(config)
    best = reports[0]
    for report in reports:
        best = report if is_better(config, report.get(metric, math.nan), best.get(metric, math.nan)) else best
    # How long an evaluation took says nothing about the model.
    names = [name for name in reports[-1] if name.startswith("eval_") and name != "eval_runtime"]
    rows = [
        (name, *(f"{report[name]:.4f}" if name in report else "" for report in (reports[-1], best))) for name in names
    ]
    header = ("evaluation", f"last (step {reports[-1]['step']})", f"best by {metric} (step {best['step']})")
    end = "\n\nThe weights are those of the best checkpoint." if config.load_best_model_at_end else ""
    return _table(header, rows) + end


def _answers(samples: Sequence[dict[str, Any]]) -> str:
    if not samples:
        return ""
    # Earlier answers are in samples.jsonl; the card shows what the model says now.
    step = samples[-1]["step"]
    rows = [
        (item["image"] or "", item["question"], item["answer"], item["expected"] or "")
        for item in samples
        if item["step"] == step
    ]
    table = _table(("image", "question", "answer", "expected"), rows)
    return f"Greedy, at step {step}; `samples.jsonl` has those of earlier steps.\n\n{table}"
