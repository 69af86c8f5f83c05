"""The one room that knows devices: environment before paddle loads, choice of device, dtypes, seeds and memory.

`settings.py` is the table of what is set and why; read it first.
"""

from paddlemix.device.choice import (
    available_kinds,
    check_dtype,
    default_dtype,
    device_count,
    kind_of,
    missing_card,
    select_device,
    supported_dtypes,
)
from paddlemix.device.environment import prepare_environment, return_freed_memory
from paddlemix.device.settings import DEVICE_KINDS
from paddlemix.device.settings_text import report_settings
from paddlemix.device.state import RandomState, peak_memory_bytes, random_state, restore_random_state, set_seed

__all__ = [
    "DEVICE_KINDS",
    "RandomState",
    "available_kinds",
    "check_dtype",
    "default_dtype",
    "device_count",
    "kind_of",
    "missing_card",
    "peak_memory_bytes",
    "prepare_environment",
    "random_state",
    "report_settings",
    "restore_random_state",
    "return_freed_memory",
    "select_device",
    "set_seed",
    "supported_dtypes",
]
