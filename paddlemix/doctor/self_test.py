"""A tiny model trained and asked on a device, in seconds: whether it computes, and whether it computes right.

The reference numbers are the CPU's, computed in the same process from the same weights.  Import it only after the
environment is prepared, since it loads paddle.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import paddle

from paddlemix.datasets.collate import collate
from paddlemix.device import peak_memory_bytes, random_state, restore_random_state, select_device, set_seed
from paddlemix.generation.incremental import IncrementalModel
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
from paddlemix.models.layers import skip_initialisation
from paddlemix.models.llava import LlavaModel
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Example
from paddlemix.trainer.batches.dataloader import batch_inputs
from paddlemix.trainer.loss import LossModel

STEPS = 40
MAX_GAP = 1e-2  # relative, of the first losses: devices sum in different orders, and training amplifies that
_COMPARED, _LEARNED = 5, 0.2  # steps whose losses are compared; the last loss as a share of the first
_ROWS, _ANSWER = 4, 5
CONFIG = LlavaConfig(
    text=DecoderConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
    vision=VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    ),
    mm_vision_select_layer=-1,
)


@dataclass(frozen=True)
class SelfTest:
    """What came out.

    Args:
        losses: mean loss of each step.
        answers: token ids that the trained model answers with, [rows, tokens].
        seconds: building, training and answering.
        peak_bytes: see `peak_memory_bytes`.
    """

    losses: list[float]
    answers: np.ndarray
    seconds: float
    peak_bytes: int


def run_self_test(device: str) -> SelfTest:
    """Trains a two-layer LLaVA on four questions about pictures of noise, and asks these.

    Args:
        device: any name that `select_device` accepts; the current device and all random states are restored afterwards.

    Raises:
        Exception: whatever the device raises.
    """
    # The test must leave no trace in the process that runs it.
    before, state = paddle.get_device(), random_state()
    try:
        weights = start_weights()
        name, start = select_device(device), time.monotonic()
        model = build(weights)
        losses = _train(model)
        answers = _answer(model)
        return SelfTest(losses, answers, time.monotonic() - start, peak_memory_bytes(name))
    finally:
        select_device(before)
        restore_random_state(state)


def compare(found: SelfTest, reference: SelfTest) -> str | None:
    """What is wrong with a test; None if nothing is.

    Args:
        reference: the CPU's.
    """
    # From the plainest fault to the subtlest: NaN; other numbers from the start; no learning; wrong answers, which
    # after good losses point at the cache.
    if not np.isfinite(found.losses).all():
        return f"the loss is not a number from step {int(np.argmin(np.isfinite(found.losses)))} on"
    # Only the first steps: later losses differ by amplified rounding.
    gaps = [abs(a - b) / b for a, b in zip(found.losses[:_COMPARED], reference.losses, strict=False)]
    if max(gaps) > MAX_GAP:
        return f"losses differ from the CPU's by up to {max(gaps):.1%} in the first {_COMPARED} steps"
    # Equal losses that do not fall would mean a broken optimiser on both.
    if found.losses[-1] > _LEARNED * found.losses[0]:
        return f"the loss fell from {found.losses[0]:.2f} to {found.losses[-1]:.2f} only"
    if not np.array_equal(found.answers, _targets()):
        return "the trained model does not answer as it was trained to"
    return None


def computes_in(device: str, dtype: str) -> str | None:
    """Why products, softmax and their gradients do not work in a precision; None if they do.

    Args:
        device: becomes the current one.
    """
    select_device(device)
    try:
        values = paddle.to_tensor(np.eye(8, dtype=np.float32)).astype(dtype)
        values.stop_gradient = False
        result = paddle.nn.functional.softmax(paddle.matmul(values, values), axis=-1).sum()
        (grad,) = paddle.grad([result], [values])
        right = abs(float(result.astype("float32")) - 8.0) < 0.1 and np.isfinite(grad.astype("float32").numpy()).all()
        return None if right else "wrong numbers"
    # A missing kernel is an answer here, not a failure.
    except (RuntimeError, ValueError, OSError) as error:  # what paddle raises where it has no kernel
        return str(error).strip().rpartition("\n")[2]


def start_weights() -> dict[str, np.ndarray]:
    """Name -> initial weight of the tiny model; makes the CPU the current device."""
    # drawn on the CPU, since each kind of device has a generator of its own
    select_device("cpu")
    set_seed(0)
    return {name: weight.numpy() for name, weight in LlavaModel(CONFIG).named_parameters()}


def build(weights: dict[str, np.ndarray]) -> LlavaModel:
    """The tiny model with these weights, on the current device."""
    # The weights are given, so nothing is drawn.
    with skip_initialisation():
        model = LlavaModel(CONFIG)
    for name, weight in model.named_parameters():
        weight.set_value(weights[name])
    return model


def _train(model: LlavaModel) -> list[float]:
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    optimizer = paddle.optimizer.AdamW(0.01, parameters=model.parameters(), weight_decay=0.0, grad_clip=clip)
    # one batch, used in every step: the model is to learn four answers by heart
    batch = collate(examples(), model.config.tokens_per_tile)
    inputs, count = batch_inputs(batch), len(batch.loss_index)
    inputs = {name: value for name, value in inputs.items() if isinstance(value, paddle.Tensor)}
    losses = []
    for _ in range(STEPS):
        loss = LossModel(model)(**inputs)[0] / count
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        # read after the loop: `float` waits for the device
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def _answer(model: LlavaModel) -> np.ndarray:
    """Greedy answers, token by token over the cache, [rows, tokens]."""
    model.eval()
    incremental, tokens = IncrementalModel(model), []
    scores = incremental.prefill(prompts())
    for number in range(_ANSWER):
        tokens.append(scores.argmax(axis=-1))
        if number + 1 < _ANSWER:
            scores = incremental.step(tokens[-1])
    return np.stack(tokens, axis=1)


def _targets() -> np.ndarray:
    return np.stack([example.labels[-_ANSWER:] for example in examples()])


def examples() -> list[Example]:
    """Questions of different lengths about pictures of noise, and answers of five random tokens."""
    random, tokens = np.random.default_rng(0), CONFIG.tokens_per_tile
    examples = []
    for row in range(_ROWS):
        question, answer = random.integers(3, 61, 3 + row), random.integers(3, 61, _ANSWER)
        ids = np.concatenate([[1], np.full(tokens, IMAGE_TOKEN_INDEX), question, answer]).astype(np.int64)
        labels = np.where(np.arange(len(ids)) < len(ids) - _ANSWER, IGNORE_INDEX, ids)
        pixels = random.standard_normal((1, 3, 28, 28), dtype=np.float32)
        examples.append(
            Example(input_ids=ids, labels=labels, pixel_values=pixels, image_index=np.arange(tokens, dtype=np.int64))
        )
    return examples


def prompts() -> list[Example]:
    """The same examples without their answers."""
    return [_cut(example, _ANSWER) for example in examples()]


def _cut(example: Example, count: int) -> Example:
    """A prompt: without the last tokens."""
    return Example(
        input_ids=example.input_ids[:-count],
        labels=example.labels[:-count],
        pixel_values=example.pixel_values,
        image_index=example.image_index,
    )
