"""What the environment says about the network: whether servers may be asked, and which hub plain names are of.

Sources: huggingface_hub's page of environment variables; the variables of ms-swift (USE_HF), LLaMA-Factory
(USE_MODELSCOPE_HUB), vLLM and LMDeploy by which their users choose ModelScope.
"""

from __future__ import annotations

import os
from typing import Literal

from paddlemix.errors import UserError, did_you_mean

Hub = Literal["huggingface", "modelscope"]

_HUBS: tuple[Hub, ...] = ("huggingface", "modelscope")
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
# Variable -> the hub that a yes means, and the one that a no means.
_CHOICES: dict[str, tuple[Hub, Hub | None]] = {
    "USE_HF": ("huggingface", "modelscope"),
    "USE_MODELSCOPE_HUB": ("modelscope", None),
    "VLLM_USE_MODELSCOPE": ("modelscope", None),
    "LMDEPLOY_USE_MODELSCOPE": ("modelscope", None),
}


def offline_switch(setting: bool | None = None) -> str | None:
    """What forbids asking servers, as the user knows it, or None.

    Args:
        setting: True or False decides; None leaves it to the environment.
    """
    # setting of the call                     -> decides
    # PADDLEMIX_OFFLINE, then HF_HUB_OFFLINE  -> decides where it is a yes
    # none of them                            -> servers may be asked
    if setting is not None:
        return "the setting offline" if setting else None
    for variable in ("PADDLEMIX_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(variable, "").lower() in _YES:
            return f"{variable}={os.environ[variable]}"
    return None


def chosen_hub() -> tuple[Hub, str | None]:
    """The hub that a plain `owner/name` is of, and the variable that says so (None: nothing does).

    PADDLEMIX_HUB decides; without it, other programs' variables decide, the first of the table that is set.

    Raises:
        UserError: PADDLEMIX_HUB is neither hub.
    """
    given = os.environ.get("PADDLEMIX_HUB", "")
    if given:
        hub = next((hub for hub in _HUBS if hub == given.lower()), None)
        if hub is None:
            raise UserError(f"PADDLEMIX_HUB='{given}' is not one of {', '.join(_HUBS)}{did_you_mean(given, _HUBS)}")
        return hub, f"PADDLEMIX_HUB={given}"
    for variable, (yes, no) in _CHOICES.items():
        value = os.environ.get(variable, "")
        chosen = yes if value.lower() in _YES else no if value.lower() in _NO else None
        if chosen is not None:
            return chosen, f"{variable}={value}"
    return "huggingface", None
