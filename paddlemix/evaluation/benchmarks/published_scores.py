"""What papers print for LLaVA's models, to be shown beside a score of the same model.

Sources: docs/MODEL_ZOO.md of haotian-liu/LLaVA (commit c121f04); for 1.6 the LLaVA-NeXT blog of January 2024.
"""

from __future__ import annotations

from collections.abc import Mapping

from paddlemix.evaluation.scoring.answered import LLAVA

_COLUMNS = (
    *("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme"),
    *("mmbench_dev_en", "mmbench_dev_cn", "seed", "llava_bench", "mmvet"),
)
# model -> values of the columns, as printed: percent, but MME in points (perception); SEED of 1.6 is its image part
_ROWS: Mapping[str, tuple[float, ...]] = {
    "llava-v1.5-7b": (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 58.3, 58.6, 65.4, 31.1),
    "llava-v1.5-13b": (80.0, 63.3, 53.6, 71.6, 61.3, 85.9, 1531.3, 67.7, 63.6, 61.6, 72.5, 36.1),
    "llava-v1.5-7b-lora": (79.1, 63.0, 47.8, 68.4, 58.2, 86.4, 1476.9, 66.1, 58.9, 60.1, 67.9, 30.2),
    "llava-v1.5-13b-lora": (80.0, 63.3, 58.9, 71.2, 60.2, 86.7, 1541.7, 68.5, 61.5, 61.3, 69.5, 38.3),
    "llava-v1.6-vicuna-7b": (81.8, 64.2, 57.6, 70.1, 64.9, 86.5, 1519.0, 67.4, 60.6, 70.2, 81.6, 43.9),
    "llava-v1.6-vicuna-13b": (82.8, 65.4, 60.5, 73.6, 67.1, 86.2, 1575.0, 70.0, 64.4, 71.9, 87.3, 48.4),
}
_MORE: Mapping[str, Mapping[str, float]] = {"llava-v1.6-vicuna-7b": {"mmmu": 35.8, "mathvista": 34.6}}


def published_score(model: str | None, benchmark: str, protocol: str) -> float | None:
    """The printed value of a model's headline metric; None where there is none.

    Args:
        model: its name, as `model_id` says it.
        protocol: the printed ones are LLaVA's.
    """
    name = (model or "").lower()
    # copies in another layout keep the name and add to it: "llava-v1.5-7b-hf"
    name = name.removesuffix("-hf")
    if protocol != LLAVA or name not in _ROWS:
        return None
    return {**dict(zip(_COLUMNS, _ROWS[name], strict=True)), **_MORE.get(name, {})}.get(benchmark)
