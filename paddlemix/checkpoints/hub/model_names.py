"""Names of models: which hub they belong to, and where a model of that name may be on this machine.

    ModelName.parse("modelscope:swift/llava-1.5-7b-hf")
    ModelName.parse("llava-hf/llava-1.5-7b-hf@main")  # of Hugging Face, or of the hub that PADDLEMIX_HUB names

Asks no server.

Sources: PaddleMIX's cache folders (its documentation); huggingface_hub's cache layout
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paddlemix.network import modelscope
from paddlemix.network.switches import chosen_hub
from paddlemix.paths import user_path

PADDLEMIX = "paddlemix/"  # how the names on PaddleMIX's server begin
_PREFIXES: dict[str, Literal["huggingface", "modelscope"]] = {
    "modelscope": "modelscope",
    "ms": "modelscope",
    "huggingface": "huggingface",
    "hf": "huggingface",
}
NAME_PATTERN = r"[A-Za-z0-9_][\w.\-]*"  # of an owner, a model, a revision and a weight file (ASCII)
_NAME = re.compile(
    rf"(?P<paddlemix>paddlemix(/{NAME_PATTERN})+)|((?P<hub>{'|'.join(_PREFIXES)}):)?(?P<name>{NAME_PATTERN}/{NAME_PATTERN})(@(?P<revision>{NAME_PATTERN}))?",
    re.ASCII,
)
# What ModelScope calls models that have another owner there.  Source: ms-swift's model registrations, LLaMA-Factory's.
_ON_MODELSCOPE = {
    "llava-hf/llava-1.5-7b-hf": "swift/llava-1.5-7b-hf",
    "llava-hf/llava-1.5-13b-hf": "swift/llava-1.5-13b-hf",
    "llava-hf/llava-v1.6-vicuna-7b-hf": "swift/llava-v1.6-vicuna-7b-hf",
    "llava-hf/llava-v1.6-vicuna-13b-hf": "swift/llava-v1.6-vicuna-13b-hf",
    "llava-hf/llava-v1.6-mistral-7b-hf": "swift/llava-v1.6-mistral-7b-hf",
    "lmsys/vicuna-7b-v1.5": "AI-ModelScope/vicuna-7b-v1.5",
    "openai/clip-vit-large-patch14": "AI-ModelScope/clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336": "AI-ModelScope/clip-vit-large-patch14-336",
}


@dataclass(frozen=True)
class ModelName:
    """A model's name in its parts.

    Args:
        hub: whose server has it.
        name: its name there: `owner/name`, or `paddlemix/...` on PaddleMIX's server.
        revision: branch, tag or commit; None for the newest.
    """

    hub: Literal["huggingface", "modelscope", "paddlemix"]
    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelName | None:
        """The parts of `[hub:]owner/name[@revision]` or `paddlemix/...`; None if the text does not name a model."""
        # | text               | hub                                              |
        # |--------------------|--------------------------------------------------|
        # | paddlemix/...      | PaddleMIX                                        |
        # | hf:..., ms:..., .. | as the prefix says                               |
        # | owner/name         | PADDLEMIX_HUB, else Hugging Face                 |
        found = _NAME.fullmatch(text)
        if found is None:
            return None
        if found["paddlemix"] is not None:
            return cls("paddlemix", found["paddlemix"])
        if found["hub"] is not None:
            return cls(_PREFIXES[found["hub"]], found["name"], found["revision"])
        hub, _ = chosen_hub()
        # only a name without a prefix is translated: with one, the user names ModelScope's own
        name = _ON_MODELSCOPE.get(found["name"], found["name"]) if hub == "modelscope" else found["name"]
        return cls(hub, name, found["revision"])

    def places(self) -> list[Path]:
        """Where it may be on this machine, the preferred place first, where a download goes too."""
        folder = self.name if self.revision is None else f"{self.name}@{self.revision}"
        home = user_path(os.environ.get("PPMIX_HOME") or "~/.paddlemix", "PPMIX_HOME")
        if self.hub == "modelscope":
            return [home / "modelscope" / folder, *modelscope.cached_places(self.name, self.revision)]
        paddlenlp = user_path(os.environ.get("PPNLP_HOME") or "~/.paddlenlp", "PPNLP_HOME")
        places = [home / "models" / folder, paddlenlp / "models" / folder]
        if self.hub == "huggingface":
            cached = _hugging_face_cache() / f"models--{self.name.replace('/', '--')}"
            wanted = self.revision or "main"
            # refs/main holds the commit that snapshots/ has a folder for; a commit itself has no entry in refs/
            reference = cached / "refs" / wanted
            places.append(cached / "snapshots" / (reference.read_text().strip() if reference.is_file() else wanted))
        return places


def is_model_name(text: str) -> bool:
    """Whether a text may name a model, see `ModelName.parse`: no leading "./", "/" or "~"."""
    return _NAME.fullmatch(text) is not None


def candidates(name: str) -> list[Path]:
    """`ModelName.places` of a name; [] if the text does not name a model."""
    parsed = ModelName.parse(name)
    return parsed.places() if parsed is not None else []


def _hugging_face_cache() -> Path:
    # in huggingface_hub's own order of precedence
    for variable, below in (("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")):
        if os.environ.get(variable):
            return user_path(os.environ[variable], variable) / below
    return user_path("~/.cache/huggingface/hub", "HF_HOME")
