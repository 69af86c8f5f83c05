"""Pieces on all cores give what they give one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import paddle
import pytest

from paddlemix.models.attention import attention_bias
from paddlemix.models.kernels import threads
from paddlemix.models.kernels.attention_functions import AttentionFunction
from paddlemix.models.kernels.threads import cores, map_on_cores
from tests.tiny_models import tiny_model


@pytest.fixture(params=[1, 3])
def core_count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """As many cores as a test is to see."""
    threads._pool.cache_clear()
    monkeypatch.setenv("OMP_NUM_THREADS", str(request.param))
    yield request.param
    threads._pool.cache_clear()


def test_order_and_arguments(core_count: int) -> None:
    assert map_on_cores(lambda a, b: a * b, [1, 2, 3, 4], [5, 6, 7, 8]) == [5, 12, 21, 32]
    assert map_on_cores(str, []) == []
    assert map_on_cores(str, [1], threads=1) == ["1"]


def test_no_gradient_inside_and_the_callers_state_stays(core_count: int) -> None:
    assert map_on_cores(lambda _: paddle.is_grad_enabled(), range(5)) == [False] * 5
    assert paddle.is_grad_enabled()


def test_pieces_of_pieces_are_done_in_place(core_count: int) -> None:
    if threads.openmp() is not None:
        assert cores() == core_count
    assert map_on_cores(lambda _: cores(), range(3)) == [1, 1, 1] or core_count == 1
    assert map_on_cores(lambda n: map_on_cores(lambda m: n + m, [1, 2]), [10, 20]) == [[11, 12], [21, 22]]


def test_the_first_error_comes_back(core_count: int) -> None:
    with pytest.raises(ZeroDivisionError):
        map_on_cores(lambda n: 1 // n, [1, 0, 2])


@pytest.mark.parametrize("length, block", [(300, 128), (300, None), (64, 16)])
def test_attention_is_the_same(
    core_count: int, form: str, length: int, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven heads on three cores, with gradients: every element as on one core."""
    monkeypatch.setattr("paddlemix.models.kernels.attention_functions._LEAST_SCORES", 0)
    paddle.seed(0)
    states = [paddle.randn([2, length, 7, 8]) for _ in range(3)]
    wanted = paddle.randn([2, length, 7, 8])
    for part in states:
        part.stop_gradient = False
    bias = attention_bias(length, length, None, None)

    def run() -> list[paddle.Tensor]:
        output = AttentionFunction.apply(*states, bias, block)
        return [output, *paddle.grad([output], states, [wanted])]

    shared = run()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cores() == 1
    for ours, alone in zip(shared, run(), strict=True):
        assert (ours - alone).abs().max().item() < 1e-5


def test_a_tile_does_not_depend_on_its_neighbours(core_count: int, form: str) -> None:
    tower = tiny_model().vision_tower
    side = tower.config.image_size
    tiles = paddle.randn([5, 3, side, side])
    tower.train()
    with paddle.no_grad():
        together = tower(tiles)
        for number in range(5):
            assert (together[number] == tower(tiles[number : number + 1])[0]).all()
