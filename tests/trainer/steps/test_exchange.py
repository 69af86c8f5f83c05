"""What processes tell each other of a step: with one nothing is sent; with several all take the same from a table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from paddlenlp.trainer.trainer_callback import CallbackHandler

from paddlemix.errors import OtherProcessError, UserError
from paddlemix.parallel import collectives
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.trainer.batches.dataloader import PositionCounts
from paddlemix.trainer.steps.exchange import EvaluationStopped, StepExchange

PAIR = Layout(world_size=2, rank=0, data_size=2, data_rank=0)


def exchange_of(layout: Layout, upcoming: list[int]) -> tuple[StepExchange, Any]:
    loader: Any = SimpleNamespace(counts=PositionCounts(), upcoming=upcoming)
    return StepExchange(lambda: layout, lambda: loader), loader


def test_one_process_sends_nothing_and_waits_for_nothing() -> None:
    exchange, loader = exchange_of(ALONE, [])
    loader.counts.tokens = 40
    assert exchange.begin(paddle.full([], 2.0)) is None and exchange.supervised(7) == 7
    exchange.tokens_seen = 100
    loader.counts.tokens = 45
    assert exchange.tokens_seen == 105
    exchange.received = lambda: 15
    assert exchange.stop == 15
    with pytest.raises(OSError, match="full"), exchange.held():
        raise OSError("the disk is full")
    exchange.settle()


def test_several_take_the_same_from_all_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process has the loss 6, received signal 15, and 30 supervised tokens next."""
    exchange, loader = exchange_of(PAIR, [20])
    loader.counts = PositionCounts(positions=64, tokens=50, visual=8)
    other = np.array([6.0, 1, 15, 0, 30, 64, 40, 0, 0], dtype=np.float32)
    monkeypatch.setattr(
        "paddlemix.trainer.steps.exchange.gathered_tensor",
        lambda own: paddle.stack([own, paddle.to_tensor(other)]),
    )
    messages = exchange.begin(paddle.full([], 2.0))
    assert messages is not None
    assert exchange.end(messages.numpy()).tolist() == [2.0, 6.0]
    assert exchange.stop == 15 and exchange.bad_gradients == [1]
    assert exchange.counts == PositionCounts(positions=128, tokens=90, visual=8) and exchange.tokens_seen == 90
    assert exchange.supervised(20) == 50
    exchange.tokens_seen = 1000
    assert exchange.tokens_seen == 1000
    message = exchange.begin(paddle.full([], 2.0))
    assert message is not None and message.numpy()[5:8].tolist() == [0, 0, 0]  # told once


@pytest.mark.parametrize("waiting", [0, 2])
def test_samples_that_are_left_out_are_told_where_there_are_any(monkeypatch: pytest.MonkeyPatch, waiting: int) -> None:
    done: list[str] = []
    skips: Any = SimpleNamespace(
        waiting=dict.fromkeys(range(waiting)), share=lambda: done.append("share"), check=lambda: done.append("check")
    )
    loader: Any = SimpleNamespace(counts=PositionCounts(), upcoming=[3])
    exchange = StepExchange(lambda: PAIR, lambda: loader, skips)
    monkeypatch.setattr("paddlemix.trainer.steps.exchange.gathered_tensor", lambda own: paddle.stack([own * 0, own]))
    messages = exchange.begin(paddle.full([], 2.0))
    assert messages is not None
    exchange.end(messages.numpy())
    assert done == (["share", "check"] if waiting else [])  # though this process may have none


def test_an_error_waits_for_the_next_message(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, _ = exchange_of(PAIR, [])
    monkeypatch.setattr("paddlemix.trainer.steps.exchange.gathered_tensor", lambda own: paddle.stack([own, own * 0]))
    monkeypatch.setattr(collectives, "gathered_objects", lambda value: [value, None])
    with exchange.held():
        raise OSError("the disk is full")
    with exchange.held():
        raise ValueError("and then another")
    messages = exchange.begin(paddle.full([], 2.0))
    assert messages is not None
    with pytest.raises(OSError, match="full"):
        exchange.end(messages.numpy())


def test_an_error_of_one_callback_leaves_out_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later one may wait for all processes."""
    exchange, _ = exchange_of(PAIR, [])
    called: list[str] = []

    def callback(name: str) -> Any:
        def on_step_end(args: Any, state: Any, control: str, **_: Any) -> str:
            called.append(name)
            if name == "fails":
                raise OSError("the disk is full")
            return f"{control} {name}"

        return SimpleNamespace(on_step_end=on_step_end)

    handler: Any = CallbackHandler([], None, None, None, None)
    handler.callbacks = [callback(name) for name in ("first", "fails", "last")]
    exchange.guard(handler)
    assert handler.call_event("on_step_end", None, None, "begin") == "begin first last"
    assert called == ["first", "fails", "last"]
    monkeypatch.setattr(collectives, "gathered_objects", lambda value: [value, None])
    with pytest.raises(OSError, match="full"):
        exchange.settle()


@pytest.mark.parametrize(
    ("other", "expected"), [((0, 0), None), ((15, 0), EvaluationStopped), ((0, 1), OtherProcessError)]
)
def test_between_two_batches_one_message_is_sent(
    monkeypatch: pytest.MonkeyPatch, other: tuple[int, int], expected: type[Exception] | None
) -> None:
    exchange, _ = exchange_of(PAIR, [])
    sent: list[Any] = []

    def gathered(values: Any) -> np.ndarray:
        sent.append(list(values))
        return np.array([values, [*other, 0]], dtype=np.float32)

    monkeypatch.setattr("paddlemix.trainer.steps.exchange.gathered", gathered)
    monkeypatch.setattr(
        collectives, "gathered_objects", lambda value: [value, "no picture"] if other[1] else sent.append(value)
    )
    if expected is None:
        exchange.between_batches(None)
    else:
        with pytest.raises(expected):
            exchange.between_batches(None)
    assert sent == [[0, 0, 0]]


def test_processes_of_one_model_have_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four processes the last has left out a sample that the one before has: their layers would wait for ever."""
    layout = Layout(world_size=4, rank=0, data_size=2, tensor_group=SimpleNamespace(nranks=2, rank=0))
    exchange, _ = exchange_of(layout, [])
    tokens = [20, 20, 30, 30]
    monkeypatch.setattr(
        "paddlemix.trainer.steps.exchange.gathered",
        lambda values: np.array([[*values[:-1], number] for number in tokens], dtype=np.float32),
    )
    monkeypatch.setattr("paddlemix.trainer.steps.exchange.meet", lambda: None)
    assert exchange.supervised(20) == 50  # each once
    exchange.between_batches(None, 20)
    tokens[3] = 25
    for call in (lambda: exchange.supervised(20), lambda: exchange.between_batches(None, 20)):
        with pytest.raises(UserError, match="processes 2 and 3 compute one model .* 30 and 25 supervised tokens"):
            call()
