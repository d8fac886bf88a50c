"""Hessian and Gauss-Newton matrix of every kind of model with every loss, against dense oracles of JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature_models import EXAMPLES, LOSSES, MODELS, batched, mean
from jax.flatten_util import ravel_pytree

import funcprop as fp


def matrices(name: str) -> dict[str, tuple[jax.Array, jax.Array]]:
    """For each loss and each operator: our matrix, and the one of `jax.hessian` or `jax.jacrev`.

    One program computes all of a model, so that what they share is compiled once.
    """
    model = MODELS[name]()
    of_batch = batched(model)
    flat, unravel = ravel_pytree(model.params)

    names = list(LOSSES)
    targets = tuple(loss.targets(EXAMPLES, model.outputs) for loss in LOSSES.values())

    def of_outputs(outputs, ys):
        return jnp.stack([mean(loss)(outputs, y) for loss, y in zip(LOSSES.values(), ys, strict=True)])

    def of_params(params, x, ys, weights):
        return weights @ of_outputs(of_batch(params, x), ys)

    def all_of(params, flat, x, targets):
        outputs = of_batch(params, x)
        jacobian = jax.jacrev(lambda flat: of_batch(unravel(flat), x).ravel())(flat)
        inner = jax.hessian(lambda o: of_outputs(o.reshape(outputs.shape), targets))(outputs.ravel())
        references = {
            "hessian": jax.hessian(lambda flat: of_outputs(of_batch(unravel(flat), x), targets))(flat),
            "ggn": jnp.einsum("op,noq,qr->npr", jacobian, inner, jacobian),
        }
        # The losses one after the other, chosen by their weights, are one program.
        each = jnp.eye(len(LOSSES))
        G = fp.ggn(of_batch, lambda outputs, chosen: chosen[1] @ of_outputs(outputs, chosen[0]), batched=True)
        ours = {
            "hessian": jax.lax.map(lambda w: fp.hessian(of_params)(params, x, targets, w).dense(), each),
            "ggn": jax.lax.map(lambda w: G(params, x, (targets, w)).dense(), each),
        }
        found = {
            f"{operator}, {loss}": (ours[operator][n], references[operator][n])
            for operator in ours
            for n, loss in enumerate(names)
        }
        # Diagonals have programs of their own; one loss for each model is enough to find what they mistake.
        number = list(MODELS).index(name) % len(LOSSES)
        loss, y, of_one = names[number], targets[number], mean(LOSSES[names[number]])
        for operator, at in (
            ("hessian", fp.hessian(lambda p: of_one(of_batch(p, x), y))(params)),
            ("ggn", fp.ggn(of_batch, of_one, batched=True)(params, x, y)),
        ):
            diagonal = ravel_pytree(at.diagonal())[0]
            found[f"diagonal of {operator}"] = diagonal, jnp.diagonal(found[f"{operator}, {loss}"][1])
        return found

    return jax.jit(all_of)(model.params, flat, model.x, targets)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", MODELS)
def test_matrices_and_diagonals(name: str) -> None:
    for what, (ours, reference) in matrices(name).items():
        scale = float(jnp.abs(reference).max())
        assert scale > 1e-3, what
        # The floor is for entries that are zero, as those of an attention's key bias.
        np.testing.assert_allclose(ours, reference, rtol=1e-10, atol=1e-12 * scale, err_msg=what)
