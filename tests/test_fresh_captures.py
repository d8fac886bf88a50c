"""What a function reads besides its arguments is never stale."""

from __future__ import annotations

from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from changing_sources import (
    CALLED,
    GRAM,
    OPERATORS,
    QUERIES,
    SOURCES,
    Functions,
    V,
    W,
    X,
    Y,
    close,
    from_closure,
    leaves,
)

import funcprop as fp


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", OPERATORS)
def test_every_query_of_every_operator(name: str, kind: str) -> None:
    source = SOURCES[kind]()
    make = OPERATORS[name](Functions(source))
    few = kind == "a number"  # each value of a number is compiled for itself
    chosen = ("@ v", "dense", "solve", "linearize") if few else tuple(QUERIES)
    for query, expected in (QUERIES[q] for q in chosen):
        for scale in (1.0, 3.0):
            source.change(scale)
            close(query(make(W, X, Y)), expected(scale**2 * GRAM))


def test_an_operator_is_what_it_was_when_it_was_made() -> None:
    """All of its queries agree, also those that are asked first after the change."""
    source = from_closure()
    functions = Functions(source)
    for make in OPERATORS.values():
        source.change(2.0)
        A = make(functions)(W, X, Y)
        close(A @ V, 4 * GRAM @ V)
        source.change(5.0)
        for query, expected in QUERIES.values():
            close(query(A), expected(4 * GRAM))


# --- what is called again ---------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", SOURCES)
def test_whatever_is_called_again_reads_again(kind: str) -> None:
    """Called after the change, it is what another one made afterwards is, which never saw the first value."""
    for name, make in CALLED.items():
        source, other = SOURCES[kind](), from_closure()
        called = make(Functions(source))
        source.change(1.0)
        before = leaves(called())
        source.change(3.0)
        other.change(3.0)
        after, expected = leaves(called()), leaves(make(Functions(other))())
        np.testing.assert_allclose(after, expected, rtol=1e-7, atol=1e-9, err_msg=name)
        assert not np.allclose(before, after), name


def test_footprint_and_plans_are_of_the_array_that_is_there() -> None:
    table = jnp.ones((10, 3))

    def loss(w: Any) -> Any:
        return jnp.sum(jnp.sin(table @ jnp.sin(w)) ** 2)

    plan, footprint = fp.memory.remat_plan(loss, 0.5), fp.memory.footprint(loss)
    before = plan(W).plain_residual_bytes, footprint(W).training.predicted
    table = jnp.ones((1000, 3))
    assert plan(W).plain_residual_bytes > 10 * before[0]
    assert footprint(W).training.predicted > 10 * before[1]


# --- under transformations --------------------------------------------------------------------


def test_operators_are_pytrees_with_traced_parameters() -> None:
    def loss(w: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(x @ w) ** 2)

    def expected(w: Any) -> Any:
        return jax.hessian(loss)(w, X) @ V

    points = jnp.stack([W, -W, 2 * W])
    each = np.stack([expected(w) for w in points])
    H = fp.hessian(loss)
    close(jax.vmap(lambda w: H(w, X) @ V)(points), each)
    close(jax.lax.map(lambda w: H(w, X).dense() @ V, points), each)
    stacked = jax.vmap(lambda w: H(w, X))(points)
    close(jax.vmap(lambda A: A @ V)(stacked), each)
    last, products = jax.lax.scan(lambda A, w: (H(w, X), A @ V), H(W, X), points)
    close(products, each[[0, 0, 1]])
    close(last @ V, each[2])
    made = jax.lax.cond(W[0] > 0, lambda: H(W, X), lambda: H(-W, X))
    close(made @ V, each[0])
    close(jax.grad(lambda w: jnp.sum(H(w, X) @ V))(W), jax.grad(lambda w: jnp.sum(expected(w)))(W))
    close(jax.jit(lambda w: H(w, X))(W).dense(), jax.hessian(loss)(W, X))


def test_a_posterior_and_influences_are_what_they_were() -> None:
    source = from_closure()
    f = Functions(source)
    source.change(2.0)
    posterior = fp.curvature.laplace(f.model, "gaussian", structure="full")(W, X, Y)
    influence = fp.curvature.influence(f.loss_of_one, damping=0.1)(W, X, Y)
    mean_before, losses = posterior.predictive(X).mean, influence.on_losses(X, Y)
    source.change(5.0)
    close(posterior.predictive(X).mean, mean_before)
    close(influence.on_losses(X, Y), losses)
    close(jax.jit(lambda p, x: p.predictive(x))(posterior, X).mean, mean_before)
    # Of other types than those of the training data, they are traced again.
    again = posterior.predictive(X.astype("float32")).mean
    np.testing.assert_allclose(again, mean_before * 2.5, rtol=1e-5)
    with pytest.raises(TypeError, match=r"was traced for arguments of the types .* inside of `jit`"):
        jax.jit(lambda p, x: p.predictive(x))(posterior, X.astype("float32"))
