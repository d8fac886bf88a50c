"""Public functions say a thing in one way: parts of parameters, bytes, auxiliary data, whole batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcprop as fp
from funcprop.memory.remat.rematerialize import rematerialize
from funcprop.program.sizes import budget_bytes

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {"w": jax.random.normal(KEYS[0], (3, 4)) / 2, "v": jax.random.normal(KEYS[1], (4, 2)) / 2}
X, Y = jax.random.normal(KEYS[2], (5, 3)), jax.random.normal(KEYS[3], (5, 2))
# The flat order of the parameters is that of their names.
V, W = slice(0, 8), slice(8, 20)


def model(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def loss(output, y):
    return jnp.sum((output - y) ** 2) / 2


def mean_loss(outputs, y):
    return jnp.mean(jax.vmap(loss)(outputs, y))


def of_example(params, x, y):
    return loss(model(params, x), y)


def objective(params):
    return mean_loss(model(params, X), Y)


def close(actual, expected):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-12), actual, expected)


def dense_hessian():
    flat, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    return jax.hessian(lambda flat: objective(unravel(flat)))(flat)


def dense_gauss_newton():
    flat, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    J = jax.jacobian(lambda flat: model(unravel(flat), X))(flat).reshape(-1, flat.size)
    return J.T @ J / len(X)


# --- where ------------------------------------------------------------------------------------


def test_where_in_per_example():
    found = fp.per_example(model, loss, where="v")(PARAMS, X, Y, {"gradients", "diag_ggn"})
    each = jax.vmap(jax.grad(of_example), (None, 0, 0))(PARAMS, X, Y)
    close(found["gradients"], {"v": each["v"], "w": None})
    close(found["diag_ggn"]["v"].ravel(), jnp.diag(dense_gauss_newton())[V])
    assert found["diag_ggn"]["w"] is None


def test_where_in_an_audit_of_shapes():
    shapes = jax.eval_shape(lambda: (PARAMS, X))
    routes = fp.per_example(model, loss, where="v").audit(*shapes)
    assert [route.path for route in routes] == ["['v']"]


@pytest.mark.parametrize("factored", [fp.kfac, fp.ekfac])
def test_where_in_kfac(factored):
    whole = factored(model, loss, kind="exact")(PARAMS, X, Y).dense()
    close(factored(model, loss, kind="exact", where="v")(PARAMS, X, Y).dense(), whole[V, V])


def test_where_in_the_diagonal_of_a_hessian():
    diagonal = fp.curvature.hessian_diagonal(lambda p: objective(p), where=lambda path, leaf: path == "w")
    close(diagonal(PARAMS), {"v": None, "w": jnp.diag(dense_hessian())[W].reshape(3, 4)})
    assert {name for row in diagonal.plan(PARAMS).rows for name in row.leaves} == {"w"}


def test_where_in_influence():
    found = fp.curvature.influence(of_example, where="v", damping=0.1)(PARAMS, X, Y).on_parameters(2)
    gradient = jax.grad(of_example)(PARAMS, X[2], Y[2])["v"].ravel()
    expected = jnp.linalg.solve(dense_hessian()[V, V] + 0.1 * jnp.eye(8), gradient) / len(X)
    np.testing.assert_allclose(found["v"].ravel(), expected, rtol=1e-6)
    assert found["w"] is None


def test_where_leaves_out_what_has_no_derivative():
    params = {**PARAMS, "steps": jnp.array(3)}
    found = fp.per_example(model, loss, where=["v", "w"])(params, X, Y, {"gradient"})["gradient"]
    close(found, {**jax.grad(objective)(PARAMS), "steps": None})


def test_where_that_chooses_nothing():
    with pytest.raises(ValueError, match="'u'"):
        fp.per_example(model, loss, where="u")(PARAMS, X, Y, {"gradient"})


# --- one example, or a whole batch ------------------------------------------------------------


def test_gauss_newton_of_one_example_and_of_a_batch():
    close(fp.ggn(model, loss)(PARAMS, X, Y).dense(), dense_gauss_newton())
    close(fp.ggn(model, mean_loss, batched=True)(PARAMS, X, Y).dense(), dense_gauss_newton())


def test_fisher_of_one_example_and_of_a_batch():
    for options in ({}, {"batched": True}):
        close(fp.fisher(model, "gaussian", **options)(PARAMS, X).dense(), dense_gauss_newton())


def batch_model(params, x):
    assert x.ndim == 2
    return model(params, x)


@pytest.mark.parametrize("quantity", ["gradients", "norm", "diag_ggn", "kflr"])
def test_quantities_of_a_model_of_a_batch(quantity):
    expected = fp.per_example(model, loss)(PARAMS, X, Y, {quantity})
    close(fp.per_example(batch_model, mean_loss, batched=True)(PARAMS, X, Y, {quantity}), expected)


def test_kfac_laplace_and_influence_of_functions_of_a_batch():
    expected = fp.kfac(model, loss, kind="exact")(PARAMS, X, Y).dense()
    close(fp.kfac(batch_model, mean_loss, kind="exact", batched=True)(PARAMS, X, Y).dense(), expected)
    ways = [
        fp.curvature.laplace(model, "gaussian"),
        fp.curvature.laplace(batch_model, "gaussian", batched=True),
    ]
    close(*(way(PARAMS, X, Y).log_marginal_likelihood(1.0) for way in ways))
    of_batch = lambda params, x, y: mean_loss(batch_model(params, x), y)  # noqa: E731
    one = fp.curvature.influence(of_example, damping=0.1)(PARAMS, X, Y)
    batched = fp.curvature.influence(of_batch, damping=0.1, batched=True)(PARAMS, X, Y)
    close(batched.on_parameters(1), one.on_parameters(1))


def test_a_model_of_a_batch_needs_batched():
    takes_batch = lambda params, x: jnp.einsum("nd,dh->nh", x, params["w"]) @ params["v"]  # noqa: E731
    for call in (
        lambda: fp.ggn(takes_batch, mean_loss)(PARAMS, X, Y),
        lambda: fp.fisher(takes_batch, "gaussian")(PARAMS, X),
    ):
        with pytest.raises(ValueError, match=r"takes a batch and fails for ONE example .* pass batched=True"):
            call()


# --- bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("100", 100), ("64MB", 64_000_000), ("1.5 GiB", 3 << 29), ("2k", 2000), ("1e3B", 1000), (7, 7)],
)
def test_bytes_are_numbers_or_text(text, expected):
    assert budget_bytes(text, "budget") == expected


@pytest.mark.parametrize("wrong", ["many", "64XB", "", "-3", 0, "0MB"])
def test_what_is_no_number_of_bytes(wrong):
    with pytest.raises(ValueError, match="budget="):
        budget_bytes(wrong, "budget")


@pytest.mark.parametrize("wrong", [1.5, True, None])
def test_what_is_neither_number_nor_text(wrong):
    with pytest.raises(TypeError, match="is not a number of bytes; pass an int, or text as '64MB'"):
        budget_bytes(wrong, "budget")


def test_budgets_are_text_everywhere():
    H = fp.hessian(objective)(PARAMS)
    close(H.dense(budget="1MB"), dense_hessian())
    with pytest.raises(ValueError, match="budget=1kB"):
        H.dense(budget="1kB")
    close(
        fp.per_example(model, loss, budget="1kB")(PARAMS, X, Y, {"norm"}),
        fp.per_example(model, loss)(PARAMS, X, Y, {"norm"}),
    )
    assert fp.memory.batch_limit(model, "10kB", argnums=0)(PARAMS, X) > 0
    for budget in ("50%", 0.5):
        close(jax.grad(rematerialize(objective, budget))(PARAMS), jax.grad(objective)(PARAMS))


# --- auxiliary data ---------------------------------------------------------------------------


def test_auxiliary_data():
    with_aux = lambda params: (objective(params), {"outputs": model(params, X)})  # noqa: E731
    v = jax.tree.map(jnp.ones_like, PARAMS)
    product, aux = fp.hvp(with_aux, has_aux=True)(PARAMS, v)
    close(product, jax.jvp(jax.grad(objective), (PARAMS,), (v,))[1])
    close(aux["outputs"], model(PARAMS, X))
    close(fp.hessian(with_aux, has_aux=True)(PARAMS).dense(), dense_hessian())
    expected = fp.curvature.hessian_diagonal(objective)(PARAMS)
    close(fp.curvature.hessian_diagonal(with_aux, has_aux=True)(PARAMS), expected)
    for graph in (fp.backward_graph, fp.second_order_graph):
        assert len(graph(with_aux, has_aux=True)(PARAMS)) == len(graph(objective)(PARAMS))


def test_steps_of_newton_are_products():
    with pytest.raises(ValueError, match="newton_cg: products=0"):
        fp.training.newton_cg(products=0)
    assert isinstance(fp.training.newton_cg(products=3), optax.GradientTransformationExtraArgs)
