"""Half precision on the stand-in NPU, piece by piece: sums are float32 sums, and masks come from the device alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.npu.answer_probes import answers
from tests.npu.mixed_probes import LEVELS as MIXED
from tests.npu.probes import LEVELS
from tests.npu_double.build import STRICT, environment

NAMES = [f"{dtype} {level}" for dtype, level in LEVELS]


def probe(plugin: Path, *names: str, **variables: str) -> dict[str, Any]:
    """What `tests.npu.probes` prints in a process with the stand-in."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.npu.probes", *names],
        cwd=ROOT,
        env=environment(plugin, **variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(plugin: Path) -> dict[str, Any]:
    return probe(
        plugin, "norms", "scales", "losses", "recomputed", "answers", "attended", "attention_slopes", "unfit_steps"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_row_with_an_outlier_keeps_its_norm(found: dict[str, Any], name: str) -> None:
    """As the first token of every Llama has; in training and in decoding."""
    for ratios in found["norms"][name]:
        assert ratios == pytest.approx([1.0, 1.0], abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_norms_scale_is_float32(found: dict[str, Any], name: str) -> None:
    """In training and in decoding."""
    assert [error < 1e-6 for error in found["scales"][name]] == [True, True], found["scales"]


@pytest.mark.parametrize("name", NAMES)
def test_a_tokens_loss_is_float32(found: dict[str, Any], name: str) -> None:
    assert found["losses"][name] < 1e-5


def test_attention_takes_states_of_several_types(found: dict[str, Any]) -> None:
    """As autocast gives them where biases, rotary positions or lengths of DoRA are in float32."""
    assert set(found["attended"]) == {f"{dtype} {level} {black}" for dtype, level, black in MIXED}
    for name, error in found["attended"].items():
        assert error < (2e-2 if name.startswith("bfloat16") else 3e-3), name


def test_what_rows_have_in_common_cancels_in_attentions_gradients(found: dict[str, Any]) -> None:
    """A mean that is rounded otherwise than the numbers it is taken from leaves twice the error around 20."""
    most = {"around 20": {"bfloat16": 5e-2, "float16": 6.5e-3}, "outlier": {"bfloat16": 4.2e-3, "float16": 4.8e-4}}
    for name, errors in found["attention_slopes"].items():
        dtype, _, kind = name.partition(", ")
        assert max(errors) < most[kind][dtype], found["attention_slopes"]
    assert len(found["attention_slopes"]) == 4


def test_a_gradient_that_no_scale_fits_ends_the_run(found: dict[str, Any]) -> None:
    """Each such step is left out and halves the scale: without an end a run would train nothing and say it is done."""
    assert found["unfit_steps"]["scales"] == [4.0, 2.0, 1.0]
    said = found["unfit_steps"]["said"]
    assert "the gradient of step 3 is NaN or infinite at a loss scale of 1 in the batch of train.json record 3" in said


def test_recomputation_draws_the_same_masks(found: dict[str, Any], plugin: Path) -> None:
    """Also where the plugin has no dropout of its own: nothing is then drawn on the host."""
    lacking = probe(plugin, "recomputed", CUSTOM_DEVICE_BLACK_LIST="dropout,dropout_grad")["recomputed"]
    assert found["recomputed"] == lacking == {"0.0": 0.0, "0.3": 0.0}


def test_a_row_that_is_taken_often_gets_all_of_its_gradient(plugin: Path) -> None:
    """`image_newline` ends every line of a picture; the real plugin's gather keeps the last gradient of a row."""
    found = probe(plugin, "newline", **STRICT)["newline"]
    assert found["gather"] == [1.0] * 4  # the stand-in is as wrong as the plugin
    assert found["merge"] == [3.0] * 4
    assert found["image_newline"] == [3.0] * 32


def test_the_strict_stand_in_computes_the_same(found: dict[str, Any], plugin: Path) -> None:
    strict = probe(plugin, "norms", "losses", "recomputed", **STRICT)
    assert strict == {name: found[name] for name in strict}


def test_answers_to_a_batch_are_those_of_the_cpu(found: dict[str, Any]) -> None:
    """Whether the card chooses the token or the host; positions, angles and masks are made on the card."""
    expected = answers()
    assert found["answers"] == expected
    assert len({len(answer) for answer in expected["greedy None"]}) > 1  # so that rows leave the batch


def test_sums_are_exact_where_products_are_rounded(plugin: Path) -> None:
    """As TF32 and HF32 do, which paddle uses for float32 by itself on a GPU."""
    found = probe(plugin, "scales", "plain_losses", NPU_DOUBLE_TF32="1")
    assert found["plain_losses"]["product"] == 1.0
    assert found["plain_losses"]["worst"] < 1e-5
    assert max(max(errors) for errors in found["scales"].values()) < 1e-6
