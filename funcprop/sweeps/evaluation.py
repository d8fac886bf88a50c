"""The values of operators by name, and numbers in the place of values that are not known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop.graph.graph import Operator, Variable
from funcprop.sweeps.sweeps import read


def evaluated(operators: Iterable[Operator], known: Mapping[str, Any]) -> dict[str, Any]:
    """Known values and those that operators compute, in order; what is known stays as it is."""
    values = dict(known)
    for op in operators:
        results = _jax.evaluate(op.jaxpr, (), [read(v, values) for v in op.inputs])
        for v, result in zip(op.outputs, results, strict=True):
            values.setdefault(v.name, result)
    return values


def drawn(random: np.random.Generator, variable: Variable, classes: int, shape: tuple[int, ...]) -> Any:
    """Random values of a variable's type: labels of so many classes, or numbers between 0 and 1."""
    if jnp.issubdtype(variable.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), shape)
    if jnp.issubdtype(variable.dtype, jnp.integer):
        return jnp.asarray(random.integers(0, max(1, classes), shape), variable.dtype)
    return jnp.asarray(random.uniform(0.1, 0.9, shape)).astype(variable.dtype)
