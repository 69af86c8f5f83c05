"""What a card makes of the pieces of a run: numbers, speeds, and operators that it lacks; takes minutes.

Runs as its own process, `python -m paddlemix.doctor.card_checks DEVICE`, because paddle reports operators that fall
back to the host only on standard error, and only if that is requested before it loads.  Prints one JSON object per
check on standard output, and the check's name on standard error before it begins; `card.py` reads both.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from paddlemix.doctor.slow import OPERATOR

MARK = "paddlemix check: "
# side of a product and of a layer, rows of the layer's input, decoded tokens
_PRODUCT, _ROWS, _TOKENS = 1024, 64, 16
_SLOW = 0.02  # seconds of a call that is timed alone
_TF32 = 1e-5  # relative error of such a product above which operands were rounded; float32 stays under 1e-6
_LOSS = {
    "float32": 1e-3,
    "bfloat16": 1e-2,
    "float16": 2e-3,
}  # relative, of a tiny model; ten times that of its gradient
_QUANTIZED = 2e-2

Row = dict[str, Any]  # check, result, wrong (what is, or None); number: TFLOP/s or seconds, where a time was taken


def fused(device: str) -> Iterator[Row]:
    """Which fused kernels pass, with the head sizes of published models."""
    from paddlemix.models.kernels.fused import choose_kernels, use_plain_kernels

    for dtype in ("bfloat16", "float16"):
        for line in choose_kernels(None, device, dtype):
            yield {"check": f"fused, {dtype}", "result": line, "wrong": None}
    # The next checks start without them.
    use_plain_kernels()


def products(device: str) -> Iterator[Row]:
    """Rounding of float32 products, and how fast products are."""
    import numpy as np
    import paddle

    random = np.random.default_rng(0)
    left, right = (random.standard_normal([_PRODUCT, _PRODUCT]).astype(np.float32) for _ in range(2))
    # Eight rows are enough for an error, and float64 is slow.
    exact = left[:8].astype(np.float64) @ right.astype(np.float64)
    found = paddle.matmul(paddle.to_tensor(left), paddle.to_tensor(right))[:8].numpy()
    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    how = "rounded operands (TF32 or HF32)" if error > _TF32 else "float32"
    yield {"check": "float32 products", "result": f"{how}, relative error {error:.1e}", "wrong": None}
    for dtype in ("float32", "bfloat16", "float16"):
        a, b = (paddle.to_tensor(values).astype(dtype) for values in (left, right))
        seconds = _seconds(functools.partial(paddle.matmul, a, b))
        # a multiplication and an addition for each of the n**3 terms
        rate = 2 * _PRODUCT**3 / seconds / 1e12
        result = f"{rate:.2f} TFLOP/s at {_PRODUCT}"
        yield {"check": f"products, {dtype}", "result": result, "wrong": None, "number": rate}
    small = paddle.ones([8])
    seconds = _seconds(lambda: small + small)
    yield {"check": OPERATOR, "result": f"{seconds * 1e6:.1f} us", "wrong": None, "number": seconds}


def losses(device: str) -> Iterator[Row]:
    """A tiny model's loss and the length of its gradient in each precision, beside the CPU's in float32."""
    from paddlemix.device import select_device
    from paddlemix.doctor.self_test import start_weights
    from paddlemix.doctor.tiny_runs import loss_and_gradient, sharpened

    # Plain random weights give even scores, whose loss hides rounding.
    weights = sharpened(start_weights())  # the CPU is the current device
    wanted = loss_and_gradient(weights, "float32")
    select_device(device)
    for dtype, most in _LOSS.items():
        found = loss_and_gradient(weights, dtype)
        gaps = [abs(a - b) / b for a, b in zip(found, wanted, strict=True)]
        result = f"{found[0]:.4f} (CPU {wanted[0]:.4f}), gradient off by {gaps[1]:.1e}"
        wrong = None if gaps[0] <= most and gaps[1] <= 10 * most else f"loss or gradient in {dtype} is not the CPU's"
        yield {"check": f"loss, {dtype}", "result": result, "wrong": wrong}


def repeated_rows(device: str) -> Iterator[Row]:
    """The gradient of a row that is gathered several times, as `image_newline` is."""
    import paddle

    from paddlemix.models.kernels.operators import take_rows

    table = paddle.ones([5, 4], dtype="bfloat16")
    table.stop_gradient = False
    take_rows(table, paddle.to_tensor([0, 4, 1, 4, 2, 4])).sum().backward()
    found = table.grad.astype("float32").numpy()[4].tolist()
    # row 4 is taken three times, and 3 is exact in bfloat16: any other value is a lost addition
    wrong = None if found == [3.0] * 4 else "gradients of repeated rows are not summed: image_newline trains wrongly"
    yield {"check": "gradient of a repeated row", "result": f"{found[0]:g} of 3", "wrong": wrong}


def quantized(device: str) -> Iterator[Row]:
    """Layers of each kind: outputs compared with the same weights held wide, and time."""
    import numpy as np
    import paddle

    from paddlemix.peft.quantized_linear import QuantizedLinear
    from paddlemix.peft.quantized_weight import quantize_weight

    random = np.random.default_rng(0)
    weight = (random.standard_normal([_PRODUCT, _PRODUCT]) * 0.02).astype(np.float32)
    inputs = paddle.to_tensor(random.standard_normal([_ROWS, _PRODUCT]).astype(np.float32)).astype("bfloat16")
    for kind in ("nf4", "int8"):
        layer = QuantizedLinear(kind, (_PRODUCT, _PRODUCT))
        layer.fill(quantize_weight(weight, kind))
        # the layer's own codes made wide: the rounding to codes is not part of the error
        wanted = paddle.matmul(inputs, layer.dequantized().astype("bfloat16")).astype("float32").numpy()
        found = layer(inputs).astype("float32").numpy()
        error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

        def widen(layer: QuantizedLinear = layer) -> Any:
            return layer.group.made(paddle.bfloat16)[0]

        seconds = _seconds(widen)
        result = f"relative error {error:.1e}, {seconds * 1e3:.2f} ms to make {_PRODUCT}x{_PRODUCT} wide"
        wrong = None if error < _QUANTIZED else f"{kind} layers compute something else"
        yield {"check": f"quantised, {kind}", "result": result, "wrong": wrong, "number": seconds}


def training(device: str) -> Iterator[Row]:
    """Steps of a tiny model in bf16 with an adapter, dropout and recomputation."""
    from paddlemix.device import select_device
    from paddlemix.doctor.self_test import start_weights
    from paddlemix.doctor.tiny_runs import adapter_step

    weights = start_weights()
    kernels = _as_users_run(select_device(device))
    for kind in (None, "nf4", "int8"):
        seconds, loss = adapter_step(weights, kind)
        # NaN is the only number that differs from itself
        wrong = None if loss == loss else "the loss is not a number"
        result = f"{seconds * 1e3:.0f} ms, {kernels}"
        yield {"check": f"LoRA step, {kind or 'plain'}", "result": result, "wrong": wrong, "number": seconds}


def decoding(device: str) -> Iterator[Row]:
    """Tokens of a tiny model of two layers in bf16: what a token costs besides arithmetic."""
    from paddlemix.device import select_device
    from paddlemix.doctor.self_test import start_weights
    from paddlemix.doctor.tiny_runs import decoding_seconds

    weights = start_weights()
    kernels = _as_users_run(select_device(device))
    seconds = decoding_seconds(weights, _TOKENS)
    result = f"{seconds * 1e3:.2f} ms for 2 layers, {kernels}"
    yield {"check": "a decoded token", "result": result, "wrong": None, "number": seconds}


def _as_users_run(device: str) -> str:
    """Chooses the fused kernels that fit the tiny model, as loading a model does; returns which, in words."""
    from paddlemix.doctor.self_test import CONFIG
    from paddlemix.models.kernels.fused import KernelSizes, choose_kernels

    lines = choose_kernels(None, device, "bfloat16", KernelSizes.of(CONFIG.text))
    fused = [line.partition(":")[0] for line in lines if line.endswith(": fused")]
    return f"fused {', '.join(fused)}" if fused else "plain kernels"


def memory(device: str) -> Iterator[Row]:
    """The peak memory of these checks."""
    from paddlemix.device import peak_memory_bytes

    yield {"check": "memory", "result": f"at most {peak_memory_bytes(device) / 2**20:.0f} MiB", "wrong": None}


CHECKS: tuple[Callable[[str], Iterator[Row]], ...] = (
    *(fused, products, losses, repeated_rows, quantized, training, decoding, memory),
)


def _print_row(row: Row) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def _seconds(call: Callable[[], Any]) -> float:
    """Duration of one call, including the device's work."""
    import paddle

    def several(times: int) -> float:
        paddle.device.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            call()
        paddle.device.synchronize()
        return (time.perf_counter() - start) / times

    # the first call also compiles or loads the operator
    call()
    # A slow call is timed once: 20 of them would take minutes.
    once = several(1)
    return once if once > _SLOW else several(20)


def main(device: str) -> None:
    """Runs every check; an exception that one raises becomes its result."""
    from paddlemix.device import prepare_environment

    prepare_environment()
    from paddlemix.device import select_device

    name = select_device(device)
    for check in CHECKS:
        sys.stderr.write(f"{MARK}{check.__name__}\n")
        sys.stderr.flush()
        try:
            select_device(name)  # the check before may have stopped while the CPU was current
            for row in check(name):
                _print_row(row)
        except Exception as error:  # a device's own errors are of any kind
            reason = f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"
            _print_row({"check": check.__name__, "result": "stops", "wrong": reason})


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stderr.flush()
    os._exit(0)  # everything is reported: a plugin that hangs or aborts while it is unloaded changes nothing
