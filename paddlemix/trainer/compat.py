"""The only door to PaddleNLP: what is imported from it, and what its import must not change.

Source of the defects that are mended here: PaddleNLP 3.0.0b4 on Paddle 3.3.1.
"""

from __future__ import annotations

import os
import warnings

import paddle.nn.functional as functional

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_linear = functional.linear
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from paddlenlp.trainer import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from paddlenlp.trainer.trainer_callback import DefaultFlowCallback, PrinterCallback, ProgressCallback
    from paddlenlp.utils.log import logger as paddlenlp_logger

functional.linear = _linear  # importing PaddleNLP replaces it with a variant for other number formats
paddlenlp_logger.set_level("WARNING")

__all__ = [
    "DefaultFlowCallback",
    "PrinterCallback",
    "ProgressCallback",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
]
