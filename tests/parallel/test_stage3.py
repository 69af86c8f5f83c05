"""Weights in slices on stand-in NPUs: what is whole when, and what the optimiser learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.models.configuration import DecoderConfig, LlavaConfig
from tests.parallel.cluster import Circumstances, Cluster

WIDTH, LAYERS = 32, 4


def begin(sharding: str) -> Any:
    """Joins the processes; returns the layout."""
    from paddlemix.config.load import load_config
    from paddlemix.device import select_device
    from paddlemix.trainer.processes import begin_processes

    config = load_config(None, ["model_name_or_path=model", "output_dir=unused", f"sharding={sharding}"])
    return begin_processes(config, select_device("npu"))[1]


def make_layers(trained: list[int]) -> Any:
    """Linear layers in a row, drawn alike everywhere, those of `trained` with a gradient."""
    import paddle

    random = np.random.RandomState(2)
    model = paddle.nn.Sequential(*(paddle.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    for number, layer in enumerate(model):
        for parameter in layer.parameters():
            parameter.set_value((0.3 * random.randn(*parameter.shape)).astype("float32"))
            parameter.stop_gradient = number not in trained
    return model


def optimizer_of(model: Any) -> Any:
    import paddle

    trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    return paddle.optimizer.AdamW(learning_rate=0.01, parameters=trained, weight_decay=0.1)


def steps(model: Any, optimizer: Any, rows: list[Any]) -> list[list[str]]:
    """Two steps on these rows; after each backward pass, which weights are whole."""
    import paddle

    whole = []
    for _ in range(2):
        loss = sum((model(paddle.to_tensor(row)) ** 2).mean() for row in rows) / len(rows)
        loss.backward()
        whole.append([name for name, weight in model.named_parameters() if getattr(weight, "status", "") == "all"])
        optimizer.step()
        optimizer.clear_grad()
    return whole


def learn(trained: list[int]) -> dict[str, Any]:
    """Run on every process: two steps in slices, and in this process alone on the rows of all."""
    import paddle

    from paddlemix.parallel import deferred, stage3
    from paddlemix.parallel.shares import slice_of

    layout, deferred.LARGE = begin("stage3"), WIDTH
    inputs = [np.random.RandomState(rank).randn(3, WIDTH).astype("float32") for rank in range(layout.world_size)]
    alone, shared = make_layers(trained), make_layers(trained)
    steps(alone, optimizer_of(alone), inputs)
    model, optimizer = stage3.shard_weights(shared, optimizer_of(shared), layout, None)
    whole = steps(model, optimizer, [inputs[layout.rank]])
    gap, bytes_held = 0.0, 0
    for weight, expected in zip(shared.parameters(), alone.parameters(), strict=True):
        part = slice_of(weight, layout.rank)
        flat = expected.numpy().reshape(-1)
        own = weight.numpy().reshape(-1) if part is None else part.tensor.numpy()[: part.stop - part.start]
        of_alone = flat if part is None else flat[part.start : part.stop]
        gap = max(gap, float(np.abs(own - of_alone).max()))
        bytes_held += own.nbytes
    assert paddle.get_device().startswith("npu")
    return {"whole": whole, "gap": gap, "bytes": bytes_held}


def test_slices_learn_what_whole_weights_do(cluster: Cluster) -> None:
    for trained in ([0, 1, 2, 3], [1, 3]):
        outcome = cluster.call(2, f"{__name__}:learn", Circumstances(where="npu"), trained=trained)
        assert outcome.ok, outcome.told()
        for result in outcome.results:
            assert result["gap"] < 1e-6
            # Paddle's own class keeps frozen weights whole after the first backward pass.
            assert result["whole"] == [[], []]
            assert result["bytes"] == LAYERS * 4 * (WIDTH * WIDTH // 2 + WIDTH)  # half of each matrix, whole biases
        assert outcome.collectives[0]["all_gather:float32"][0] > 0


def load(directory: str, defers: bool) -> dict[str, int]:
    """Run on every process: a model from its files into slices; bytes of the device at most, and of the model."""
    import ctypes
    import os

    from paddlemix.checkpoints.base_model import BaseSpec
    from paddlemix.checkpoints.load import load_base
    from paddlemix.parallel import deferred, stage3
    from tests.npu_double.build import LIBRARY

    layout, deferred.LARGE = begin("stage3"), 4096
    model = load_base(BaseSpec(model=directory), "float32", defers).model
    expected = {name: list(weight.shape) for name, weight in model.named_parameters()}
    stage3.shard_weights(model, optimizer_of(model), layout, None)
    library = ctypes.CDLL(str(Path(os.environ["CUSTOM_DEVICE_ROOT"]) / LIBRARY))
    library.npu_double_stat.restype = ctypes.c_size_t
    peak = int(library.npu_double_stat(layout.rank, b"peak"))
    return {"peak": peak, "all": sum(4 * int(np.prod(shape)) for shape in expected.values())}


def test_loading_takes_a_share_and_not_the_model(cluster: Cluster, tmp_path: Path) -> None:
    from paddlemix.checkpoints.pretrained import Pretrained, build_model, save_model

    text = DecoderConfig(
        vocab_size=300, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4
    )
    model = build_model(LlavaConfig(text=text, vision=None), initialise=True)
    save_model(Pretrained(model, None, tmp_path), tmp_path / "model")
    shares = {}
    for defers in (True, False):
        values = {"directory": str(tmp_path / "model"), "defers": defers}
        outcome = cluster.call(2, f"{__name__}:load", Circumstances(where="npu"), **values)
        assert outcome.ok, outcome.told()
        shares[defers] = [result["peak"] / result["all"] for result in outcome.results]
    # Half of the model, and the embedding, which an adapter's base is known by.
    assert max(shares[True]) < 0.6, shares
    assert min(shares[False]) > 0.95, shares


def graphs(rows: list[int]) -> list[str]:
    """Run on a process: how the gradient of an adapted layer is computed, for numbers of rows."""
    import paddle

    from paddlemix.peft.lora import LoRAConfig, add_lora

    begin("")
    model = paddle.nn.Sequential(paddle.nn.Linear(64, 64, bias_attr=False))
    add_lora(model, LoRAConfig(r=2, lora_alpha=4, modules=("0",)))
    return [model(paddle.ones([count, 64])).grad_fn.name() for count in rows]


def test_the_order_of_gradients_does_not_depend_on_the_data(cluster: Cluster) -> None:
    """Processes that send gradients as they come must come to them in one order."""
    outcome = cluster.call(1, f"{__name__}:graphs", Circumstances(where="npu"), rows=[1, 100])
    assert outcome.ok, outcome.told()
    few, many = outcome.results[0]
    assert few == many
