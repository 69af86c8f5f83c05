"""Tokens one after the other: sampling, batches, conversations."""

from paddlemix.device import prepare_environment

prepare_environment()  # must come before the first `import paddle`
