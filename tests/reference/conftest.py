"""The processor's instructions that the reference tests are limited to, `make reference ISA=avx2`.

The Makefile tells the math libraries by their own variables; our kernels are told here, and both are looked at.
"""

from __future__ import annotations

import os

import pytest

ISA = "REFERENCE_ISA"  # "" for whatever the processor has, or "avx2"


@pytest.fixture(scope="session", autouse=True)
def _instructions() -> None:
    if not os.environ.get(ISA):
        return
    import torch

    from paddlemix.models.kernels import cpu_library

    assert os.environ[ISA] == "avx2", f"{ISA}={os.environ[ISA]}: allowed is avx2"
    cpu_library._KINDS.pop("avx512", None)
    cpu_library._best_file.cache_clear()
    assert torch.backends.cpu.get_cpu_capability() == "AVX2", "run it by `make reference ISA=avx2`"
    assert cpu_library.kind() in ("avx2", None)
