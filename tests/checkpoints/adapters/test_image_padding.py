"""A llava-hf model whose files crop pictures is padded and says so; an adapter whose files crop is followed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CLIPImageProcessor

from paddlemix.checkpoints.adapters.adapter import read_adapter
from paddlemix.checkpoints.adapters.adapter_processor import adapter_processor
from paddlemix.checkpoints.convert.export_peft import export_peft_adapter
from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import read_json, write_json, write_safetensors
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.config.load import load_config
from paddlemix.errors import UserError
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.trainer.run_model import declared_processor
from tests.peft_cases import GOLDEN_ADAPTERS, with_base
from tests.tiny import draw_picture
from tests.tiny_models import GOLDEN

SAVED = GOLDEN.parent / "saved" / "4.57" / "llava"
PREPROCESSOR = "preprocessor_config.json"
CROPS = read_json(SAVED / PREPROCESSOR)
Q_PROJ = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAVED, tmp_path / "base"))


def change(path: Path, **changes: Any) -> None:
    write_json(path, {**read_json(path), **changes})


def adapter_on(base: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    shutil.copy(GOLDEN_ADAPTERS / "lora" / "adapter_config.json", directory)
    width = read_json(base / "config.json")["text_config"]["hidden_size"]
    matrices = {"lora_A": np.ones((2, width), "float32"), "lora_B": np.ones((width, 2), "float32")}
    weights = {f"{Q_PROJ}.{name}.weight": array_entry(matrix) for name, matrix in matrices.items()}
    write_safetensors(directory / "adapter_model.safetensors", weights, {})
    return with_base(directory, base)


def check_crops(processor: LlavaProcessor | None, directory: Path) -> None:
    """Pixels of an oblong picture are those of transformers' CLIPImageProcessor."""
    assert processor is not None and processor.image_spec.aspect_mode == "square"
    image = draw_picture(100, 60, 3)
    theirs = CLIPImageProcessor(**json.loads((directory / PREPROCESSOR).read_text()))
    wanted = theirs(image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(processor.tiles([image]), wanted)


def test_loading_says_once_that_pictures_are_padded(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    processor = load_pretrained(base).processor
    assert processor is not None and processor.image_spec.aspect_mode == "pad"
    load_pretrained(base)
    (said,) = (record.getMessage() for record in caplog.records)
    for words in ("padded to squares", "crops pictures to their centre", f"{base / PREPROCESSOR} says", '"square"'):
        assert words in said


def test_who_follows_the_warning_has_transformers_pixels(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(base / "config.json", image_aspect_ratio="square")
    check_crops(load_pretrained(base).processor, base)
    assert not caplog.records


def test_files_that_pad_or_say_nothing_are_silent(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(base / PREPROCESSOR, image_processor_type="LlavaImageProcessor", do_pad=True)
    load_pretrained(base)
    (base / PREPROCESSOR).unlink()
    load_pretrained(base)
    assert not caplog.records
    squeezes = {"image_processor_type": "LlavaImageProcessor", "do_center_crop": False}
    write_json(base / PREPROCESSOR, {**CROPS, **squeezes, "size": {"height": 28, "width": 28}})
    load_pretrained(base)
    assert "squeezes pictures into a square" in caplog.text


def test_a_run_says_it_where_it_does_not_choose(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = [f"model_name_or_path={base}", "output_dir=out"]
    check_crops(declared_processor(load_config(None, [*run, "image_aspect_ratio=square"])), base)
    declared_processor(load_config(None, [*run, "image_aspect_ratio=pad"]))
    assert not caplog.records
    declared_processor(load_config(None, run))
    assert "padded to squares" in caplog.text


@pytest.mark.parametrize("inside", [False, True])
def test_an_adapter_that_was_trained_on_crops_gets_crops(
    base: Path, tmp_path: Path, inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own file, as TRL and LLaMA-Factory save one beside it; `inside` processor_config.json, as transformers 5."""
    directory = adapter_on(base, tmp_path)
    values = {"image_processor": CROPS} if inside else CROPS
    write_json(directory / ("processor_config.json" if inside else PREPROCESSOR), values)
    check_crops(load_pretrained(directory).processor, base)
    export_peft_adapter(directory, tmp_path / "peft")
    assert read_json(tmp_path / "peft" / "paddlemix_processor.json")["image_aspect_ratio"] == "square"
    (said,) = (record.getMessage() for record in caplog.records)
    assert str(directory) in said and "the adapter was trained so, and image_aspect_ratio is square" in said


def test_an_adapter_without_such_a_file_is_padded_like_its_base(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = adapter_on(base, tmp_path)
    processor = load_pretrained(directory).processor
    assert processor is not None and processor.image_spec.aspect_mode == "pad"
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"{base}: pictures are padded") and "paddlemix_processor.json beside such an adapter" in said
    write_json(directory / "paddlemix_processor.json", {"image_aspect_ratio": "square"})
    check_crops(load_pretrained(directory).processor, base)
    write_json(directory / "paddlemix_processor.json", {"image_aspect_ratio": "pad"})
    write_json(directory / PREPROCESSOR, CROPS)  # what we wrote ourselves counts first
    found = adapter_processor(processor, read_adapter(directory))
    assert found is not None and found.image_spec.aspect_mode == "pad"
    write_json(directory / "paddlemix_processor.json", {"chat_template": None, "image_aspect_ratio": None})  # is absent
    assert adapter_processor(processor, read_adapter(directory)) is not None
    write_json(directory / "paddlemix_processor.json", {"mm_use_im_start_end": "false"})
    with pytest.raises(UserError, match=r'mm_use_im_start_end is "false" \(text\); allowed: true or false'):
        read_adapter(directory)
