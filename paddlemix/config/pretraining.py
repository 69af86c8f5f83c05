"""What pretraining has in place of the defaults of fine-tuning: the projector alone learns, from captions."""

from __future__ import annotations

# Source: haotian-liu/LLaVA scripts/v1_5/pretrain.sh
DEFAULTS = {
    "chat_template": "plain",
    "image_aspect_ratio": "square",
    "language_model": "frozen",
    "vision_tower": "frozen",
    "projector": "full",
}
