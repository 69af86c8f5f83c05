"""A home without models, and hubs on this machine that downloads may ask."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import HANG
from tests.hub_server import HubServer, serving_hub

_VARIABLES = (
    *("HF_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "PADDLEMIX_OFFLINE", "PADDLEMIX_HUB", "USE_HF"),
    *("USE_MODELSCOPE_HUB", "VLLM_USE_MODELSCOPE", "LMDEPLOY_USE_MODELSCOPE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    *("MODELSCOPE_API_TOKEN", "MODELSCOPE_DOMAIN", "MODELSCOPE_ENDPOINT", "HF_HUB_DISABLE_IMPLICIT_TOKEN"),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, an empty working directory, and a network that may be used."""
    for variable in _VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    folders = {"PPMIX_HOME": "paddlemix", "PPNLP_HOME": "paddlenlp", "HF_HOME": "hf", "MODELSCOPE_CACHE": "ms"}
    for variable, folder in folders.items():
        monkeypatch.setenv(variable, str(tmp_path / folder))
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    return tmp_path


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Hubs that all names are asked of; waits between attempts are skipped, and nobody is logged in."""
    import huggingface_hub

    from paddlemix.checkpoints.hub import needed_files
    from paddlemix.network import client, hugging_face, modelscope, transfer

    settings = replace(transfer.MODEL_DOWNLOADS, timeout=HANG)
    for module in (hugging_face, modelscope, needed_files, transfer):
        monkeypatch.setattr(module, "MODEL_DOWNLOADS", settings)
    for module in (client, hugging_face):
        monkeypatch.setattr(module, "_sleep", lambda seconds: None)
    hasty = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr("huggingface_hub.utils._http.time", hasty)
    monkeypatch.setattr("huggingface_hub.file_download.time", hasty)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(home / "hf" / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.address)
        monkeypatch.setenv("COMMUNITY_MODEL_PREFIX", f"{running.address}/community")
        yield running
