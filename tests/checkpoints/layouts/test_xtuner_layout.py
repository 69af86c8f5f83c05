"""XTuner's three forms: its own directory whole and with adapters, `official` and `huggingface`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.adapters.adapter import read_adapter
from paddlemix.checkpoints.adapters.adapter_processor import adapter_processor
from paddlemix.checkpoints.adapters.merging import write_merged
from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.convert.declared_files import complete_processor
from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.export_xtuner import export_xtuner_adapter
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import (
    read_json,
    read_safetensors,
    read_weights,
    write_json,
    write_safetensors,
    write_weights,
)
from paddlemix.checkpoints.layouts.recognise import is_adapter
from paddlemix.checkpoints.layouts.xtuner_layout import is_xtuner, log_template, read_xtuner
from paddlemix.checkpoints.load import load_base, load_pretrained
from paddlemix.checkpoints.sizes import read_sizes
from paddlemix.checkpoints.source import Source
from paddlemix.config.load import load_config
from paddlemix.errors import MissingFileError, UserError
from paddlemix.processors.llava import processor_from_dict
from paddlemix.tools.merge_lora_params import main as merge
from paddlemix.trainer.run_model import processor_of_run
from tests.tiny_models import GOLDEN, draw, weights_of

ORIGINAL = GOLDEN / "llava_v15_llama" / "original"
TOKENIZER = GOLDEN.parent / "training" / "tokenizer"
WIDTH, TOWER_WIDTH = 64, 48
RUN_FILE = """
raise SystemExit("a run's file is never executed")
from xtuner.utils import PROMPT_TEMPLATE
llm_name_or_path = 'language'
visual_encoder_name_or_path = 'tower'
prompt_template = PROMPT_TEMPLATE.vicuna
model = dict(type=LLaVAModel, llm=dict(r=512), visual_select_layer=-3)
"""


def change(path: Path, **values: Any) -> None:
    write_json(path, {**read_json(path), **values})


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A whole model in XTuner's own form, as its conversion writes it after full fine-tuning."""
    convert_checkpoint(ORIGINAL, tmp_path / "whole", Conversion(to="xtuner"))
    return tmp_path / "whole"


def lora(shapes: dict[str, tuple[int, int]], rank: int, prefix: str) -> dict[str, np.ndarray]:
    """PEFT's two matrices for every layer, shapes (in, out)."""
    tensors = {}
    for seed, (name, (inner, outer)) in enumerate(shapes.items()):
        tensors[f"{prefix}{name}.lora_A.weight"] = draw(rank, inner, seed=seed)
        tensors[f"{prefix}{name}.lora_B.weight"] = draw(outer, rank, seed=seed + 50)
    return tensors


def write_lora(directory: Path, tensors: dict[str, np.ndarray], base: Path | str, **settings: Any) -> None:
    directory.mkdir()
    write_safetensors(directory / "adapter_model.safetensors", {k: array_entry(v) for k, v in tensors.items()}, {})
    values = {"peft_type": "LORA", "base_model_name_or_path": str(base), "bias": "none", "lora_dropout": 0.05}
    write_json(directory / "adapter_config.json", {**values, **settings})


LANGUAGE_LAYERS = {"layers.0.self_attn.q_proj": (WIDTH, WIDTH), "layers.2.mlp.down_proj": (128, WIDTH)}
TOWER_LAYERS = {"encoder.layers.0.self_attn.v_proj": (TOWER_WIDTH, TOWER_WIDTH)}


@pytest.fixture
def adapted(whole: Path) -> Path:
    """The same after QLoRA: both adapters and the projector, the models themselves elsewhere."""
    directory = whole.parent / "adapted"
    directory.mkdir()
    (whole / "projector").rename(directory / "projector")
    (whole / "visual_encoder").rename(whole.parent / "tower")
    whole.rename(whole.parent / "language")
    language, tower = whole.parent / "language", whole.parent / "tower"
    tensors = lora(LANGUAGE_LAYERS, 4, "base_model.model.model.")
    write_lora(directory / "llm_adapter", tensors, language, r=4, lora_alpha=2)
    tensors = lora(TOWER_LAYERS, 2, "base_model.model.vision_model.")
    write_lora(directory / "visual_encoder_adapter", tensors, tower, r=2, lora_alpha=1)
    return directory


def plain_sum(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights with every adapter's product added: W + alpha / r * (B A)^T, both scales being 1/2."""
    parts = (("language_model.", LANGUAGE_LAYERS, 4), ("vision_tower.", TOWER_LAYERS, 2))
    merged = dict(weights)
    for part, shapes, rank in parts:
        found = lora(shapes, rank, "")
        for name in shapes:
            key = f"{part}{name.removeprefix('encoder.')}.weight"
            merged[key] = merged[key] + 0.5 * (
                found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"]
            ).T.astype("float64")
    return merged


def check_template(adapter: Path, template: str) -> None:
    """What an adapter answers and is merged with, on a base whose own template is another one."""
    assert read_xtuner(adapter).chat_template == template
    source = Source.open(ORIGINAL)
    values = {**complete_processor(source.config, source.processor), "chat_template": "vicuna_v1"}
    processor = adapter_processor(processor_from_dict(values, TOKENIZER), read_adapter(adapter))
    assert processor is not None and processor.template.name == template


def write_ours(adapted: Path) -> tuple[Path, dict[str, Any]]:
    """An adapter of ours, made of XTuner's by training on, and its settings."""
    source = read_adapter(adapted)
    language, tower = (str(adapted.parent / name) for name in ("language", "tower"))
    base = {**source.base, "model": language, "tower": tower, "inside": False, "relative": {}}
    ours = adapted.parent / "ours"
    ours.mkdir()
    write_safetensors(ours / "adapter_model.safetensors", source.tensors(), {"format": "paddlemix"})
    write_json(ours / "processor_config.json", {"image_aspect_ratio": "pad", "chat_template": "llava_v1"})
    values = {"paddlemix_format": 1, **source.config.to_dict(), "base": base, "base_fingerprint": ""}
    write_json(ours / "lora_config.json", values)
    return ours, values


@pytest.mark.parametrize("frozen", ["tower", "language"])
def test_what_has_no_adapter_is_named_beside_the_others(
    adapted: Path, frozen: str, caplog: pytest.LogCaptureFixture
) -> None:
    """LoRA of one part and a frozen other: XTuner's folder says of that nothing, and its chat has a flag for it."""
    part, key = {
        "tower": ("visual_encoder_adapter", "visual_encoder_name_or_path"),
        "language": ("llm_adapter", "llm_name_or_path"),
    }[frozen]
    place = str(adapted.parent / frozen)
    (adapted / "xtuner_config.py").write_text(f"{key} = {place!r}\n", encoding="utf-8")
    shutil.rmtree(adapted / part)
    ours, _ = write_ours(adapted)
    written = adapted.parent / "written"
    export_xtuner_adapter(ours, written)
    assert not (written / part).exists()
    check_template(written, "llava_v1")
    target = adapted.parent / "merged"
    target.mkdir()
    write_merged(load_pretrained(written), target, "float32")
    merged = plain_sum(weights_of(load_pretrained(ORIGINAL).model))
    prefix = {"tower": "vision_tower.", "language": "language_model."}[frozen]
    plain = weights_of(load_pretrained(ORIGINAL).model)
    found = read_weights(target)
    for name in plain:
        wanted = plain if name.startswith(prefix) else merged
        np.testing.assert_allclose(found[name].read(), wanted[name], atol=1e-6, err_msg=name)
    (written / "xtuner_config.py").unlink()  # as earlier versions wrote it
    with pytest.raises(MissingFileError, match=f"no xtuner_config.py .* or write one with the line {key} = 'FOLDER"):
        load_pretrained(written)
    (written / "xtuner_config.py").write_text(f"{key} = {place!r}\n", encoding="utf-8")
    load_pretrained(written)
    assert "unknown keys" not in caplog.text


def test_an_adapter_is_written_as_xtuner_does_and_read_back(adapted: Path) -> None:
    """Ours, made of XTuner's by training on: the same files again."""
    ours, values = write_ours(adapted)
    base = values["base"]
    write_json(ours / "lora_config.json", {**values, "base": {**base, "vision_image_size": 280}})
    with pytest.raises(UserError, match="trained with vision_image_size 280, its base's tower reads 28 pixels"):
        export_xtuner_adapter(ours, adapted.parent / "again")
    write_json(ours / "lora_config.json", values)
    assert export_xtuner_adapter(ours, adapted.parent / "again") == 10
    for part in ("llm_adapter", "visual_encoder_adapter"):
        found, wanted = (read_json(root / part / "adapter_config.json") for root in (adapted.parent / "again", adapted))
        for key in ("r", "lora_alpha", "base_model_name_or_path"):
            assert found[key] == wanted[key], (part, key)
        assert not found["rank_pattern"] and not found["alpha_pattern"]
        path = Path(part) / "adapter_model.safetensors"
        again, before = (read_safetensors(root / path) for root in (adapted.parent / "again", adapted))
        assert again.keys() == before.keys()
        for name, entry in before.items():
            np.testing.assert_array_equal(again[name].read(), entry.read())
    again, before = (read_adapter(root) for root in (adapted.parent / "again", adapted))
    assert again.config == before.config
    for name, entry in before.tensors().items():
        np.testing.assert_array_equal(again.tensors()[name].read(), entry.read())
    check_template(adapted.parent / "again", "llava_v1")
    export_xtuner_adapter(ours, adapted.parent / "short", "float16")
    assert {entry.dtype for entry in read_adapter(adapted.parent / "short").tensors().values()} == {"F16"}
    write_json(ours / "lora_config.json", {**values, "base": {**base, "model": str(ORIGINAL), "tower": None}})
    with pytest.raises(UserError, match="is a whole model, but XTuner's adapters need a language model"):
        export_xtuner_adapter(ours, adapted.parent / "other")


def test_a_whole_model_is_written_as_xtuner_does_and_read_back_bit_for_bit(whole: Path) -> None:
    assert is_xtuner(whole) and not is_adapter(whole)
    assert {path.name for path in whole.iterdir() if path.is_dir()} == {"projector", "visual_encoder"}
    projector = read_json(whole / "projector" / "config.json")
    kind = {"model_type": "projector", "depth": 2, "hidden_act": "gelu", "bias": True}
    assert kind.items() <= projector.items()
    assert (projector["visual_hidden_size"], projector["llm_hidden_size"]) == (TOWER_WIDTH, WIDTH)
    assert set(read_weights(whole / "projector")) == {
        f"model.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")
    }
    assert read_json(whole / "config.json")["architectures"] == ["LlamaForCausalLM"]
    assert all(name.startswith(("model.", "lm_head.")) for name in read_weights(whole))
    assert all(name.startswith("vision_model.") for name in read_weights(whole / "visual_encoder"))
    convert_checkpoint(whole, whole.parent / "again", Conversion(to="llava"))
    found, wanted = Source.open(whole.parent / "again"), Source.open(ORIGINAL)
    assert found.config == Source.open(whole).config
    assert found.processor["image_aspect_ratio"] == "pad"
    for name, entry in wanted.tensors().items():
        np.testing.assert_array_equal(found.tensors()[name].read(), entry.read())
    assert read_sizes(BaseSpec(model=str(whole))).config == found.config


def test_a_whole_model_answers_as_before(whole: Path) -> None:
    found, wanted = weights_of(load_pretrained(whole).model), weights_of(load_pretrained(ORIGINAL).model)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        np.testing.assert_array_equal(found[name], weight)


@pytest.mark.parametrize("given", [False, True])
def test_both_adapters_and_the_projector_are_added_to_their_models(adapted: Path, given: bool) -> None:
    """Whether the language model is found by the adapter's own words or the user's."""
    assert is_adapter(adapted)
    loaded = load_pretrained(adapted, base=str(adapted.parent / "language") if given else None)
    config = loaded.adapter
    assert config is not None and (config.r, config.lora_alpha) == (4, 2)
    assert config.rank_of("vision_tower.layers.0.self_attn.v_proj") == 2
    assert config.alpha_of("vision_tower.layers.0.self_attn.v_proj") == 1
    target = adapted.parent / "merged"
    target.mkdir()
    assert write_merged(loaded, target, "float32") == 3
    found = {name: entry.read() for name, entry in read_weights(target).items()}
    wanted = plain_sum(weights_of(load_pretrained(ORIGINAL).model))
    for name, weight in wanted.items():
        np.testing.assert_allclose(found[name], weight, atol=1e-6, err_msg=name)


def test_a_tower_adapter_beside_a_whole_language_model(adapted: Path) -> None:
    """LLaVA-Llama-3-8B-v1.1's form; nothing is loaded without the adapter."""
    for path in (adapted.parent / "language").iterdir():
        shutil.copy(path, adapted)
    shutil.rmtree(adapted / "llm_adapter")
    loaded = load_pretrained(adapted)
    assert loaded.adapter is not None
    assert loaded.adapter.modules == ("vision_tower.layers.0.self_attn.v_proj",)
    assert (loaded.adapter.r, loaded.adapter.lora_alpha) == (2, 1)
    with pytest.raises(UserError, match="is an adapter, expected a whole model"):
        convert_checkpoint(adapted, adapted.parent / "converted", Conversion(to="llava"))


def test_a_joined_layers_adapter_is_one_of_its_parts(adapted: Path) -> None:
    """InternLM2's `wqkv`: query, key and value have the same A and their own columns of B."""
    shutil.rmtree(adapted / "llm_adapter")
    language = adapted.parent / "language"
    change(language / "config.json", model_type="internlm2", num_key_value_heads=2)
    tensors = lora({"layers.1.attention.wqkv": (WIDTH, 128)}, 4, "base_model.model.model.")
    write_lora(adapted / "llm_adapter", tensors, language, r=4, lora_alpha=2)
    found = read_adapter(adapted)
    layer = "language_model.layers.1.self_attn"
    assert set(found.config.modules) >= {f"{layer}.{part}_proj" for part in "qkv"}
    a, b = tensors.values()
    groups = b.reshape(2, 4, 16, 4)  # per key/value head: two query heads, a key, a value
    wanted = {"q": groups[:, :2].reshape(64, 4), "k": groups[:, 2].reshape(32, 4), "v": groups[:, 3].reshape(32, 4)}
    for part, rows in wanted.items():
        np.testing.assert_array_equal(found.tensors()[f"{layer}.{part}_proj.lora_A"].read(), a.T)
        np.testing.assert_array_equal(found.tensors()[f"{layer}.{part}_proj.lora_B"].read(), rows.T)


def test_a_pretrained_projector_finds_its_models_by_the_runs_file(adapted: Path) -> None:
    """After pretraining there is a projector and nothing else; the run's file is read, not run."""
    shutil.rmtree(adapted / "llm_adapter")
    shutil.rmtree(adapted / "visual_encoder_adapter")
    with pytest.raises(MissingFileError, match="does not say where its language model is"):
        Source.open(adapted)
    (adapted / "xtuner_config.py").write_text(RUN_FILE)
    source = Source.open(adapted)
    assert source.config.mm_vision_select_layer == -3
    assert source.processor["chat_template"] == "xtuner_vicuna"
    np.testing.assert_array_equal(
        source.tensors()["projector.2.bias"].read(), Source.open(ORIGINAL).tensors()["projector.2.bias"].read()
    )


def test_a_projector_is_a_start_for_a_run(adapted: Path) -> None:
    for place in (adapted / "projector", adapted / "projector" / "model.safetensors"):
        language, tower = (str(adapted.parent / name) for name in ("language", "tower"))
        loaded = load_base(BaseSpec(model=language, tower=tower, projector_file=str(place)))
        wanted = Source.open(ORIGINAL).tensors()
        for name in ("projector.0.weight", "projector.2.bias"):
            found = dict(loaded.model.named_parameters())[name].numpy()
            np.testing.assert_array_equal(found, wanted[name].read())


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "relu"), ("bias", False), ("depth", "two")])
def test_a_projector_that_we_do_not_have_is_named(whole: Path, key: str, value: Any) -> None:
    change(whole / "projector" / "config.json", **{key: value})
    with pytest.raises(UserError, match=f"projector/config.json: {key} is .*; (supported|allowed): "):
        read_xtuner(whole)


def test_what_does_not_fit_has_the_files_own_name(adapted: Path) -> None:
    path = adapted / "llm_adapter" / "adapter_model.safetensors"
    entries = read_safetensors(path)
    arrays = {key.replace("layers.2", "layers.7"): np.array(entry.read()) for key, entry in entries.items()}
    write_safetensors(path, {key: array_entry(array) for key, array in arrays.items()}, {})
    with pytest.raises(
        UserError,
        match="the base does not have: 'llm_adapter: base_model.model.model.layers.7.mlp.down_proj.lora_A.weight'",
    ):
        load_pretrained(adapted)


def test_what_differs_between_the_adapters_is_named(adapted: Path) -> None:
    change(adapted / "visual_encoder_adapter" / "adapter_config.json", use_rslora=True)
    with pytest.raises(UserError, match="differ in rslora False and True"):
        read_adapter(adapted)


def test_an_unknown_template_and_broken_python_are_said(adapted: Path, caplog: pytest.LogCaptureFixture) -> None:
    (adapted / "xtuner_config.py").write_text("prompt_template = PROMPT_TEMPLATE.chatglm2")
    with caplog.at_level("WARNING", logger="paddlemix"):
        assert read_xtuner(adapted).chat_template is None
    assert "XTuner's template 'chatglm2', which is not known here" in caplog.text
    for name in ("default", "mistral"):  # the first is a name of LLaVA's, for another text
        (adapted / "xtuner_config.py").write_text(f"prompt_template = PROMPT_TEMPLATE.{name}")
        assert read_xtuner(adapted).chat_template is None
    assert "'mistral', which is not known here (the nearest is mistral_instruct)" in caplog.text
    (adapted / "xtuner_config.py").write_text("prompt_template = PROMPT_TEMPLATE.phi3_chat")
    assert read_xtuner(adapted).chat_template == "xtuner_phi3_chat"
    for broken in ("model = dict(", f"x = {'-' * 100_000}1"):
        (adapted / "xtuner_config.py").write_text(broken)
        with pytest.raises(UserError, match="xtuner_config.py cannot be read"):
            read_xtuner(adapted)
    for layer in ("layer", "'a'", "True", "9**9"):
        (adapted / "xtuner_config.py").write_text(f"layer = -3\nmodel = dict(visual_select_layer={layer})")
        with pytest.raises(UserError, match=r"visual_select_layer is .*; write the whole number there, e\.g\. -2"):
            read_xtuner(adapted)


def test_what_says_no_template_is_told_once(adapted: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="paddlemix"):
        assert read_xtuner(adapted).chat_template is None and read_xtuner(adapted).chat_template is None
    assert caplog.text.count("does not declare the conversation template it was trained with") == 1
    assert "copy the run's xtuner_config.py into it" in caplog.text


def test_xtuners_own_name_of_the_template_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="paddlemix"):
        log_template("xtuner_llama3_chat")
        log_template("llava_v1")
    assert "xtuner chat ... --prompt-template llama3_chat" in caplog.text
    assert "XTuner has no template that renders the same text as 'llava_v1'" in caplog.text


@pytest.mark.parametrize(
    ("template", "mode", "is_said"),
    [("xtuner_vicuna", "square", True), ("xtuner_vicuna", "pad", False), ("vicuna_v1", "square", False)],
)
def test_what_xtuner_cannot_say_is_told_before_training(
    template: str, mode: str, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source.open(ORIGINAL)
    values = {**complete_processor(source.config, source.processor), "chat_template": template}
    arguments = [f"model_name_or_path={ORIGINAL}", "output_dir=o", f"image_aspect_ratio={mode}"]
    with caplog.at_level("WARNING", logger="paddlemix"):
        processor_of_run(load_config(None, arguments), processor_from_dict(values, TOKENIZER), source.config)
    message = "the result cannot be converted --to xtuner: its form has no place for image_aspect_ratio 'square' (only"
    assert (message in caplog.text) == is_said


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_checkpoint_of_training_has_to_be_converted(adapted: Path, is_folder: bool) -> None:
    """iter_N.pth is a file, under DeepSpeed a folder; given itself, by its run's folder or as a projector."""
    run = adapted.parent / "run"
    run.mkdir()
    checkpoint = run / "iter_500.pth"
    if is_folder:
        checkpoint.mkdir()
    else:
        checkpoint.write_bytes(b"PK")
    advice = f"'{checkpoint}' is a checkpoint of XTuner's training: convert it first .xtuner convert pth_to_hf"
    for path in (run, checkpoint):
        with pytest.raises(MissingFileError, match=advice):
            load_pretrained(path)
        with pytest.raises(UserError, match=advice):
            merge(["--lora_path", str(path)])
    language, tower = (str(adapted.parent / name) for name in ("language", "tower"))
    with pytest.raises(UserError, match=f"pretrain_mm_mlp_adapter .* is not a projector's file; {advice}"):
        load_base(BaseSpec(model=language, tower=tower, projector_file=str(checkpoint)))


def test_a_part_of_another_kind_is_refused(adapted: Path) -> None:
    change(adapted / "llm_adapter" / "adapter_config.json", base_model_name_or_path=str(adapted.parent / "tower"))
    with pytest.raises(UserError, match="is not just a language model"):
        load_pretrained(adapted)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio 'square'"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer -1"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
    ],
)
def test_what_xtuner_cannot_say_is_an_error(tmp_path: Path, values: dict[str, Any], fault: str) -> None:
    shutil.copytree(ORIGINAL, tmp_path / "original")
    change(tmp_path / "original" / "config.json", **values)
    with pytest.raises(UserError, match=f"XTuner's form has no place for {fault}"):
        convert_checkpoint(tmp_path / "original", tmp_path / "xtuner", Conversion(to="xtuner"))
    assert not (tmp_path / "xtuner").exists()


@pytest.mark.parametrize("trained", [False, True])
def test_the_official_form_is_read(tmp_path: Path, trained: bool) -> None:
    """`--save-format official`: LLaVA's names, the tower inside only where it trained, CLIP's file at the top."""
    directory = Path(shutil.copytree(ORIGINAL, tmp_path / "official"))
    tower = (directory / "vision_tower").rename(tmp_path / "clip-tiny")
    values = json.loads((ORIGINAL / "config.json").read_text())
    for key in ("chat_template_name", "image_grid_pinpoints", "mm_patch_merge_type"):
        values.pop(key, None)
    values |= {"model_type": "llava", "mm_vision_tower": "openai/clip-tiny", "image_aspect_ratio": "pad"}
    write_json(directory / "config.json", {**values, "unfreeze_mm_vision_tower": trained})
    shutil.copy(tower / "preprocessor_config.json", directory)
    if not trained:
        tensors = {k: array_entry(np.array(e.read())) for k, e in read_weights(directory).items() if "vision" not in k}
        write_weights(directory, tensors, 10**9)
    source, wanted = Source.open(directory), Source.open(ORIGINAL)
    assert source.config == wanted.config
    for name, entry in wanted.tensors().items():
        np.testing.assert_array_equal(source.tensors()[name].read(), entry.read())


def test_the_huggingface_form_is_read(tmp_path: Path) -> None:
    """`--save-format huggingface`: llava-hf's files, with CLIP's own image processor, that of padded images."""
    convert_checkpoint(ORIGINAL, tmp_path / "hf", Conversion(to="hf"))
    values = read_json(tmp_path / "hf" / "config.json")
    for key in ("chat_template_name", "image_aspect_ratio", "image_seq_length"):
        values.pop(key)
    write_json(tmp_path / "hf" / "config.json", values)
    change(tmp_path / "hf" / "preprocessor_config.json", image_processor_type="CLIPImageProcessor", do_pad=False)
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", Conversion(to="llava"))
    source, wanted = Source.open(tmp_path / "back"), Source.open(ORIGINAL)
    assert source.config == wanted.config
    assert source.processor["image_aspect_ratio"] == "pad"
    for name, entry in wanted.tensors().items():
        np.testing.assert_array_equal(source.tensors()[name].read(), entry.read())
