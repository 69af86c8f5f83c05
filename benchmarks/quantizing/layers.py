"""A quantised linear layer beside the float layer it was made of: time of both passes, bytes and error.

Layers take turns within a round; times are medians over the rounds, as multiples of the float layer's.  `plain` is the
same layer without the kernels in C.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import paddle
from paddle.nn import functional

from paddlemix.models.kernels import cpu_library
from paddlemix.peft import cpu_products
from paddlemix.peft.quantized_linear import QuantizedLinear
from paddlemix.peft.quantized_weight import KINDS, quantize_weight

Product = Callable[[paddle.Tensor], paddle.Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this part takes."""
    parser.add_argument("--sizes", nargs="+", default=["512x1376", "4096x11008"], help="inputs x outputs")
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 1], help="rows of the input")
    parser.add_argument("--rounds", type=int, default=15)


def make_products(in_features: int, out_features: int) -> tuple[dict[str, Product], dict[str, str]]:
    """Name -> layer for the float one and every kind, and what is to be said of each."""
    weight = 0.02 * np.random.RandomState(0).randn(in_features, out_features).astype(np.float32)
    plain = paddle.to_tensor(weight)
    products: dict[str, Product] = {"float32": lambda inputs: functional.linear(inputs, plain)}
    said = {"float32": "4 bytes"}
    for kind in KINDS:
        coded = quantize_weight(weight, kind)
        layer = QuantizedLinear(kind, (in_features, out_features))
        layer.fill(coded)
        error = np.linalg.norm(layer.dequantized().numpy() - weight) / np.linalg.norm(weight)
        products[kind] = layer
        if cpu_products.can_decode(kind, layer._buffers):
            products[f"{kind} plain"], said[f"{kind} plain"] = layer, ""
        said[kind] = f"{coded.num_bytes / weight.size:.3f} bytes, relative error {error:.5f}"
    return products, said


def seconds(product: Product, inputs: paddle.Tensor, plain: bool, backward: bool) -> float:
    """Of one forward pass, or of a forward and a backward pass."""
    inputs = inputs.detach()
    inputs.stop_gradient = not backward
    with cpu_library.switched_off() if plain else contextlib.nullcontext():
        start = time.perf_counter()
        outputs = product(inputs)
        if backward:
            outputs.backward(paddle.ones_like(outputs))
        return time.perf_counter() - start


def run(arguments: argparse.Namespace) -> int:
    """Prints one line per size, rows and kind."""
    for size in arguments.sizes:
        in_features, out_features = map(int, size.split("x"))
        products, said = make_products(in_features, out_features)
        for rows in arguments.rows:
            inputs = paddle.randn([rows, in_features])
            times: dict[tuple[str, bool], list[float]] = {}
            for number in range(arguments.rounds + 2):
                for name, product in products.items():
                    for backward in (False, True):
                        taken = seconds(product, inputs, name.endswith("plain"), backward)
                        if number >= 2:  # the first rounds warm up
                            times.setdefault((name, backward), []).append(taken)
            reference = {backward: median(times["float32", backward]) for backward in (False, True)}
            for name in products:
                forward, both = (median(times[name, backward]) for backward in (False, True))
                ratios = f"forward {forward / reference[False]:5.2f} x, with backward {both / reference[True]:5.2f} x"
                print(
                    f"{size} rows {rows:4} {name:10} {1e3 * forward:8.2f} ms {ratios}  {said[name]}".rstrip(),
                    flush=True,
                )
    return 0
