"""What the user sees while a run goes on: a progress bar, `metrics.jsonl`, a loss curve - and the seed of each step."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from paddlemix.device import peak_memory_bytes, set_seed
from paddlemix.log import MetricsWriter, logger, process_rank, read_metrics
from paddlemix.trainer.compat import TrainerCallback

METRICS_FILE, CURVE_FILE = "metrics.jsonl", "loss.png"
_SEED_STRIDE = 1_000_003  # a prime, so that neighbouring seeds do not share steps


class SeedEachStep(TrainerCallback):
    """Seeds all random numbers from (seed, step, process), so that a resumed run draws the same."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called before each optimiser step."""
        set_seed((args.seed * _SEED_STRIDE + state.global_step * 4096 + args.dataset_rank) % 2**31)


class Progress(TrainerCallback):
    """Bar with time left, loss, learning rate, tokens per second and memory; one line of `metrics.jsonl` per report.

    Args:
        output_dir: where `metrics.jsonl` and the loss curve go.
        device: whose memory is shown.
        tokens_seen: gives the tokens trained on so far, padding not counted.
        show_bar: False prints a line for each report instead.
    """

    def __init__(self, output_dir: Path, device: str, tokens_seen: Any, show_bar: bool) -> None:
        self.writer = MetricsWriter(output_dir / METRICS_FILE)
        self.device, self.tokens_seen, self.show_bar = device, tokens_seen, show_bar
        self.bar: Any = None
        self._time = self._tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Opens the bar; drops what an interrupted run reported behind its last checkpoint."""
        if process_rank() == 0:
            self.writer.truncate_after(state.global_step)
            shown = self.show_bar and sys.stderr is not None
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, disable=not shown, unit="step", ncols=110)
        self._time, self._tokens = time.time(), float(self.tokens_seen())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Moves the bar; the last step is always reported."""
        if self.bar is not None:
            self.bar.update(1)
        if state.global_step >= state.max_steps and args.logging_strategy.value == "steps":
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Writes a report."""
        if self.bar is None or not logs or "train_runtime" in logs:
            return
        values: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        if "loss" in logs:
            values |= {"loss": logs["loss"], "learning_rate": logs["learning_rate"], **self._speed()}
            values["memory_gib"] = round(peak_memory_bytes(self.device) / 2**30, 3)
        values |= {key: value for key, value in logs.items() if key.startswith("eval_")}
        self.writer.write(values)
        self._show(values, state)

    def _speed(self) -> dict[str, float]:
        now, tokens = time.time(), float(self.tokens_seen())
        rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._time, self._tokens = now, tokens
        return {"tokens_per_second": round(rate, 1)}

    def _show(self, values: dict[str, Any], state: Any) -> None:
        if "loss" in values:
            shown = (
                f"loss {values['loss']:.4f} lr {values['learning_rate']:.2e} {values['tokens_per_second']:.0f} tok/s"
            )
            shown += f" {values['memory_gib']:.1f} GiB"
            self.bar.set_postfix_str(shown)
            if self.bar.disable:
                logger.info("step %d/%d %s", state.global_step, state.max_steps, shown)
        else:
            text = " ".join(f"{key} {value:.4f}" for key, value in values.items() if key not in ("step", "epoch"))
            self.bar.clear()
            logger.info("step %d %s", state.global_step, text)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Closes the bar and draws the loss curve."""
        if self.bar is not None:
            self.bar.close()
            draw_loss_curve(self.writer.path, self.writer.path.with_name(CURVE_FILE))


def draw_loss_curve(metrics_path: Path, picture_path: Path) -> None:
    """Draws training and evaluation loss over steps from a `metrics.jsonl` as PNG; nothing where none was reported."""
    reports = read_metrics(metrics_path) if metrics_path.is_file() else []
    curves = {
        label: [(item["step"], item[key]) for item in reports if key in item]
        for key, label in (("loss", "training"), ("eval_loss", "evaluation"))
    }
    if not any(curves.values()):
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if label == "evaluation" else None)
    axes.set(xlabel="optimiser step", ylabel="loss (nats per supervised token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture_path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
