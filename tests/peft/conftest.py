"""The compiled kernels of every kind of processor, as the tests of `models/` have them."""

from __future__ import annotations

from tests.models.conftest import fresh_library, library

__all__ = ["fresh_library", "library"]
