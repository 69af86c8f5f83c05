"""Tensors -> tensors: decoder, vision tower, projector and their merge.  No tokenizer, no path, no LoRA."""

from paddlemix.device import prepare_environment

prepare_environment()  # must come before the first `import paddle`
