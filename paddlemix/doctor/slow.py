"""What is slower on a card than it has to be, judged from the numbers of its own checks.

Nothing is compared with a table of cards: each time is held against another of the same card, so that the verdict means
the same on all of them.  A bound is several times what the checks' operators cost by count (tests/npu/test_budgets.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

OPERATOR = "a small operator"
_HALF_RATE = 1.0  # of float32's: matrix units compute half precision at twice the rate or more
_WIDE_OPERATORS = 100  # in the time to make a layer wide; about 20 are called
_TOKEN_OPERATORS = 500  # in the time of a token of two layers; about 120 are called without fused kernels
_STEP = 2.0  # times a step on plain weights; in operators a step on codes costs 1.1 times as much


def slow_parts(
    numbers: Mapping[str, float], fused: Sequence[tuple[str, str]], on_host: Mapping[str, Sequence[str]]
) -> list[str]:
    """A sentence for each thing that is slow, the check's name first.

    Args:
        numbers: check -> TFLOP/s of products, seconds of everything else; what was not measured is left out.
        fused: check and line of each kernel, as `choose_kernels` words it.
        on_host: check -> operators that the card lacks.
    """
    return [*_plain_forms(fused), *_products(numbers), *_times(numbers), *_host_copies(on_host)]


def _plain_forms(fused: Sequence[tuple[str, str]]) -> Iterator[str]:
    for check, line in fused:
        kernel, _, reason = line.partition(": plain, ")
        if reason:
            yield f"{check}: {kernel} is computed in its plain form, though a fused kernel exists for this card"


def _products(numbers: Mapping[str, float]) -> Iterator[str]:
    wide = numbers.get("products, float32")
    for dtype in ("bfloat16", "float16"):
        rate = numbers.get(f"products, {dtype}")
        if wide and rate is not None and rate < _HALF_RATE * wide:
            yield (
                f"products, {dtype}: {rate / wide:.2f} of float32's rate, at least {_HALF_RATE:g} is expected; no "
                f"matrix units compute {dtype}"
            )


def _times(numbers: Mapping[str, float]) -> Iterator[str]:
    small, step = numbers.get(OPERATOR), numbers.get("LoRA step, plain")
    for kind in ("nf4", "int8"):
        yield from _over(f"quantised, {kind}", numbers, small, _WIDE_OPERATORS, OPERATOR)
        yield from _over(f"LoRA step, {kind}", numbers, step, _STEP, "the step on plain weights")
    yield from _over("a decoded token", numbers, small, _TOKEN_OPERATORS, OPERATOR)


def _over(check: str, numbers: Mapping[str, float], unit: float | None, most: float, name: str) -> Iterator[str]:
    found = numbers.get(check)
    if unit and found is not None and found > most * unit:
        yield f"{check}: {found / unit:.1f} times {name}, at most {most:g} is expected"


def _host_copies(on_host: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for check, operators in on_host.items():
        count = "1 operator goes" if len(operators) == 1 else f"{len(operators)} operators go"
        yield f"{check}: {count} to the host, and each waits for the card twice"
