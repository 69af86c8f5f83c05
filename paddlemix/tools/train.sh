#!/bin/sh
# Starts a training on all cards of this machine, or of several, with PaddleMIX's environment variables:
#
#     sh paddlemix/tools/train.sh CONFIG.json [key=value ...]
#
#   script                         what is started; default: supervised_finetune.py beside this file
#   nnode_set, offset, master      number of machines, number of the first one of this job, address of machine 0
#   OMPI_COMM_WORLD_SIZE, _RANK    the same from mpirun, which starts this once per machine
#   PADDLE_TRAINERS_NUM, _ID       the same from a platform; they come before the others
#   CUDA_VISIBLE_DEVICES, ASCEND_RT_VISIBLE_DEVICES    cards; default: all
#
# `paddlemix launch --help` has more; its flags may follow the configuration.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
port=36677

nodes=${PADDLE_TRAINERS_NUM:-${nnode_set:-${OMPI_COMM_WORLD_SIZE:-1}}}
said=${PADDLE_TRAINERS_NUM:-${nnode_set:-}}
rank=${PADDLE_TRAINER_ID:-$((${OMPI_COMM_WORLD_RANK:-0} + ${offset:-0}))}

# What a platform sets for its own way of starting; a worker's own variables come from the launcher.
unset PADDLE_TRAINERS_NUM PADDLE_TRAINER_ID PADDLE_TRAINER_ENDPOINTS DISTRIBUTED_TRAINER_ENDPOINTS
unset PADDLE_ELASTIC_JOB_ID PADDLE_ELASTIC_TIMEOUT FLAGS_START_PORT GLOG_vmodule GLOG_v

# PaddleMIX's settings, where the user has none.  Its FLAGS_use_cuda_managed_memory is left out: a run that does not fit
# would crawl instead of saying so.
export FLAGS_allocator_strategy="${FLAGS_allocator_strategy:-auto_growth}"
export FLAGS_cudnn_exhaustive_search="${FLAGS_cudnn_exhaustive_search:-1}"
export FLAGS_conv_workspace_size_limit="${FLAGS_conv_workspace_size_limit:-4096}"
export NCCL_IB_QPS_PER_CONNECTION="${NCCL_IB_QPS_PER_CONNECTION:-8}"
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
export NCCL_IB_GID_INDEX="${NCCL_IB_GID_INDEX:-3}"

# Drivers older than CUDA 12 need the toolkit's own library for them.
if command -v nvidia-smi >/dev/null && [ -d /usr/local/cuda/compat ]; then
    cuda=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9][0-9]*\).*/\1/p')
    if [ "${cuda:-12}" -lt 12 ]; then
        export LD_LIBRARY_PATH="/usr/local/cuda/compat${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    fi
fi

python=python
command -v python >/dev/null || python=python3

# One machine needs no meeting place.
if [ "$nodes" != 1 ]; then
    set -- "$@" --nnodes "$nodes" --master "${master:-localhost}:$port" --rank "$rank"
elif [ -n "$said" ]; then
    set -- "$@" --nnodes 1
fi
# In place of this shell, so that signals reach the launcher.
exec "$python" "$here/launch.py" "${script:-$here/supervised_finetune.py}" "$@"
