"""Whether this checkout has the kernels in C, for tests that compute with them.

They are built where there is a C compiler; a machine without one still runs everything else.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REQUIRED = "REQUIRE_CPU_KERNELS"  # with 1, a machine without the kernels fails their tests


def need_kernels(kind: str | None = None) -> None:
    """Skips a test that cannot run here, with the reason, or fails it where the environment requires the kernels.

    Args:
        kind: "plain", "avx2" or "avx512"; None for whichever is loaded.  One that this processor cannot run is always
            skipped: nothing that is built could change that.
    """
    from paddlemix.models.kernels import cpu_library

    if kind is not None and not cpu_library._KINDS[kind] <= cpu_library._processor_features():
        pytest.skip(f"this processor cannot run the kernels for {kind}")
    reason = cpu_library.missing()
    if reason is None and kind is not None:
        built = Path(cpu_library.__file__).parent.glob(f"_cpu_kernels_{kind}.*so")
        reason = None if any(built) else f"the kernels for {kind} were not built"
    if reason is not None and os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED}=1, but {reason}")
    if reason is not None:
        pytest.skip(f"no compiled kernels: {reason}")
