"""What no number of processes makes right is refused by its keys, with what to use instead."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from paddlemix.config.load import load_config
from paddlemix.errors import UserError

_BASE = ["model_name_or_path=model", "output_dir=out", "do_train=false"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("sharding=stage3 offload", 'offload to the host fails or changes the numbers; write "stage3"'),
        ("tensor_parallel_config=sync_grad", "tensor_parallel_config 'sync_grad' is not available; leave it out"),
        (
            "pipeline_parallel_degree=2",
            'layers are not spread over processes here; set it to 1; tensor_parallel_degree splits .*"stage3"',
        ),
        ("context_parallel_degree=2", "a sequence is not split here; set it to 1; for long rows"),
        ("expert_parallel_degree=2", "no model here has experts"),
        ("sharding_parallel_config=split_param", "'split_param' is not available: on NPU its numbers are wrong"),
        ("sharding_parallel_config=enable_stage3_magic", "'enable_stage3_magic' is not available: it is unknown"),
        ("data_parallel_config=enable_allreduce_avg_in_gradinent_scale", "data_parallel_config .* leave it out"),
        ("sharding=zero2", "did you mean 'stage2'"),
        ("sharding=ZeRO-3", "did you mean 'stage3'"),
        ("sharding=full_shard", "did you mean 'stage3'"),
        ("sharding=stage4", "did you mean 'stage"),
    ],
)
def test_what_is_not_available(given: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(None, [*_BASE, given])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["sharding=stage3"], 'sharding "stage3" cannot be used with tensor_parallel_degree 8.*"stage2" or "stage1"'),
        (["sharding=stage3", "sharding_parallel_degree=2"], 'write "stage2" or "stage1", or set sharding_parallel_'),
        (["sharding=stage3", "sharding_parallel_degree=1"], None),  # PaddleMIX's file: tensor parallelism alone
        (["sharding=stage2"], None),
        (["hybrid_parallel_topo_order=sharding_first"], "hybrid_parallel_topo_order .* is not available with tensor_"),
        (["hybrid_parallel_topo_order=pp_first"], None),
    ],
)
def test_tensor_parallelism(given: list[str], said: str | None) -> None:
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        load_config(None, [*_BASE, *given, "tensor_parallel_degree=8"])


def test_what_a_file_of_paddlemix_says_of_one_degree_is_fine() -> None:
    load_config(None, [*_BASE, "sharding=stage2", "tensor_parallel_degree=1", "sharding_parallel_degree=8"])
