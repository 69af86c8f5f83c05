"""Training: one recipe for pretraining and fine-tuning, on PaddleNLP's Trainer."""

from paddlemix.device import prepare_environment

prepare_environment()  # must come before the first `import paddle`
