"""kfac-jax: curvature of JAX models whose loss is registered with it, jitted as ours is.

Its factors are of layers, weights and bias together: the input factor has one more row, which is left out of
the comparison. Those of a convolution are means over its R positions, and the block is R times their
product; our output factor is R times larger instead. Their input factors are not compared (see
`Twin.input_factors`).

kfac-jax 0.0.8, the newest, was written for JAX before 0.10: it evaluates equations by what
`Primitive.get_bind_params` used to return. `_evaluated` does the same with what it returns now.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import kfac_jax

from benchmark_cases.curvature import Problem
from benchmark_cases.curvature_peers import Way

LIBRARY, OWN = "kfac-jax", "ours"  # its gradient is JAX's, as ours is


def _evaluated(eqn: Any, values: list[Any]) -> list[Any]:
    """The results of one equation."""
    found = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)
    results = eqn.primitive.bind(*functions, *values, **params)
    return results if isinstance(results, list) else [results]


kfac_jax.tag_graph_matcher.eval_jaxpr_eqn = _evaluated


def _way(function: Callable[..., Any], args: tuple[Any, ...], value: Callable[[Any], Any]) -> Way:
    compiled = jax.jit(function).lower(*args).compile()
    return Way(lambda: jax.block_until_ready(compiled(*args)), lambda: value(compiled(*args)))


def _registered(p: Problem) -> Callable[..., Any]:
    """The mean loss, in the form that kfac-jax reads."""

    def loss(params: Any, batch: Any) -> Any:
        x, y = batch
        outputs = p.model(params, x)
        kfac_jax.register_softmax_cross_entropy_loss(outputs, y)
        return p.loss(outputs, y)

    return loss


def _product(method: str) -> Callable[[str, Problem], Way]:
    def build(name: str, p: Problem) -> Way:
        multiply = getattr(kfac_jax.ImplicitExactCurvature(_registered(p)), method)
        return _way(
            lambda params, v, x, y: multiply((params, (x, y)), v),
            (p.params, p.direction, p.x, p.y),
            lambda result: result,
        )

    return build


def _blocks(
    mode: str, value: Callable[[Problem, Any, Any], Any], blocks: Any = None
) -> Callable[[str, Problem], Way]:
    """One update of a block-diagonal estimate; `value` reads the estimator and its state."""

    def build(name: str, p: Problem) -> Way:
        estimator = kfac_jax.BlockDiagonalCurvature(_registered(p), layer_tag_to_block_ctor=blocks)
        key = jax.random.key(0)
        state = estimator.init(key, (p.params, (p.x, p.y)), None, None)

        def update(state: Any, params: Any, x: Any, y: Any, key: Any) -> Any:
            args = params, (x, y)
            return estimator.update_curvature_matrix_estimate(state, 0.0, 1.0, 0.0, len(x), key, args, mode)

        args = state, p.params, p.x, p.y, key
        return _way(update, args, lambda state: value(p, estimator, state))

    return build


def _factors(p: Problem, estimator: Any, state: Any) -> dict[str, Any]:
    """Both factors of each layer's weights, in our conventions."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(p.params)]
    found = {}
    for block, indices, here in zip(
        estimator.blocks, estimator.jaxpr.layer_indices, state.blocks_states, strict=True
    ):
        a, g = (factor.value for factor in here.factors)
        layer = paths[indices[0]][1].key
        found[layer] = {"output": block.fixed_scale() * g}
        if not layer.startswith("Conv"):
            found[layer]["input"] = a[:-1, :-1]
    return found


def _input_factors(p: Problem, estimator: Any, state: Any) -> dict[str, Any]:
    found = _factors(p, estimator, state)
    return {layer: {"input": here["input"]} for layer, here in found.items() if "input" in here}


def _diagonal(p: Problem, estimator: Any, state: Any) -> Any:
    found: dict[int, Any] = {}
    for indices, here in zip(estimator.jaxpr.layer_indices, state.blocks_states, strict=True):
        found |= dict(zip(indices, (factor.value for factor in here.diagonal_factors), strict=True))
    return jax.tree.unflatten(jax.tree.structure(p.params), [found[i] for i in range(len(found))])


_DIAGONAL = {"dense": kfac_jax.DenseDiagonal, "conv2d": kfac_jax.Conv2DDiagonal}

WAYS: dict[str, Callable[[str, Problem], Way]] = {
    "Hessian-vector product": _product("multiply_hessian"),
    "Gauss-Newton product": _product("multiply_ggn"),
    "Gauss-Newton diagonal": _blocks("ggn_exact", _diagonal, _DIAGONAL),
    "diagonal, Monte-Carlo": _blocks("fisher_gradients", lambda *_: (), _DIAGONAL),
    "KFAC factors, Monte-Carlo": _blocks("fisher_gradients", _input_factors),
    "KFAC factors, exact": _blocks("ggn_exact", _factors),
}
