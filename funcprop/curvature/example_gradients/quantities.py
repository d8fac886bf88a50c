"""What `fp.per_example` computes: each quantity is a contraction of the forms, and what is made of it.

The columns of the backward sweep come in groups: the gradient of the loss, all columns of the root of the
loss's Hessian (`exact`), a random combination of these (`sampled`), and the entries of the output
(`outputs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from funcprop.curvature.example_gradients.contractions import NORMS, SQUARES, SUM

GRADIENT, EXACT, SAMPLED, OUTPUTS = "gradient", "exact", "sampled", "outputs"
EACH, GRAM, EXPAND, REDUCE, ROTATED = "each", "gram", "expand", "reduce", "rotated"


class Part(NamedTuple):
    """A contraction of one group of columns."""

    group: str
    kind: str


@dataclass(frozen=True)
class Quantity:
    """The contractions that a quantity needs, and what it is for one leaf, from these and the batch's size.

    With `whole`, it is one result for all leaves, the sum of what the leaves have.
    """

    summary: str
    parts: tuple[Part, ...]
    finish: Callable[..., Any]
    whole: bool = False

    def __call__(self, found: Mapping[Part, Any], size: int) -> Any:
        """The quantity of one leaf."""
        return self.finish(*(found[part] for part in self.parts), size)


def _mean(total: Any, size: int) -> Any:
    return total / size


def _variance(total: Any, squares: Any, size: int) -> Any:
    return jnp.maximum(squares / size - (total / size) ** 2, 0)


def _signal_to_noise(total: Any, squares: Any, size: int) -> Any:
    signal = (total / size) ** 2
    noise = _variance(total, squares, size)
    return jnp.where(signal == 0, 0, signal / noise)


def _factors(found: Any, size: int) -> Any:
    return normal_activations(found.activations, found.seen, size), found.cotangents / size


def normal_activations(total: Any, seen: Any, size: Any) -> Any:
    """The mean of the factor of activations, over the examples that it has a part of."""
    if seen is None:
        return total / size
    count = jnp.where(seen > 0, seen, 1)
    return total / (count[:, None, None] if count.ndim else count)


_TOTAL, _SQUARES, _NORMS = (Part(GRADIENT, kind) for kind in (SUM, SQUARES, NORMS))

QUANTITIES: dict[str, Quantity] = {
    "gradient": Quantity("the gradient of the mean loss", (_TOTAL,), _mean),
    "gradients": Quantity(
        "each example's gradient, `[n, *leaf]`", (Part(GRADIENT, EACH),), lambda w, n: w[0]
    ),
    "norm": Quantity(
        "the norm of each example's gradient in the leaf, `[n]`", (_NORMS,), lambda q, n: jnp.sqrt(q)
    ),
    "second_moment": Quantity("`1/n Σ W²` of the examples' gradients", (_SQUARES,), _mean),
    "variance": Quantity("`1/n Σ (W − mean)²`", (_TOTAL, _SQUARES), _variance),
    "snr": Quantity("`mean² / variance`, entry by entry", (_TOTAL, _SQUARES), _signal_to_noise),
    "gram": Quantity(
        "inner products of the examples' gradients over all leaves, `[n, n]`",
        (Part(GRADIENT, GRAM),),
        lambda k, n: k[:, 0, :, 0],
        whole=True,
    ),
    "ntk": Quantity(
        "inner products of the outputs' gradients over all leaves, `[n, c, n, c]`: the empirical NTK",
        (Part(OUTPUTS, GRAM),),
        lambda k, n: k,
        whole=True,
    ),
    "diag_ggn": Quantity(
        "diagonal of the Gauss-Newton matrix of the mean loss", (Part(EXACT, SQUARES),), _mean
    ),
    "diag_ggn_mc": Quantity("an unbiased estimate of the same", (Part(SAMPLED, SQUARES),), _mean),
    "trace_ggn": Quantity(
        "trace of the leaf's Gauss-Newton block", (Part(EXACT, NORMS),), lambda q, n: q.sum() / n
    ),
    "trace_ggn_mc": Quantity(
        "an unbiased estimate of the same", (Part(SAMPLED, NORMS),), lambda q, n: q.sum() / n
    ),
    "kfac": Quantity("Kronecker factors `(A, G)`, Monte-Carlo, expand", (Part(SAMPLED, EXPAND),), _factors),
    "kfac_reduce": Quantity("the same, reduce", (Part(SAMPLED, REDUCE),), _factors),
    "kflr": Quantity("Kronecker factors `(A, G)`, exact columns, expand", (Part(EXACT, EXPAND),), _factors),
    "kflr_reduce": Quantity("the same, reduce", (Part(EXACT, REDUCE),), _factors),
    "kfac_empirical": Quantity(
        "Kronecker factors `(A, G)` of the gradients' second moment, expand",
        (Part(GRADIENT, EXPAND),),
        _factors,
    ),
    "kfac_empirical_reduce": Quantity("the same, reduce", (Part(GRADIENT, REDUCE),), _factors),
}

# A row for each example.
ROWS = frozenset({"gradients", "norm"})
# Of a data set these follow from means.
MEANS_OF = {"variance": ("gradient", "second_moment"), "snr": ("gradient", "second_moment")}
OF_MEANS = {
    "variance": lambda mean, squares: _variance(mean, squares, 1),
    "snr": lambda mean, squares: _signal_to_noise(mean, squares, 1),
}
# Other names for the same.
ALIASES = {"batch_gradients": "gradients"}
# Not of the parameters: the mean loss.
VALUE = "value"
