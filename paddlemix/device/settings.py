"""The table of what paddle, its plugins and our kernels read from the environment: each setting, our value, and why.

`docs/devices.md` shows it, and a test holds page and table equal.  Knows neither paddle nor any run.
Sources: Paddle's flag documentation; the NPU plugin's sources (PaddleCustomDevice, October 2024) for what it reads and
when; measurements with paddle 3.3.1 for the CPU settings and for the moment at which a flag is read.
"""

from __future__ import annotations

import os

from paddlemix.device.setting_row import BEFORE_IMPORT, BEFORE_USE, DEVICE_KINDS, Setting
from paddlemix.device.settings_of_processes import PROCESS_SETTINGS
from paddlemix.device.started import Started

# By device: all, CPU, GPU, NPU. A name may occur once per device, with different values.
SETTINGS = (
    Setting(
        name="OMP_NUM_THREADS",
        kinds=DEVICE_KINDS,
        value="{cores}",
        default="1 in paddle's CPU kernels",
        when=BEFORE_IMPORT,
        form="count",
        reason="threads of work on the host, divided by the processes on it; on CPU all of the computation (a product "
        "of matrices: 31 ms with one thread, 16 with two)",
    ),
    Setting(
        # With several processes on CPU paddle's last words before it ends the process itself, "Unknown DataType" of a
        # collective, are such a line.
        name="GLOG_minloglevel",
        kinds=("cpu",),
        value="1",
        several="0",
        default="0",
        when=BEFORE_IMPORT,
        reason="no INFO lines among the output; with several processes they are shown (three at the start), because "
        "paddle says there alone why it ends a process in a collective on CPU",
    ),
    Setting(
        name="GLOG_minloglevel",
        kinds=("gpu", "npu", "xpu"),
        value="1",
        default="0",
        when=BEFORE_IMPORT,
        reason="no INFO lines of a plugin or an allocator among the output; 0 shows them",
    ),
    Setting(
        name="MKL_DEBUG_CPU_TYPE",
        kinds=DEVICE_KINDS,
        value="5",
        default="chosen by maker",
        when=BEFORE_IMPORT,
        only="AMD",
        reason="the math library's AVX2 code, which it keeps from AMD processors otherwise; about 3 times faster",
    ),
    Setting(
        name="FLAGS_use_stride_kernel",
        kinds=("cpu",),
        value="0",
        default="1",
        when=BEFORE_IMPORT,
        form="flag",
        reason="slices and transposes are copies, which are faster to read than views (an attention's transpose: 0.14 "
        "ms instead of 7.3); results are the same with 1",
    ),
    Setting(
        name="KMP_BLOCKTIME",
        kinds=("cpu",),
        value="1",
        default="200",
        when=BEFORE_IMPORT,
        reason="milliseconds that an idle thread keeps a core busy before it sleeps",
    ),
    Setting(
        name="MKL_DISABLE_FAST_MM",
        kinds=("cpu",),
        value="1",
        default="0",
        when=BEFORE_IMPORT,
        reason="the math library takes its working memory from the heap that everything uses and gives it back, "
        "instead of keeping 100 MB of its own",
    ),
    Setting(
        # Not a variable, but part of the same story: listed so that the report shows it.
        name="mallopt",
        kinds=("cpu",),
        value="M_MMAP_MAX 0, M_TRIM_THRESHOLD -1, M_TOP_PAD 64 MiB",
        default="the C library's",
        when=BEFORE_IMPORT,
        form="call",
        reason="a call, no variable (glibc only): freed blocks are kept, so that a large activation is not mapped and "
        "zeroed anew for each operator (a softmax: 5.4 ms instead of 19)",
    ),
    Setting(
        name="PADDLEMIX_CPU_KERNELS",
        kinds=("cpu",),
        value=None,
        default="1",
        when=BEFORE_USE,
        form="switch",
        reason="0 computes everything with paddle's own operators, without the compiled kernels, to compare the two: "
        "results agree to rounding, and a training step of a small LLaVA takes about 1.25 times as long (2 cores)",
    ),
    Setting(
        # Nothing is set for GPUs: paddle's defaults are right there.
        name="CUDA_VISIBLE_DEVICES",
        kinds=("gpu",),
        value=None,
        default="all cards",
        when=BEFORE_IMPORT,
        form="cards",
        reason="yours: which cards the process sees; gpu:0 is the first of them",
    ),
    Setting(
        name="FLAGS_selected_gpus",
        kinds=("gpu",),
        value=None,
        default="0",
        when=BEFORE_USE,
        form="cards",
        reason="set by paddle.distributed.launch for each process; leave it to that",
    ),
    Setting(
        name="FLAGS_allocator_strategy",
        kinds=("gpu",),
        value=None,
        default="auto_growth",
        when=BEFORE_IMPORT,
        form="strategy",
        reason="memory is taken as it is needed; naive_best_fit takes 92 % of the card at once",
    ),
    Setting(
        name="CUSTOM_DEVICE_ROOT",
        kinds=("npu",),
        value=None,
        default="paddle_custom_device beside paddle",
        when=BEFORE_IMPORT,
        form="folder",
        reason="the folder of the plugin; needed only where pip did not install it",
    ),
    Setting(
        name="FLAGS_npu_storage_format",
        kinds=("npu",),
        value="0",
        default="0",
        when=BEFORE_IMPORT,
        form="first letter",
        upstream="0",
        reason="plain layouts; 1 keeps private ones for convolutions and some float16 products, and those then fall "
        "back to slower operators",
    ),
    Setting(
        name="FLAGS_use_stride_kernel",
        kinds=("npu",),
        value="0",
        default="1",
        when=BEFORE_IMPORT,
        form="flag",
        upstream="0",
        reason="slices are copies, and a weight that is not contiguous in memory is not copied wrongly to the card "
        "(with 1 paddle 3.3.1 did that on the stand-in NPU). It breaks code that writes labels through views, "
        "PaddleMIX's masking for one; here labels are made in numpy, and results are the same with 1",
    ),
    Setting(
        name="FLAGS_npu_jit_compile",
        kinds=("npu",),
        value="0",
        default="1",
        when=BEFORE_IMPORT,
        form="first letter",
        upstream="0",
        reason="ready-made operators instead of one compiled for every new length of a batch",
    ),
    Setting(
        name="FLAGS_npu_scale_aclnn",
        kinds=("npu",),
        value="True",
        default="0",
        when=BEFORE_IMPORT,
        form="first letter",
        upstream="True",
        reason="scale in the tensor's own precision, not as a power in float32",
    ),
    Setting(
        name="FLAGS_npu_split_aclnn",
        kinds=("npu",),
        value="True",
        default="0",
        when=BEFORE_IMPORT,
        form="first letter",
        upstream="True",
        reason="the newer operator for split",
    ),
    Setting(
        name="FLAGS_allocator_strategy",
        kinds=("npu",),
        value="auto_growth",
        default="auto_growth",
        when=BEFORE_IMPORT,
        form="strategy",
        upstream="auto_growth",
        reason="memory is taken as it is needed; naive_best_fit, which Paddle's docker image exports, takes 92 % of "
        "the card at once",
    ),
    Setting(
        name="CUSTOM_DEVICE_BLACK_LIST",
        kinds=("npu",),
        value=None,
        default="no operator",
        when=BEFORE_USE,
        form="names",
        upstream="set_value,set_value_with_tensor",
        reason="operators that run on the host instead. Not needed: nothing here writes into a tensor in a step, so "
        "PaddleMIX's value is harmless. Names are paddle's old ones (matmul_v2, not matmul)",
    ),
    Setting(
        name="ASCEND_RT_VISIBLE_DEVICES",
        kinds=("npu",),
        value=None,
        default="all cards",
        when=BEFORE_IMPORT,
        form="cards",
        upstream="8",
        reason="yours: which cards the process sees, as npu-smi info counts them; npu:0 is the first of them. "
        "PaddleMIX's value leaves no card visible on a host whose cards are 0 to 7",
    ),
    Setting(
        name="FLAGS_selected_npus",
        kinds=("npu",),
        value=None,
        default="0",
        when=BEFORE_USE,
        form="cards",
        reason="set by paddle.distributed.launch for each process; leave it to that",
    ),
    Setting(
        name="FLAGS_npu_blocking_run",
        kinds=("npu",),
        value=None,
        default="0",
        when=BEFORE_IMPORT,
        form="first letter",
        reason="for finding errors: every operator waits for the card, which is slow",
    ),
    Setting(
        name="FLAGS_npu_check_nan_inf",
        kinds=("npu",),
        value=None,
        default="0",
        when=BEFORE_IMPORT,
        form="first letter",
        reason="for finding errors: every result is searched for NaN and infinity, which is slow",
    ),
    *PROCESS_SETTINGS,
)


def settings_of(kind: str) -> list[Setting]:
    """The rows of a device kind."""
    return [setting for setting in SETTINGS if kind in setting.kinds]


def value_of(setting: Setting, is_amd: bool, started: Started | None = None) -> str | None:
    """What is set on this machine if the user exported nothing; None leaves the setting alone.

    Args:
        is_amd: whether the processor is AMD's.
        started: None for a process alone.
    """
    started = started or Started()
    value = setting.several if started.several and setting.several is not None else setting.value
    if value is None or (setting.only == "AMD" and not is_amd):
        return None
    return value.format(cores=max(1, (os.cpu_count() or 1) // started.local))
