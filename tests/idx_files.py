"""A small data set in the files of MNIST and Fashion-MNIST."""

import gzip
from pathlib import Path

import numpy as np


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def write_split(directory: Path, compressed: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (30, 4, 5)),
        "train-labels-idx1-ubyte": rng.integers(0, 10, 30),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (20, 4, 5)),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, 20),
    }
    for name, array in arrays.items():
        content = gzip.compress(idx(array)) if compressed else idx(array)
        (directory / (name + ".gz" * compressed)).write_bytes(content)
    return arrays
