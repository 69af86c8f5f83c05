"""Packed rows: each sample's losses and gradients are those it has alone, and no sample sees another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest
from paddle.nn import functional

from paddlemix.datasets.collate import collate
from paddlemix.models.attention import SegmentLengths, attention_mask, packed_segments
from paddlemix.models.llava import LlavaModel
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.processors.images.visual_tokens import visual_token_index
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, NEWLINE_INDEX, Batch, Example, Row
from paddlemix.trainer.batches.dataloader import batch_inputs
from paddlemix.trainer.loss import LossModel
from tests.tiny_models import tiny_llava, tiny_model, tiny_text

pytestmark = pytest.mark.usefixtures("form")  # in C and in paddle's operators

TILE, PATCH, VOCABULARY = 6, 3, 37
PINPOINTS = ((6, 12), (12, 6), (12, 12))
SPECS = {
    "1.5": ImageSpec(tile_size=TILE, patch_size=PATCH),
    "anyres": ImageSpec(
        tile_size=TILE,
        patch_size=PATCH,
        aspect_mode="anyres",
        grid_pinpoints=PINPOINTS,
        merge_type="spatial_unpad",
    ),
}


def example(spec: ImageSpec, sizes: list[tuple[int, int]], texts: int, seed: int) -> Example:
    """`texts` tokens, the images before and between them, the later half trained."""
    random = np.random.default_rng(seed)
    ids: list[int] = list(random.integers(1, VOCABULARY, 2))
    index: list[np.ndarray] = []
    tiles = 0
    for size in sizes:
        rows = visual_token_index(*size, spec)
        index.append(np.where(rows == NEWLINE_INDEX, NEWLINE_INDEX, rows + tiles * spec.tokens_per_tile))
        tiles += -(-(int(rows.max()) + 1) // spec.tokens_per_tile)
        ids += [IMAGE_TOKEN_INDEX] * len(rows)
        ids += list(random.integers(1, VOCABULARY, 1))
    ids += list(random.integers(1, VOCABULARY, texts))
    labels = np.array(ids)
    labels[: len(ids) - texts // 2] = IGNORE_INDEX
    return Example(
        input_ids=np.array(ids, dtype=np.int64),
        labels=labels,
        pixel_values=random.standard_normal((tiles, 3, TILE, TILE), dtype=np.float32),
        image_index=np.concatenate(index) if index else np.zeros(0, dtype=np.int64),
    )


def examples_of(spec: ImageSpec) -> list[Example]:
    """With one image, with two, and text alone; of different lengths."""
    return [
        example(spec, [(40, 30)], 9, 1),
        example(spec, [], 5, 2),
        example(spec, [(20, 70), (6, 6)], 12, 3),
        example(spec, [(64, 20)], 4, 4),
    ]


def model_of(name: str) -> LlavaModel:
    return tiny_model(tiny_llava(image_newline=name == "anyres"))


def losses_of(model: LlavaModel, batch: Batch, masked: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Loss of each supervised token, and the gradients of their sum; with a mask instead of lengths where asked for."""
    inputs = model_inputs(batch)
    if masked:
        inputs["segment_ids"] = paddle.to_tensor(batch.segment_ids)
    hidden = model(**inputs)
    chosen = paddle.gather(hidden.reshape([-1, hidden.shape[-1]]), paddle.to_tensor(batch.loss_index))
    losses = functional.cross_entropy(model.logits(chosen), paddle.to_tensor(batch.loss_targets), reduction="none")
    model.clear_gradients()
    losses.sum().backward()
    gradients = {name: part.grad.numpy() for name, part in model.named_parameters() if part.grad is not None}
    return losses.numpy().reshape(-1), gradients


def model_inputs(batch: Batch) -> dict[str, Any]:
    names = ("input_ids", "position_ids", "segment_ids", "pixel_values", "merge_index")
    return {name: value for name, value in batch_inputs(batch).items() if name in names}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "window"), [*((name, None) for name in SPECS), ("anyres", 3)])
def test_packed_is_unpacked(name: str, window: int | None, masked: bool) -> None:
    spec, text = SPECS[name], tiny_text(sliding_window=window)
    model = tiny_model(tiny_llava(text=text, image_newline=name == "anyres"))
    examples = examples_of(spec)
    single = collate(examples, spec.tokens_per_tile)
    packed = collate([Row(tuple(examples[:3])), Row(tuple(examples[3:]))], spec.tokens_per_tile)
    losses, gradients = losses_of(model, single)
    packed_losses, packed_gradients = losses_of(model, packed, masked)
    assert len(losses) == sum(part.num_supervised for part in examples)
    if window is not None:
        assert np.abs(losses - losses_of(model_of(name), single)[0]).max() > 1e-2
    np.testing.assert_allclose(packed_losses, losses, rtol=0, atol=1e-5)
    assert packed_gradients.keys() == gradients.keys() and len(gradients) > 40
    for key, values in gradients.items():
        scale = max(np.abs(values).max(), 1.0)
        np.testing.assert_allclose(packed_gradients[key], values, rtol=0, atol=1e-5 * scale, err_msg=key)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_no_sample_sees_another(changed: int, masked: bool) -> None:
    """Other tokens and pixels in one sample leave every bit of the others as it was."""
    spec, model = SPECS["anyres"], model_of("anyres")
    examples = examples_of(spec)[:3]
    hidden = []
    for _ in range(2):
        batch = collate([Row(tuple(examples))], spec.tokens_per_tile)
        inputs = model_inputs(batch)
        if masked:
            inputs["segment_ids"] = paddle.to_tensor(batch.segment_ids)
        hidden.append(model(**inputs).numpy()[0])
        ids = examples[changed].input_ids
        other = np.where(ids == IMAGE_TOKEN_INDEX, ids, ids % (VOCABULARY - 1) + 1)
        examples[changed] = replace(examples[changed], input_ids=other, pixel_values=-examples[changed].pixel_values)
    own = batch.segment_ids[0] == changed + 1
    np.testing.assert_array_equal(hidden[0][~own], hidden[1][~own])
    assert (hidden[0][own] != hidden[1][own]).any(axis=-1).all()


def test_recomputation_keeps_the_segments() -> None:
    spec, model = SPECS["1.5"], model_of("1.5")
    batch = collate([Row(tuple(examples_of(spec)))], spec.tokens_per_tile)
    losses, gradients = losses_of(model, batch)
    model.train()
    model.language_model.enable_recompute = True
    again, found = losses_of(model, batch)
    np.testing.assert_array_equal(again, losses)
    for key, values in gradients.items():
        np.testing.assert_allclose(found[key], values, atol=1e-6, err_msg=key)


def test_heads_without_groups() -> None:
    model = tiny_model(tiny_llava(text=tiny_text(num_key_value_heads=2), image_newline=False))
    examples = [example(SPECS["1.5"], [], count, count) for count in (6, 9)]
    losses, _ = losses_of(model, collate(examples, 4))
    packed, _ = losses_of(model, collate([Row(tuple(examples))], 4))
    np.testing.assert_allclose(packed, losses, rtol=0, atol=1e-5)


def test_a_batch_of_nothing_but_skipped_samples_has_no_loss() -> None:
    model = LossModel(model_of("1.5"))
    batch = collate([Row(()), Row(())], 4)
    inputs = {
        key: value
        for key, value in batch_inputs(batch).items()
        if key not in ("num_tokens", "sources", "skipped", "tile_keys")
    }
    loss, right = model(**inputs)
    loss.backward()
    assert loss.item() == right.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.numpy().any(), name


@pytest.mark.parametrize(
    ("segment_ids", "lengths"),
    [
        ([[1, 1, 2, 2, 2]], (2, 3)),
        ([[1, 2, 0, 0]], (1, 1, 2)),
        ([[1, 1, 0], [1, 2, 2]], (2, 1, 1, 2)),
        ([[1, 2], [1, 2]], (1, 1, 1, 1)),
        ([[1, 2], [2, 2]], (1, 1, 2)),  # a run never goes over a row's end
    ],
)
def test_runs_of_packed_rows(segment_ids: list[list[int]], lengths: tuple[int, ...]) -> None:
    assert packed_segments(np.array(segment_ids)) == SegmentLengths(lengths)


def test_rows_of_one_sample_need_no_segments() -> None:
    assert packed_segments(np.array([[1, 1, 0], [1, 1, 1]])) is None


def test_other_devices_get_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    assert packed_segments(np.array([[1, 2]])).tolist() == [[1, 2]]  # type: ignore[union-attr]


def test_lengths_and_a_cache_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="whole rows without a cache"):
        attention_mask(2, 4, SegmentLengths((1, 1)), paddle.to_tensor([[1, 1, 1, 1]]))
