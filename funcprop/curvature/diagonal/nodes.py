"""The variable through which a parameter leaf acts on a loss, and what of the loss comes after it.

A weight that enters one product `z = a w` (a `dot_general` or a convolution) acts through `z`, the bias that
is added to `z` likewise; every other leaf acts through itself. In the coordinates of this module `z` is
`Z[s, m, q, r]`: positions `s` that the loss keeps apart (examples), positions `m` that it mixes (tokens under
attention), features `q` that it mixes and `r` that it keeps apart; and `a` is `a[s, m, i]`, so that
`∂Z[s, m, q, r] / ∂w[i, q', r'] = a[s, m, i] δ_qq' δ_rr'`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax


@dataclass(frozen=True, eq=False, kw_only=True)
class LossNode:
    """Where one or two leaves act, and the rest of the loss.

    `positions` and `features` are the axes of the variable. `data` is the other operand of the product and
    `activations` makes `a[*positions, i]` of it; without a product both are None and `a` is 1. `assign` takes
    the diagonal `[i, *features]` apart: `{leaf: its diagonal}`.

    `term` is the jaxpr whose equations `after` depend on `variable`; `tail` are these, a jaxpr from
    `variable` and then `free` to the loss. `apart` says of each axis whether the loss is a sum over its
    slices. These five are added when the entry is known.
    """

    leaves: tuple[int, ...]
    variable: Any
    positions: tuple[int, ...]
    features: tuple[int, ...]
    inputs: int
    assign: Callable[[Any], dict[int, Any]]
    data: Any = None
    activations: Callable[[Any], Any] | None = None
    term: Any = None
    after: tuple[int, ...] = ()
    tail: Any = None
    free: tuple[Any, ...] = ()
    apart: tuple[bool, ...] = ()

    def sizes(self) -> tuple[int, int, int, int]:
        """`S, M, Q, R`."""
        shape = self.variable.aval.shape

        def size(axes: Sequence[int], apart: bool) -> int:
            return math.prod(shape[d] for d in axes if self.apart[d] == apart)

        at, of = self.positions, self.features
        return size(at, True), size(at, False), size(of, False), size(of, True)

    def order(self) -> list[int]:
        """The axes of the variable in the order `s, m, q, r`."""
        groups = [(self.positions, True), (self.positions, False), (self.features, False)]
        return [d for axes, apart in [*groups, (self.features, True)] for d in axes if self.apart[d] == apart]

    def to_variable(self, Z: Any) -> Any:
        """From `Z[s, m, q, r]` to the variable's own axes."""
        order, shape = self.order(), self.variable.aval.shape
        return jnp.transpose(Z.reshape([shape[d] for d in order]), np.argsort(order).tolist())

    def canonical_activations(self, data: Any) -> Any:
        """`a[s, m, i]`."""
        S, M, _, _ = self.sizes()
        if self.activations is None:
            return jnp.ones((1, 1, 1), self.variable.aval.dtype)
        a = self.activations(data)  # axes: positions, i
        kept = [p for p in self.order() if p in self.positions]
        return jnp.transpose(a, [*[self.positions.index(p) for p in kept], a.ndim - 1]).reshape(S, M, -1)

    def split(self, diagonal: Any) -> dict[int, Any]:
        """The leaves' diagonals from `diagonal[q, i, r]`."""
        shape = self.variable.aval.shape
        mixed = [d for d in self.features if not self.apart[d]]
        kept = [d for d in self.features if self.apart[d]]
        parts = diagonal.reshape([*[shape[d] for d in mixed], self.inputs, *[shape[d] for d in kept]])
        order = [len(mixed)] + [
            mixed.index(d) if d in mixed else len(mixed) + 1 + kept.index(d) for d in self.features
        ]
        return self.assign(jnp.transpose(parts, order))


def perturbed(nodes: Sequence[LossNode], result: Any) -> tuple[Any, tuple[Any, ...]]:
    """A jaxpr from a perturbation of each node's variable, and then what else it reads, to a result.

    The nodes are of one term; their perturbations are added to the variables.
    """
    term = nodes[0].term
    equations = [term.eqns[i] for i in sorted({i for node in nodes for i in node.after})]
    equations = _jax.needed_equations(equations, [result])
    deltas = [_jax.Var(node.variable.aval) for node in nodes]
    moved: dict[Any, Any] = {}
    found: list[Any] = []

    def move(variable: Any) -> None:
        for node, delta in zip(nodes, deltas, strict=True):
            if node.variable is variable:
                before, moved[variable] = moved.get(variable, variable), _jax.Var(variable.aval)
                sum_of = jax.make_jaxpr(jax.lax.add)(variable.aval, variable.aval).eqns[0]
                found.append(sum_of.replace(invars=[before, delta], outvars=[moved[variable]]))

    defined = {v for eqn in equations for v in eqn.outvars}
    for variable in dict.fromkeys(node.variable for node in nodes):
        if variable not in defined:
            move(variable)
    for eqn in equations:
        operands = [v if isinstance(v, _jax.Literal) else moved.get(v, v) for v in eqn.invars]
        found.append(eqn.replace(invars=operands))
        for variable in eqn.outvars:
            move(variable)
    given = set(deltas)
    free = tuple(v for v in _jax.free_variables(found) if v not in given)
    return _jax.jaxpr_of(found, [*deltas, *free], [moved.get(result, result)], "perturbed"), free
