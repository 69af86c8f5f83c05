"""How a run reads its samples: length, what becomes of bad ones, limits on images.  Only values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field

from paddlemix.datasets.images.sources import ImageSettings


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How samples are read.

    Args:
        max_length: most tokens of an example, visual ones included; None for no limit.
        on_too_long: "truncate_turns" drops the last question-answer pairs, "skip" the sample, "error" stops.
        on_bad_sample: "error" stops, "skip" leaves out what cannot be read.
        max_bad_fraction: most bad samples, 0..1 of all, that "skip" accepts.
        image_root: folder of images for entries that name none.
        images: limits on files and downloads.
        seed: of the draws that `#N` and `weight` make.
    """

    max_length: int | None = None
    on_too_long: str = "truncate_turns"
    on_bad_sample: str = "error"
    max_bad_fraction: float = 0.01
    image_root: str | None = None
    images: ImageSettings = field(default_factory=ImageSettings)
    seed: int = 0
