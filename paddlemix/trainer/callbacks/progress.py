"""What the user sees during a run: a progress bar, `metrics.jsonl` and a loss curve."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from paddlemix.log import MetricsWriter, logger, process_rank, read_metrics
from paddlemix.trainer.callbacks.meters import StepReport
from paddlemix.trainer.paddlenlp_trainer import TrainerCallback

METRICS_FILE, CURVE_FILE = "metrics.jsonl", "loss.png"
_WIDTH, _HEIGHT = 150, 24  # characters
_REPORTED = ("loss", "learning_rate", *StepReport.KEYS)


class Progress(TrainerCallback):
    """Bar with time left, loss, learning rate and what `StepReport` measures; one line of `metrics.jsonl` per report.

    Args:
        output_dir: where `metrics.jsonl` and the loss curve go.
        report: is started here; its numbers arrive with the logs.
        show_bar: False prints a line for each report instead.
    """

    def __init__(self, output_dir: Path, report: StepReport, show_bar: bool) -> None:
        self.writer = MetricsWriter(output_dir / METRICS_FILE)
        self.report, self.show_bar = report, show_bar
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Opens the bar; drops what an interrupted run reported after its last checkpoint."""
        if process_rank() == 0:
            self.writer.truncate_after(state.global_step)
            # Without a bar the object counts all the same and prints nothing.
            shown = self.show_bar and sys.stderr is not None
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, disable=not shown, unit="step", **_bar_width()
            )
        self.report.start(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Moves the bar; the last step is always reported."""
        if self.bar is not None:
            self.bar.update(1)
        # The last step may not be a multiple of logging_steps.
        if state.global_step >= state.max_steps and args.logging_strategy.value == "steps":
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Writes a report."""
        # Only the first process has a bar. `train_runtime` marks PaddleNLP's summary, whose numbers are not ours.
        if self.bar is None or not logs or "train_runtime" in logs:
            return
        values = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        # PaddleNLP adds measures of its own, which count padding as tokens.
        values |= {key: value for key, value in logs.items() if key in _REPORTED or key.startswith("eval_")}
        self.writer.write(values)
        self._show(values, state)

    def _show(self, values: dict[str, Any], state: Any) -> None:
        if "loss" in values:
            shown = describe_report(values)
            self.bar.set_postfix_str(shown)
            if self.bar.disable:
                left = timedelta(seconds=round(values["eta_seconds"]))
                logger.info("step %d/%d %s, %s left", state.global_step, state.max_steps, shown, left)
        else:
            text = " ".join(f"{key} {value:.4f}" for key, value in values.items() if key not in ("step", "epoch"))
            with tqdm.external_write_mode(file=sys.stderr):  # the bar gives way
                logger.info("step %d %s", state.global_step, text)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Closes the bar and draws the loss curve."""
        if self.bar is not None:
            self.bar.close()
            draw_loss_curve(self.writer.path, self.writer.path.with_name(CURVE_FILE))


def _bar_width() -> dict[str, Any]:
    """As wide as the terminal, which may change; a fixed width where the terminal does not say or there is none."""
    try:
        is_known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):
        is_known = False
    return {"dynamic_ncols": True} if is_known else {"ncols": _WIDTH, "nrows": _HEIGHT}


def shows_bar(disabled: bool | None) -> bool:
    """Whether a run shows a bar.

    Args:
        disabled: the key `disable_tqdm`; None for a bar on terminals and lines elsewhere.
    """
    return sys.stderr is not None and sys.stderr.isatty() if disabled is None else not disabled


def describe_report(values: dict[str, Any]) -> str:
    """A report of training in one line: loss, rate, gradient norm, speed, shares and memory."""
    norm = f" norm {values['grad_norm']:.3g}" if "grad_norm" in values else ""
    return (
        f"loss {values['loss']:.4f} lr {values['learning_rate']:.2e}{norm} {values['tokens_per_second']:.0f} tok/s "
        f"image {values['image_token_share']:.0%} pad {values['padding_share']:.0%} {values['memory_gib']:.1f} GiB"
    )


def draw_loss_curve(metrics_path: Path, picture_path: Path) -> None:
    """Draws training and evaluation loss over steps from a `metrics.jsonl` as PNG; nothing where none was reported.

    A disk that is full is only warned of: the run's result is still to be written, and the curve can be drawn again.
    """
    reports = read_metrics(metrics_path) if metrics_path.is_file() else []
    curves = {
        label: [(item["step"], item[key]) for item in reports if key in item]
        for key, label in (("loss", "training"), ("eval_loss", "evaluation"))
    }
    # A run that ended before its first report.
    if not any(curves.values()):
        return
    import matplotlib

    # A machine that trains has no display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if label == "evaluation" else None)
    axes.set(xlabel="optimiser step", ylabel="loss (nats per supervised token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    # Renamed when it is whole, like everything in `output_dir`.
    temporary = picture_path.with_name(f".{picture_path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
        os.replace(temporary, picture_path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        logger.warning("%s could not be written: %s", picture_path, error.strerror or error)
    pyplot.close(figure)
