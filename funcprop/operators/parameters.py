"""The vector space that an operator acts on: a pytree of parameters, and the same as one flat vector."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from funcprop.graph.graph import aligned

_MOST_LISTED = 20  # leaves that are listed for people
# Otherwise each leaf of each vector would compile its own slice, reshape and change of type.
_compiled = functools.partial(jax.jit, static_argnums=0, inline=True)


@dataclass(frozen=True)
class Parameters:
    """Shapes, dtypes and paths of a parameter pytree; hashable, so that it can be static.

    A path joins the keys of a leaf by `/`: `params/Dense_0/kernel`. The flat order is that of
    `jax.flatten_util.ravel_pytree`.
    """

    tree: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    paths: tuple[str, ...]

    @classmethod
    def of(cls, params: PyTree) -> Parameters:
        """Describe a pytree of real floating-point arrays.

        Raises:
            TypeError: a leaf has no real derivative.
            ValueError: there is no leaf.
        """
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        if not leaves:
            raise ValueError(f"params={params!r} has no leaves; there is nothing to differentiate.")
        paths = tuple(path_name(path) for path, _ in leaves)
        for path, (_, leaf) in zip(paths, leaves, strict=True):
            # A float is a parameter too; what is not an array at all has no dtype.
            dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf) if _is_number(leaf) else None
            if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
                kind = type(leaf).__name__ if dtype is None else dtype
                if not path:
                    value = "" if hasattr(leaf, "dtype") else f"={leaf!r}"
                    raise TypeError(
                        f"params{value} is {kind}, which has no real derivative; pass the parameters, a "
                        "pytree of floating-point arrays, as the first argument."
                    )
                raise TypeError(
                    f"the parameter {path!r} is {kind}, which has no real derivative; leave it out by "
                    "where=, or close over it."
                )
        return cls(
            tree,
            tuple(jnp.shape(leaf) for _, leaf in leaves),
            tuple(jnp.dtype(jnp.result_type(leaf)) for _, leaf in leaves),
            paths,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each leaf."""
        return tuple(map(math.prod, self.shapes))

    @property
    def size(self) -> int:
        """All entries together, P."""
        return sum(self.sizes)

    @property
    def dtype(self) -> Any:
        """The dtype of the flat vector: the leaves' common one, of half precision float32.

        What is computed of products is computed in this dtype; the products themselves have the leaves' own.
        """
        return single_at_least(*self.dtypes)

    @property
    def rounding(self) -> float:
        """The relative rounding error of a product: that of the leaf of the lowest precision."""
        return max(float(jnp.finfo(dtype).eps) for dtype in self.dtypes)

    @property
    def eigenvalue_rounding(self) -> float:
        """How far from zero rounding may put an eigenvalue, relative to the largest."""
        return max(100 * float(jnp.finfo(self.dtype).eps), 4 * self.rounding)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where each leaf stands in the flat vector."""
        ends = list(accumulate(self.sizes, initial=0))
        return tuple(slice(a, b) for a, b in pairwise(ends))

    @property
    def structs(self) -> PyTree:
        """The shapes and dtypes as a pytree."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return self.unflatten([jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in pairs])

    def zeros(self) -> PyTree:
        """The pytree of zeros."""
        return self.unflatten([jnp.zeros(*pair) for pair in zip(self.shapes, self.dtypes, strict=True)])

    def unflatten(self, leaves: Sequence[Any]) -> PyTree:
        """The pytree with these leaves."""
        return jax.tree.unflatten(self.tree, leaves)

    def ravel(self, vector: PyTree) -> Float[Array, " P"]:
        """The pytree as one flat vector."""
        leaves = [jnp.ravel(leaf).astype(self.dtype) for leaf in jax.tree.leaves(vector)]
        return jnp.concatenate(leaves)

    @_compiled
    def unravel(self, flat: Float[Array, " P"]) -> PyTree:
        """The flat vector as a pytree."""
        parts = zip(self.slices, self.shapes, self.dtypes, strict=True)
        return self.unflatten([flat[at].reshape(shape).astype(dtype) for at, shape, dtype in parts])

    @_compiled
    def unravel_results(self, flat: Float[Array, " P"]) -> PyTree:
        """The flat vector as a pytree of numbers that were computed, which keep at least float32."""
        parts = zip(self.slices, self.shapes, self.dtypes, strict=True)
        return self.unflatten(
            [flat[at].reshape(shape).astype(single_at_least(dtype)) for at, shape, dtype in parts]
        )

    @_compiled
    def ravel_columns(self, columns: PyTree) -> Float[Array, "P m"]:
        """A pytree whose leaves have a last axis of columns, as a matrix."""
        leaves = jax.tree.leaves(columns)
        return jnp.concatenate([leaf.reshape(-1, leaf.shape[-1]).astype(self.dtype) for leaf in leaves])

    @_compiled
    def unravel_columns(self, matrix: Float[Array, "P m"]) -> PyTree:
        """The columns of a matrix as a pytree whose leaves have a last axis of columns."""
        parts = zip(self.slices, self.shapes, self.dtypes, strict=True)
        return self.unflatten([matrix[at].reshape(*shape, -1).astype(dtype) for at, shape, dtype in parts])

    def select(self, path: str | Sequence[Any]) -> tuple[int, ...]:
        """The positions of the leaves at a path, or below it; a path is a string or a sequence of keys.

        Raises:
            ValueError: there is no such parameter.
        """
        wanted = path if isinstance(path, str) else "/".join(map(str, path))
        found = tuple(i for i, p in enumerate(self.paths) if wanted in ("", p) or p.startswith(f"{wanted}/"))
        if not found:
            near = difflib.get_close_matches(wanted, self.paths, n=1, cutoff=0.0)
            raise ValueError(
                f"path={wanted!r} is not a parameter; did you mean {near[0]!r}? The paths are "
                f"{', '.join(map(repr, self.paths))}."
            )
        return found

    def is_flat(self, v: Any) -> bool:
        """Whether `v` is a flat vector or matrix, and not a pytree like the parameters."""
        if not isinstance(v, jax.Array | np.ndarray):
            return False
        bare = self.tree == jax.tree.structure(0)
        return not (bare and self.shapes[0] in (v.shape, v.shape[:-1]))

    def restrict(self, tree: PyTree) -> PyTree:
        """The leaves of a larger pytree at these paths."""
        found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        missing = [shown(path) for path in self.paths if path not in found]
        if missing:
            raise ValueError(f"tree has no {', '.join(missing)}; give a pytree like the parameters.")
        return self.unflatten([found[path] for path in self.paths])

    def __str__(self) -> str:
        shapes = (
            f"{path and path + ': '}{dtype}{list(shape)}"
            for path, dtype, shape in zip(self.paths, self.dtypes, self.shapes, strict=True)
        )
        return f"{{{', '.join(shapes)}}}"

    def listed(self) -> str:
        """A line for each leaf, for people; of many, those in front."""
        rows = [("parameter", "type")]
        rows += [
            (path or "(all)", f"{dtype}{list(shape)}")
            for path, dtype, shape in zip(self.paths, self.dtypes, self.shapes, strict=True)
        ]
        more = len(rows) - 1 - _MOST_LISTED
        table = aligned(rows[: 1 + _MOST_LISTED], set())
        return f"{table}\n… and {more} more" if more > 0 else table

    def vector(self, v: PyTree, name: str = "v") -> PyTree:
        """`v` as a pytree of the parameters' shapes and dtypes.

        Raises:
            ValueError: `v` has other leaves or shapes.
        """
        return self.unflatten(self._matching(v, name, self.shapes))

    def flat(self, v: PyTree, name: str) -> Float[Array, " P"]:
        """`v`, flat or a pytree like the parameters, as a flat vector.

        Raises:
            ValueError: it has other leaves or shapes.
        """
        if not self.is_flat(v):
            return self.ravel(self.vector(v, name))
        if jnp.shape(v) != (self.size,):
            raise ValueError(f"{name} has shape {jnp.shape(v)}, but a flat {name} has shape ({self.size},).")
        return self.real(v, name).astype(self.dtype)

    def columns(self, v: PyTree) -> PyTree | None:
        """`v` as a pytree of columns, or None if it is not one: each leaf with the same extra last axis."""
        leaves, tree = jax.tree.flatten(v)
        if tree != self.tree:
            return None
        ends = {jnp.shape(leaf)[-1:] for leaf in leaves}
        fits = all(jnp.shape(leaf)[:-1] == shape for leaf, shape in zip(leaves, self.shapes, strict=True))
        if len(ends) != 1 or ends == {()} or not fits:
            return None
        shapes = [(*shape, *ends.copy().pop()) for shape in self.shapes]
        return self.unflatten(self._matching(v, "v", shapes))

    def _matching(self, v: PyTree, name: str, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
        found, tree = jax.tree_util.tree_flatten_with_path(v)
        if tree != self.tree:
            paths = [path_name(path) for path, _ in found]
            missing = ", ".join(repr(p) for p in self.paths if p not in paths)
            surplus = ", ".join(repr(p) for p in paths if p not in self.paths)
            said = "".join(
                [f"; it lacks {missing}" * bool(missing), f"; it has {surplus} besides" * bool(surplus)]
            )
            raise ValueError(
                f"{name} is {tree}, but the operator acts on {self.tree}{said}. Give a pytree like the "
                f"parameters or a flat vector of their {self.size} entries; A.restrict(tree) leaves out what "
                "where= leaves out."
            )
        arrays = []
        for (_, leaf), shape, dtype, path in zip(found, shapes, self.dtypes, self.paths, strict=True):
            if jnp.shape(leaf) != shape:
                raise ValueError(
                    f"{name} has shape {jnp.shape(leaf)} at {shown(path)}, but the parameter has shape "
                    f"{shape}."
                )
            arrays.append(self.real(leaf, name).astype(dtype))
        return arrays

    @staticmethod
    def real(values: Any, name: str) -> Array:
        """The values as an array.

        Raises:
            TypeError: they are complex.
        """
        array = jnp.asarray(values)
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"{name} is {array.dtype}, but the parameters are real; take its real part.")
        return array


def path_name(path: Any) -> str:
    """The keys of a leaf joined by `/`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shown(*paths: str) -> str:
    """Paths in a message; that of parameters that are one array is empty."""
    return ", ".join(repr(path) if path else "params" for path in paths)


def single_at_least(*dtypes: Any) -> Any:
    """The common dtype in which results are computed and added up: for half precision float32."""
    with jax.numpy_dtype_promotion("standard"):  # Whatever JAX is configured to do by itself.
        return jnp.promote_types(jnp.result_type(*dtypes), jnp.float32)


def times(number: Any, array: Any) -> Any:
    """A number, or several, times an array, in the array's dtype; for half precision in float32.

    Counts, weights and the user's numbers have dtypes of their own, which under `jax_enable_x64` are wider.
    """
    dtype = single_at_least(array.dtype)
    return jnp.asarray(number, dtype) * array.astype(dtype)


def widened(outputs: Any) -> Any:
    """Outputs and targets in float32 for half precision, whose rounding makes Hessians indefinite."""

    def wide(o: Any) -> Any:
        real = hasattr(o, "dtype") and jnp.issubdtype(o.dtype, jnp.floating)
        return o.astype(single_at_least(o.dtype)) if real else o

    return jax.tree.map(wide, outputs)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, float | int | complex) or hasattr(leaf, "dtype")


Where: TypeAlias = Callable[[str, Any], bool] | str | Sequence[str] | PyTree
