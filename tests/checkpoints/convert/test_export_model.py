"""Layout into layout: the same bits after every round, everything declared travels, and nothing appears by halves."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.convert import verify
from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.files import weight_files
from paddlemix.checkpoints.files.tensors import array_entry, convert
from paddlemix.checkpoints.files.weight_files import INDEX_FILE, read_json, read_weights, write_json, write_weights
from paddlemix.checkpoints.layouts.added_rows import HF_VOCABULARY_FILE
from paddlemix.checkpoints.layouts.config_keys import BASE_KEY
from paddlemix.checkpoints.layouts.recognise import config_values
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import save_model
from paddlemix.checkpoints.source import Source
from paddlemix.errors import MissingFileError, UserError
from paddlemix.generation.ending import ending_of
from paddlemix.models.configuration import LlavaConfig
from paddlemix.processors.images.image_config import PIXEL_OPTIONS
from paddlemix.tools.convert_checkpoint import main, parse_size
from tests.tiny_models import GOLDEN, GOLDEN_MODELS, tiny_text

V15, V16 = (GOLDEN / name for name in GOLDEN_MODELS)


def bits(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape and bytes of every weight of a directory."""
    return {name: (entry.dtype, entry.shape, entry.read().tobytes()) for name, entry in read_weights(directory).items()}


def chain(start: Path, folder: Path, *targets: str, **options: Any) -> Path:
    """Converts again and again; gives the last directory."""
    for number, to in enumerate(targets):
        place = folder / f"{number}-{to}"
        convert_checkpoint(start, place, Conversion(to=to, **options))
        start = place
    return start


@pytest.mark.parametrize("model", [V15, V16], ids=GOLDEN_MODELS)
@pytest.mark.parametrize("shard", [10**9, 40_000])
def test_every_round_gives_the_same_bits(tmp_path: Path, model: Path, shard: int) -> None:
    last = chain(model / "hf", tmp_path, "paddlemix", "llava", "paddlemix", "hf", max_shard_bytes=shard)
    assert (last / INDEX_FILE).is_file() == (shard < 10**9)
    assert bits(last) == bits(model / "hf")
    assert bits(tmp_path / "0-paddlemix") == bits(tmp_path / "2-paddlemix")
    config, before = read_json(last / "config.json"), read_json(model / "hf" / "config.json")
    assert config["image_token_index"] == before["image_token_index"]
    for key in ("model_type", "architectures", "vision_feature_layer", "vision_feature_select_strategy"):
        assert config[key] == before[key]
    assert config.get("image_grid_pinpoints") == before.get("image_grid_pinpoints")
    assert {**before["vision_config"], **config["vision_config"]} == {
        **config["vision_config"],
        **before["vision_config"],
    }


@pytest.mark.parametrize("model", [V15, V16], ids=GOLDEN_MODELS)
def test_every_layout_is_the_same_model(tmp_path: Path, model: Path) -> None:
    wanted = Source.open(model / "original")
    for to in ("paddlemix", "llava", "hf"):
        convert_checkpoint(model / "original", tmp_path / to, Conversion(to=to))
        found = Source.open(tmp_path / to)
        assert found.config.vision == wanted.config.vision
        for key in ("image_aspect_ratio", "mm_patch_merge_type", "chat_template", "image_size", "image_mean"):
            assert found.processor[key] == wanted.processor[key], (to, key)
        assert found.processor.get("image_grid_pinpoints") == wanted.processor.get("image_grid_pinpoints")
    assert read_json(tmp_path / "llava" / "config.json")["architectures"] == ["LlavaLlamaForCausalLM"]
    assert bits(tmp_path / "llava").keys() >= bits(model / "original").keys()


def test_our_layout_equals_what_loading_and_saving_gives(tmp_path: Path) -> None:
    save_model(load_pretrained(V16 / "hf"), tmp_path / "saved")
    convert_checkpoint(V16 / "hf", tmp_path / "converted", Conversion(to="paddlemix"))
    assert bits(tmp_path / "converted") == bits(tmp_path / "saved")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("to", ["paddlemix", "llava", "hf"])
def test_weights_are_rounded_on_the_way(tmp_path: Path, dtype: str, to: str) -> None:
    convert_checkpoint(V15 / "hf", tmp_path / "out", Conversion(to=to, dtype=dtype))
    name = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    before, after = Source.open(V15 / "hf").tensors(), Source.open(tmp_path / "out").tensors()
    for key, entry in before.items():
        found = after[key]
        wanted = convert(entry.read(), "F32", name)
        rows = len(wanted) if "embed_tokens" in key else None
        columns = wanted.shape[1] if key == "lm_head.weight" else None
        content = found.read()[:rows, :columns] if columns else found.read()[:rows]
        assert found.dtype == name
        np.testing.assert_array_equal(content, wanted)
    config = read_json(tmp_path / "out" / "config.json")
    assert config.get("torch_dtype", dtype) == dtype


@pytest.fixture
def with_tokenizer(tmp_path: Path, tokenizer_directory: Path) -> Path:
    """An original LLaVA-1.5 with the vocabulary of the small tokenizer and a template that is not the default."""
    from paddlemix.processors.text.tokenizer import load_tokenizer

    directory = Path(shutil.copytree(V15 / "original", tmp_path / "start"))
    for path in tokenizer_directory.iterdir():
        shutil.copy(path, directory)
    rows = len(load_tokenizer(directory))
    tensors = {name: np.array(entry.read()) for name, entry in read_weights(directory).items()}
    random = np.random.RandomState(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = random.randn(rows, tensors[name].shape[1]).astype("float32")
    write_weights(directory, {name: array_entry(value) for name, value in tensors.items()}, 10**9)
    change(directory, vocab_size=rows, chat_template_name="llava_v1")
    return directory


def change(directory: Path, **values: Any) -> None:
    write_json(directory / "config.json", {**read_json(directory / "config.json"), **values})


def test_tokenizer_template_and_added_rows_travel(tmp_path: Path, with_tokenizer: Path) -> None:
    before = load_pretrained(with_tokenizer)
    assert before.processor is not None
    hf = chain(with_tokenizer, tmp_path / "there", "paddlemix", "hf")
    rows, config = len(before.processor.tokenizer), read_json(hf / "config.json")
    assert config["image_token_index"] == rows == config[BASE_KEY]
    assert config["text_config"]["vocab_size"] == -(-(rows + 2) // 64) * 64
    mean = read_weights(with_tokenizer)["model.embed_tokens.weight"].read().mean(axis=0)
    added = read_weights(hf)["language_model.model.embed_tokens.weight"].read()[rows:]
    np.testing.assert_allclose(added, np.broadcast_to(mean, added.shape), atol=1e-6)
    direct = load_pretrained(hf)
    assert direct.processor is not None
    assert direct.processor.tokenizer.special_id("<image>") == rows
    assert direct.processor.template.name == "llava_v1"
    ours = chain(hf, tmp_path / "back", "paddlemix")
    after = load_pretrained(ours)
    assert after.processor is not None
    assert after.model.config == before.model.config
    assert after.processor.template.name == "llava_v1"
    assert after.processor.to_dict() == before.processor.to_dict()
    for sentence in ("What is this? </s> <image>", "a  b\nc"):
        assert after.processor.tokenizer.encode(sentence) == before.processor.tokenizer.encode(sentence)
    assert len(after.processor.tokenizer) == rows
    assert bits(chain(ours, tmp_path / "again", "llava", "paddlemix", "hf")) == bits(hf)


def test_every_end_of_an_answer_travels(tmp_path: Path, with_tokenizer: Path) -> None:
    """config.json names one, generation_config.json three, which count; from every layout into every layout."""

    def ends(directory: Path) -> set[int]:
        processor = load_pretrained(directory).processor
        assert processor is not None
        return set(ending_of(processor).ids)

    change(with_tokenizer, eos_token_id=2)
    assert ends(with_tokenizer) == {2}
    write_json(with_tokenizer / "generation_config.json", {"eos_token_id": [2, 7, 9], "temperature": 0.2})
    assert ends(with_tokenizer) == {2, 7, 9}
    start = with_tokenizer
    for number, to in enumerate(("hf", "llava", "paddlemix", "hf", "paddlemix", "llava")):
        start = chain(start, tmp_path / str(number), to)
        config = read_json(start / "config.json")
        assert config.get("text_config", config).get("eos_token_id", config.get("eos_token_id")) == [2, 7, 9], to
        generation = read_json(start / "generation_config.json")
        assert (generation["eos_token_id"], generation["temperature"]) == ([2, 7, 9], 0.2), to
    assert ends(start) == ends(tmp_path / "3" / "0-hf") == {2, 7, 9}
    save_model(load_pretrained(tmp_path / "4" / "0-paddlemix"), tmp_path / "saved")
    assert ends(tmp_path / "saved") == {2, 7, 9}
    assert ends(chain(tmp_path / "saved", tmp_path / "after", "hf")) == {2, 7, 9}


def test_pixels_unlike_clips_travel(tmp_path: Path, with_tokenizer: Path) -> None:
    tower = with_tokenizer / "vision_tower" / "preprocessor_config.json"
    write_json(tower, {**read_json(tower), "resample": 2, "rescale_factor": 0.01, "size": {"shortest_edge": 40}})
    wanted = Source.open(with_tokenizer).processor
    assert (wanted["resample"], wanted["rescale_factor"], wanted["size"]) == (2, 0.01, {"shortest_edge": 40})
    hf = chain(with_tokenizer, tmp_path, "paddlemix", "llava", "hf")
    for directory in (tmp_path / "0-paddlemix", tmp_path / "1-llava", hf):
        found = Source.open(directory).processor
        assert {key: found[key] for key in PIXEL_OPTIONS if key in found} == {
            "resample": 2,
            "rescale_factor": 0.01,
            "size": {"shortest_edge": 40},
        }


def test_rows_of_llava_hf_come_off_only_where_its_tokenizer_declares_them(tmp_path: Path, with_tokenizer: Path) -> None:
    hf = chain(with_tokenizer, tmp_path, "hf")
    config = read_json(hf / "config.json")
    base, padded = config.pop(BASE_KEY), config["text_config"]["vocab_size"]
    write_json(hf / "config.json", config)  # as a file that is not ours
    taken = chain(hf, tmp_path / "declared", "paddlemix")
    assert read_json(taken / "config.json")["text_config"]["vocab_size"] == base
    assert (taken / HF_VOCABULARY_FILE).is_file()
    assert bits(chain(taken, tmp_path / "back", "hf")) == bits(hf)
    (hf / "added_tokens.json").write_text(json.dumps({"<other>": base + 2}))  # a row that has a meaning
    kept = chain(hf, tmp_path / "other", "paddlemix")
    assert read_json(kept / "config.json")["text_config"]["vocab_size"] == padded


def test_the_added_rows_survive_loading_and_saving(tmp_path: Path, with_tokenizer: Path) -> None:
    ours = chain(with_tokenizer, tmp_path, "hf", "paddlemix")
    save_model(load_pretrained(ours), tmp_path / "saved")
    assert bits(chain(tmp_path / "saved", tmp_path / "again", "hf")) == bits(tmp_path / "0-hf")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path, with_tokenizer: Path) -> None:
    path, rows = with_tokenizer / "tokenizer_config.json", read_json(with_tokenizer / "config.json")["vocab_size"]
    values = read_json(path)
    values["added_tokens_decoder"][str(rows)] = {"content": "<extra>", "special": True}
    write_json(path, values)
    for use in (load_pretrained, lambda path: chain(path, tmp_path / "out", "paddlemix")):
        with pytest.raises(
            UserError, match="has 4.. tokens, but the embedding only 4.. rows: they do not belong together"
        ):
            use(with_tokenizer)
    assert not (tmp_path / "out" / "0-paddlemix").exists()


def test_padding_behind_the_embedding_needs_no_row(tmp_path: Path, with_tokenizer: Path) -> None:
    """A text never has it, and what pads a batch is never looked up."""
    path, rows = with_tokenizer / "tokenizer_config.json", read_json(with_tokenizer / "config.json")["vocab_size"]
    values = read_json(path)
    values["added_tokens_decoder"][str(rows)] = {"content": "<pad>", "special": True}
    write_json(path, {**values, "pad_token": "<pad>"})
    change(with_tokenizer, pad_token_id=rows)
    processor = load_pretrained(chain(with_tokenizer, tmp_path / "out", "paddlemix")).processor
    assert processor is not None and processor.tokenizer.num_rows == rows == len(processor.tokenizer) - 1
    assert max(processor.tokenizer.encode("one <pad> two")) < rows


def test_sizes_that_are_not_the_weights_cost_no_memory(with_tokenizer: Path) -> None:
    """A model of these would take 500 TB."""
    change(with_tokenizer, hidden_size=1 << 20, num_hidden_layers=1000, head_dim=16)
    with pytest.raises(UserError, match="do not fit its config.json: .* missing: .*; .* misshapen: "):
        load_pretrained(with_tokenizer)


def test_a_text_model_becomes_ours_and_no_llava(tmp_path: Path) -> None:
    model, text = tmp_path / "vicuna", tiny_text()
    model.mkdir()
    source = {name: entry for name, entry in Source.open(V15 / "original").tensors().items() if "language" in name}
    config = read_json(V15 / "original" / "config.json")
    keys = [key for key in config if not key.startswith(("mm_", "image_", "architectures", "unfreeze"))]
    write_json(model / "config.json", {**{key: config[key] for key in keys}, "model_type": "llama"})
    from paddlemix.checkpoints.convert.export_model import to_layout
    from paddlemix.checkpoints.layouts.weight_names import LLAMA

    head = {"lm_head.weight": Source.open(V15 / "original").tensors()["lm_head.weight"]}
    write_weights(model, to_layout({**source, **head}, LLAMA), 10**9)
    ours = chain(model, tmp_path, "paddlemix")
    assert load_pretrained(ours).model.config.vision is None
    assert LlavaConfig.from_dict(config_values(LlavaConfig(text=text))).text == text
    with pytest.raises(UserError, match="--to llava needs a vision tower: use --to paddlemix, or --to hf"):
        chain(model, tmp_path / "llava", "llava")


def test_what_llava_hf_has_no_place_for_is_listed(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(V16 / "original", tmp_path / "start"))
    change(directory, mm_patch_merge_type="spatial")
    tensors = {
        name: array_entry(np.array(e.read())) for name, e in read_weights(directory).items() if "newline" not in name
    }
    write_weights(directory, tensors, 10**9)
    with pytest.raises(UserError, match=r"no place for mm_patch_merge_type 'spatial' with anyres .*use --to llava"):
        chain(directory, tmp_path, "hf")


def test_a_grid_list_that_is_not_symmetric_is_turned_for_llava_hf(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(V16 / "original", tmp_path / "start"))
    change(directory, image_grid_pinpoints="[(28, 84), (56, 56)]")  # as LLaVA's trainer writes it
    hf = chain(directory, tmp_path, "hf")
    assert read_json(hf / "config.json")["image_grid_pinpoints"] == [[84, 28], [56, 56]]
    assert Source.open(hf).processor["image_grid_pinpoints"] == [[28, 84], [56, 56]]


def test_the_target_must_be_new(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty; choose a new folder or remove it first"):
        convert_checkpoint(V15 / "hf", tmp_path / "out", Conversion(to="paddlemix"))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    with pytest.raises(UserError, match="'torch' is not one of paddlemix, llava, hf"):
        convert_checkpoint(V15 / "hf", tmp_path / "x", Conversion(to="torch"))


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def filling(*_: Any) -> None:
        nonlocal written
        written += 1
        if written == 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(verify.zlib, "crc32", filling)
    with pytest.raises(UserError, match="No space left on device; free space or choose another place"):
        convert_checkpoint(V15 / "hf", tmp_path / "out", Conversion(to="paddlemix"))
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_read_back_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = weight_files.write_weights

    def faulty(directory: Path, *arguments: Any) -> None:
        write(directory, *arguments)
        path = directory / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(verify, "write_weights", faulty)
    with pytest.raises(UserError, match=r"does not read back as it was \(1 weights, e.g. 'vision"):
        convert_checkpoint(V15 / "hf", tmp_path / "out", Conversion(to="paddlemix"))
    assert list(tmp_path.iterdir()) == []


def test_damaged_sources_are_told_before_anything_is_written(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(V15 / "original", tmp_path / "start"))
    tensors = {name: array_entry(np.array(e.read())) for name, e in read_weights(directory).items()}
    (directory / "model.safetensors").unlink()
    write_weights(directory, tensors, 60_000)
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=f"{shard.name}' is cut short"):
        chain(directory, tmp_path, "paddlemix")
    shard.unlink()
    with pytest.raises(MissingFileError, match=f"names the shard '{shard.name}', which is missing"):
        chain(directory, tmp_path, "paddlemix")
    shard.write_bytes(whole)
    shutil.rmtree(directory / "vision_tower")
    with pytest.raises(MissingFileError, match="vision tower 'vision_tower' .* was not found .searched"):
        chain(directory, tmp_path, "paddlemix")
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(V15 / "original", tmp_path / "start"))
    change(directory, intermediate_size=100)
    with pytest.raises(UserError, match="9 misshapen: language_model.layers.0.mlp.down_proj.weight is"):
        chain(directory, tmp_path, "hf")


def test_the_command_converts_and_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", str(V16 / "hf"), "--output", str(tmp_path / "out"), "--to", "llava", "--shard-size", "50KB"]
    assert main(arguments) == 0
    assert "wrote and verified 145 weights" in capsys.readouterr().out
    assert (tmp_path / "out" / INDEX_FILE).is_file()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("1000", 1000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["GB", "-1GB", "0GB", "0.1", "5PB", "five", "9" * 400 + "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="is not a size; give a number"):
        parse_size(text)
