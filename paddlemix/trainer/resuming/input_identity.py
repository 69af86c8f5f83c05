"""What a run reads (data, pictures, declared files, an adapter's base), and whether it is the same on resuming.

Data files are hashed before the first step.  Pictures are hashed during the training, by a thread: reading all of them
first may take long, and nothing needs their digests before a checkpoint is saved.  One that was not hashed when its
checkpoint was saved is recognised by size and time of its file alone.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from paddlemix.checkpoints.adapters.adapter import read_adapter
from paddlemix.checkpoints.adapters.base_check import changed_weights, describe_weights
from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import read_metadata, read_safetensors, write_safetensors
from paddlemix.checkpoints.identity.declared_identity import changed_config, changed_processor, computed_values
from paddlemix.checkpoints.layouts.file_names import ADAPTER_WEIGHTS
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.checkpoints.source import open_source
from paddlemix.datasets.data_identity import (
    UNKNOWN,
    Pictures,
    cached_record_digests,
    describe_records,
    hashed,
    picture_blocks,
    record_digests,
    states_of,
)
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.datasets.records.record_file import RecordFile
from paddlemix.errors import UserError
from paddlemix.identity import listed
from paddlemix.log import logger

INPUTS_FILE = "inputs.safetensors"
_FILES_KEY = "data_files"
_ARRAYS = ("digests", "states")
_THREADS = 2  # that hash pictures while the run trains
_WAIT = 5.0  # seconds that the saves of a run wait, in all, for pictures that are not hashed yet


class InputIdentity:
    """What a run reads; hashes pictures until `close`.

    Args:
        data: the data sets of a run by split.
        loaded: the run's model and processor.
        base: digests of an adapter's base, see `base_check.base_digests`; empty for a run that saves all weights.
    """

    def __init__(self, data: Mapping[str, SampleDataset], loaded: Pretrained, base: Mapping[str, str]) -> None:
        self._data, self._loaded, self._base = data, loaded, base
        self._files = [
            {"split": split, "path": records.path, "digest": records.content_digest}
            for split, samples in data.items()
            for records in samples.record_files
        ]
        self._known: list[Pictures] = []  # one for each block of pictures, in their order
        self._closed, self._patience = threading.Event(), _WAIT
        # A daemon: a run that ends by an error does not wait for it.
        self._thread = threading.Thread(target=self._hash_pictures, daemon=True, name="picture digests")

    def differences(self, checkpoint: Path) -> list[str]:
        """What has changed since a checkpoint was saved, in words; without what it does not record.

        Raises:
            UserError: the checkpoint is damaged.
        """
        found = self._changed_declared(checkpoint) + self._changed_base(checkpoint)
        if (checkpoint / INPUTS_FILE).is_file():
            data = self._changed_data(checkpoint)
            found += data or self._changed_pictures(checkpoint)
        return found

    def _changed_declared(self, checkpoint: Path) -> list[str]:
        """Compares tokenizer, processor and the sizes that the model computes with to those of the checkpoint."""
        adapter = (checkpoint / ADAPTER_WEIGHTS).is_file()
        # An adapter stores what its base computes with; a whole model has its own config.json.
        if adapter:
            then = read_adapter(checkpoint).base_values()
        else:
            then = computed_values(open_source(checkpoint).config)
        processor, directories = self._loaded.processor, self._loaded.declared_directories
        found = [] if processor is None else changed_processor(checkpoint, processor, directories)
        return found + changed_config(then, self._loaded.model.config, directories)

    def _changed_base(self, checkpoint: Path) -> list[str]:
        if not self._base or not (checkpoint / ADAPTER_WEIGHTS).is_file():
            return []
        wrong = changed_weights(read_adapter(checkpoint).base_digests(), self._base)
        return [f"the base's weights ({describe_weights(wrong)})"] if wrong else []

    def _changed_data(self, checkpoint: Path) -> list[str]:
        """Compares the data files of each split that both runs have: evaluations may be switched on or off."""
        then, wrong = _saved_files(checkpoint / INPUTS_FILE), []
        for split, samples in self._data.items():
            now = [item["digest"] for item in self._files if item["split"] == split]
            # A split that the earlier run did not have differs from nothing.
            old = then.get(split, now)
            if len(old) != len(now):
                wrong.append(f"the number of data files of dataset.{split} ({len(now)} instead of {len(old)})")
                continue
            for records, before, content in zip(samples.record_files, old, now, strict=True):
                if before != content:
                    digests = record_digests(records, content)
                    wrong.append(describe_records(records.path, cached_record_digests(before), digests))
        return list(filter(None, wrong))

    def _record_files(self) -> list[RecordFile]:
        return [records for samples in self._data.values() for records in samples.record_files]

    def _changed_pictures(self, checkpoint: Path) -> list[str]:
        """Compares all pictures, and keeps the digests of those that have not changed."""
        saved = read_safetensors(checkpoint / INPUTS_FILE)
        then = Pictures(*(np.array(saved[name].read()).view(np.uint64) for name in _ARRAYS))
        wrong: dict[str, None] = {}
        start = 0
        for block in self._blocks():
            known = then.part(start, len(block))
            now = states_of(block, known)
            # Hashing is slow, so only pictures are hashed again whose size or time differs from what was saved.
            moved = (known.states != UNKNOWN) & (known.states != now.states)
            if moved.any():
                now = hashed(block, now)
            for place in np.flatnonzero(moved & (known.digests != now.digests)).tolist():
                wrong[block[place] or f"picture {start + place}"] = None
            self._known.append(now)
            start += len(block)
        return [f"{'picture' if len(wrong) == 1 else 'pictures'} {listed(list(wrong))}"] if wrong else []

    def start(self) -> None:
        """Starts to hash pictures during the training."""
        self._thread.start()

    def close(self) -> None:
        """Stops hashing."""
        self._closed.set()

    def _blocks(self) -> Iterator[list[str]]:
        for samples in self._data.values():
            yield from picture_blocks(samples)

    def _hash_pictures(self) -> None:
        try:
            for records, item in zip(self._record_files(), self._files, strict=True):
                record_digests(records, item["digest"])
            if not self._known:  # a resumed run has done this already
                for block in self._blocks():  # states first: they are known soon
                    self._known.append(states_of(block, Pictures.unknown(len(block))))
                    if self._closed.is_set():
                        return
            for number, block in enumerate(self._blocks()):
                if self._closed.is_set():
                    return
                self._known[number] = hashed(block, self._known[number], _THREADS)
        except (UserError, OSError) as error:
            logger.warning("pictures of this run are not hashed from here on: %s", error)

    def write(self, directory: Path) -> None:
        """Writes what is known by now into a checkpoint.

        Raises:
            UserError: it cannot be written.
        """
        if self._thread.is_alive():
            start = time.monotonic()
            self._thread.join(self._patience)
            # One budget for all saves of a run: a disk of millions of pictures must not slow every checkpoint.
            self._patience = max(self._patience - (time.monotonic() - start), 0.0)
        known = Pictures.joined(list(self._known))
        tensors = {name: array_entry(getattr(known, name).view(np.int64)) for name in _ARRAYS}
        write_safetensors(directory / INPUTS_FILE, tensors, {_FILES_KEY: json.dumps(self._files)})


def _saved_files(path: Path) -> dict[str, list[str]]:
    """Split -> digests of the data files that a checkpoint was saved with."""
    found: dict[str, list[str]] = {}
    try:
        for item in json.loads(read_metadata(path)[_FILES_KEY]):
            found.setdefault(str(item["split"]), []).append(str(item["digest"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be understood ({error!r}); copy the checkpoint again") from error
    return found


def check_same_inputs(identity: InputIdentity, checkpoint: Path, allowed: bool) -> None:
    """Compares what a resumed run reads with what the run read that saved its checkpoint.

    Args:
        allowed: whether changes are (`allow_changed_recipe`).

    Raises:
        UserError: something differs and may not.
    """
    changed: Sequence[str] = identity.differences(checkpoint)
    if not changed:
        return
    text = f"what {checkpoint} was trained with has changed since: {'; '.join(changed)}"
    if not allowed:
        raise UserError(f"{text}. Put it back, choose another output_dir, or set allow_changed_recipe true")
    logger.warning(text)
