"""Names of the files that make a directory a model or an adapter, whichever program wrote it."""

from __future__ import annotations

# | file                     | makes a directory                                        |
# |--------------------------|----------------------------------------------------------|
# | CONFIG_FILE              | a model                                                  |
# | ADAPTER_FILE             | an adapter of ours, or of PaddleMIX                      |
# | PEFT_ADAPTER_FILE        | an adapter of PEFT, which most other programs train with |
CONFIG_FILE, ADAPTER_FILE, PEFT_ADAPTER_FILE = "config.json", "lora_config.json", "adapter_config.json"
ADAPTER_PROCESSOR_FILE = "paddlemix_processor.json"  # ours beside another program's adapter: template and pixels
# Weights of adapters: PEFT's, of which the first is ours too; what LLaVA and ms-swift trained whole; PaddleMIX's.
PEFT_WEIGHTS, PEFT_OTHER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin"), "non_lora_trainables.bin"
SWIFT_WEIGHTS, PADDLEMIX_WEIGHTS = "vit.safetensors", "lora_model_state.pdparams"
ADAPTER_WEIGHTS = PEFT_WEIGHTS[0]
