"""Compiled passes over rows and numbers, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from paddle.nn import functional

from paddlemix.models.kernels import cpu
from tests.tiny_models import draw

pytestmark = pytest.mark.usefixtures("library")

SIZES = [(1, 1), (1, 3), (5, 17), (3, 64), (7, 130)]
EPSILON = 1e-5
NAN, INFINITE = float("nan"), float("inf")
HARMLESS = np.array([NAN, INFINITE, -INFINITE, 1.0, -1e38, 1e30, -200.0, 100.0, 0.0], dtype=np.float32)


def tensors(*arrays: np.ndarray) -> list[paddle.Tensor]:
    return [paddle.to_tensor(array) for array in arrays]


def in_float64(
    function: Callable[..., paddle.Tensor], arrays: list[np.ndarray], grads: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """A formula's values, and its gradients by paddle's automatic ones."""
    inputs = [paddle.to_tensor(array.astype(np.float64), stop_gradient=False) for array in arrays]
    outputs = function(*inputs)
    found = paddle.grad([outputs], inputs, [paddle.to_tensor(grads.astype(np.float64))])
    return outputs.numpy(), [part.numpy() for part in found]


def assert_close(found: paddle.Tensor, wanted: np.ndarray, tolerance: float = 2e-6) -> None:
    """The tolerance is of the largest number."""
    assert found.dtype == paddle.float32 and found.shape == list(wanted.shape)
    assert np.abs(found.numpy() - wanted).max() <= tolerance * np.abs(wanted).max()


def assert_same_numbers(found: paddle.Tensor, wanted: np.ndarray) -> None:
    """NaN and infinities in the same places, every other number within rounding."""
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-30)


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x.astype(np.float64)))


# ---- norms and biases ----


def plain_norm(x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    return x * paddle.rsqrt((x * x).mean(axis=-1, keepdim=True) + EPSILON) * weight


@pytest.mark.parametrize("scale", [3.0, 3e-3])  # the other makes epsilon as large as the mean square
@pytest.mark.parametrize("size", [*SIZES, (2, 3, 17)])
def test_norms_and_their_gradients(size: tuple[int, ...], scale: float) -> None:
    arrays, grads = [np.float32(scale) * draw(*size), draw(size[-1], seed=2)], draw(*size, seed=3)
    wanted, wanted_grads = in_float64(plain_norm, arrays, grads)
    x, weight, g = tensors(*arrays, grads)
    outputs, scales = cpu.rms_norm(x, weight, EPSILON)
    assert_close(outputs, wanted)
    factors = 1 / np.sqrt((arrays[0].astype(np.float64) ** 2).mean(-1) + EPSILON)
    assert_close(scales, factors.reshape(-1))
    x_grad, weight_grad = cpu.rms_norm_backward(g, x, weight, scales, True)
    # of the parts that it is the difference of, which nearly cancel where a row has one number
    parts = np.abs(grads * arrays[1]).max() * factors.max()
    assert np.abs(x_grad.numpy() - wanted_grads[0]).max() <= 3e-6 * parts
    assert_close(weight_grad, wanted_grads[1])
    alone, none = cpu.rms_norm_backward(g, x, weight, scales, False)
    assert none is None
    np.testing.assert_array_equal(alone.numpy(), x_grad.numpy())


def test_a_norm_into_a_tensor_that_is_there() -> None:
    x, weight, there = tensors(draw(5, 17), draw(17, seed=2), draw(5, 17, seed=3))
    address, wanted = there.data_ptr(), cpu.rms_norm(x, weight, EPSILON)[0].numpy()
    assert cpu.rms_norm_into(there, x, weight, EPSILON) is there and there.data_ptr() == address
    np.testing.assert_array_equal(there.numpy(), wanted)
    np.testing.assert_array_equal(x.numpy(), draw(5, 17))


def test_a_row_that_is_no_number_leaves_the_others_alone() -> None:
    x, weight = draw(4, 17), draw(17, seed=2)
    wanted = cpu.rms_norm(*tensors(x, weight), EPSILON)[0].numpy()
    x[1, 3], x[2, 5] = NAN, INFINITE
    found = cpu.rms_norm(*tensors(x, weight), EPSILON)[0].numpy()
    np.testing.assert_array_equal(found[[0, 3]], wanted[[0, 3]])
    assert np.isnan(found[1]).all()
    assert np.isnan(found[2]).tolist() == [column == 5 for column in range(17)]  # infinite by infinite; else by it: 0
    assert not np.delete(found[2], 5).any()


@pytest.mark.parametrize("size", SIZES)
def test_a_bias_is_added_in_place(size: tuple[int, int]) -> None:
    states, bias = tensors(draw(*size), draw(size[1], seed=2))
    assert cpu.add_bias_(states, bias) is states
    np.testing.assert_array_equal(states.numpy(), draw(*size) + draw(size[1], seed=2))
    np.testing.assert_array_equal(bias.numpy(), draw(size[1], seed=2))


# ---- gates ----


@pytest.mark.parametrize("size", [*SIZES, (2, 3, 17)])
def test_gates_and_their_gradients(size: tuple[int, ...]) -> None:
    arrays, grads = [8 * draw(*size), draw(*size, seed=2)], draw(*size, seed=3)
    wanted, wanted_grads = in_float64(lambda gate, up: functional.silu(gate) * up, arrays, grads)
    gate, up, g = tensors(*arrays, grads)
    outputs = cpu.gated(gate, up)
    assert_close(outputs, wanted)
    for found, expected in zip(cpu.gated_backward(g, gate, up), wanted_grads, strict=True):
        assert_close(found, expected)
    np.testing.assert_array_equal(gate.numpy(), arrays[0])
    assert cpu.gated_(gate, up) is gate
    np.testing.assert_array_equal(gate.numpy(), outputs.numpy())


@pytest.mark.parametrize("size", SIZES)
def test_quick_gelu(size: tuple[int, int]) -> None:
    x = 4 * draw(*size)
    assert_close(cpu.quick_gelu(paddle.to_tensor(x)), x * sigmoid(1.702 * x.astype(np.float64)))


def test_gates_at_the_ends_of_the_numbers() -> None:
    """What is infinite or no number comes out as the formula says, what is finite stays so, a slope ends in 0 or 1."""
    x, ones = HARMLESS.astype(np.float64), np.ones_like(HARMLESS)
    with np.errstate(invalid="ignore"):
        gate = x * sigmoid(x)
        slope = sigmoid(x) * (1 + (x - gate))
        gelu = x * sigmoid(1.702 * x)
    gates, up = tensors(HARMLESS, ones)
    assert_same_numbers(cpu.gated(gates, up), gate)
    assert_same_numbers(cpu.quick_gelu(gates), gelu)
    gate_grad, up_grad = cpu.gated_backward(up, gates, up)
    assert_same_numbers(gate_grad, slope)
    assert_same_numbers(up_grad, gate)
    assert gate_grad.tolist()[4:8] == [0, 1, 0, 1]


def test_the_exponential_is_exact_to_a_few_units_in_the_last_place() -> None:
    """Relative, for every result that is a normal number."""
    x = np.linspace(-86.0, 86.0, 20_010, dtype=np.float32)
    ratio = cpu.gated(*tensors(x, np.ones_like(x))).numpy() / (x * sigmoid(x))
    assert np.abs(ratio - 1).max() < 3e-7
    near = x[np.abs(x) < 50]
    ratio = cpu.quick_gelu(paddle.to_tensor(near)).numpy() / (near * sigmoid(np.float32(1.702) * near))
    assert np.abs(ratio - 1).max() < 3e-7
    logits = paddle.to_tensor(np.stack([-np.abs(x), np.zeros_like(x)], axis=1))
    cpu.cross_entropy_(logits, paddle.ones([len(x)], dtype="int64"))
    assert np.abs(logits.numpy()[:, 0] / sigmoid(-np.abs(x)) - 1).max() < 3e-7


# ---- rotary positions ----


def angles(batch: int, length: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [B, L, 1, E] of other angles in every row, whose halves are equal."""
    turns = np.tile(5 * draw(batch, length, 1, width // 2, seed=7), 2)
    return np.cos(turns), np.sin(turns)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 6), (1, 4, 2, 34), (2, 3, 4, 64), (1, 3, 1, 130)], ids=str)
def test_a_turn_and_back(shape: tuple[int, int, int, int]) -> None:
    batch, length, _, width = shape
    x, (cosines, sines) = draw(*shape), angles(batch, length, width)
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    wanted = x * cosines + np.concatenate([-second, first], axis=-1) * sines
    states, *tables = tensors(x, cosines, sines)
    assert cpu.supports_rotation(states, *tables)
    turned = cpu.rotate(states, *tables)
    assert_close(turned, wanted)
    np.testing.assert_allclose(cpu.rotate(turned, *tables, back=True).numpy(), x, atol=2e-6)
    grads = draw(*shape, seed=4)  # the opposite turn is the gradient
    through = (cpu.rotate(paddle.to_tensor(grads), *tables, back=True).numpy().astype(np.float64) * x).sum()
    assert through == pytest.approx((wanted * grads).sum(), abs=1e-4)


def test_angles_that_rows_or_heads_share_are_not_taken() -> None:
    for shape in ((1, 5, 1, 6), (2, 5, 3, 6), (2, 1, 1, 6)):
        states, table = paddle.zeros([2, 5, 3, 6]), paddle.zeros(shape)
        assert not cpu.supports_rotation(states, table, table)


# ---- products ----


@pytest.mark.parametrize(("inner", "columns"), [(1, 1), (7, 15), (8, 16), (19, 33), (64, 130), (21, 2100)])
def test_few_rows_by_a_weight(inner: int, columns: int) -> None:
    """Each row has the bits that it has alone."""
    x, weight = draw(16, inner), draw(inner, columns, seed=2)
    alone = [cpu.matmul_few(*tensors(x[row : row + 1], weight)).numpy()[0] for row in range(16)]
    assert_close(paddle.to_tensor(np.stack(alone)), x.astype(np.float64) @ weight.astype(np.float64))
    for rows in range(1, 17):
        found = cpu.matmul_few(*tensors(x[:rows], weight)).numpy()
        np.testing.assert_array_equal(found, alone[:rows])
    turned = cpu.matmul_few(*tensors(x[::-1].copy().reshape(2, 8, inner), weight)).numpy()
    np.testing.assert_array_equal(turned.reshape(16, columns), alone[::-1])


def test_a_product_spreads_what_is_no_number_along_its_row_and_its_column() -> None:
    x, weight = draw(3, 19), draw(19, 33, seed=2)
    wanted = cpu.matmul_few(*tensors(x, weight)).numpy()
    x[1, 2], weight[4, 5], weight[6, 32] = NAN, INFINITE, NAN
    found = cpu.matmul_few(*tensors(x, weight)).numpy()
    assert np.isnan(found[1]).all() and np.isnan(found[:, 32]).all()
    assert np.isinf(found[[0, 2], 5]).all()
    rest = [column for column in range(33) if column not in (5, 32)]
    np.testing.assert_array_equal(found[[0, 2]][:, rest], wanted[[0, 2]][:, rest])


@pytest.mark.parametrize("rows", [0, 1, 2, 16, 17])
def test_the_number_of_rows_that_suits(rows: int) -> None:
    assert cpu.supports_few_rows(rows) is (rows in (2, 16))


# ---- the loss ----


@pytest.mark.parametrize("size", [*SIZES, (4, 3000)])
def test_cross_entropy_and_its_gradient(size: tuple[int, int]) -> None:
    rows, classes = size
    logits, targets = 5 * draw(*size), np.random.RandomState(3).randint(0, classes, rows)
    targets[0], targets[-1] = classes - 1, 0
    if rows > 3:
        targets[2] = logits[2].argmax()
    losses, grads = in_float64(
        lambda scores: (
            -functional.log_softmax(scores, axis=-1).take_along_axis(paddle.to_tensor(targets[:, None]), axis=1)
        ),
        [logits],
        np.ones([rows, 1]),
    )
    scores = paddle.to_tensor(logits)
    found, rights = cpu.cross_entropy_(scores, paddle.to_tensor(targets))
    np.testing.assert_allclose(found.numpy(), losses[:, 0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scores.numpy(), grads[0], rtol=4e-6, atol=2e-7)
    assert rights.dtype == paddle.int64 and rights.tolist() == (logits.argmax(axis=1) == targets).astype(int).tolist()


def test_the_small_terms_of_a_large_vocabulary_count() -> None:
    """In one float32 sum of them the loss would be 1e-5 away."""
    logits, targets = 3 * draw(2, 152_064), paddle.to_tensor([0, 1])
    wide = logits.astype(np.float64)
    wanted = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1) - wide[[0, 1], [0, 1]]
    losses, _ = cpu.cross_entropy_(paddle.to_tensor(logits), targets)
    np.testing.assert_allclose(losses.numpy(), wanted, rtol=0, atol=2.5e-6)


def test_cross_entropy_of_logits_that_are_far_apart_equal_or_no_numbers() -> None:
    rows = [[1e30, -1e30, 0.0], [2.0, 2.0, 1.0], [NAN, 1.0, 2.0], [1.0, INFINITE, 2.0], [-INFINITE, 1.0, 0.0]]
    logits = paddle.to_tensor(np.array(rows, dtype=np.float32))
    losses, rights = cpu.cross_entropy_(logits, paddle.to_tensor([1, 1, 1, 0, 1]))
    np.testing.assert_allclose(losses.numpy()[:2], [2e30, np.log(2 + np.exp(-1))], rtol=1e-6)
    assert np.isnan(losses.numpy()[2]) and not np.isfinite(losses.numpy()[3])
    np.testing.assert_allclose(losses.numpy()[4], np.log1p(np.exp(-1)), rtol=1e-6)
    assert rights.tolist() == [0, 0, 0, 0, 1]  # of equal ones a greedy choice takes the first
    _, rights = cpu.cross_entropy_(paddle.to_tensor([[2.0, 2.0, 1.0], [0.0, 0.0, 0.0]]), paddle.to_tensor([0, 2]))
    assert rights.tolist() == [1, 0]
    assert logits.numpy()[0].tolist() == [1, -1, 0] and logits.numpy()[4, 0] == 0


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_a_target_that_is_no_class_changes_nothing(wrong: int) -> None:
    logits = paddle.to_tensor(draw(2, 3))
    with pytest.raises(ValueError, match=f"{wrong}.* must be within 0 to 2"):
        cpu.cross_entropy_(logits, paddle.to_tensor([1, wrong]))
    np.testing.assert_array_equal(logits.numpy(), draw(2, 3))


# ---- threads ----


def test_no_bit_depends_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x, other, weight = draw(7, 130), draw(7, 130, seed=2), draw(130, seed=3)
    cosines, sines = angles(7, 1, 130)
    targets = paddle.to_tensor(np.arange(7))

    def run() -> list[np.ndarray]:
        states, up, row, scores, *tables = tensors(x, other, weight, x, cosines, sines)
        normed, scales = cpu.rms_norm(states, row, EPSILON)
        found = [normed, scales, cpu.rms_norm_backward(up, states, row, scales, False)[0]]
        found += [cpu.quick_gelu(states), cpu.gated(states, up), *cpu.gated_backward(states, up, states)]
        found += [cpu.rotate(states.reshape([7, 1, 1, 130]), *tables), *cpu.cross_entropy_(scores, targets)]
        found += [cpu.matmul_few(states, paddle.to_tensor(draw(130, 90))), scores, cpu.add_bias_(states, row)]
        return [part.numpy() for part in found]

    here = run()
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        for one, expected in zip(run(), here, strict=True):
            np.testing.assert_array_equal(one, expected)
