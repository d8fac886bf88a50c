"""The top of the Hessian's spectrum, as the report shows it."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcprop as fp
from funcprop.reporting.spectrum import top


def test_the_top_of_the_spectrum_is_that_of_the_matrix() -> None:
    def bowl(w: Any, scale: Any) -> Any:
        return jnp.sum(scale * w**2) / 2 + jnp.prod(w[:2])

    scale, w = jnp.linspace(-1.0, 3.0, 15), jnp.ones(15)
    cost = fp.second_order_cost(bowl, repeats=1)(w, scale)
    found = top(bowl, 0, (w, scale), {}, cost)
    assert found is not None
    expected = np.linalg.eigvalsh(jax.jit(jax.hessian(bowl))(w, scale))[::-1][:10]
    np.testing.assert_allclose(found.values, expected, atol=1e-10)
    # The second argument may be the one that is differentiated by; of two there is no spectrum.
    second = top(bowl, 1, (w, scale), {}, cost)
    assert second is not None
    np.testing.assert_allclose(second.values, 0.0, atol=1e-12)
    assert top(bowl, (0, 1), (w, scale), {}, cost) is None


@pytest.mark.parametrize("argnums", [0, None])
def test_a_model_of_equinox_with_a_function_and_a_counter_among_its_leaves(argnums: int | None) -> None:
    class Scaled(eqx.Module):
        w: Any
        activation: Any
        steps: Any

    def bowl(model: Any, x: Any) -> Any:
        return jnp.sum(model.activation(model.w * x) ** 2) + 0.0 * model.steps

    w, x = jnp.array([0.3, -0.2]), jnp.array([1.0, 2.0])
    page = fp.report(bowl, argnums)(Scaled(w, jax.nn.relu, jnp.array(3)), x if argnums == 0 else 2)
    assert "<svg" in page.html
    assert page.spectrum is not None
    factor = x if argnums == 0 else 2.0
    hessian = jax.jit(jax.hessian(lambda w: jnp.sum(jax.nn.relu(w * factor) ** 2)))(w)
    expected = np.linalg.eigvalsh(hessian)[::-1]
    np.testing.assert_allclose(page.spectrum.values, expected, atol=1e-12)


def test_an_empty_batch_and_16_bits_have_no_spectrum_and_do_not_fail() -> None:
    def squared(w: Any, x: Any) -> Any:
        return jnp.sum((x @ w) ** 2)

    empty = fp.second_order_cost(squared, repeats=1)(jnp.eye(3), jnp.ones((0, 3)))
    assert empty["gradient"].measured is not None
    w, x = jnp.eye(3, dtype=jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16)
    assert top(squared, 0, (w, x), {}, empty) is None
