"""Answers per second of batch prediction: batches of 8 beside one question at a time, on a small LLaVA.

    python benchmarks/predict.py                      about three minutes
    python benchmarks/predict.py --new-tokens 32 --batch-sizes 1 4 16

Batch sizes take turns on the same questions within one process; what is timed is `paddlemix.predict` as a user calls
it: reading and preparing the pictures, the tower, the prompt, every token.  The answers must be the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks/training")]

from paddlemix.device import prepare_environment, set_seed  # noqa: E402

prepare_environment()  # must come before the first `import paddle`

from workload import Workload  # noqa: E402

from paddlemix.checkpoints.pretrained import Pretrained, build_model  # noqa: E402
from paddlemix.demo.vocabulary import train_tokenizer  # noqa: E402
from paddlemix.generation.predict import predict  # noqa: E402
from paddlemix.generation.sampling import GenerationSettings  # noqa: E402
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig  # noqa: E402
from paddlemix.processors.images.image_spec import ImageSpec  # noqa: E402
from paddlemix.processors.llava import LlavaProcessor  # noqa: E402
from paddlemix.processors.text.known_templates import get_template  # noqa: E402
from paddlemix.processors.text.tokenizer import load_tokenizer  # noqa: E402

_TEXT = "the a red blue cat dog sits stands on under table street with and bus person holding looks"
_WORDS = np.array(_TEXT.split(" "))


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--questions", type=int, default=16, help="answered by each batch size in every round")
    parser.add_argument("--new-tokens", type=int, default=128, help="of every answer")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def make_model(folder: Path) -> Pretrained:
    """The sizes of `training/workload.py`, drawn weights, and a small tokenizer in a vocabulary of full size."""
    work = Workload()
    train_tokenizer([" ".join(np.roll(_WORDS, number)) for number in range(40)], folder, vocab_size=380)
    text = DecoderConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_size,
        intermediate_size=work.intermediate_size,
        num_hidden_layers=work.num_hidden_layers,
        num_attention_heads=work.num_attention_heads,
        initializer_range=0.06,  # answers that differ between questions, where 0.02 repeats one token
    )
    vision = VisionConfig(
        hidden_size=work.tower_hidden_size,
        intermediate_size=work.tower_intermediate_size,
        num_hidden_layers=work.tower_layers,
        num_attention_heads=work.tower_heads,
        image_size=work.image_size,
        patch_size=work.patch_size,
    )
    set_seed(0)
    model = build_model(LlavaConfig(text=text, vision=vision), initialise=True)
    model.eval()
    tokenizer = load_tokenizer(folder)
    head = model.lm_head.weight.numpy()  # [D, V]
    head[:, len(tokenizer) :] = head[:, tokenizer.eos_token_id] = (
        0  # never the likeliest: every answer is of full length
    )
    model.lm_head.weight.set_value(head)
    spec = ImageSpec(tile_size=work.image_size, patch_size=work.patch_size)
    processor = LlavaProcessor(tokenizer=tokenizer, template=get_template("mistral_instruct"), image_spec=spec)
    return Pretrained(model, processor, folder)


def make_questions(folder: Path, count: int) -> list[dict[str, Any]]:
    """Pictures of 320 x 240 pixels with questions of 5 to 40 words; every fourth has no picture."""
    random, questions = np.random.default_rng(0), []
    for number in range(count):
        record: dict[str, Any] = {"text": " ".join(random.choice(_WORDS, int(random.integers(5, 41))))}
        if number % 4:
            record["image"] = str(folder / f"{number}.jpg")
            Image.fromarray(random.integers(0, 256, (240, 320, 3), dtype=np.uint8)).save(record["image"])
        questions.append(record)
    return questions


def main() -> int:
    """Prints one line of JSON and the same as a table; status 1 where answers differ."""
    arguments = build_parser().parse_args()
    settings = GenerationSettings(max_new_tokens=arguments.new_tokens)
    with tempfile.TemporaryDirectory() as name:
        loaded, questions = make_model(Path(name)), make_questions(Path(name), arguments.questions)
        seconds: dict[int, list[float]] = {size: [] for size in arguments.batch_sizes}
        answers: dict[int, list[str]] = {}
        for _ in range(arguments.rounds + 1):  # the first warms up
            for size, times in seconds.items():
                start = time.perf_counter()
                answers[size] = [answer.text for answer in predict(loaded, questions, settings, batch_size=size)]
                times.append(time.perf_counter() - start)
                print(f"batch {size}: {times[-1]:.1f} s", file=sys.stderr, flush=True)
    rates = {size: arguments.questions / median(times[1:]) for size, times in seconds.items()}
    first = arguments.batch_sizes[0]
    equal = {size: sum(map(str.__eq__, answers[size], answers[first])) for size in rates}
    result = {
        "new_tokens": arguments.new_tokens,
        "questions": arguments.questions,
        "different_answers": len(set(answers[first])),
        "answers_per_second": {size: round(rate, 2) for size, rate in rates.items()},
        "times_the_first": {size: round(rate / rates[first], 2) for size, rate in rates.items()},
        "equal_answers": equal,
    }
    print(json.dumps(result))
    for size, rate in rates.items():
        print(f"batch {size:3}: {rate:6.2f} answers per second, {rate / rates[first]:5.2f} x, {equal[size]} equal")
    return 0 if min(equal.values()) == arguments.questions else 1


if __name__ == "__main__":
    raise SystemExit(main())
