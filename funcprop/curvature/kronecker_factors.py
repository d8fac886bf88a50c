"""`fp.kfac` and `fp.ekfac`: Kronecker-factored curvature of any model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from funcprop.curvature.example_gradients.entering_parameters import Model
from funcprop.curvature.example_gradients.gradient_forms import Factors
from funcprop.curvature.example_gradients.loss_roots import Loss
from funcprop.curvature.example_gradients.per_example import AUDIT, LIMIT, batch_size, programs, sweep
from funcprop.curvature.example_gradients.quantities import (
    EXACT,
    EXPAND,
    GRADIENT,
    REDUCE,
    ROTATED,
    SAMPLED,
    Part,
)
from funcprop.curvature.examples import loss_of_one, model_of_one
from funcprop.curvature.kronecker import Eigen, Kronecker, KroneckerProduct
from funcprop.operators.parameters import Parameters, Where
from funcprop.operators.subset import restricted
from funcprop.program.call import require_values
from funcprop.program.program import Program
from funcprop.program.sizes import budget_bytes
from funcprop.rules.rule_set import RuleSet

_GROUPS = {"mc": SAMPLED, "exact": EXACT, "empirical": GRADIENT}
_SHARING = {"expand": EXPAND, "reduce": REDUCE}


def kfac(
    model: Model,
    loss: Loss,
    *,
    kind: str = "mc",
    sharing: str = "expand",
    batched: bool = False,
    where: Where | None = None,
    rules: RuleSet | None = None,
    budget: int | str = LIMIT,
) -> Callable[..., Kronecker]:
    """Kronecker-factored curvature, `kfac(model, loss)(params, x, y, key=None) -> Kronecker`.

    For each parameter `A ⊗ G` in place of its block of the Gauss-Newton matrix of the **mean** loss; the
    module `funcprop.curvature.kronecker` has the conventions. Exact for one example, and for linear networks
    with squared error. Every call traces both functions, as in `fp.per_example`.

    Args:
        model, loss: of ONE example, as in `fp.per_example`.
        kind: "mc", one random combination of the root's columns (needs `key`); "exact", all columns (KFLR);
            "empirical", the gradients themselves.
        sharing: "expand" or "reduce", for weights that are used at several positions.
        batched, where, rules, budget: as in `fp.per_example`.

    Returns:
        A `Kronecker`: a linear operator with `.factors[path] -> (A, G)`, `.inverse(damping)`, `.logdet()`,
        `.sqrt()`, `.update(other, decay)`.

    Raises:
        ValueError: `kind` or `sharing` is not known, or there is no key for "mc"; also as `fp.per_example`.

    References: Martens and Grosse, ICML 2015; Botev, Ritter and Barber, ICML 2017; Eschenhagen et al.,
    NeurIPS 2023.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> squared = lambda output, y: jnp.sum((output - y) ** 2) / 2
        >>> w, x, y = jnp.ones((2, 1)), jnp.eye(2), jnp.zeros((2, 1))
        >>> A = fp.kfac(lambda w, x: x @ w, squared, kind="exact")(w, x, y)
        >>> print(A.dense())
        [[0.5 0. ]
         [0.  0.5]]
    """
    part, limit = _chosen(kind, sharing), budget_bytes(budget, "budget")
    functions = model_of_one(model, batched), loss_of_one(loss, batched)
    return _of_call("kfac", _kfac, functions, part, where, rules, limit)


def ekfac(
    model: Model,
    loss: Loss,
    *,
    kind: str = "mc",
    sharing: str = "expand",
    batched: bool = False,
    where: Where | None = None,
    rules: RuleSet | None = None,
    budget: int | str = LIMIT,
) -> Callable[..., Kronecker]:
    """KFAC's eigenvectors with the curvature's own second moments along them as eigenvalues.

    `ekfac(model, loss)(params, x, y, key=None)`; with `A ⊗ G = U S Uᵀ` the eigenvalues are
    `diag(Uᵀ (1/N Σ W Wᵀ) U)`, which are the best in the Frobenius norm for these vectors. Arguments and
    errors are those of `fp.kfac`; the result is in its eigenbasis and has no `.factors`.

    Reference: George et al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis",
    NeurIPS 2018.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> squared = lambda output, y: jnp.sum((output - y) ** 2) / 2
        >>> w, x, y = jnp.ones((2, 1)), jnp.eye(2), jnp.zeros((2, 1))
        >>> E = fp.ekfac(lambda w, x: x @ w, squared, kind="exact")(w, x, y)
        >>> print(E.trace())
        1.0
    """
    part, limit = _chosen(kind, sharing), budget_bytes(budget, "budget")
    functions = model_of_one(model, batched), loss_of_one(loss, batched)
    return _of_call("ekfac", _ekfac, functions, part, where, rules, limit)


def _of_call(
    what: str,
    factored: Callable[..., Kronecker],
    functions: tuple[Model, Loss],
    part: Part,
    where: Where | None,
    rules: RuleSet | None,
    limit: int,
) -> Callable[..., Kronecker]:
    """The function `(params, x, y, key=None) -> Kronecker`, which traces model and loss of one example."""
    model, loss = functions

    def at(params: Any, x: Any, y: Any, key: Any = None) -> Kronecker:
        of_chosen, chosen = restricted(model, params, where)
        given = _checked(what, of_chosen, loss, chosen, x, y, _with_key(key, part.group))
        return factored(*given, part, rules, limit)

    return at


@functools.partial(jax.jit, static_argnames=("part", "rules", "limit"))
def _kfac(
    model: Program,
    loss: Program,
    params: Any,
    x: Any,
    y: Any,
    key: Any,
    part: Part,
    rules: RuleSet | None,
    limit: int,
) -> Kronecker:
    names, size = Parameters.of(params), batch_size(x, y)
    found = sweep(model, loss, params, [part], rules, limit)
    _, factors = found(jax.tree.leaves(params), x, y, key, size)
    blocks = []
    for i, here in enumerate(factors):
        both = here[part]
        layout = found.study.layout(i, both)
        blocks.append(KroneckerProduct(both.activations / size, both.cotangents / size, layout))
    return Kronecker(tuple(blocks), names)


@functools.partial(jax.jit, static_argnames=("part", "rules", "limit"))
def _ekfac(
    model: Program,
    loss: Program,
    params: Any,
    x: Any,
    y: Any,
    key: Any,
    part: Part,
    rules: RuleSet | None,
    limit: int,
) -> Kronecker:
    plain = _kfac(model, loss, params, x, y, key, part, rules, limit)
    eigen = [block.eigen() for block in plain.blocks]
    size, rotated = batch_size(x, y), Part(part.group, ROTATED)
    found = sweep(model, loss, params, [rotated], rules, limit)
    found = replace(found, bases=[Factors(block.ua, block.ug) for block in eigen])
    _, squares = found(jax.tree.leaves(params), x, y, key, size)
    blocks = [
        Eigen(block.ua, block.ug, here[rotated] / size, block.layout)
        for block, here in zip(eigen, squares, strict=True)
    ]
    return replace(plain, blocks=tuple(blocks))


def _chosen(kind: str, sharing: str) -> Part:
    if kind not in _GROUPS:
        raise ValueError(f"kfac: kind={kind!r} is not known; it is one of {', '.join(map(repr, _GROUPS))}.")
    if sharing not in _SHARING:
        raise ValueError(f"kfac: sharing={sharing!r} is not known; it is 'expand' or 'reduce'.")
    return Part(_GROUPS[kind], _SHARING[sharing])


def _checked(
    what: str, model: Model, loss: Loss, params: Any, x: Any, y: Any, key: Any
) -> tuple[Program, Program, Any, Any, Any, Any]:
    """The programs of model and loss, and the values they are called with."""
    require_values(what, {"params": params, "x": x, "y": y}, AUDIT)
    Parameters.of(params)
    batch_size(x, y)
    return *programs(model, loss, params, x, y), params, x, y, key


def _with_key(key: Any, group: str) -> Any:
    if group == SAMPLED and key is None:
        raise ValueError("kfac: kind='mc' draws random signs; pass key=jax.random.key(…), or kind='exact'.")
    return key
