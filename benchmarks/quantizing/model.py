"""A trained model and itself in few bits: error of the logits, perplexity of right answers, answers word for word.

Logits are those of every supervised position of the records; relative errors are norms over all of them.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import paddle

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.datasets.collate import collate
from paddlemix.datasets.forms.parse import parse_record
from paddlemix.datasets.images.decode import load_image
from paddlemix.datasets.records.record_file import read_records
from paddlemix.generation.predict import predict
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.peft.quantize import quantized_linears
from paddlemix.sample import IGNORE_INDEX, Sample

_MAX_NEW_TOKENS, _BATCH_SIZE = 32, 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this part takes."""
    parser.add_argument("--model", required=True, help="a model or adapter directory")
    parser.add_argument("--data", required=True, help="records with right answers")
    parser.add_argument("--image-root", help="folder that image paths start from")
    parser.add_argument("--kinds", nargs="+", default=["int8", "nf4"])


def score(loaded: Pretrained, samples: list[Sample]) -> tuple[np.ndarray, float]:
    """Logits [S, V] of the supervised positions, and the mean loss there."""
    assert loaded.processor is not None and loaded.model.config.vision is not None
    found, losses = [], []
    for start in range(0, len(samples), _BATCH_SIZE):
        chosen = samples[start : start + _BATCH_SIZE]
        examples = [loaded.processor.encode(item, [load_image(path) for path in item.images]) for item in chosen]
        assert all((example.labels != IGNORE_INDEX).any() for example in examples)
        batch = collate(examples, loaded.model.config.tokens_per_tile)
        names = ("input_ids", "position_ids", "segment_ids", "pixel_values", "merge_index")
        inputs = {name: paddle.to_tensor(getattr(batch, name)) for name in names if getattr(batch, name) is not None}
        with paddle.no_grad():
            hidden = loaded.model(**inputs).flatten(0, 1)
            logits = loaded.model.logits(paddle.gather(hidden, paddle.to_tensor(batch.loss_index))).numpy()
        wide = logits.astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        likely = wide[np.arange(len(wide)), batch.loss_targets] - np.log(np.exp(wide).sum(axis=1))
        found.append(logits)
        losses.append(-likely)
    return np.concatenate(found), float(np.concatenate(losses).mean())


def count_right(loaded: Pretrained, samples: list[Sample]) -> int:
    """Questions whose answer is the expected one, word for word."""
    settings = GenerationSettings(max_new_tokens=_MAX_NEW_TOKENS)
    answers = predict(loaded, samples, settings, batch_size=_BATCH_SIZE)
    return sum(answer.text == answer.reference for answer in answers)


def run(arguments: argparse.Namespace) -> int:
    """Prints a line of JSON and of a table per kind; status 1 where one loses more than 2 points of right answers."""
    samples = [
        parse_record(record, f"record {number}", arguments.image_root)
        for number, record in enumerate(read_records(arguments.data))
    ]
    reference, lost = None, 0.0
    for kind in (None, *arguments.kinds):
        loaded = load_pretrained(arguments.model, quantize=kind)
        logits, loss = score(loaded, samples)
        right = 100 * count_right(loaded, samples) / len(samples)
        reference = reference or (logits, loss, right)
        result: dict[str, Any] = {
            "kind": kind or "float32",
            "layers": len(quantized_linears(loaded.model)),
            "logits_relative_error": round(
                float(np.linalg.norm(logits - reference[0]) / np.linalg.norm(reference[0])), 5
            ),
            "logits_largest_error": round(float(np.abs(logits - reference[0]).max()), 4),
            "perplexity": round(float(np.exp(loss)), 5),
            "perplexity_change": f"{100 * (np.exp(loss - reference[1]) - 1):+.2f} %",
            "right_percent": round(right, 2),
            "points": round(right - reference[2], 2),
        }
        lost = max(lost, reference[2] - right)
        print(json.dumps(result))
        print("  ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    return 0 if lost <= 2 else 1
