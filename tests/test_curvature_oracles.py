"""Hessian and Gauss-Newton matrix of every kind of model with every loss, against dense oracles of JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature_models import EXAMPLES, LOSSES, MODELS, batched, mean
from jax.flatten_util import ravel_pytree

import funcprop as fp


@pytest.fixture(scope="module", params=MODELS)
def matrices(request: pytest.FixtureRequest) -> dict[str, tuple[jax.Array, jax.Array]]:
    """For each loss and each operator: our matrix, and the one of `jax.hessian` or `jax.jacrev`.

    One program computes all of a model, so that what they share is compiled once.
    """
    model = MODELS[request.param]()
    of_batch = batched(model)
    flat, unravel = ravel_pytree(model.params)

    def all_of(params, flat, x):
        outputs = of_batch(params, x)
        jacobian = jax.jacrev(lambda flat: of_batch(unravel(flat), x).ravel())(flat)
        found = {}
        for name, loss in LOSSES.items():
            y = loss.targets(EXAMPLES, model.outputs)
            of_outputs = mean(loss)

            def of_params(params, x, y, of_outputs=of_outputs):
                return of_outputs(of_batch(params, x), y)

            inner = jax.hessian(lambda o, f=of_outputs, y=y: f(o.reshape(outputs.shape), y))(outputs.ravel())
            found[f"hessian, {name}"] = (
                fp.hessian(of_params)(params, x, y).dense(),
                jax.hessian(lambda flat, f=of_params, y=y: f(unravel(flat), x, y))(flat),
            )
            found[f"ggn, {name}"] = (
                fp.ggn(of_batch, of_outputs)(params, x, y).dense(),
                jacobian.T @ inner @ jacobian,
            )
        # Diagonals have programs of their own; one loss for each model is enough to find what they mistake.
        name = list(LOSSES)[list(MODELS).index(request.param) % len(LOSSES)]
        y, of_outputs = LOSSES[name].targets(EXAMPLES, model.outputs), mean(LOSSES[name])
        for operator, at in (
            ("hessian", fp.hessian(lambda p: of_outputs(of_batch(p, x), y))(params)),
            ("ggn", fp.ggn(of_batch, of_outputs)(params, x, y)),
        ):
            diagonal = ravel_pytree(at.diagonal())[0]
            found[f"diagonal of {operator}"] = diagonal, jnp.diagonal(found[f"{operator}, {name}"][1])
        return found

    return jax.jit(all_of)(model.params, flat, model.x)


@pytest.mark.parametrize(("operator", "loss"), [(o, loss) for o in ("hessian", "ggn") for loss in LOSSES])
def test_dense(matrices: dict[str, tuple[jax.Array, jax.Array]], operator: str, loss: str) -> None:
    assert_equal(*matrices[f"{operator}, {loss}"])


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_diagonal(matrices: dict[str, tuple[jax.Array, jax.Array]], operator: str) -> None:
    assert_equal(*matrices[f"diagonal of {operator}"])


def assert_equal(ours: jax.Array, reference: jax.Array) -> None:
    scale = float(jnp.abs(reference).max())
    assert scale > 1e-3
    # The floor is for entries that are zero, as those of an attention's key bias.
    np.testing.assert_allclose(ours, reference, rtol=1e-10, atol=1e-12 * scale)
