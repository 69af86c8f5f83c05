"""A process that has a part of a model reads that part of every weight, and never has a large one whole."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.adapters.adapter import weight_shapes
from paddlemix.checkpoints.files.tensors import TensorEntry, array_entry, transposed
from paddlemix.checkpoints.files.weight_files import read_weights, write_json, write_safetensors, write_weights
from paddlemix.checkpoints.layouts.weight_names import LLAMA, is_linear_weight
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained, build_model, save_model
from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig, LlavaConfig
from paddlemix.parallel.layout import Layout
from paddlemix.parallel.tensor.parts import part_of
from paddlemix.peft.lora import merge_lora
from tests.peft_cases import BASE, CASES, GOLDEN_ADAPTERS
from tests.tiny_models import randomise

# Embedding and output layer are 6.4 MB, the projections to and from the inner width 2.6, and all else is small.
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 10000,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 25001,
}
EMBEDDING = 25001 * 64 * 4  # bytes


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same text-only model in our layout and in Llama's, where linear weights are transposed."""
    root = tmp_path_factory.mktemp("large")
    model = randomise(build_model(LlavaConfig(text=DecoderConfig(**TEXT), vision=None)), seed=5)
    save_model(Pretrained(model, None, root / "ours"), root / "ours")
    (root / "llama").mkdir()
    tensors: dict[str, TensorEntry] = {}
    for name, entry in read_weights(root / "ours").items():
        tensors[LLAMA.to_theirs(name)] = transposed(entry) if is_linear_weight(name, entry.shape) else entry
    write_weights(root / "llama", tensors, 10**9)
    write_json(root / "llama" / "config.json", {"model_type": "llama", **TEXT})
    return {"ours": root / "ours", "llama": root / "llama"}


def layout_of(rank: int, degree: int = 2) -> Layout:
    """That of one process of a tensor group; loading sends nothing to the others."""
    return Layout(world_size=degree, rank=rank, tensor_group=SimpleNamespace(nranks=degree, rank=rank))


@pytest.mark.parametrize("kind", ["ours", "llama"])
@pytest.mark.parametrize("rank", [0, 1])
def test_no_large_weight_is_ever_whole(places: dict[str, Path], kind: str, rank: int) -> None:
    memory = paddle.base.core
    before = memory.host_memory_stat_current_value("Allocated", 0)
    memory.host_memory_stat_reset_peak_value("Allocated", 0)
    tracemalloc.start()
    model = load_pretrained(places[kind], layout=layout_of(rank)).model
    _, arrays = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # numpy's arrays, without pages of mapped files: at most the process's part of the weight that is being read
    assert arrays < 0.6 * EMBEDDING, arrays
    # paddle's tensors: those of the model and nothing beside them
    tensors = memory.host_memory_stat_peak_value("Allocated", 0) - before
    own = sum(weight.size * weight.element_size() for weight in model.parameters())
    assert own < 0.51 * sum(entry.num_bytes for entry in read_weights(places[kind]).values())
    assert tensors < own + 0.1 * EMBEDDING, (tensors, own)


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_every_process_has_its_part(places: dict[str, Path], kind: str) -> None:
    whole = dict(load_pretrained(places[kind]).model.named_parameters())
    seen = {name: np.zeros(weight.shape, dtype=bool) for name, weight in whole.items()}
    for rank in (0, 1):
        for name, weight in load_pretrained(places[kind], layout=layout_of(rank)).model.named_parameters():
            part = part_of(weight)
            assert (weight == (whole[name] if part is None else part.cut(whole[name]))).all(), name
            (seen[name] if part is None else part.cut(seen[name]))[...] = True
    assert all(places.all() for places in seen.values())


def test_a_broken_number_is_found_by_who_reads_it(places: dict[str, Path], tmp_path: Path) -> None:
    values = {name: np.array(entry.read()) for name, entry in read_weights(places["ours"]).items()}
    values["lm_head.weight"][3, -1] = np.nan  # of the last token
    (tmp_path / "config.json").write_bytes((places["ours"] / "config.json").read_bytes())
    write_safetensors(tmp_path / "model.safetensors", {name: array_entry(value) for name, value in values.items()})
    load_pretrained(tmp_path, layout=layout_of(0))
    with pytest.raises(UserError, match=r"'lm_head.weight' of .* holds NaN"):
        load_pretrained(tmp_path, layout=layout_of(1))


def test_shapes_of_wholes_are_named(places: dict[str, Path], tmp_path: Path) -> None:
    values = {name: array_entry(np.array(entry.read())) for name, entry in read_weights(places["ours"]).items()}
    name = "language_model.layers.0.mlp.down_proj.weight"
    values[name] = array_entry(np.zeros((9999, 64), dtype=np.float32))
    (tmp_path / "config.json").write_bytes((places["ours"] / "config.json").read_bytes())
    write_safetensors(tmp_path / "model.safetensors", values)
    with pytest.raises(UserError, match=re.escape(f"{name} is [9999, 64], expected [10000, 64]")):
        load_pretrained(tmp_path, layout=layout_of(1))


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.is_golden and not {"dora", "pissa"} & {name}]
)
def test_an_adapter_of_another_program_is_split_as_its_base_is(name: str) -> None:
    """Also after it is merged, which gives parts of the merged weights."""
    place, base = GOLDEN_ADAPTERS / name, str(BASE)
    whole = load_pretrained(place, base=base).model
    parts = [load_pretrained(place, base=base, layout=layout_of(rank)).model for rank in (0, 1)]
    for is_merged in (False, True):
        if is_merged:
            assert merge_lora(whole) == merge_lora(parts[0]) == merge_lora(parts[1]) > 0
        weights = dict(whole.named_parameters())
        for model in parts:
            found = dict(model.named_parameters())
            assert found.keys() == weights.keys()
            for key, weight in found.items():
                part = part_of(weight)
                wanted = (weights[key] if part is None else part.cut(weights[key])).numpy()
                np.testing.assert_allclose(weight.numpy(), wanted, rtol=0, atol=1e-6, err_msg=key)
            assert weight_shapes(model) == weight_shapes(whole)
