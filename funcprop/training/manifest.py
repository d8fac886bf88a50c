"""The manifest of a saved step: what was saved, with checksums of every array and of every file.

orbax restores a file with a flipped bit without a word; so each step has checksums of its own. Those of the
arrays are made before anything is written, those of the files name the file that changed.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

MANIFEST = "manifest.json"
BLOCK = 1 << 20


class CheckpointError(Exception):
    """A step can be neither written nor read; the message names the directory or the file, and the remedy."""


class DamagedError(Exception):
    """A saved step is not what was written; the message names the file."""


class Manifest(NamedTuple):
    """All that is known of a saved step.

    * `leaves`: for every array its shape, dtype, and `[region, crc32]` of every part of it.
    * `files`: for every file, by its path inside the step, its size and crc32.
    * `note`: position, key, and whatever else the run wants back; plain data.
    """

    step: int
    note: dict[str, Any]
    versions: dict[str, str]
    devices: dict[str, Any]
    leaves: dict[str, dict[str, Any]]
    files: dict[str, list[int]]

    def write(self, directory: Path) -> None:
        """Write it into the directory of the step, at once: it is there as a whole or not at all."""
        body = _canonical(self._asdict())
        text = f'{{"crc32": {zlib.crc32(body.encode())}, "manifest": {body}}}\n'
        unfinished = directory / f"{MANIFEST}.unfinished"
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(directory / MANIFEST)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a step.

        Raises:
            DamagedError: it cannot be read, or is not what was written.
        """
        path = directory / MANIFEST
        try:
            found = json.loads(path.read_bytes())
            if zlib.crc32(_canonical(found["manifest"]).encode()) == found["crc32"]:
                return cls(**found["manifest"])
        except OSError as error:
            raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            pass  # No JSON, or not ours; said below.
        raise DamagedError(f"{path} is damaged: its contents are not those that were written")

    def verify_files(self, directory: Path) -> None:
        """Compare all files with what they were.

        Raises:
            DamagedError: one is missing, cannot be read, or was changed.
        """
        # Each process reads its share of them.
        share = sorted(self.files.items())[jax.process_index() :: jax.process_count()]
        for name, (size, checksum) in share:
            path = directory / name
            try:
                found = file_checksum(path)
            except FileNotFoundError:
                raise DamagedError(f"{path} is missing") from None
            except OSError as error:
                raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
            if found[0] != size:
                raise DamagedError(f"{path} has {found[0]:,} bytes, {size:,} were written")
            if found[1] != checksum:
                raise DamagedError(
                    f"{path} is damaged: its crc32 is {found[1]:08x}, {checksum:08x} was written"
                )

    def verify_leaves(self, directory: Path, arrays: Mapping[str, Any]) -> None:
        """Compare restored arrays with what was saved, as far as they lie on this process's devices.

        Raises:
            DamagedError: one differs.
        """
        for name, array in arrays.items():
            for region, checksum in self.leaves[name]["shards"]:
                part = _part(array, tuple(slice(*bounds) for bounds in region))
                if part is not None and zlib.crc32(_bytes(part)) != checksum:
                    raise DamagedError(f"{directory}: the array {name} is not what was saved")


def versions() -> dict[str, str]:
    """Return the versions that a step is written with."""
    return {"funcprop": version("funcprop"), "jax": jax.__version__, "jaxlib": jaxlib.__version__}


def leaf_facts(array: jax.Array) -> dict[str, Any]:
    """Return shape, dtype and the checksums of the parts of an array that this process is to save."""
    shards = [
        [_region(shard.index, array.shape), zlib.crc32(_bytes(np.asarray(shard.data)))]
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]
    return {"shape": list(array.shape), "dtype": str(array.dtype), "shards": shards}


def file_checksums(directory: Path) -> dict[str, list[int]]:
    """Return size and crc32 of every file of a step."""
    return {str(path.relative_to(directory)): file_checksum(path) for path in _files(directory)}


def file_checksum(path: Path) -> list[int]:
    """Return size and crc32 of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _files(directory: Path) -> Iterator[Path]:
    return (
        path for path in sorted(directory.rglob("*")) if path.is_file() and not path.name.startswith(MANIFEST)
    )


def _canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _bytes(array: np.ndarray) -> Any:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _region(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[list[int]]:
    return [list(part.indices(size)[:2]) for part, size in zip(index, shape, strict=True)]


def _part(array: Any, region: tuple[slice, ...]) -> np.ndarray | None:
    """A part of an array; None if it lies on another process's devices."""
    if array.is_fully_addressable:
        return np.asarray(array)[region]
    for shard in array.addressable_shards:
        if _region(shard.index, array.shape) == [[part.start, part.stop] for part in region]:
            return np.asarray(shard.data)
    return None
