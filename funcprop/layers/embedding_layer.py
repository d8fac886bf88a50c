"""Embedding: rows of a table by their indices.

    y[…] = E[i[…]],    Ē[k] = Σ {ȳ[…] : i[…] = k}

The backward scatters: rows that were read several times add up, and nothing of the size `indices × rows` (a
one-hot matrix) is made. Kept are the indices alone. Used for the output projection too (`h Eᵀ`, tied), the
table receives both cotangents.

References: Bengio et al., "A neural probabilistic language model", JMLR 2003; Press and Wolf, "Using the
output embedding to improve language models", 2017 (tying).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from funcprop.rules.equations import Equations, OperatorSymbols, apply
from funcprop.rules.layer import layer
from funcprop.rules.rule import Rule

Mode: TypeAlias = Literal["index", "clip", "fill"]


class Indices(NamedTuple):
    """The indices, and the table for its type alone."""

    indices: Any
    table: Any


def init_embedding(key: PRNGKeyArray, rows: int, features: int, *, dtype: Any = None) -> dict[str, Any]:
    """Normal rows of mean square `1 / features`, as Flax's.

    Example:
        >>> import jax, funcprop as fp
        >>> fp.layers.embedding.init(jax.random.key(0), 10, 4)["table"].shape
        (10, 4)
    """
    initialiser = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
    return {"table": initialiser(key, (rows, features), dtype or float)}


def _rows(table: Any, indices: Any, mode: Mode) -> Any:
    return table[indices] if mode == "index" else table.at[indices].get(mode=mode)


def _scattered(g: Any, indices: Any, table: Any, mode: Mode) -> Any:
    # The transpose of reading is adding; taken from JAX, so that it treats outliers as reading did.
    return jax.linear_transpose(partial(_rows, indices=indices, mode=mode), table)(g)[0]


def _forward(indices: Any, table: Any, *, mode: Mode) -> tuple[Any, Indices]:
    return _rows(table, indices, mode), Indices(indices, table)


def _backward(residuals: Indices, g: Any, needs: Any, *, mode: Mode) -> tuple[None, Any]:
    indices, table = residuals
    return None, _scattered(g, indices, table, mode)


def _equations(op: OperatorSymbols) -> Equations:
    indices, table = op.args
    mode = op.static["mode"]
    back = partial(_scattered, table=table.type, mode=mode)
    return Equations(
        apply("rows", partial(_rows, mode=mode), table, indices),
        (None, apply("scatter_add", back, op.cotangent, indices)),
    )


@layer(rule=Rule(_forward, _backward, _equations, platforms=frozenset(), pure=True), init=init_embedding)
def embedding(
    indices: Int[Array, "*batch"], table: Float[Array, "rows features"], *, mode: Mode = "index"
) -> Float[Array, "*batch features"]:
    """The rows of a table at integer indices, `y = E[i]`; `Ē` is `ȳ` added up row by row.

    Negative indices count from the end. What lies outside of the table beyond that is

    * `mode="index"`: the nearest row, as `E[i]` in `jax.numpy`, where an array of indices (not a single one)
      gives it no cotangent;
    * `mode="clip"`: the nearest row, which receives the cotangent;
    * `mode="fill"`: NaN without a cotangent, as by `jnp.take`.

    Raises:
        TypeError: the indices are not integers.
        ValueError: `mode` is unknown.

    Reference: Bengio et al., "A neural probabilistic language model", JMLR 2003.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> print(fp.layers.embedding(jnp.array([1, 0, -1, 5]), jnp.array([[1.0], [2.0]])).ravel())
        [2. 1. 2. 2.]
    """
    if not jnp.issubdtype(jnp.result_type(indices), jnp.integer):
        raise TypeError(f"embedding: indices are {jnp.result_type(indices)}; give integers.")
    if mode not in ("index", "clip", "fill"):
        raise ValueError(f"embedding: mode={mode!r} is unknown; use 'index', 'clip' or 'fill'.")
    return _rows(jnp.asarray(table), indices, mode)
