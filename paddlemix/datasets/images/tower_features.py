"""The vision tower's outputs on disk, for towers that do not train: an image is decoded and encoded in one epoch only.

Knows no tower: features come from whoever computed them.  A file holds one image: float32 [N, P, C] of its N tiles.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from paddlemix.cache import cache_key, replacing
from paddlemix.datasets.data_settings import DataSettings
from paddlemix.datasets.images.decode import load_image
from paddlemix.datasets.images.sizes import ImageSizes
from paddlemix.datasets.images.sources import ImageSettings, open_content
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.processors.images.visual_tokens import count_tiles
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.sample import Example, Sample


class FeatureStore:
    """Features of images in a folder, up to a number of bytes.

    Args:
        directory: made where it is missing; may be shared by runs and processes, and deleted at any time.
        mark: differs between towers with different features.
        limit: bytes of files; when they are reached nothing is added any more.
        shape: (P, C) of a tile's features.
        writers: processes that add to the folder at the same time; each may fill its share of what is left.
    """

    def __init__(self, directory: Path, mark: str, limit: int, shape: tuple[int, int], writers: int = 1) -> None:
        self.directory, self._mark, self._shape = directory, mark, shape
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder {directory} for vision features cannot be made: {error.strerror}") from error
        self._bytes = sum(entry.stat().st_size for folder in os.scandir(directory) for entry in _files(folder))
        self._limit = self._bytes + (limit - self._bytes) // writers
        self._full = False

    def key(self, path: str, settings: ImageSettings, spec: ImageSpec) -> str:
        """Differs where the image's bytes, their processing or the tower differ.

        Raises:
            MissingFileError, UserError: the image cannot be read.
        """
        with open_content(path, settings) as file:
            # by content, not by path: a picture that is replaced must never be answered with the old one's features
            content = hashlib.sha256(file.read()).hexdigest()
        return cache_key(content, spec, self._mark)

    def read(self, key: str, tiles: int) -> np.ndarray | None:
        """float32 [tiles, P, C], or None where the store does not have them whole."""
        try:
            features = np.load(self._path(key), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        # a file cut short by a full disk, or of another tower under the same name, counts as absent
        return features if features.shape == (tiles, *self._shape) and features.dtype == np.float32 else None

    def write(self, key: str, features: np.ndarray) -> None:
        """Keeps an image's features, float32 [N, P, C]; does nothing where they are there or the store is full."""
        path = self._path(key)
        if self._full or path.is_file():
            return
        if self._bytes + features.nbytes > self._limit:
            self._stop(f"holds {self._bytes:,} bytes, vision_cache_gb allows no more")
            return
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                np.save(temporary, features)
            self._bytes += path.stat().st_size
        except (UserError, OSError) as error:
            self._stop(str(error))

    def _stop(self, reason: str) -> None:
        self._full = True
        logger.warning(
            "vision features of further images are computed anew in each epoch: %s %s", self.directory, reason
        )

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.npy"


def _files(folder: os.DirEntry[str]) -> Sequence[os.DirEntry[str]]:
    return [entry for entry in os.scandir(folder) if entry.name.endswith(".npy")] if folder.is_dir() else []


def encode_with_features(
    sample: Sample, processor: LlavaProcessor, store: FeatureStore, sizes: ImageSizes, settings: DataSettings
) -> Example:
    """Encodes a sample with the stored features of its images, or with pixels and the keys to store features under.

    Args:
        sizes: of the images, without decoding them.

    Raises:
        MissingFileError, UserError: as `LlavaProcessor.encode`.
    """
    spec, images = processor.image_spec, settings.images
    keys = [store.key(path, images, spec) for path in sample.images]
    found_sizes = [sizes.get(path) for path in sample.images]
    tiles = [count_tiles(*size, spec) for size in found_sizes]
    example, order = processor.encode_sized(sample, found_sizes, settings.max_length, settings.on_too_long)
    features = {index: store.read(keys[index], tiles[index]) for index in order}
    stored = [item for item in (features[index] for index in order) if item is not None]
    # all of them stored  -> no pixel is read
    # any of them missing -> all are decoded: the tower sees one sample's tiles together
    if order and len(stored) == len(order):
        return replace(example, tile_features=np.concatenate(stored))
    pictures = {index: load_image(sample.images[index], images) for index in order}
    names = tuple((keys[index], tiles[index]) for index in order)
    return replace(example, pixel_values=processor.tiles([pictures[index] for index in order]), tile_keys=names)
