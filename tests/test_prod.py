"""The chapter's operator `prod`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcprop as fp

SHAPES = [((), (2, 3), (4,)), ((5,), (2, 3), ()), ((2,), (3,), (4, 5)), ((), (), ()), ((3, 1), (2,), (2, 2))]


@pytest.mark.parametrize(("z", "y", "x"), SHAPES)
def test_is_the_chain_rule_for_any_shape(z, y, x):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=z + y), rng.normal(size=y + x)
    result = fp.prod(a, b, y_ndim=len(y))
    assert result.shape == z + x
    np.testing.assert_allclose(result, np.tensordot(a, b, axes=len(y)), rtol=1e-14)


def test_composes_jacobians():
    inner = lambda x: jnp.stack([jnp.sin(x), x**2])  # noqa: E731
    outer = lambda y: jnp.sum(y, axis=1) ** 3  # noqa: E731
    x = jnp.arange(3.0)
    whole = jax.jacobian(lambda x: outer(inner(x)))(x)
    parts = fp.prod(jax.jacobian(outer)(inner(x)), jax.jacobian(inner)(x))
    np.testing.assert_allclose(parts, whole, rtol=1e-14)


def test_shape_of_a_gradient_is_the_shape_of_its_variable():
    w = jnp.ones((2, 3))
    assert fp.prod(jnp.ones((2,)), jnp.ones((2, 2, 3))).shape == w.shape
    assert jax.grad(lambda w: jnp.sum(w**2))(w).shape == w.shape
    assert jax.hessian(lambda w: jnp.sum(w**2))(w).size == w.size**2


@pytest.mark.parametrize(
    ("a", "b", "y_ndim", "message"),
    [
        ((2, 3), (4, 5), None, r"no axes agree.*Pass y_ndim=, the number of axes of Y"),
        ((3, 3), (3, 3), None, r"Y may have \[1, 2\] axes.*Pass y_ndim="),
        ((2, 3), (3, 4), 2, r"y_ndim=2, but the last 2 axes of dz_dy \(2, 3\)"),
    ],
)
def test_errors_name_the_shapes_and_the_remedy(a, b, y_ndim, message):
    with pytest.raises(ValueError, match=message):
        fp.prod(jnp.ones(a), jnp.ones(b), y_ndim=y_ndim)
