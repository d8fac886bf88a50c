"""Products, reductions, cumulative operators and indexing: as JAX has them, at the edges too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

import funcprop as fp

HANDWRITTEN = fp.rules.handwritten
INF, NAN = np.inf, np.nan


def weighted(fun):
    """A scalar whose gradient has a different weight for every entry of the result."""

    def scalar(*args):
        results = [y for y in jax.tree.leaves(fun(*args)) if jnp.issubdtype(y.dtype, jnp.floating)]
        return sum(jnp.sum(y * jnp.cos(jnp.arange(y.size) + 1.0).reshape(y.shape)) for y in results)

    return scalar


def assert_same_gradient(fun, *args, argnums=0):
    assert [m.reason for m in fp.matches(fun, HANDWRITTEN)(*args)] == [None]

    @compiled
    def both(*args):
        by_rule = fp.value_and_grad(weighted(fun), argnums, rules=HANDWRITTEN)
        return by_rule(*args), jax.value_and_grad(weighted(fun), argnums)(*args)

    actual, expected = both(*args)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12), actual, expected)


def normal(*shape, seed=0):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape))


# --- products ---------------------------------------------------------------------------------


@settings(max_examples=10)
@given(st.lists(st.sampled_from([0, 2, 3]), min_size=2, max_size=3), st.integers(1, 3), st.integers(0, 2))
@example([0, 2], 2, 1)
@example([2, 1, 3], 1, 0)
@example([2, 0, 3], 3, 2)
def test_product_of_rows_with_a_matrix(rows, inputs, more):
    x, w = normal(*rows, inputs), normal(inputs, inputs + more, seed=1)
    assert_same_gradient(lambda x, w: x @ w, x, w, argnums=(0, 1))


def test_activations_come_first_in_the_weight_gradient():
    def products(gradient):
        eqns = jax.make_jaxpr(gradient)(normal(2, 3, 4), normal(4, 8)).jaxpr.eqns
        return [e.outvars[0].aval.shape for e in eqns if e.primitive.name == "dot_general"]

    loss = lambda x, w: jnp.sum((x @ w) ** 2)  # noqa: E731
    assert (8, 4) in products(jax.grad(loss, 1))
    assert products(fp.grad(loss, 1, rules=fp.rules.default.on("cpu"))) == [(2, 3, 8), (4, 8)]


LEFT_ALONE = {
    "matrix of rows": (lambda x, w: x @ w, (3, 2), (2, 4), "XLA finds the best order of this product itself"),
    "one example": (lambda x, w: x @ w, (1, 3, 2), (2, 4), "XLA finds the best order of this product itself"),
    "narrowing": (lambda x, w: x @ w, (2, 3, 4), (4, 2), "XLA finds the best order of this product itself"),
    "batched": (jnp.matmul, (2, 3, 4), (2, 4, 5), "it is not a product of rows with a matrix"),
    "heads": (
        lambda x, w: jnp.einsum("btd,dhe->bthe", x, w),
        (2, 3, 4),
        (4, 2, 3),
        "it is not a product of rows with a matrix",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_products_that_are_left_to_autodiff(case):
    fun, x, w, reason = LEFT_ALONE[case]
    assert [m.reason for m in fp.matches(fun, HANDWRITTEN)(normal(*x), normal(*w))] == [reason]


def test_products_of_mixed_precision_are_left_to_autodiff():
    shapes = jax.ShapeDtypeStruct((2, 3, 4), jnp.bfloat16), jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    widened = lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32)  # noqa: E731
    (match,) = fp.matches(widened, HANDWRITTEN)(*shapes)
    assert match.reason == "its operands are bfloat16 and bfloat16, its result float32"


# --- reductions and cumulative operators ------------------------------------------------------

EDGES = {
    "ties": [1.0, 2.0, 2.0, 0.0],
    "infinite": [1.0, INF, 2.0],
    "two infinities": [INF, INF, 0.0],
    "no weight first": [-INF, 1.0, 2.0, -INF, 3.0],
    "no weight at all": [-INF, -INF, 1.0, 2.0],
    "infinite first": [INF, 1.0, 2.0],
    "not a number": [1.0, NAN, 2.0],
    "not a number first": [NAN, 1.0],
    "one": [3.0],
}
FUNCTIONS = {
    "max": lambda x: lax.reduce_max(x, (0,)),
    "min": lambda x: lax.reduce_min(x, (0,)),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x, 0),
    "reverse": lambda x: lax.cumlogsumexp(x, 0, reverse=True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_edges_are_autodiffs(name):
    fun = FUNCTIONS[name]
    both = compiled(lambda x: (jax.grad(weighted(fun))(x), fp.grad(weighted(fun), rules=HANDWRITTEN)(x)))
    for label, entries in EDGES.items():
        expected, actual = both(jnp.array(entries if name != "reverse" else entries[::-1]))
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12, err_msg=label)


@settings(max_examples=10)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_random_reductions(shape, data):
    x = jnp.round(normal(*shape) * 2)
    axes = tuple(sorted(data.draw(st.sets(st.integers(0, len(shape) - 1)))))
    assert_same_gradient(lambda x: lax.reduce_max(x, axes), x)
    assert_same_gradient(lambda x: lax.reduce_min(x, axes), x)


@settings(max_examples=6)
@given(st.lists(st.integers(2, 5), min_size=1, max_size=3), st.booleans(), st.data())
def test_random_cumulative_sums(shape, reverse, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    assert_same_gradient(lambda x: lax.cumlogsumexp(x, axis, reverse), normal(*shape))


# --- indexing ---------------------------------------------------------------------------------

TABLE, INDICES = normal(4, 3), jnp.array([[3, 0], [0, -1]])
INDEXED = {
    "rows": lambda x: x[INDICES],
    "entries": lambda x: x[INDICES, jnp.array([0, 2])],
    "out of range is filled": lambda x: x.at[INDICES + 3].get(mode="fill", fill_value=0.5),
    "out of range is clipped": lambda x: x.at[INDICES + 3].get(mode="clip"),
    "added": lambda x: x.at[INDICES].add(2 * x[:2, None]),
    "added out of range": lambda x: x.at[INDICES + 3].add(x[:2, None]),
    "largest": lambda x: lax.top_k(x, 2),
    "largest of equals": lambda x: lax.top_k(jnp.concatenate([x, x], 1), 3),
    "largest along another axis": lambda x: lax.top_k(x, 3, axis=0),
}


@pytest.mark.parametrize("case", INDEXED)
def test_indexing(case):
    fun = INDEXED[case]
    assert {m.reason for m in fp.matches(fun, HANDWRITTEN)(TABLE)} == {None}
    expected = jax.jit(jax.value_and_grad(weighted(fun)))(TABLE)
    actual = fp.value_and_grad(weighted(fun), rules=HANDWRITTEN)(TABLE)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12), actual, expected)
