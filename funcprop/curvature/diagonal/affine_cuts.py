"""Where the loss after a node is piecewise affine up to some outputs: the Hessian is Gauss-Newton's there.

If `L(Z) = h(o(Z))` with `o` piecewise affine, `∂²L/∂Z² = Jᵀ (∂²h/∂o²) J`, `J = ∂o/∂Z`, and nothing besides.
With the eigenvalues `λ` and eigenvectors `v` of the small matrices `∂²h/∂o²`, one of each slice that the loss
keeps apart,

    diagonal[q, i, r] = Σ_c λ_c Σ_s (Σ_m a[s, m, i] (Jᵀ v_c)[s, m, q, r])²,

so that as many sweeps backwards are enough as a slice of the outputs has entries. For the weights of a relu
network these are its outputs, for the last layer of any network too.

Reference: Schraudolph, "Fast curvature matrix-vector products", Neural Computation 2002; Dangel, Kunstner and
Hennig, "BackPACK", ICLR 2020, for the columns of the loss's Hessian.
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
from funcprop.curvature.diagonal.dependence import propagate
from funcprop.curvature.diagonal.nodes import LossNode, perturbed
from funcprop.curvature.diagonal.piecewise import why_curved
from funcprop.curvature.diagonal.separability import Separability, is_separable
from funcprop.operators.parameters import single_at_least
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules


@dataclass(frozen=True, eq=False)
class Cut:
    """`L = h(o(Z))`: both parts as jaxprs, from a variable and then what else they read (`loss_free`).

    `order` has the axes of the outputs: those that follow the node's independent slices, then the others, of
    which a slice has `size` entries.
    """

    outputs: Any
    model: Any
    loss: Any
    loss_free: tuple[Any, ...]
    order: tuple[int, ...]
    size: int

    def slices(self, o: Any) -> Any:
        """The outputs as `[s r, c]`."""
        return jnp.transpose(o, self.order).reshape(-1, self.size)

    def unsliced(self, slices: Any) -> Any:
        """From `[s r, c]` back."""
        shape = self.outputs.aval.shape
        return jnp.transpose(slices.reshape([shape[d] for d in self.order]), np.argsort(self.order).tolist())


def find_cut(node: LossNode) -> Cut | None:
    """The cut with the smallest slices, if the loss has one after the node."""
    found = []
    for k in _places(node.tail):
        before = node.tail.eqns[: k + 1]
        (outputs,) = _read_after(node.tail, k)
        free = tuple(v for v in _jax.free_variables(before) if v is not node.variable)
        model = _jax.jaxpr_of(before, [node.variable, *free], [outputs], "model")
        if not _jax.is_differentiable(outputs.aval) or why_curved(model, 0) is not None:
            break  # and so is all that is longer
        if (cut := _cut(node, k, model, len(free))) is not None:
            found.append(cut)
    return min(found, key=lambda cut: cut.size, default=None)


def _read_after(tail: Any, k: int) -> list[Any]:
    """Find the results of the k-th equation that later ones read."""
    later = set(_jax.free_variables(tail.eqns[k + 1 :])) | set(tail.outvars)
    return [v for v in tail.eqns[k].outvars if v in later]


def _places(tail: Any) -> list[int]:
    """After which equations everything later depends on the node through one variable only."""
    last: dict[Any, int] = {}
    for k, eqn in enumerate(tail.eqns):
        last.update({v: k for v in eqn.invars if not isinstance(v, _jax.Literal)})
    last.update({v: len(tail.eqns) for v in tail.outvars if not isinstance(v, _jax.Literal)})
    alive, places = {tail.invars[0]}, []
    for k, eqn in enumerate(tail.eqns):
        alive = {v for v in {*alive, *eqn.outvars} if last.get(v, -1) > k}
        if len(alive) == 1 and alive <= set(eqn.outvars):
            places.append(k)
    return places


def _cut(node: LossNode, k: int, model: Any, free: int) -> Cut | None:
    """After the k-th equation, if the loss keeps the same slices apart there as at the node."""
    after, (outputs,) = node.tail.eqns[k + 1 :], model.outvars
    loss_free = tuple(v for v in _jax.free_variables(after) if v is not outputs)
    loss = _jax.jaxpr_of(after, [outputs, *loss_free], list(node.tail.outvars), "loss")
    kept = [d for d in node.order() if node.apart[d]]
    at = [d for d in kept if d in node.positions] + [d for d in kept if d in node.features]
    none = [None] * free
    images = [propagate(Separability(), model, [d, *none])[0] for d in at]
    if any(d is None or d < 0 for d in images) or len(set(images)) < len(images):
        return None
    if not all(is_separable(loss, 0, d) for d in images):
        return None
    shape = outputs.aval.shape
    rest = [d for d in range(len(shape)) if d not in images]
    size = math.prod(shape[d] for d in rest)
    return Cut(outputs, model, loss, loss_free, (*images, *rest), size)


def functions_of(
    cut: Cut, nodes: Sequence[LossNode], read: Callable[[Any], Any], rules: RuleSet | None
) -> tuple[Callable[[Any], Any], Callable[[Any], Any], Any]:
    """The pullback `[s r, c] ↦ Z[s, m, q, r]` of each node, the product with `∂²h/∂o²`, and the outputs."""
    jaxpr, free = perturbed(nodes, cut.outputs)
    values = [read(v) for v in free]

    def model(deltas: Sequence[Any]) -> Any:
        operands = [node.to_variable(delta) for node, delta in zip(nodes, deltas, strict=True)]
        return cut.slices(_jax.evaluate(jaxpr, (), [*operands, *values])[0])

    def loss(slices: Any) -> Any:
        return _jax.evaluate(cut.loss, (), [cut.unsliced(slices), *map(read, cut.loss_free)])[0]

    zeros = [jnp.zeros(node.sizes(), node.variable.aval.dtype) for node in nodes]
    outputs, pullback = jax.vjp(with_rules(model, rules), zeros)
    _, product = jax.linearize(jax.grad(with_rules(loss, rules)), outputs)
    return lambda slices: pullback(slices.astype(outputs.dtype))[0], product, outputs


def eigensystem(product: Callable[[Any], Any], outputs: Any, at_once: int) -> tuple[Any, Any]:
    """Eigenvalues `[s r, c]` and eigenvectors `[s r, c', c]` of the Hessians of all slices."""

    def row(c: Any) -> Any:
        return product(
            jnp.broadcast_to((jnp.arange(outputs.shape[1]) == c).astype(outputs.dtype), outputs.shape)
        )

    hessians = jax.lax.map(row, jnp.arange(outputs.shape[1]), batch_size=min(at_once, outputs.shape[1]))
    # Of half precision there are no eigenvalues.
    return jnp.linalg.eigh(jnp.moveaxis(hessians, 0, -1).astype(single_at_least(hessians.dtype)))


def column_terms(cotangents: Any, weights: Any, a: Any, sizes: Sequence[int]) -> Any:
    """`[q, i, r]` of some columns: `cotangents[c, s, m, q, r]` and their eigenvalues `weights[c, s, r]`."""
    _, M, _, _ = sizes
    if M == 1:
        squares = jnp.einsum("csqr,csr->sqr", cotangents[:, :, 0] ** 2, weights)
        return jnp.einsum("si,sqr->qir", a[:, 0] ** 2, squares)
    products = jnp.einsum("smi,csmqr->csqir", a, cotangents)
    return jnp.einsum("csqir,csr->qir", products**2, weights)
