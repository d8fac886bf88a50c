"""The Fisher information matrix of a model with a likelihood: exact, sampled, or at the given targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from funcprop.curvature.binding import Bound
from funcprop.curvature.examples import (
    explained,
    model_of_all,
    over_positions,
    require_free_layout,
    total_of,
    weights_of,
)
from funcprop.curvature.gauss_newton import GaussNewton, Map, traced_model
from funcprop.curvature.likelihood import Likelihood, likelihood_of
from funcprop.operators.parameters import Where
from funcprop.operators.subset import Point
from funcprop.rules.rule_set import RuleSet

KINDS = ("exact", "mc", "empirical")


def _shares(weights: Any, count: int) -> Any:
    """What each example is multiplied by: `1/N`, or its share of the weights."""
    return jnp.full(count, 1 / count) if weights is None else weights / total_of(weights, count)


def _exact(likelihood: Likelihood, outputs: PyTree, weights: Any) -> Map:
    """`u ↦ F_o u / N`, the outputs' own Fisher matrix for each example."""
    shares = _shares(weights, examples(outputs))
    product = over_positions(lambda o, u, share: _scaled(likelihood.fisher(o, u), share), shares.ndim)
    return lambda u: product(outputs, u, shares)


def _sampled(likelihood: Likelihood, samples: int, outputs: PyTree, given: tuple[Array, Any]) -> Map:
    """`u ↦ Σ_s g_s g_sᵀ u / (N S)` for each example, `g_s` the gradients at S drawn targets."""
    key, weights = given

    def gradients(key: Array, outputs: PyTree) -> PyTree:
        y = jax.lax.stop_gradient(likelihood.sample(key, outputs))
        return jax.grad(likelihood.negative_log)(outputs, y)

    shares = _shares(weights, examples(outputs))
    keys = jax.random.split(key, (samples, *shares.shape))
    drawn = jax.vmap(over_positions(gradients, shares.ndim), (0, None))(keys, outputs)
    return _outer(drawn, shares)


def _empirical(likelihood: Likelihood, outputs: PyTree, given: tuple[PyTree, Any]) -> Map:
    """`u ↦ g gᵀ u / N` for each example, `g` the gradient at its target."""
    y, weights = given
    shares = _shares(weights, examples(outputs))
    gradients = over_positions(jax.grad(likelihood.negative_log), shares.ndim)(outputs, y)
    return _outer(jax.tree.map(lambda g: g[None], gradients), shares)


def fisher(
    model: Callable[..., Any],
    likelihood: str | Likelihood,
    *,
    kind: str = "exact",
    samples: int = 1,
    batched: bool = False,
    where: Where | None = None,
    rules: RuleSet | None = None,
) -> Callable[..., GaussNewton]:
    """The Fisher matrix `F = (1/N) Σ_n J_nᵀ F_o J_n` as a linear operator, the mean over the N examples.

    `fisher(model, likelihood)(params, x)`: `outputs = model(params, x)` of ONE example, or (`batched=True`)
    of a whole batch; the leading axis of `x` is the examples either way. With `weights=w`, one number ≥ 0 for
    each example, the mean is `Σ_n w_n … / Σ_n w_n`; with weights of positions, `[n, *positions]`, the
    likelihood is of one position, of which the outputs of an example have an array. `J_n` is the Jacobian of
    the outputs of example n by the parameters, and `F_o` is the Fisher matrix of its outputs, by `kind`:

    * "exact": `F_o = E_y[∇_o log p(y|o) (∇_o log p(y|o))ᵀ]`. With "categorical" F equals `fp.ggn` of the mean
      softmax cross-entropy, with "bernoulli" that of the mean over examples of the summed binary
      cross-entropy, with "gaussian" (unit variance) that of `(1/N) Σ_n ½ ‖o_n − y_n‖²`.
    * "mc": the expectation by `samples` targets drawn from the model, `(params, x, key=…)`; unbiased.
    * "empirical": the targets of the data instead, `(params, x, y)`: the second moment of the gradients of
      the examples. It is not an estimate of the others.

    Args:
        model: a function of parameters and inputs.
        likelihood: "categorical" (logits on the last axis, integer targets), "gaussian", "bernoulli"
            (logits), or a `Likelihood`. What an example has further axes for is independent: its
            logarithms add up.
        kind: which of the three.
        samples: targets drawn for each example, with "mc".
        batched: the model is a function of a whole batch.
        where, rules: as in `fp.hessian`.

    Raises:
        ValueError: `likelihood` or `kind` is not known, the key of "mc" or the targets of "empirical" are
            missing, or outputs and targets are not of the same number of examples or of other shapes.
        TypeError: outputs are not real, or a parameter has no derivative.

    References: Martens, "New insights and perspectives on the natural gradient method", JMLR 2020; Kunstner,
    Balles and Hennig, "Limitations of the empirical Fisher approximation", NeurIPS 2019.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> model = lambda w, x: x @ w
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> print(fp.fisher(model, "gaussian")(jnp.zeros(2), x).dense())  # x.T @ x / 2
        [[ 5.  7.]
         [ 7. 10.]]
        >>> y = jnp.array([1.0, 2.0])
        >>> print(fp.fisher(model, "gaussian", kind="empirical")(jnp.zeros(2), x, y).trace())
        52.5
    """
    density = likelihood_of(likelihood)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known; choose one of {', '.join(KINDS)}.")
    if samples < 1:
        raise ValueError(f"samples={samples}, but at least one target has to be drawn.")

    def at(
        params: PyTree, x: Any, y: Any = None, *, key: Array | None = None, weights: Any = None
    ) -> GaussNewton:
        for path, leaf in jax.tree.leaves_with_path(x):
            require_free_layout("fisher", f"x{jax.tree_util.keystr(path)}", leaf)
        point = Point.of(params, where)
        bound = Bound.of(model_of_all(model, batched), (x,), {}, point)
        with explained("fisher", model, batched, params, x):
            written = traced_model(bound, point)
        count = examples(written.results)
        weights = weights_of(weights, count, "fisher", positions=True)
        more, curvature = weights, partial(_exact, density)
        if kind == "mc":
            if key is None:
                raise ValueError("key=None: kind='mc' draws targets and needs key=jax.random.key(…).")
            more, curvature = (key, weights), partial(_sampled, density, samples)
        if kind == "empirical":
            if y is None:
                raise ValueError("y=None: kind='empirical' is at the targets of the data; give them as y.")
            if {len(leaf) for leaf in jax.tree.leaves(y)} != {count}:
                raise ValueError(
                    f"y has the shapes {jax.tree.map(jnp.shape, y)}, but the outputs are of {count} "
                    "examples, which are the leading axis."
                )
            more, curvature = (y, weights), partial(_empirical, density)
        return GaussNewton.of(bound, written, curvature, more, point, rules)

    at.__qualname__ = "fisher(model, likelihood)"
    return at


def examples(outputs: PyTree) -> int:
    """The number of examples: the leading axis of all outputs.

    Raises:
        ValueError: there is no such axis.
    """
    lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(outputs)}
    if len(lengths) != 1 or lengths == {()}:
        shapes = jax.tree.map(lambda leaf: leaf.shape, outputs)
        raise ValueError(
            f"the model's outputs have the shapes {shapes}, but their leading axis has to be the examples."
        )
    return lengths.pop()[0]


def _outer(gradients: PyTree, shares: Array) -> Map:
    """`u_n ↦ share_n Σ_s g_sn ⟨g_sn, u_n⟩ / S`; the gradients' leading axes are S and N."""
    samples = len(jax.tree.leaves(gradients)[0])

    def product(u: PyTree) -> PyTree:
        def one(gradients: PyTree, u: PyTree, share: Array) -> PyTree:
            pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(u), strict=True)
            inner = sum(jnp.vdot(g, part) for g, part in pairs)
            return _scaled(gradients, share * inner / samples)

        summands = jax.vmap(over_positions(one, shares.ndim), (0, None, None))(gradients, u, shares)
        return jax.tree.map(lambda leaf: leaf.sum(0), summands)

    return product


def _scaled(tree: PyTree, scale: Any) -> PyTree:
    return jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), tree)
