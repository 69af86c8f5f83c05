"""The tables of `docs/scaling.md`: which layout holds which model on which cards, from the estimator.

    python -m tests.dry_run.scaling_table

prints them; a test compares the page with them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import paddlemix.config
from paddlemix.checkpoints.sizes import read_sizes
from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.dry_run.activations import Activations, estimate_activations
from paddlemix.dry_run.computation import computation_of, training_of
from paddlemix.dry_run.device import program_bytes
from paddlemix.dry_run.memory import estimate_memory
from paddlemix.dry_run.model import ModelFacts, describe_model
from paddlemix.dry_run.step_sizes import BatchShape
from paddlemix.peft.wide_weights import bytes_besides
from paddlemix.trainer.run_model import base_spec

GIB = 1024**3
ROOM = 0.9  # of a card's memory; the rest is for the communication library and what is not modelled
CARDS = (1, 2, 4, 8, 16)
MEMORY = (24, 40, 64, 80)  # GiB of a card
LAYOUTS = ("", "stage1", "stage2", "stage3")  # the first that fits sends least
# Tensor parallelism where none of these fits, with the fewest cards for one model, which are those of one machine.
DEGREES, WITH_TENSOR = (2, 4, 8), ("", "stage1", "stage2")
_RECIPES = Path(paddlemix.config.__file__).parent / "llava"
_LORA = "lora_sft_argument.json"
# Size -> folder of recipes and the keys of a tuned model, where the file names the result of a first stage.
MODELS = {
    "7B": ("v1_5", {"model_name_or_path": "liuhaotian/llava-v1.5-7b"}),
    "13B": ("v1_5", {"model_name_or_path": "liuhaotian/llava-v1.5-13b"}),
    "34B": ("yi", {"model_name_or_path": "liuhaotian/llava-v1.6-34b"}),
    "72B": ("qwen", {"model_name_or_path": "lmms-lab/llava-next-72b"}),
}
METHODS = {
    "full": ("sft_argument.json", {}),
    "LoRA": (_LORA, {}),
    "QLoRA": (_LORA, {"quantize_base": "nf4"}),
}
PRETRAINING = "pretrain"  # of a language model: the file names it
# Layouts of the recipes that no single card holds: (tensor_parallel_degree, sharding, cards).
LARGE = ((1, "stage3", 8), (1, "stage3", 16), (8, "", 8), (4, "stage1", 16), (8, "stage1", 16), (8, "stage2", 32))


@cache
def _model(size: str, method: str, degree: int = 1) -> tuple[RunConfig, ModelFacts, Activations, int]:
    """A recipe, its model, activations of one row of max_length with one picture, bytes of decoded weights."""
    folder, keys = MODELS[size]
    file, more = METHODS.get(method, (f"{PRETRAINING}.json", {}))
    keys = {} if method == PRETRAINING else keys
    overrides = [f"{key}={value}" for key, value in {**keys, **more, "device": "gpu"}.items()]
    config = load_config(_RECIPES / folder / file, [*overrides, "sharding=", f"tensor_parallel_degree={degree}"])
    sizes = read_sizes(base_spec(config))
    model = describe_model(config, sizes.config, sizes.quantization)
    tiles = 5 if sizes.config.image_newline else 1  # of LLaVA-1.6: at most four tiles and the whole image
    visual = min(tiles * sizes.config.tokens_per_tile, config.max_length - 1)
    shape = BatchShape(rows=1, length=config.max_length, tiles=tiles, supervised=config.max_length - visual)
    trained = {weight.name for weight in model.weights if weight.trained}
    computation = computation_of(config, on_cpu=False)
    activations = estimate_activations(sizes.config, model.linears, trained, shape, computation)
    return config, model, activations, bytes_besides(model.coded_at_once, model.coded, computation.size)


def gib(size: str, method: str, layout: str, cards: int, degree: int = 1) -> float:
    """What each card needs."""
    config, model, activations, wide = _model(size, method, degree)
    config.sharding = layout
    training = training_of(config, cards)
    found = estimate_memory(model.weights, activations, training, False, program_bytes(on_cpu=False), wide)
    return found.total / GIB


def cell(size: str, method: str, cards: int, memory: int) -> str:
    """The first layout that fits, with what it needs: "`stage2`, 31", or "`tensor 4` `stage1`, 35"."""
    for degree, layout in _layouts(cards):
        need = gib(size, method, layout, cards, degree)
        if need <= ROOM * memory:
            names = [f"`tensor {degree}`"] * (degree > 1) + [f"`{layout}`"] * (layout != "")
            return f"{' '.join(names) or 'no sharding'}, {need:.0f}"
    return "-"


def _layouts(cards: int) -> Iterator[tuple[int, str]]:
    """(tensor_parallel_degree, sharding) of all layouts, in the order in which they are tried."""
    yield from ((1, layout) for layout in (LAYOUTS if cards > 1 else LAYOUTS[:1]))
    for degree in DEGREES:
        if degree <= cards:
            yield from ((degree, layout) for layout in (WITH_TENSOR if degree < cards else WITH_TENSOR[:1]))


def table(memory: int) -> str:
    """The table for cards of a size, GiB."""
    lines = [f"| {memory} GiB | " + " | ".join(f"{cards} card{'s' if cards > 1 else ''}" for cards in CARDS) + " |"]
    lines.append("|---" * (1 + len(CARDS)) + "|")
    for size in MODELS:
        for method in METHODS:
            cells = [cell(size, method, cards, memory) for cards in CARDS]
            lines.append(f"| {size} {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def large_table(size: str) -> str:
    """Rows of the recipes of a family of large models: GiB that each card needs in each layout."""
    folder, _ = MODELS[size]
    lines = []
    for method, (file, _) in {PRETRAINING: (f"{PRETRAINING}.json", {}), **METHODS}.items():
        values = (gib(size, method, layout, cards, degree) for degree, layout, cards in LARGE)
        more = ' with `quantize_base="nf4"`' if method == "QLoRA" else ""
        lines.append(f"| `{folder}/{file}`{more} | " + " | ".join(f"{value:.0f}" for value in values) + " |")
    return "\n".join(lines)


def tables() -> Iterator[str]:
    """All of them."""
    return (table(memory) for memory in MEMORY)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """A step of a run: numbers that train and all numbers of the model, micro-batches, bytes a number.

    With recompute, as the recipes have it: stage 3 gathers each weight three times for a micro-batch.
    """

    trained: float
    weights: float
    passes: int = 1
    weight: int = 2
    gradient: int = 4

    def sent(self, layout: str, cards: int) -> float:
        """Bytes that a card sends in a step, where collectives go round in a ring."""
        part = (cards - 1) / cards
        gradients, new = self.trained * self.gradient, self.trained * self.weight
        kinds = {
            "": 2 * gradients,
            "stage1": gradients + new,
            "stage2": self.passes * gradients + new,
            "stage3": self.passes * (3 * self.weights * self.weight + 2 * gradients),
        }
        return part * kinds[layout]


@dataclass(frozen=True, kw_only=True)
class SplitTraffic:
    """A step of a tensor group: rows, tokens of a row, width and number of layers, and numbers with partial gradients.

    With recompute each layer adds up six times: two blocks forward, the same again, and their gradients.
    """

    rows: int
    tokens: int
    width: int
    layers: int
    partial: float = 0
    weight: int = 2
    gradient: int = 4

    def sent(self, cards: int) -> float:
        """Bytes that a card sends in a step, where collectives go round in a ring."""
        states = self.tokens * self.width * self.weight
        return 2 * (cards - 1) / cards * (self.rows * 6 * self.layers * states + self.partial * self.gradient)


SEVEN_B, LORA_128 = 6.76e9, 0.34e9  # numbers of the language model and projector; of LoRA 128 with the projector
PASSES = 16  # of the recipes, with one row each
NETWORKS = {"NVLink or HCCS, 200 GB/s": 200e9, "InfiniBand, 25 GB/s": 25e9, "25 Gbit Ethernet, 3 GB/s": 3e9}
SPLIT_SEVEN_B = SplitTraffic(rows=8 * PASSES, tokens=2048, width=4096, layers=32)  # as many rows as on 8 cards
OPERATIONS = 150e12  # a second, of a card of the A100's class in bf16: half of its peak


def traffic_table() -> str:
    """Bytes and seconds of a step of 7B on 8 cards."""
    lines = ["| 7B on 8 cards, 16 passes | sent by a card | " + " | ".join(NETWORKS) + " |", "|---" * 5 + "|"]
    kinds = {"full": (SEVEN_B, LAYOUTS), "LoRA": (LORA_128, ("", "stage1", "stage3"))}
    for method, (trained, layouts) in kinds.items():
        traffic = Traffic(trained=trained, weights=SEVEN_B, passes=PASSES)
        for layout in layouts:
            sent = traffic.sent(layout, 8)
            seconds = " | ".join(f"{sent / speed:.3g} s" for speed in NETWORKS.values())
            lines.append(f"| {method}, {layout or 'data parallel'} | {_three_digits(sent / 1e9)} GB | {seconds} |")
    sent = SPLIT_SEVEN_B.sent(8)
    seconds = " | ".join(f"{sent / speed:.3g} s" for speed in NETWORKS.values())
    lines.append(f"| either, tensor 8 | {_three_digits(sent / 1e9)} GB | {seconds} |")
    return "\n".join(lines)


def _three_digits(number: float) -> str:
    """Rounded, and never with an exponent."""
    return f"{number:.3g}" if number < 1000 else f"{float(f'{number:.3g}'):,.0f}"


def computing_seconds(tokens: int) -> float:
    """Of a step of 7B with recompute: 8 operations a number and token."""
    return PASSES * 8 * SEVEN_B * tokens / OPERATIONS


def least_tokens(speed: float, full: bool) -> float:
    """Tokens of a pass from which on stage 3 computes longer than it sends, for many cards and a model of any size."""
    sent = 3 * 2 + (2 * 4 if full else 0)  # bytes a number
    return sent * OPERATIONS / (8 * speed)


def most_tokens(width: int, cards: int, full: bool) -> float:
    """Tokens of a row up to which tensor parallelism sends less for each row than stage 3.

    Stage 3 sends the weights for `cards` rows at a time; a layer has 12 numbers for each square of its width.
    """
    of_stage_3 = (3 * 2 + (2 * 4 if full else 0)) * 12 * width**2  # bytes for a layer and pass
    return of_stage_3 / (cards * 12 * width * 2)


if __name__ == "__main__":
    sys.stdout.write("\n\n".join([*tables(), large_table("34B"), large_table("72B"), traffic_table()]) + "\n")
