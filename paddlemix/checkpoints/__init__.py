"""Directory <-> model and processor: files, names of weights, layouts."""

from paddlemix.device import prepare_environment

prepare_environment()  # must come before the first `import paddle`
