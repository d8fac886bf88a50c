"""A tree as arrays by their names, which is what a saved step consists of; and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.training.manifest import CheckpointError, Manifest


def named_arrays(tree: Any) -> dict[str, jax.Array]:
    """Return the leaves by their paths, as arrays of numbers.

    Raises:
        TypeError: a leaf is no array.
    """
    found: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "array"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
            raise TypeError(
                f"checkpoints: {name} is of type {type(leaf).__name__}; only arrays can be saved. Keep what "
                "is no array outside of params and state, as eqx.partition does."
            )
        array = jnp.asarray(leaf)
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        while name in found:
            name += "_"
        found[name] = array
    return found


def in_structure(tree: Any, arrays: dict[str, jax.Array]) -> Any:
    """Return the arrays in the structure of a tree; keys of random numbers are typed where they are there."""
    leaves, structure = jax.tree.flatten(tree)

    def leaf(old: Any, new: jax.Array) -> Any:
        if isinstance(old, jax.Array) and jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
        return new

    return jax.tree.unflatten(structure, map(leaf, leaves, arrays.values()))


def as_saved(manifest: Manifest, wanted: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the arrays, those of a model's state in the dtype of the step: the loss decides on it."""
    saved = {name: leaf["dtype"] for name, leaf in manifest.leaves.items() if f"{name}.".startswith("model.")}
    return {
        name: array.astype(saved[name]) if saved.get(name, "key").startswith(("float", "bfloat")) else array
        for name, array in wanted.items()
    }


def require_same(path: Path, manifest: Manifest, wanted: dict[str, jax.Array]) -> None:
    """Require the arrays of a step to be those that are asked for.

    Raises:
        CheckpointError: they have other names, shapes or dtypes.
    """
    remedy = "go on with the model and optimizer that wrote it, or choose another directory."
    saved = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in manifest.leaves.items()}
    asked = {name: f"{array.dtype}{list(array.shape)}" for name, array in wanted.items()}
    for name in dict.fromkeys([*asked, *saved]):
        if saved.get(name) != asked.get(name):
            raise CheckpointError(
                f"checkpoints: {path} has {saved.get(name, 'no')} {name}, this run has "
                f"{asked.get(name, 'no such array')}; {remedy}"
            )
