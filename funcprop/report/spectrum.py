"""The largest eigenvalues of the Hessian, where they can be had in seconds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.curvature.hessian import hessian
from funcprop.report.cost import Cost

COUNT = 10
# Of more parameters, or with a dearer product, it would take longer than a reader of the page would wait.
MOST_PARAMETERS, MOST_FLOPS = 300_000, 2_000_000_000
# Up to this many parameters, the matrix itself is decomposed.
FEW_PARAMETERS = 400


@dataclass(frozen=True)
class Top:
    """The largest eigenvalues, descending, of `parameters` in all; `notes` are doubts about them."""

    values: tuple[float, ...]
    parameters: int
    notes: tuple[str, ...] = ()


def top(
    fun: Callable[..., Any], argnums: int | Sequence[int], args: Sequence[Any], kwargs: Any, cost: Cost
) -> Top | None:
    """The top of the spectrum; None if it takes too long, or several arguments are differentiated by."""
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if len(numbers) != 1 or cost.programs[-1].flops > MOST_FLOPS:
        return None
    at = numbers[0] % len(args)
    leaves = jax.tree.leaves(args[at])
    size = sum(np.size(leaf) for leaf in leaves)
    is_real = all(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves)
    if not (is_real and 0 < size <= MOST_PARAMETERS):
        return None

    def of_parameters(params: Any, *others: Any, **kwargs: Any) -> Any:
        return fun(*others[:at], params, *others[at:], **kwargs)

    others = [arg for i, arg in enumerate(args) if i != at]
    operator = hessian(of_parameters)(args[at], *others, **kwargs)
    method = "dense" if size <= FEW_PARAMETERS else "lanczos"
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always")
        values, _ = operator.eigsh(min(COUNT, size), method=method)
    descending = tuple(float(value) for value in values[::-1])
    return Top(descending, size, tuple(dict.fromkeys(str(doubt.message) for doubt in doubts)))
