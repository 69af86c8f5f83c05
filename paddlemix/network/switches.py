"""What the environment says about the network: whether servers may be asked at all.

Source: https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables
"""

from __future__ import annotations

import os


def offline_switch(setting: bool | None = None) -> str | None:
    """What forbids to ask servers, as the user knows it, or None.

    Args:
        setting: True or False decides; None leaves it to the environment.
    """
    if setting is not None:
        return "the setting offline" if setting else None
    for variable in ("PADDLEMIX_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            return f"{variable}={os.environ[variable]}"
    return None
