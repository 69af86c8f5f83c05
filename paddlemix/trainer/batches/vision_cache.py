"""The frozen tower's features, computed once and kept, and put into batches in place of pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import paddle
import paddle.distributed as dist

from paddlemix.cache import cache_directory, cache_key
from paddlemix.config.schema import RunConfig
from paddlemix.datasets.images.tower_features import FeatureStore
from paddlemix.errors import UserError
from paddlemix.models.kernels.operators import take_rows
from paddlemix.models.llava import LlavaModel
from paddlemix.models.vision import VisionTower
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.trainer.batches.dataloader import Inputs


def open_store(config: RunConfig, model: LlavaModel, processes: int = 1) -> FeatureStore | None:
    """The store that a run asks for, None where it asks for none.

    Args:
        processes: of the run that write to it.

    Raises:
        UserError: the model has no tower, or the tower trains.
    """
    if not config.cache_vision_features:
        return None
    if model.config.vision is None:
        raise UserError(f"cache_vision_features is set, but {config.model_name_or_path} has no vision tower")
    if any(not weight.stop_gradient for weight in model.vision_tower.parameters()):
        raise UserError("cache_vision_features needs a tower that does not train; set vision_tower to frozen")
    folder = Path(config.vision_cache_dir) if config.vision_cache_dir else cache_directory("features")
    shape = (model.config.tokens_per_tile, model.config.vision.hidden_size)
    return FeatureStore(folder, _mark(model.vision_tower), int(config.vision_cache_gb * 1e9), shape, processes)


def _mark(tower: VisionTower) -> str:
    """Differs between towers that compute different features."""
    # Of the numbers, not of the file: a tower may have been trained in an earlier stage.
    weights = hashlib.sha256()
    for name, weight in sorted(tower.named_parameters()):
        weights.update(f"{name} {weight.dtype} {weight.shape}".encode())
        weights.update(weight.numpy().tobytes())
    return cache_key(weights.hexdigest(), tower.keep_class_token, tower.config)


_TILES = ("pixel_values", "tile_features", "tile_order")


class VisionCache:
    """Puts the tower's features in the place of pixels, and keeps those that are new.

    Args:
        store: keeps them.
        tower: does not train.
        layout: of a tensor group the first process keeps features, and all compute with what it found.
    """

    def __init__(self, store: FeatureStore, tower: VisionTower, layout: Layout = ALONE) -> None:
        self._store, self._tower, self._layout = store, tower, layout

    @paddle.no_grad()
    def complete(self, inputs: Inputs) -> Inputs:
        """The same batch without pixels.

        Args:
            inputs: see `dataloader.batch_inputs`; may hold `pixel_values`, `tile_features`, neither or both with their
                `tile_order`.
        """
        rest = {name: value for name, value in inputs.items() if name not in _TILES}
        features = []
        if "pixel_values" in inputs:
            features.append(self._tower(inputs["pixel_values"]))
            if self._layout.tensor_rank == 0:
                self._keep(features[0], inputs["tile_keys"])
        if "tile_features" in inputs:  # float32 holds every value of a lower precision
            features.append(inputs["tile_features"].astype(self._tower.class_embedding.dtype))
        if len({item.dtype for item in features}) > 1:  # under autocast the tower computes in a lower precision
            features = [item.astype("float32") for item in features]
        if not features:
            return inputs
        # New tiles first, kept ones after them; `tile_order` puts them back into the batch's order.
        joined = paddle.concat(features)
        if len(features) > 1:
            tiles, shape = len(joined), joined.shape
            joined = take_rows(joined.reshape([tiles, -1]), inputs["tile_order"]).reshape(shape)
        return {**rest, "tile_features": self._of_group(joined)}

    def _of_group(self, features: paddle.Tensor) -> paddle.Tensor:
        """The first process's features, on all processes of a tensor group.

        What one found in the store another may have computed, with pictures of another batch: not the same last bits.
        """
        group = self._layout.tensor_group
        if group is None:
            return features
        features = features.astype("float32").contiguous()  # one type, wherever they are from
        dist.broadcast(features, src=group.ranks[0], group=group)
        return features.astype(self._tower.class_embedding.dtype)  # of kept features: float32 under autocast

    def _keep(self, features: paddle.Tensor, keys: tuple[tuple[str, int], ...]) -> None:
        # One copy to the host for the batch; the store is a file per picture.
        values, first = features.astype("float32").numpy(), 0
        for key, tiles in keys:
            self._store.write(key, values[first : first + tiles])
            first += tiles
