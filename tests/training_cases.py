"""The runs that are compared with the reference step by step: start, data and recipe of each.  Knows no torch.

    directory = build_start(tmp_path, CASES["v1_5 full"])         # a tiny model in llava-hf's layout, data, an adapter
    run_recipe(case_config(CASES["v1_5 full"], directory, tmp_path / "out"))

Weights are drawn by numpy and the tokenizer is a file of `golden/training`, so that a start is the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.adapters.adapter import AdapterSettings, fingerprint
from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.files.weight_files import write_json
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained, build_model, save_model
from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.datasets.order import EpochBatchSampler
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
from paddlemix.peft.lora import LoRAConfig, add_lora, linear_names, lora_parameters
from paddlemix.processors.text.tokenizer import load_tokenizer
from paddlemix.sample import Example
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.run_data import read_samples
from tests.tiny import ANYRES_SPEC, PAD_SPEC, PATCH, PINPOINTS, TILE, draw_picture, make_processor
from tests.tiny_models import save_adapter
from tests.tiny_world import reports, weights

GOLDEN_TRAINING = Path(__file__).resolve().parent / "golden" / "training"
TOKENIZER = GOLDEN_TRAINING / "tokenizer"
STEPS, SEED, RECORDS = 30, 3, 14
VOCABULARY, IMAGE_TOKEN = 512, 480  # rows of the model; the tokenizer has 480 pieces
RANK, ALPHA = 4, 8
# The project promises 1e-4 for both; measured are 3e-7 and 4e-7.
MAX_LOSS_GAP = 1e-5  # relative
MAX_WEIGHT_GAP = 1e-5
SAMPLES = 8  # values of each weight in a golden file
SIZES = ((40, 60), (60, 40), (45, 45), (90, 30), (30, 90), (56, 56), (28, 84), (64, 50))  # (width, height), pixels
_QUESTIONS = (
    ("What is the colour of the big bus?", "It is red."),
    ("Where is the small cat?", "On the mat, 0.25, 0.33."),
    ("How many?", "1, 2, 3 or 45"),
    ("这是什么颜色?", "红色的公交车。"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run.

    Args:
        any_resolution: LLaVA-1.6 instead of 1.5.
        lora: adapters and projector instead of the whole language model (and for 1.6 the tower).
        accumulation: micro-batches of an optimiser step of four samples, 1 or 2.
        loss_reduction: as in the configuration.
        modality: steps of one modality (`group_by_modality_length`) over data that is half text, with a frozen tower.
    """

    any_resolution: bool = False
    lora: bool = False
    accumulation: int = 1
    loss_reduction: str = "tokens"
    modality: bool = False

    @property
    def name(self) -> str:
        """As the case's golden file is called."""
        parts = ["v1_6" if self.any_resolution else "v1_5", "lora" if self.lora else "full", str(self.accumulation)]
        parts += ["micro_batch"] if self.loss_reduction == "micro_batch" else []
        return "_".join([*parts, *(["modality"] if self.modality else [])])

    @property
    def batch_size(self) -> int:
        """Samples of a micro-batch."""
        return 4 // self.accumulation

    @property
    def trains_tower(self) -> bool:
        """Whether the vision tower trains."""
        return self.any_resolution and not self.lora and not self.modality

    @property
    def data_file(self) -> str:
        """The training data's name in the start's folder."""
        return "half_text.json" if self.modality else "train.json"


CASES = [
    *(
        Case(any_resolution=any_resolution, lora=lora, accumulation=accumulation)
        for any_resolution in (False, True)
        for lora in (False, True)
        for accumulation in (1, 2)
    ),
    Case(accumulation=2, loss_reduction="micro_batch"),
    Case(any_resolution=True, lora=True, accumulation=2, loss_reduction="micro_batch"),
    Case(modality=True),
    Case(any_resolution=True, modality=True),
]


def build_start(root: Path, any_resolution: bool) -> Path:
    """Writes `hf` (a model in llava-hf's layout), `llava` (the same in original LLaVA's), `adapter` (drawn, on that
    model), `train.json` and `half_text.json` with their pictures.

    Returns:
        `root`.
    """
    text = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlavaConfig(
        text=DecoderConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **text),
        vision=VisionConfig(image_size=TILE, patch_size=PATCH, **vision),
        mm_vision_select_layer=-1,
        image_newline=any_resolution,
    )
    model = _draw(build_model(config))
    processor = make_processor(load_tokenizer(TOKENIZER), ANYRES_SPEC if any_resolution else PAD_SPEC)
    save_model(Pretrained(model, processor, root / "ours"), root / "ours")
    write_json(root / "ours" / "added_tokens.json", {"<image>": IMAGE_TOKEN})
    convert_checkpoint(root / "ours", root / "hf", Conversion(to="hf"))
    convert_checkpoint(root / "ours", root / "llava", Conversion(to="llava"))
    _write_adapter(root)
    _write_data(root)
    return root


def _draw(model: Any) -> Any:
    """Draws every weight, small enough that neighbouring float32 numbers do not grow apart within the run."""
    random = np.random.RandomState(5)
    for name, parameter in sorted(model.named_parameters()):
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.set_value((centre + 0.15 * random.randn(*parameter.shape)).astype("float32"))
    model.eval()
    return model


def _write_adapter(root: Path) -> None:
    loaded = load_pretrained(root / "hf")
    mark = fingerprint(loaded.model)
    modules = tuple(name for name in linear_names(loaded.model) if name.startswith("language_model."))
    settings = LoRAConfig(r=RANK, lora_alpha=ALPHA, modules=modules)
    add_lora(loaded.model, settings)
    random = np.random.RandomState(6)
    for _, parameter in sorted(lora_parameters(loaded.model)):
        parameter.set_value((0.1 * random.randn(*parameter.shape)).astype("float32"))
    for name, parameter in loaded.model.named_parameters():
        parameter.stop_gradient = not name.endswith((".lora_A", ".lora_B"))
    base = {"model": str(root / "hf")}
    save_adapter(loaded.model, loaded.processor, AdapterSettings(settings, base, mark), root / "adapter")


def _write_data(root: Path) -> None:
    """Every fifth or second record is text only, every third has two rounds; answers are of different lengths."""
    for number, (width, height) in enumerate(SIZES):
        draw_picture(width, height, number).save(root / f"{number}.png")
    for name, text_every in (("train.json", 5), ("half_text.json", 2)):
        write_json(root / name, _records(text_every))


def _records(text_every: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for number in range(RECORDS):
        question, answer = _QUESTIONS[number % 4]
        second = [list(_QUESTIONS[(number + 1) % 4])] if number % 3 == 0 else []
        if number % text_every == text_every - 1:
            records.append({"conversations": [[question, answer], *second]})
        else:
            rounds = [[f"<image>\n{question}", answer], *second]
            records.append({"image": f"{number % len(SIZES)}.png", "conversations": rounds})
    return records


def case_config(case: Case, start: Path, output_dir: Path) -> RunConfig:
    """The recipe of a case, as if read from a JSON file."""
    values: dict[str, Any] = {
        "model_name_or_path": str(start / "hf"),
        "dataset": {"train": [{"data_files": str(start / case.data_file)}]},
        "image_root": str(start),
        "output_dir": str(output_dir),
        "chat_template": "vicuna_v1",
        "image_aspect_ratio": "anyres" if case.any_resolution else "pad",
        "do_train": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": case.batch_size,
        "gradient_accumulation_steps": case.accumulation,
        "loss_reduction": case.loss_reduction,
        "learning_rate": 1e-3,
        "mm_projector_lr": 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-4,  # large enough to be seen
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "device": "cpu",
        "seed": SEED,
        "group_by_modality_length": case.modality,
    }
    if case.any_resolution:
        values |= {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [list(grid) for grid in PINPOINTS]}
    if case.lora:
        values |= {"lora": True, "lora_path": str(start / "adapter")}
    elif case.trains_tower:
        values |= {"vision_tower": "full", "mm_vision_tower_lr": 1e-4}
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def steps_of(case: Case, start: Path) -> Iterator[list[list[tuple[Example, list[Path]]]]]:
    """The micro-batches of each optimiser step: every sample as it is encoded, and its pictures."""
    config = case_config(case, start, start / "unused")
    processor = make_processor(load_tokenizer(TOKENIZER), ANYRES_SPEC if case.any_resolution else PAD_SPEC)
    data = read_samples(config, "train", processor, has_tower=True)
    sampler = EpochBatchSampler(len(data), case.batch_size, case.accumulation, SEED)
    if case.modality:
        sampler.grouping, sampler.lengths = "modality", data.words
    made = 0
    for epoch in range(STEPS):
        sampler.epoch = epoch
        batches = list(sampler)
        for first in range(0, len(batches), case.accumulation):
            if made == STEPS:
                return
            made += 1
            rows = batches[first : first + case.accumulation]
            yield [[(data[row].examples[0], _pictures(data.sample(row))) for row in batch] for batch in rows]


def _pictures(sample: Any) -> list[Path]:
    return [Path(image) for image in sample.images]


def data_digest(case: Case, start: Path) -> str:
    """SHA-256 of all ids and labels of a run in their order: where it differs, the losses have to."""
    digest = hashlib.sha256()
    for step in steps_of(case, start):
        for example, _ in (pair for batch in step for pair in batch):
            digest.update(example.input_ids.astype("<i8").tobytes())
            digest.update(example.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def summary(weight: np.ndarray) -> dict[str, Any]:
    """What a golden file keeps of a weight: shape, length as a vector, and values spread evenly over it."""
    places = np.linspace(0, weight.size - 1, SAMPLES).astype(int)
    values = [float(value) for value in weight.reshape(-1)[places]]
    return {"shape": list(weight.shape), "norm": float(np.linalg.norm(weight.astype("float64"))), "values": values}


def start_weights(case: Case, start: Path) -> dict[str, np.ndarray]:
    """Every weight before the first step."""
    return weights(start / ("adapter" if case.lora else "hf"))


def run_ours(case: Case, start: Path, output_dir: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    """Our run.

    Returns:
        The loss of every step, and every weight at the end by its name.
    """
    run_recipe(case_config(case, start, output_dir))
    losses = reports(output_dir)
    assert sorted(losses) == list(range(1, STEPS + 1))
    return [losses[step] for step in range(1, STEPS + 1)], weights(output_dir)
