"""The IDX file format, in which MNIST and Fashion-MNIST are distributed; every field is checked.

A file is a magic number (two zero bytes, the code of the data type, the number of dimensions), the dimensions
as big-endian 32-bit integers, and the data in C order.

Reference: LeCun, Cortes and Burges, "The MNIST database of handwritten digits"; Xiao, Rasul and Vollgraf,
"Fashion-MNIST", 2017.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from funcprop.training.data import Dataset, Split

GZIP_MAGIC = b"\x1f\x8b"
UNSIGNED_BYTE = 0x08
CODES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
CLASSES = 10


class DataError(ValueError):
    """A data file is missing or not what it should be; the message says what was found and expected."""


def read_idx(path: str | os.PathLike[str], ndim: int | None = None) -> UInt8[np.ndarray, "..."]:
    """The array in an IDX file of unsigned bytes, compressed by gzip or not (told by its content).

    Args:
        path: the file.
        ndim: how many dimensions it must have; any number if None.

    Raises:
        DataError: there is no such file, the gzip stream is broken, or the magic number, data type, number of
            dimensions or length are wrong.

    Example:
        >>> import pathlib, tempfile, funcprop as fp
        >>> path = pathlib.Path(tempfile.mkdtemp(), "labels")
        >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        >>> print(fp.training.read_idx(path))
        [7 8 9]
    """
    content = _content(Path(path))
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError(
            f"{path}: the file begins with {content[:4].hex(' ') or 'nothing'}; expected an IDX magic "
            f"number, 00 00 {UNSIGNED_BYTE:02x} and the number of dimensions."
        )
    code, found_ndim = content[2], content[3]
    if code != UNSIGNED_BYTE:
        raise DataError(
            f"{path}: the data type is {code:#04x} ({CODES.get(code, 'unknown')}); expected "
            f"{UNSIGNED_BYTE:#04x} (uint8)."
        )
    if found_ndim != (found_ndim if ndim is None else ndim):
        raise DataError(f"{path}: the array has {found_ndim} dimensions; expected {ndim}.")
    start = 4 + 4 * found_ndim
    if len(content) < start:
        raise DataError(
            f"{path}: the file has {len(content)} bytes; expected a header of {start} bytes for "
            f"{found_ndim} dimensions."
        )
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path}: {len(content) - start} bytes of data follow the header; expected {math.prod(shape)} "
            f"for an array of shape {shape}."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected an IDX file.") from error
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {error}; expected a complete gzip file.") from error


def fashion_mnist(directory: str | os.PathLike[str]) -> Split:
    """Fashion-MNIST (or MNIST, whose files have the same names and format) from a directory.

    Reads `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same two with `t10k`, each with or
    without `.gz`. Entries of the images are divided by 255.

    Raises:
        DataError: a file is missing or malformed, images and labels differ in number, training and test
            images in size, or a label is not a class; the message names the file.

    Example:
        >>> import pathlib, tempfile, funcprop as fp
        >>> directory = pathlib.Path(tempfile.mkdtemp())
        >>> for part in ("train", "t10k"):
        ...     image = bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 255])
        ...     label = bytes([0, 0, 8, 1, 0, 0, 0, 1, 7])
        ...     _ = (directory / f"{part}-images-idx3-ubyte").write_bytes(image)
        ...     _ = (directory / f"{part}-labels-idx1-ubyte").write_bytes(label)
        >>> train, test = fp.training.fashion_mnist(directory)
        >>> print(train.images, train.labels)
        [[0. 1.]] [7]
    """
    train, test = (_images_and_labels(Path(directory), part) for part in ("train", "t10k"))
    if train.images.shape[1] != test.images.shape[1]:
        raise DataError(
            f"{_find(Path(directory), 't10k-images-idx3-ubyte')}: the images have {test.images.shape[1]} "
            f"pixels; expected {train.images.shape[1]}, as in the training set."
        )
    return Split(train, test)


def _images_and_labels(directory: Path, part: str) -> Dataset:
    images_path = _find(directory, f"{part}-images-idx3-ubyte")
    labels_path = _find(directory, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
    if images.size == 0:
        raise DataError(f"{images_path}: the array has shape {images.shape}; expected at least one image.")
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: {len(labels)} labels; expected {len(images)}, one for every image in "
            f"{images_path.name}."
        )
    if labels.max() >= CLASSES:
        where = int(np.argmax(labels >= CLASSES))
        raise DataError(
            f"{labels_path}: label {where} is {labels[where]}; expected classes from 0 to {CLASSES - 1}."
        )
    rows = images.reshape(len(images), -1).astype(np.float32) / 255
    return Dataset(rows, labels.astype(np.int32))


def _find(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    found = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else None
    contains = "is not a directory" if found is None else f"contains {', '.join(found[:8]) or 'nothing'}"
    raise DataError(f"{directory / name}: no such file, nor with .gz; {directory} {contains}.")
