"""Images checked before a run: each once, decoded while a budget of bytes lasts, by its header afterwards.

So what would stop a run hours later stops it at once, in bounded time.  Knows no record.
"""

from __future__ import annotations

import os

from paddlemix.datasets.images.decode import load_image
from paddlemix.datasets.images.sizes import ImageSizes
from paddlemix.datasets.images.sources import ImageSettings, is_data_uri, is_url

_DECODED_BYTES = 128 * 1024**2  # a few seconds of decoding, before anything of the run is written


class ImageCheck:
    """The images of some samples.

    Args:
        sizes: remembers which images decoded without an error; those are not decoded again.
        settings: limits.
    """

    def __init__(self, sizes: ImageSizes, settings: ImageSettings) -> None:
        self._sizes, self._settings = sizes, settings
        self._known: set[str] = set()
        self._decoded: list[str] = []
        self._bytes = 0

    def check(self, path: str) -> None:
        """Looks at one image.

        Raises:
            MissingFileError, UserError: it is missing, not an image or cut short.
        """
        # an address                   -> not fetched here: a run of a million of them would never start
        # a `data:` URI                -> its header
        # a file, while bytes are left -> decoded whole, and remembered
        # any other file               -> its header
        if path in self._known or is_url(path):
            return
        self._sizes.get(path)
        self._known.add(path)
        if is_data_uri(path):
            return
        if self._bytes < _DECODED_BYTES and not self._sizes.is_decoded(path):
            self._bytes += os.path.getsize(path)
            load_image(path, self._settings)
            self._decoded.append(path)

    def finish(self) -> None:
        """Remembers what was decoded, for the next run."""
        self._sizes.mark_decoded(self._decoded)
