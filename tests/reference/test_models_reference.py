"""Tiny random LLaVA models against transformers and torch, both ways: its checkpoints in ours, ours in it.

Run by `make reference`.  The tiling is chosen here and given to both sides: transformers reads grids as (height, width)
and rounds the unpadding differently at rare sizes, which `tests/processors` covers.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.adapters.adapter import AdapterSettings, fingerprint
from paddlemix.checkpoints.convert.export_adapter import export_adapter, write_torch
from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.files.pickles import read_torch
from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import read_weights, write_weights
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.datasets.collate import collate
from paddlemix.models.llava import LlavaModel
from paddlemix.peft.lora import LoRAConfig, add_lora
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.processors.images.visual_tokens import best_resolution, count_tiles, visual_token_index
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Example
from tests.reference.exact import assert_as_exact, assert_largest_as_exact, in_float64
from tests.tiny_models import GOLDEN, save_adapter

torch = pytest.importorskip("torch", reason="needs the reference environment: make reference")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

NUM_CONFIGURATIONS = 44
SIZES = ((40, 60), (60, 40), (45, 45), (90, 30), (30, 90), (56, 56), (28, 84), (64, 50))


@dataclass(frozen=True)
class Case:
    """One random model and the images of a batch of two rows, (width, height)."""

    next_generation: bool
    text: dict[str, Any]
    vision: dict[str, Any]
    top: dict[str, Any]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    spec: ImageSpec


def draw_case(seed: int) -> Case:
    """A configuration drawn from a seed: grouped heads, odd widths, every grid, select layers, sizes of images."""
    random = np.random.RandomState(seed)
    heads = int(random.choice([1, 2, 3, 4, 6]))
    groups = int(random.choice([size for size in (1, 2, 3) if heads % size == 0]))
    vision_heads, layers = int(random.choice([1, 2, 3])), int(random.choice([2, 3, 4]))
    patch, side = int(random.choice([7, 14])), 28
    text = {
        "vocab_size": int(random.choice([96, 101, 320])),
        "hidden_size": heads * 2 * int(random.randint(2, 6)),
        "intermediate_size": int(random.randint(9, 40)),
        "num_hidden_layers": int(random.randint(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // groups,
        "rms_norm_eps": float(random.choice([1e-5, 1e-6])),
        "rope_theta": float(random.choice([1e4, 5e5])),
        "max_position_embeddings": 512,
    }
    vision = {
        "hidden_size": vision_heads * int(random.randint(3, 9)),
        "intermediate_size": int(random.randint(9, 30)),
        "num_hidden_layers": layers,
        "num_attention_heads": vision_heads,
        "image_size": side,
        "patch_size": patch,
        "hidden_act": str(random.choice(["quick_gelu", "gelu"])),
    }
    next_generation = seed % 2 == 1
    top: dict[str, Any] = {"vision_feature_layer": int(random.choice([-1, -2, -layers]))}
    grids = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
    extra: dict[str, Any] = {}
    if next_generation:
        top["image_grid_pinpoints"] = [list(grid) for grid in grids]
        extra = {"aspect_mode": "anyres", "grid_pinpoints": grids, "merge_type": "spatial_unpad"}
    elif random.rand() < 0.3:
        top["vision_feature_select_strategy"] = "full"
        extra = {"cls_token": True}
    first, second = (SIZES[index] for index in random.choice(len(SIZES), 2, replace=False))
    spec = ImageSpec(tile_size=side, patch_size=patch, **extra)
    return Case(next_generation, text, vision, top, (first, second), spec)


def reference_model(case: Case, seed: int) -> Any:
    """The transformers model with drawn weights."""
    name = "LlavaNext" if case.next_generation else "Llava"
    config = getattr(transformers, f"{name}Config")(
        text_config=transformers.LlamaConfig(**case.text),
        vision_config=transformers.CLIPVisionConfig(**case.vision),
        image_token_index=case.text["vocab_size"] - 1,
        **case.top,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in parameter_name and parameter_name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
    return model


def draw_rows(case: Case, seed: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each row its ids before and behind the image, and its tiles [N, 3, H, W]."""
    random = np.random.RandomState(seed)
    rows = []
    for size in case.sizes:
        limit = case.text["vocab_size"] - 1
        before, behind = random.randint(3, limit, random.randint(2, 6)), random.randint(3, limit, random.randint(3, 9))
        side = case.spec.tile_size
        tiles = random.randn(count_tiles(*size, case.spec), 3, side, side).astype("float32")
        rows.append((before, behind, tiles))
    return rows


def reference_logits(model: Any, case: Case, rows: list[Any]) -> list[np.ndarray]:
    """Logits of every position, row by row."""
    image = model.config.image_token_index
    found = []
    for (before, behind, tiles), (width, height) in zip(rows, case.sizes, strict=True):
        count = len(visual_token_index(width, height, case.spec))
        ids = torch.tensor([[*before, *[image] * count, *behind]])
        pixels, extra = torch.tensor(tiles), {}
        if case.next_generation:
            pixels, extra = pixels[None], {"image_sizes": torch.tensor([[height, width]])}
        with torch.no_grad():
            found.append(model(input_ids=ids, pixel_values=pixels, **extra).logits[0].numpy())
    return found


def our_logits(model: LlavaModel, case: Case, rows: list[Any]) -> list[np.ndarray]:
    """The same from ours, both rows in one batch."""
    examples = []
    for (before, behind, tiles), (width, height) in zip(rows, case.sizes, strict=True):
        index = visual_token_index(width, height, case.spec)
        ids = np.array([*before, *[IMAGE_TOKEN_INDEX] * len(index), *behind])
        labels = np.full_like(ids, IGNORE_INDEX)
        examples.append(Example(input_ids=ids, labels=labels, pixel_values=tiles, image_index=index))
    batch = collate(examples, tokens_per_tile=case.spec.tokens_per_tile)
    with paddle.no_grad():
        hidden = model(
            paddle.to_tensor(batch.input_ids),
            paddle.to_tensor(batch.position_ids),
            segment_ids=paddle.to_tensor(batch.segment_ids),
            pixel_values=paddle.to_tensor(batch.pixel_values.astype("float32")),
            merge_index=paddle.to_tensor(batch.merge_index),
        )
        logits = model.logits(hidden).numpy()
    return [row[: len(example.input_ids)] for row, example in zip(logits, examples, strict=True)]


def exact_logits(model: Any, case: Case, rows: list[Any]) -> list[np.ndarray]:
    """`reference_logits` in float64; the model comes back in float32."""
    with in_float64():
        wide = [(before, behind, tiles.astype("float64")) for before, behind, tiles in rows]
        found = reference_logits(model.double(), case, wide)
    assert all(row.dtype == np.float64 for row in found)
    model.float()
    return found


def load_strictly(directory: Path, next_generation: bool) -> Any:
    """Loads a directory with transformers; every weight must be there and none too many."""
    kind = getattr(transformers, f"Llava{'Next' if next_generation else ''}ForConditionalGeneration")
    model, report = kind.from_pretrained(directory, output_loading_info=True, attn_implementation="eager")
    assert {key: list(value) for key, value in report.items() if value} == {}
    return model.eval()


@pytest.mark.parametrize("seed", range(NUM_CONFIGURATIONS))
def test_logits_agree_and_the_export_loads_strictly(tmp_path: Path, seed: int) -> None:
    case = draw_case(seed)
    reference = reference_model(case, seed)
    reference.save_pretrained(tmp_path / "hf")
    rows = draw_rows(case, seed)
    wanted = reference_logits(reference, case, rows)
    exact = exact_logits(reference, case, rows)
    assert_as_exact(our_logits(load_pretrained(tmp_path / "hf").model, case, rows), wanted, exact)
    previous = "hf"
    for to in ("paddlemix", "llava", "paddlemix", "hf"):
        target = f"{previous}-{to}"
        convert_checkpoint(tmp_path / previous, tmp_path / target, Conversion(to=to))
        previous = target
    exported = load_strictly(tmp_path / previous, case.next_generation)
    assert_largest_as_exact(reference_logits(exported, case, rows), wanted, exact)
    before, behind = read_weights(tmp_path / "hf"), read_weights(tmp_path / previous)
    assert before.keys() == behind.keys()
    for name, entry in before.items():
        assert entry.read().tobytes() == behind[name].read().tobytes(), name


def test_a_model_that_never_was_llava_hf_gets_its_added_rows(tmp_path: Path) -> None:
    convert_checkpoint(GOLDEN / "llava_v15_llama" / "original", tmp_path / "hf", Conversion(to="hf"))
    model = load_strictly(tmp_path / "hf", next_generation=False)
    assert model.get_input_embeddings().weight.shape[0] == 384  # 320 and two more, to a multiple of 64
    assert model.config.image_token_index == 320


@pytest.mark.parametrize("name", ["llava_v15_llama", "llava_v16_llama"])
def test_the_exported_processor_loads_and_knows_the_image_token(
    tmp_path: Path, tokenizer_directory: Path, name: str
) -> None:
    shutil.copytree(GOLDEN / name / "original", tmp_path / "original")
    for path in tokenizer_directory.iterdir():
        shutil.copy(path, tmp_path / "original")
    values = json.loads((tmp_path / "original" / "config.json").read_text())
    rows = len(transformers.AutoTokenizer.from_pretrained(tokenizer_directory))
    tensors = {key: np.array(entry.read()) for key, entry in read_weights(tmp_path / "original").items()}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = np.resize(tensors[key], (rows, tensors[key].shape[1]))
    write_weights(tmp_path / "original", {key: array_entry(value) for key, value in tensors.items()}, 10**9)
    (tmp_path / "original" / "config.json").write_text(json.dumps({**values, "vocab_size": rows}))
    convert_checkpoint(tmp_path / "original", tmp_path / "hf", Conversion(to="hf"))
    model = load_strictly(tmp_path / "hf", next_generation="16" in name)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [rows, rows + 1]
    assert model.config.image_token_index == rows
    assert processor.tokenizer.pad_token == "<pad>"


def test_the_grids_chosen_here_are_read_alike() -> None:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    spec = draw_case(1).spec
    for width, height in SIZES:
        across, down = best_resolution(width, height, spec)
        theirs = get_anyres_image_grid_shape((height, width), [list(grid) for grid in spec.grid_pinpoints], 28)
        assert tuple(theirs) == (down // 28, across // 28), (width, height)


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_are_read(tmp_path: Path, legacy: bool) -> None:
    tensors = {
        str(dtype): torch.arange(12).reshape(3, 4).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    }
    tensors["turned"] = torch.randn(3, 5).T
    tensors["part"] = torch.randn(10)[2:7]
    tensors["parameter"] = torch.nn.Parameter(torch.randn(2, 2))
    torch.save(tensors, tmp_path / "w.bin", _use_new_zipfile_serialization=not legacy)
    found = read_torch(tmp_path / "w.bin")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        wanted = plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain
        np.testing.assert_array_equal(found[name].read(), wanted.numpy())


def test_a_file_that_we_write_is_one_of_torch(tmp_path: Path) -> None:
    arrays = {"a": np.random.randn(3, 4).astype("float32"), "b": np.ones(5, dtype="float16")}
    entries = {name: array_entry(array) for name, array in arrays.items()}
    bits = np.array([0x3F80, 0xC000], dtype="uint16")  # 1.0 and -2.0
    write_torch(tmp_path / "w.bin", {**entries, "c": array_entry(bits, "BF16")})
    found = torch.load(tmp_path / "w.bin", weights_only=True)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].numpy(), array)
    assert found["c"].tolist() == [1.0, -2.0]


def test_an_exported_adapter_gives_the_same_weights_in_peft(tmp_path: Path) -> None:
    """PEFT reads the exported adapter onto the language model; merged weights equal ours."""
    peft = pytest.importorskip("peft")
    base = GOLDEN / "llava_v15_llama" / "original"
    loaded = load_pretrained(base)
    mark = fingerprint(loaded.model)
    modules = ("language_model.layers.0.self_attn.q_proj", "language_model.layers.1.mlp.down_proj")
    config = LoRAConfig(r=3, lora_alpha=6, modules=modules)
    add_lora(loaded.model, config)
    for name, parameter in loaded.model.named_parameters():
        parameter.stop_gradient = not name.endswith((".lora_A", ".lora_B")) and not name.startswith("projector.")
    for layer in (
        loaded.model.language_model.layers[0].self_attn.q_proj,
        loaded.model.language_model.layers[1].mlp.down_proj,
    ):
        for part in (layer.lora_A, layer.lora_B):
            part.set_value(np.random.RandomState(0).randn(*part.shape).astype("float32"))
    save_adapter(loaded.model, None, AdapterSettings(config, {"model": str(base)}, mark), tmp_path / "ours")
    (tmp_path / "ours" / "processor_config.json").write_text("{}")
    export_adapter(tmp_path / "ours", tmp_path / "peft")
    other = torch.load(tmp_path / "peft" / "non_lora_trainables.bin", weights_only=True)
    assert set(other) == {f"base_model.model.model.mm_projector.{n}.{p}" for n in (0, 2) for p in ("weight", "bias")}
    values = json.loads((base / "config.json").read_text())
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{key: values[key] for key in keys}))
    before = plain.model.layers[0].self_attn.q_proj.weight.detach().clone()
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").merge_and_unload()
    change = (wrapped.model.layers[0].self_attn.q_proj.weight - before).detach().numpy()
    ours = loaded.model.language_model.layers[0].self_attn.q_proj
    np.testing.assert_allclose(change, 2 * (ours.lora_A.numpy() @ ours.lora_B.numpy()).T, atol=1e-4)
    again = load_pretrained(tmp_path / "peft", base=str(base))
    for name, parameter in loaded.model.named_parameters():
        np.testing.assert_array_equal(dict(again.model.named_parameters())[name].numpy(), parameter.numpy())
