"""Time to the first token at round 5 of a conversation about one image: with what is kept, and everything anew.

    python benchmarks/chat.py                         about a minute
    python benchmarks/chat.py --rounds 10 --repeats 8

The model is the small LLaVA of `training/workload.py` with random weights; its answers are given, so that every repeat
has the same history.  Both sides render, tokenise and compute the same question; they take turns in one process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "training")]

from ours import build_model  # noqa: E402
from workload import Workload  # noqa: E402

ANSWER = "The picture shows a red bus in front of a white house, and a small cat sits on the mat beside the door."
QUESTIONS = ("What is this?", "Where is the cat?", "What colour is the bus?", "How many doors are there?")
SIZE = (640, 480)


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="the last one is timed")
    parser.add_argument("--repeats", type=int, default=10, help="conversations")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def load(work: Workload) -> Any:
    """Model and processor, as `load_pretrained` gives them."""
    from paddlemix.checkpoints.pretrained import Pretrained
    from paddlemix.demo.vocabulary import train_tokenizer
    from paddlemix.processors.images.image_spec import ImageSpec
    from paddlemix.processors.llava import LlavaProcessor
    from paddlemix.processors.text.known_templates import get_template
    from paddlemix.processors.text.tokenizer import load_tokenizer

    template = get_template("vicuna_v1")
    folder = Path(tempfile.mkdtemp())
    train_tokenizer([text for text in (template.system, ANSWER, *QUESTIONS) for _ in range(4)], folder, vocab_size=330)
    processor = LlavaProcessor(
        tokenizer=load_tokenizer(folder),
        template=template,
        image_spec=ImageSpec(tile_size=work.image_size, patch_size=work.patch_size),
    )
    model = build_model(work)
    model.eval()
    return Pretrained(model, processor, folder)


def answer_as_given(tokens: list[int]) -> None:
    """From now on every answer has these tokens, whatever the scores."""
    from paddlemix.generation.sampling import Sampler

    def next_token(self: Any, scores: np.ndarray) -> int:
        scores.argmax()  # choosing is part of the time
        self.given = getattr(self, "given", None) or iter(tokens)
        return next(self.given)

    Sampler.next_token = next_token  # type: ignore[method-assign]


def first_piece(ask: Callable[[], Iterator[str]]) -> float:
    """Seconds until an answer begins; it is then not heard to its end."""
    start = time.perf_counter()
    pieces = ask()
    next(pieces)
    seconds = time.perf_counter() - start
    pieces.close()  # type: ignore[attr-defined]
    return seconds


def hold(loaded: Any, image: Any, rounds: int) -> tuple[float, float, dict[str, int]]:
    """One conversation; seconds to the first token of its last round, with the cache and without, and lengths."""
    from paddlemix.generation.chat import ChatSession
    from paddlemix.generation.history import Picture, Round

    questions = list(itertools.islice(itertools.cycle(QUESTIONS), rounds))
    kept, anew = ChatSession(loaded), ChatSession(loaded)
    for number, question in enumerate(questions[:-1]):
        list(kept.ask(question, [image] if number == 0 else ()))
    first = Round((Picture(image, image.size), questions[0]), ANSWER)
    anew.rounds = [first, *(Round((question,), ANSWER) for question in questions[1:-1])]
    held = kept._steps.cache.length
    seconds = first_piece(lambda: kept.ask(questions[-1])), first_piece(lambda: anew.ask(questions[-1]))
    assert kept.prompt() == anew.prompt()
    return (*seconds, {"prompt_tokens": len(anew._marks), "held_tokens": held})


def main() -> int:
    """Measures and prints a line of JSON and the same as a table."""
    arguments = build_parser().parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    from PIL import Image

    import paddlemix.models  # noqa: F401  sets the environment before paddle is imported

    loaded = load(Workload())
    tokenizer = loaded.processor.tokenizer
    answer_as_given([*tokenizer.encode(" " + ANSWER, "text"), tokenizer.eos_token_id])
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    hold(loaded, image, arguments.rounds)
    found = [hold(loaded, image, arguments.rounds) for _ in range(arguments.repeats)]
    kept, anew = (statistics.median(seconds[side] for seconds in found) for side in (0, 1))
    result = {
        "rounds": arguments.rounds,
        **found[0][2],
        "kept_milliseconds": round(1000 * kept, 1),
        "anew_milliseconds": round(1000 * anew, 1),
        "ratio": round(anew / kept, 1),
        "ratio_of_fastest": round(min(item[1] for item in found) / min(item[0] for item in found), 1),
    }
    print(json.dumps(result))
    for key, value in result.items():
        print(f"{key:26} {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
