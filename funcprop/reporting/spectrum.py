"""The largest eigenvalues of the Hessian, where they can be had in seconds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.cost.programs import FORWARD, REVERSE
from funcprop.cost.second_order import SecondOrderCost
from funcprop.curvature.hessian_operator import hessian
from funcprop.operators.solvers import DenseSolver

COUNT = 10
# Of more parameters, or if a product takes longer, it is left out: some 64 to 320 products are needed.
MOST_PARAMETERS, MOST_SECONDS = 300_000, 0.1
# Up to this many parameters, the matrix itself is decomposed.
FEW_PARAMETERS = 400


@dataclass(frozen=True)
class Top:
    """The largest eigenvalues, descending, of `parameters` in all; `notes` are doubts about them."""

    values: tuple[float, ...]
    parameters: int
    notes: tuple[str, ...] = ()


def top(
    fun: Callable[..., Any],
    argnums: int | Sequence[int],
    args: Sequence[Any],
    kwargs: Any,
    cost: SecondOrderCost,
) -> Top | None:
    """The top of the spectrum; None if it takes too long, or several arguments are differentiated by."""
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    product = next((row.measured for row in cost.rows if row.name in (FORWARD, REVERSE)), None)
    if len(numbers) != 1 or product is None or (product.seconds or 0) > MOST_SECONDS:
        return None
    at = numbers[0] % len(args)
    leaves, tree = jax.tree.flatten(args[at])
    chosen = [i for i, leaf in enumerate(leaves) if is_smooth(leaf)]
    size = sum(np.size(leaves[i]) for i in chosen)
    is_real = not any(jnp.iscomplexobj(leaves[i]) for i in chosen)
    # LAPACK has no numbers of 16 bits, in which eigenvalues would say little.
    is_real &= all(jnp.result_type(leaves[i]).itemsize >= 4 for i in chosen)
    if not (is_real and 0 < size <= MOST_PARAMETERS):
        return None

    def of_parameters(params: Any, *others: Any, **kwargs: Any) -> Any:
        of = dict(zip(chosen, params, strict=True))
        model = jax.tree.unflatten(tree, [of.get(i, leaf) for i, leaf in enumerate(leaves)])
        return fun(*others[:at], model, *others[at:], **kwargs)

    others = [arg for i, arg in enumerate(args) if i != at]
    operator = hessian(of_parameters)([leaves[i] for i in chosen], *others, **kwargs)
    solver = DenseSolver() if size <= FEW_PARAMETERS else None
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always")
        values, _ = operator.eigsh(min(COUNT, size), solver=solver)
    descending = tuple(float(value) for value in values[::-1])
    return Top(descending, size, tuple(dict.fromkeys(str(doubt.message) for doubt in doubts)))


def is_smooth(leaf: Any) -> bool:
    """Whether it has a derivative: models of Equinox have functions among their leaves."""
    return isinstance(leaf, float | complex) or jnp.issubdtype(getattr(leaf, "dtype", int), jnp.inexact)
