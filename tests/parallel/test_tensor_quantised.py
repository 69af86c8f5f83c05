"""Quantised bases and kinds of adapters over a tensor group: the numbers of one process, or a refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
from tests.parallel.cluster import Cluster, Outcome

# 192 inner numbers are parts of 128 and 64; an output of k_proj has two nf4 blocks, so no part ends with a group.
TEXT = DecoderConfig(
    vocab_size=50,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
)
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
LAYERS = (*COLUMNS, "o_proj", "down_proj")
MAX_GAP = 1e-5
STEPS = 4


def build(layout: Any, kind: str | None, coded: bool, settings: dict[str, Any]) -> tuple[Any, Any]:
    """A model of one process and its parts, with an adapter each.

    Args:
        kind: of quantised layers, None for plain ones.
        coded: whether the parts are read from a quantised model, or quantised while they are read.
        settings: of the adapter, without `modules`; "layers" are the last parts of their names.
    """
    import paddle

    from paddlemix.checkpoints.pretrained import build_model, fill_model, parameter_entries
    from paddlemix.checkpoints.quantized import stored_entries
    from paddlemix.peft.lora import LoRAConfig, add_lora, linear_names
    from paddlemix.peft.quantize import QuantizationConfig
    from paddlemix.peft.settings import is_adapter_weight

    sizes = LlavaConfig(text=TEXT, vision=VisionConfig(image_size=28, **VISION))
    quantization = None if kind is None else QuantizationConfig(kind=kind)
    paddle.seed(1)
    plain, random = build_model(sizes, initialise=True), np.random.RandomState(3)
    for _, parameter in plain.named_parameters():
        parameter.set_value((parameter.numpy() + 0.1 * random.randn(*parameter.shape)).astype("float32"))
    whole, parts = (
        build_model(sizes, quantization=quantization),
        build_model(sizes, quantization=quantization, layout=layout),
    )
    fill_model(whole, parameter_entries(plain), "a test")
    source = whole if coded else plain
    fill_model(parts, {**parameter_entries(source), **stored_entries(source)}, "a test")
    layers = settings.get("layers", LAYERS)
    given = {key: value for key, value in settings.items() if key != "layers"}
    names = tuple(name for name in linear_names(whole) if name.rpartition(".")[2] in layers)
    config, begins = LoRAConfig(r=3, modules=names, **given), not given.get("pissa")
    for model in (whole, parts) if begins else (whole,):
        paddle.seed(5)
        add_lora(model, config)
    if not begins:  # the parts continue it, as from a file
        adapter = {name: entry for name, entry in parameter_entries(whole).items() if is_adapter_weight(name)}
        with pytest.raises(UserError, match="'language_model.layers.0.self_attn.q_proj', which tensor parallelism"):
            add_lora(parts, config)
        add_lora(parts, config, adapter.keys())
        fill_model(parts, adapter, "an adapter", may_miss=lambda name: name not in adapter)
    return whole, parts


def learn(model: Any, trains: tuple[str, ...]) -> list[float]:
    """The loss of some steps of plain gradient descent, with the gradients' shares summed as a run sums them."""
    import paddle
    import paddle.distributed as dist

    from paddlemix.parallel.tensor.parts import has_partial_gradient
    from paddlemix.trainer.loss import LossModel

    random = np.random.RandomState(7)
    ids = paddle.to_tensor(random.randint(0, 50, [2, 9]))
    positions = paddle.arange(9).unsqueeze(0).expand([2, 9]).contiguous()
    pixels = paddle.to_tensor(random.randn(1, 3, 28, 28).astype("float32"))
    merge = np.arange(18)
    merge[1:5] = 18 + np.arange(4)
    merge_index, index = paddle.to_tensor(merge), paddle.arange(2, 15)
    targets = paddle.to_tensor(random.randint(0, 50, [13]))
    trained = []
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = not any(part in name for part in trains) or name.endswith("_start")
        trained += [] if parameter.stop_gradient else [parameter]
    losses = []
    model.train()
    paddle.seed(11)  # once, so that a difference in what is drawn reaches all later steps
    for _ in range(STEPS):
        loss, _ = LossModel(model)(
            index, targets, positions, input_ids=ids, pixel_values=pixels, merge_index=merge_index
        )
        loss.backward()
        losses.append(float(loss) / 13)
        for parameter in trained:
            assert parameter.grad is not None
            if has_partial_gradient(parameter):
                dist.all_reduce(parameter.grad)
            parameter.set_value(parameter - 0.02 * parameter.grad)
            parameter.clear_gradient(False)
    return losses


def compare_all() -> dict[str, dict[str, float]]:
    """Of every case, what `compare` returns."""
    import paddle.distributed as dist

    from paddlemix.parallel.layout import Layout

    dist.init_parallel_env()
    layout = Layout(world_size=2, rank=dist.get_rank(), tensor_group=dist.get_group(0))
    return {name: compare(layout, *case) for name, case in CASES.items()}


def compare(
    layout: Any, kind: str | None, coded: bool, settings: dict[str, Any], trains: tuple[str, ...]
) -> dict[str, float]:
    """Largest differences between one process and its tensor group: of losses and of all weights after training."""
    from paddlemix.checkpoints.quantized import stored_entries
    from paddlemix.parallel.tensor.parts import part_of

    whole, parts = build(layout, kind, coded, settings)
    before = {name: parameter.numpy() for name, parameter in whole.named_parameters()}
    expected, found = learn(whole, trains), learn(parts, trains)
    assert expected[-1] < expected[0] - 1e-3, expected
    result = {"loss": max(abs(mine - its) for mine, its in zip(expected, found, strict=True))}
    weights = dict(whole.named_parameters())
    for name, parameter in parts.named_parameters():
        part, wanted = part_of(parameter), weights[name].numpy()
        result[name] = float(np.abs(parameter.numpy() - (wanted if part is None else part.cut(wanted))).max())
        assert parameter.stop_gradient or name.endswith("k_proj.bias") or (wanted != before[name]).any(), name
    # What a result has of codes is whole again, on every process.
    for name, entry in stored_entries(parts, layout).items():
        assert entry.read().tobytes() == stored_entries(whole)[name].read().tobytes(), name
    return result


LORA = {"lora_alpha": 6}
CASES: dict[str, tuple[str | None, bool, dict[str, Any], tuple[str, ...]]] = {
    "nf4": ("nf4", False, LORA, ("lora_",)),
    "nf4 of a quantised model": ("nf4", True, LORA, ("lora_",)),
    "int8": ("int8", False, LORA, ("lora_",)),
    "int8 of a quantised model, rsLoRA": ("int8", True, {**LORA, "rslora": True}, ("lora_",)),
    "bfloat16": ("bfloat16", False, LORA, ("lora_", "bias")),
    "DoRA on nf4": ("nf4", False, {**LORA, "use_dora": True, "layers": COLUMNS}, ("lora_",)),
    "DoRA and biases": (None, False, {**LORA, "use_dora": True, "layers": (*COLUMNS, "lm_head")}, ("lora_", "bias")),
    "dropout": ("int8", False, {**LORA, "lora_dropout": 0.3, "layers": (*LAYERS, "linear_1")}, ("lora_",)),
    "DoRA with dropout": (
        "nf4",
        False,
        {**LORA, "lora_dropout": 0.3, "use_dora": True, "layers": COLUMNS},
        ("lora_",),
    ),
    "a continued PiSSA": (None, False, {**LORA, "pissa": True}, ("lora_",)),
    "tower, projector and output layer": (
        "int8",
        False,
        {**LORA, "layers": (*LAYERS, "lm_head", "linear_1", "linear_2", "fc1", "fc2")},
        ("lora_", "embed_tokens", "projector"),
    ),
}


@pytest.fixture(scope="module")
def outcome(cluster: Cluster) -> Outcome:
    return cluster.call(2, "tests.parallel.test_tensor_quantised:compare_all")


@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_process(outcome: Outcome, case: str) -> None:
    assert outcome.ok, outcome.told()
    for differences in (result[case] for result in outcome.results):
        assert {name: value for name, value in differences.items() if value > MAX_GAP} == {}
        assert len(differences) > 20


def test_rows_drop_their_part_of_one_mask() -> None:
    from paddlemix.models.kernels.operators import Dropping
    from paddlemix.parallel.tensor.parts import Part
    from paddlemix.peft.split_adapters import dropping_of

    part = Part(axis=0, start=64, stop=96, size=192)
    assert dropping_of(0.1, part) == Dropping(0.1, width=192, first=64)
    assert dropping_of(0.1, part.along(1)) == dropping_of(0.1, None) == Dropping(0.1)


@pytest.mark.parametrize(
    ("filled", "advice"),
    [
        (
            False,
            r'lora_target_modules to "language_model\.\*\(q_proj\|k_proj\|v_proj\|gate_proj\|up_proj\)" or use_dora',
        ),
        (True, r"merge the adapter \(paddlemix merge-lora\), or use a tensor_parallel_degree .* of 1"),
    ],
)
def test_dora_on_split_inputs_is_refused(filled: bool, advice: str) -> None:
    """A new one and a loaded one, before anything is replaced."""
    from paddle import nn

    from paddlemix.parallel.tensor.parts import Part, mark_linear
    from paddlemix.peft.lora import LoRAConfig, add_lora

    model = nn.LayerDict({"q_proj": nn.Linear(8, 4), "o_proj": nn.Linear(4, 8)})
    for name, axis in (("q_proj", 1), ("o_proj", 0)):
        mark_linear(model[name], Part(axis=axis, start=4, stop=8, size=8))
    config = LoRAConfig(r=2, use_dora=True, modules=("q_proj", "o_proj"))
    weights = ("lora_A", "lora_B", "lora_magnitude_vector")
    names = [f"{name}.{weight}" for name in config.modules for weight in weights] if filled else []
    with pytest.raises(UserError, match=f"DoRA needs all inputs of 'o_proj', .*{advice}"):
        add_lora(model, config, names)
    assert isinstance(model["q_proj"], nn.Linear)
