"""What takes less memory: the cheapest first, and nothing that the run has already or cannot have."""

from __future__ import annotations

from argparse import Namespace

from paddlemix.config.less_memory import less_memory_in_answers, less_memory_in_run
from paddlemix.config.load import load_config


def advice(*keys: str, devices: int = 1) -> list[str]:
    data = 'dataset={"train": [{"data_files": "a.json"}]}'
    config = load_config(None, ["model_name_or_path=m", "output_dir=o", "do_train=true", data, *keys])
    return [line.partition(" ")[0] for line in less_memory_in_run(config, devices=devices)]


def test_what_keeps_the_result_comes_first() -> None:
    assert advice()[:3] == ["per_device_train_batch_size", "recompute", "bf16"]
    assert advice("per_device_train_batch_size=1", "recompute=true", "lora=true")[0] == "bf16"


def test_a_quantised_base_is_named_only_where_adapters_train() -> None:
    assert "quantize_base" in advice("lora=true") and "lora" not in advice("lora=true")
    assert "lora" in advice() and "quantize_base" not in advice()
    assert "quantize_base" not in advice("lora=true", "pissa=true")


def test_sharding_is_advised_where_there_are_devices() -> None:
    assert advice()[-1] == "several" and advice(devices=2)[-1] == "sharding"
    assert "sharding" not in advice("sharding=stage3", devices=2)


def test_single_weights_are_split_where_that_helps() -> None:
    split = "tensor_parallel_degree"
    assert split not in advice(devices=4) and split not in advice("sharding=stage3", devices=4)
    # No stage splits codes.
    assert advice("lora=true", "quantize_base=nf4", devices=4)[-2:] == ["sharding", split]
    assert advice(f"{split}=2", devices=4)[-2:] == ["sharding", split]
    assert advice(f"{split}=2", "sharding=stage2", devices=4)[-1] == split
    assert not {split, "sharding"} & set(advice(f"{split}=4", devices=4))


def test_flags_of_answers() -> None:
    flags = Namespace(load_8bit=False, load_4bit=False, max_new_tokens=64, tensor_parallel=1, batch_size=8)
    found = less_memory_in_answers(flags, "float32")
    expected = ["--batch-size", "--dtype", "--load-8bit", "--tensor-parallel", "--max-new-tokens"]
    assert [line.split(" ")[0] for line in found] == expected
    flags = Namespace(load_8bit=False, load_4bit=True, max_new_tokens=64, tensor_parallel=2)  # the chat has no batch
    assert less_memory_in_answers(flags, "bfloat16") == [
        "--tensor-parallel 2 -> more cards (a divisor of the model's key/value heads)",
        "--max-new-tokens 64 -> a smaller one",
    ]
