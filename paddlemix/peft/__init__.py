"""Adapters: layers that replace linear layers of a model that knows nothing of them."""

from paddlemix.device import prepare_environment

prepare_environment()  # must come before the first `import paddle`
