"""The settings of a run of several processes: how long they wait for each other, and over which network.

`docs/scaling.md` shows them, and a test holds page and table equal.  What has no value here is left to the user and
only reported.  Sources: paddle 3.3.1 (`distributed/parallel.py`, `collective.py`); NVIDIA's NCCL user guide and
Huawei's CANN 8.0 reference, "Environment Variables", for what their libraries read.
"""

from __future__ import annotations

from paddlemix.device.setting_row import BEFORE_IMPORT, BEFORE_USE, Setting

# Longer than a download, the first measuring of a large data set's lengths, an evaluation or a save, in all of which
# some processes wait for others: 2 hours, in the unit of each variable.
PATIENCE_SECONDS = 7200
_SECONDS = str(PATIENCE_SECONDS)
_MILLISECONDS = str(1000 * PATIENCE_SECONDS)
_INT32 = 2**31 - 1

PROCESS_SETTINGS = (
    Setting(
        name="PADDLE_PG_TIMEOUT",
        kinds=("gpu",),
        value=None,
        several=_MILLISECONDS,
        default="1800000",
        when=BEFORE_IMPORT,
        form="duration",
        limits=(1, _INT32),
        reason="milliseconds after which paddle reports a collective of NCCL that has not ended (only with "
        "`FLAGS_enable_async_trace=1`; it ends nothing)",
    ),
    Setting(
        name="NCCL_SOCKET_IFNAME",
        kinds=("gpu",),
        value=None,
        default="every interface but lo and docker*, ib* first",
        when=BEFORE_USE,
        reason="yours: interfaces for connections, by prefix; `=eth0` is one exactly, `^docker` all others. To be set "
        "where nodes see each other on one of several networks only",
    ),
    Setting(
        name="NCCL_IB_DISABLE",
        kinds=("gpu",),
        value=None,
        default="0",
        when=BEFORE_USE,
        reason="yours: 1 uses IP sockets although there is InfiniBand or RoCE; much slower, to find out whether that "
        "network is at fault",
    ),
    Setting(
        name="NCCL_IB_HCA",
        kinds=("gpu",),
        value=None,
        default="every adapter",
        when=BEFORE_USE,
        reason="yours: InfiniBand adapters, by prefix; `=mlx5_0:1` is one port exactly",
    ),
    Setting(
        name="NCCL_IB_GID_INDEX",
        kinds=("gpu",),
        value=None,
        default="by version of NCCL",
        when=BEFORE_USE,
        reason="yours: which address of an adapter RoCE uses, as `show_gids` lists them",
    ),
    Setting(
        name="NCCL_IB_TIMEOUT",
        kinds=("gpu",),
        value=None,
        default="18 (NCCL 2.14 to 2.22)",
        when=BEFORE_USE,
        reason="yours: a packet's patience, 4.096 microseconds times 2 to this power; larger on a very large network",
    ),
    Setting(
        name="NCCL_DEBUG",
        kinds=("gpu",),
        value=None,
        default="no messages",
        when=BEFORE_USE,
        reason="yours: INFO shows which network was chosen, WARN only errors",
    ),
    Setting(
        name="HCCL_CONNECT_TIMEOUT",
        kinds=("npu",),
        value=None,
        several=_SECONDS,
        default="120",
        when=BEFORE_USE,
        form="duration",
        limits=(120, 7200),
        reason="seconds that cards wait for each other to connect; Paddle's NPU image has the same value",
    ),
    Setting(
        name="HCCL_EXEC_TIMEOUT",
        kinds=("npu",),
        value=None,
        several=_SECONDS,
        default="1836",
        when=BEFORE_USE,
        form="duration",
        limits=(0, _INT32),
        reason="seconds that a collective waits for the other cards; 0 is for ever, on Atlas A2 and later. The first "
        "Atlas training cards take at most 17340, and multiples of 68",
    ),
    Setting(
        name="HCCL_IF_IP",
        kinds=("npu",),
        value=None,
        default="see HCCL_SOCKET_IFNAME",
        when=BEFORE_USE,
        reason="yours: this host's address for connections; before HCCL_SOCKET_IFNAME",
    ),
    Setting(
        name="HCCL_SOCKET_IFNAME",
        kinds=("npu",),
        value=None,
        default="the first by name that is neither lo nor docker",
        when=BEFORE_USE,
        reason="yours: the host's interfaces for connections, by prefix; `=eth0` is one exactly, `^docker` all others",
    ),
    Setting(
        name="HCCL_WHITELIST_DISABLE",
        kinds=("npu",),
        value=None,
        default="1",
        when=BEFORE_USE,
        reason="yours: 0 connects only the addresses of HCCL_WHITELIST_FILE",
    ),
    Setting(
        name="HCCL_BUFFSIZE",
        kinds=("npu",),
        value=None,
        default="200",
        when=BEFORE_USE,
        reason="yours: MB of a card's memory for sending and as many for receiving, for each group of cards",
    ),
)
