"""Curvature at its edges: each program once gave a wrong number, or said nothing of use."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from curvature_models import linear, squared
from flax import nnx

import funcprop as fp
from funcprop.curvature import accumulate, laplace

W, X, Y = jnp.ones((2, 2)), jnp.arange(10.0).reshape(5, 2), jnp.zeros((5, 2))


# --- an Equinox module as it is ---------------------------------------------------------------


NET = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
INPUTS, TARGETS = jnp.ones((5, 3)), jnp.ones((5, 2))


def net_loss(net: Any, x: Any) -> Any:
    return jnp.mean(jax.vmap(net)(x) ** 2)


class Normalized(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def parted_module() -> tuple[Any, Any, Any]:
    arrays, rest = eqx.partition(NET, eqx.is_inexact_array)
    return NET, arrays, lambda p: eqx.combine(p, rest)


def parted_model() -> tuple[Any, Any, Any]:
    model = Normalized(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return model, params, lambda p: nnx.merge(graph, p, rest)


@pytest.mark.parametrize("parted", [parted_module, parted_model])
def test_without_where_what_is_trained(parted: Any) -> None:
    """Functions and flags of a module are fixed, and running averages of an nnx model no parameters."""
    model, arrays, joined = parted()
    flat, unravel = jax.flatten_util.ravel_pytree(arrays)
    x, y = jnp.linspace(-1, 1, 15).reshape(5, 3).astype(flat.dtype), jnp.ones((5, 2), flat.dtype)

    def of_batch(model: Any, x: Any, y: Any) -> Any:
        return jnp.mean(jax.vmap(lambda x, y: squared(model(x), y))(x, y))

    def of_flat(flat: Any, x: Any, y: Any) -> Any:
        return of_batch(joined(unravel(flat)), x, y)

    wanted = jax.jit(jax.hessian(of_flat))(flat, x, y)
    np.testing.assert_allclose(fp.hessian(of_batch)(model, x, y).dense(), wanted, atol=1e-6)
    diagonal = fp.curvature.hessian_diagonal(of_batch)(model, x, y)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(diagonal)[0], wanted.diagonal(), atol=1e-6)
    apply = lambda model, x: model(x)  # noqa: E731
    J = jax.jit(jax.jacobian(lambda flat: jax.vmap(joined(unravel(flat)))(x)))(flat)
    G = fp.ggn(apply, squared)(model, x, y)
    np.testing.assert_allclose(G.dense(), jnp.einsum("nop,noq->pq", J, J) / 5, atol=1e-6)
    norms = jax.jit(jax.vmap(lambda x, y: jax.grad(of_flat)(flat, x[None], y[None]) ** 2))(x, y)
    found = fp.per_example(apply, squared)(model, x, y, {"second_moment"})["second_moment"]
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(found)[0], norms.mean(0), atol=1e-6)
    assert fp.kfac(apply, squared, kind="exact")(model, x, y).parameters.size == flat.size


def test_a_part_of_an_unpartitioned_module() -> None:
    H = fp.hessian(net_loss, where="layers")(NET, INPUTS)
    arrays, rest = eqx.partition(NET, eqx.is_inexact_array)
    whole = fp.hessian(lambda p, x: net_loss(eqx.combine(p, rest), x))(arrays, INPUTS)
    np.testing.assert_allclose(H.dense(), whole.dense(), atol=1e-12)
    np.testing.assert_allclose(jax.jit(lambda A, v: A @ v)(H, jnp.ones(26)), H @ jnp.ones(26), rtol=1e-6)
    b, damped = jnp.ones(26), whole.dense() + 5 * jnp.eye(26)
    np.testing.assert_allclose(H.solve(b, 5.0), jnp.linalg.solve(damped, b), rtol=1e-4)
    model = lambda net, x: net(x)  # noqa: E731
    G = fp.ggn(model, squared, where="layers/1")(NET, INPUTS, TARGETS)
    kfac = fp.kfac(model, squared, where="layers/1", kind="exact")(NET, INPUTS, TARGETS)
    np.testing.assert_allclose(kfac.block("layers/1/bias"), G.block("layers/1/bias"), atol=1e-6)
    for structure in ("full", "kronecker", "low-rank"):
        options = {"rank": 2} if structure == "low-rank" else {}
        fitted = laplace(model, "gaussian", structure=structure, where="layers/1", **options)
        assert np.isfinite(fitted(NET, INPUTS, TARGETS).log_marginal_likelihood())


def test_what_is_no_array_is_named_by_its_path() -> None:
    model = lambda net, x: net(x)  # noqa: E731
    of_one = lambda net, x, y: squared(net(x), y)  # noqa: E731
    everything: Any = {"where": lambda path, leaf: True}
    for ask in (
        lambda: fp.hessian(net_loss, **everything)(NET, INPUTS),
        lambda: fp.per_example(model, squared, **everything)(NET, INPUTS, TARGETS, {"norm"}),
        lambda: fp.kfac(model, squared, kind="exact", **everything)(NET, INPUTS, TARGETS),
        lambda: fp.curvature.influence(of_one, **everything)(NET, INPUTS, TARGETS),
        lambda: fp.curvature.hessian_diagonal(net_loss, **everything)(NET, INPUTS),
        lambda: laplace(model, "gaussian", **everything)(NET, INPUTS, TARGETS),
    ):
        with pytest.raises(TypeError, match=r"the parameter 'activation' is .* leave it out by where="):
            ask()


# --- positions that count ---------------------------------------------------------------------


def masked(outputs: Any, mask: Any) -> Any:
    return jnp.sum(jnp.sum(outputs**2, -1) / 2 * mask) / jnp.sum(mask)


def attention(p: Any, x: Any) -> Any:
    """With an embedding of padding that is not zero, and a bias."""
    tokens, mask = x
    h = tokens @ p["in"] + p["bias"]
    scores = jnp.where(mask > 0, (h @ p["q"]) @ h.T, -jnp.inf)
    return jnp.tanh(jax.nn.softmax(scores) @ h) @ p["out"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("of", [fp.kfac, fp.ekfac])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_nothing_depends_on_the_padding(of: Any, sharing: str) -> None:
    keys = jax.random.split(jax.random.key(3), 5)
    p = {"in": jax.random.normal(keys[0], (2, 3)), "q": jax.random.normal(keys[1], (3, 3)) / 3}
    p |= {"out": jax.random.normal(keys[2], (3, 4)), "bias": jnp.array([0.1, 0.2, 0.3])}
    lengths = jnp.array([1, 3, 2])
    dense = []
    for T in (3, 4, 7):
        mask = (jnp.arange(T) < lengths[:, None]).astype(float)
        tokens = jnp.full((3, T, 2), 5.0).at[:, :3].set(jax.random.normal(keys[3], (3, 3, 2)))
        tokens = jnp.where(mask[..., None] > 0, tokens, 5.0)
        dense.append(of(attention, masked, kind="exact", sharing=sharing)(p, (tokens, mask), mask).dense())
    np.testing.assert_allclose(dense[1], dense[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dense[2], dense[0], rtol=1e-12, atol=1e-12)


def test_a_padded_table() -> None:
    table = jax.random.normal(jax.random.key(0), (5, 3))
    found = []
    for T in (2, 5):
        ids = jnp.zeros((2, T), int).at[:, :2].set(jnp.array([[1, 2], [3, 0]]))
        mask = jnp.zeros((2, T)).at[:, :2].set(jnp.array([[1.0, 1], [1, 0]]))
        for sharing in ("expand", "reduce"):
            kfac = fp.kfac(lambda t, i: jnp.tanh(t[i]), masked, kind="exact", sharing=sharing)
            found.append(kfac(table, ids, mask).dense())
    np.testing.assert_allclose(found[2:], found[:2], atol=1e-12)


def test_the_trace_of_one_token() -> None:
    w = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    for T in (1, 2, 4):
        x = jnp.zeros((1, T, 2)).at[0, 0].set(jnp.array([1.0, 2.0]))
        mask = jnp.zeros((1, T)).at[0, 0].set(1)
        for sharing in ("expand", "reduce"):
            np.testing.assert_allclose(
                fp.kfac(linear, masked, kind="exact", sharing=sharing)(w, x, mask).trace(), 15
            )


# --- custom derivatives -----------------------------------------------------------------------


def rounded(scale: Any = None) -> Any:
    """A straight-through estimator, which may read a value of its surroundings."""

    @jax.custom_vjp
    def through(x: Any) -> Any:
        return jnp.round(x) if scale is None else jnp.round(x / scale) * scale

    through.defvjp(lambda x: (through.fun(x), None), lambda _, g: (g,))
    return through


@pytest.mark.parametrize("captures", [False, True])
def test_models_with_a_custom_vjp(captures: bool) -> None:
    x, y = jax.random.normal(jax.random.key(0), (4, 3)), jax.random.normal(jax.random.key(1), (4, 2))
    w = {"a": jax.random.normal(jax.random.key(2), (3, 5)), "b": jax.random.normal(jax.random.key(3), (5, 2))}

    def model(w: Any, x: Any) -> Any:
        return rounded(jnp.max(x) if captures else None)(x @ w["a"]) @ w["b"]

    def smooth(w: Any, x: Any) -> Any:  # with the derivative that the rule claims
        h = x @ w["a"]
        exact = rounded(jnp.max(x) if captures else None)(h)
        return (h + jax.lax.stop_gradient(exact - h)) @ w["b"]

    expected = fp.ggn(smooth, squared)(w, x, y)
    G = fp.ggn(model, squared)(w, x, y)
    np.testing.assert_allclose(G.dense(), expected.dense(), atol=1e-12)
    np.testing.assert_allclose(G.solve(jnp.ones(25), 1.0), expected.solve(jnp.ones(25), 1.0), atol=1e-8)
    F = fp.fisher(model, "gaussian")(w, x)
    np.testing.assert_allclose(F.dense(), fp.fisher(smooth, "gaussian")(w, x).dense(), atol=1e-12)
    ours, theirs = (laplace(m, "gaussian", structure="full")(w, x, y) for m in (model, smooth))
    np.testing.assert_allclose(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood(), rtol=1e-10)
    if not captures:
        covariances = [posterior.predictive(x).covariance for posterior in (ours, theirs)]
        np.testing.assert_allclose(*covariances, atol=1e-10)
    np.testing.assert_allclose(
        fp.curvature.over([(x[:3], y[:3]), (x[3:], y[3:])])(fp.ggn(model, squared))(w).dense(),
        expected.dense(),
        atol=1e-12,
    )


# --- the rest ---------------------------------------------------------------------------------


def test_the_density_of_one_point() -> None:
    grid = jnp.linspace(-1.0, 3.0, 4001)
    for value, loss in ((0.0, jnp.sum), (2.0, lambda w: jnp.sum(w**2))):
        found = fp.hessian(loss)(jnp.ones(4)).spectrum(samples=2).density(grid)
        assert np.isfinite(found.value).all()
        assert np.isfinite(found.error).all()
        np.testing.assert_allclose(found.value.sum() * (grid[1] - grid[0]), 1, rtol=1e-3)
        np.testing.assert_allclose(grid[jnp.argmax(found.value)], value, atol=1e-6)


def test_damping_is_exact_where_a_factor_is_a_number() -> None:
    bias = lambda b, x: x + b["b"]  # noqa: E731
    b, x = {"b": jnp.zeros(2), "unused": jnp.ones(3)}, jnp.ones((3, 2))
    K = fp.kfac(bias, squared, kind="exact")(b, x, x)
    exact = jnp.concatenate([jnp.full(2, 1 / 1.1), jnp.full(3, 10.0)])
    for method in ("pi", "eigenvalue"):
        np.testing.assert_allclose(K.inverse(0.1, method=method) @ jnp.ones(5), exact, rtol=1e-12)
    optimizer = fp.training.kfac(bias, squared, 1.0, (x, x), damping=0.1, kind="exact")
    step, _ = optimizer.update(jax.tree.map(jnp.ones_like, b), optimizer.init(b), b, batch=(x, x))
    np.testing.assert_allclose(step["b"], -1 / 1.1, rtol=1e-12)
    np.testing.assert_allclose(step["unused"], -10, rtol=1e-12)


def test_texts() -> None:
    dictionary = lambda w, x: {"logits": x @ w}  # noqa: E731
    for likelihood in ("categorical", "gaussian", "bernoulli"):
        with pytest.raises(
            TypeError, match="the output of one example is a dict, but it has to be one array"
        ):
            laplace(dictionary, likelihood)(jnp.ones((2, 2)), jnp.ones((3, 2)), jnp.zeros(3, int))
    broken = fp.hessian(lambda w: jnp.sum(w**3))(jnp.full(3, jnp.nan))
    with pytest.raises(FloatingPointError, match="not finite in the rows of params; fp"):
        broken.eigsh(2)
    with pytest.raises(ValueError, match=r"y\[0\] is a scalar; make it an array"):
        fp.per_example(linear, squared)(jnp.ones(2), jnp.ones((3, 2)), [1.0, 2.0, 3.0], {"norm"})
    for of in (fp.kfac, fp.ggn, lambda m, _: laplace(m, "gaussian")):
        with pytest.raises(ValueError, match=r"(kfac|ggn|laplace): y\[0\] is a scalar; make it an array"):
            of(linear, squared)(jnp.ones(2), jnp.ones((3, 2)), [1.0, 2.0, 3.0])
    with pytest.raises(FloatingPointError, match="minibatch 1 is not finite; what was accumulated"):
        accumulate(lambda x: jnp.log(-jnp.sum(x)), [X])
    of_one = lambda w, x, y: squared(x @ w["head"] + w["rest"], y)  # noqa: E731
    w = {"head": jnp.ones((2, 2)), "rest": jnp.ones(2)}
    model = lambda w, x: x @ w["head"] + w["rest"]  # noqa: E731
    G = fp.ggn(model, squared, where="head")(w, X, Y)
    with pytest.raises(ValueError, match=r"influence: curvature acts on .* by the same where="):
        fp.curvature.influence(of_one, curvature=G)(w, X, Y)
    found = fp.curvature.influence(of_one, curvature=G, damping=0.1, where="head")(w, X, Y)
    assert found.on_losses(X[:1], Y[:1]).shape == (1, 5)


def test_steps_with_auxiliary_data_and_a_state() -> None:
    sgd = optax.sgd(0.25)
    loss = lambda w, mean, x: (jnp.sum((w - x) ** 2), 0.5 * mean + 0.5 * x.mean())  # noqa: E731
    step = fp.training.make_step(loss, sgd, has_aux=True)
    w, state, value, carried = step(jnp.zeros(2), sgd.init(jnp.zeros(2)), (jnp.ones(2),), jnp.zeros(()))
    np.testing.assert_allclose([*w, value, carried], [0.5, 0.5, 2, 0.5])
    *_, carried = step(w, state, (jnp.ones(2),), carried)
    np.testing.assert_allclose(carried, 0.75)
    aux = fp.training.make_step(lambda w, x: (jnp.sum((w - x) ** 2), x.max()), sgd, has_aux=True)
    assert aux(jnp.zeros(2), sgd.init(jnp.zeros(2)), (jnp.ones(2),))[3] == 1
    newton = fp.training.newton_cg(damping=0.0)
    found = fp.training.make_step(loss, newton, has_aux=True)(
        jnp.zeros(2), newton.init(jnp.zeros(2)), (jnp.ones(2),), jnp.zeros(())
    )
    np.testing.assert_allclose(found[0], 1)
    with pytest.raises(TypeError, match="has_aux=False, and 1 are given"):
        fp.training.make_step(lambda w, x: jnp.sum(w), sgd)(jnp.ones(2), sgd.init(jnp.ones(2)), (X,), 1.0)


def test_optimizers_move_a_part() -> None:
    model = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 4)
    p = {"a": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (4, 2))}
    batch = jax.random.normal(keys[2], (8, 3)), jax.random.normal(keys[3], (8, 2))
    of_b = lambda b, x: model({**p, "b": b}, x)  # noqa: E731

    def mean(model: Any) -> Any:
        return lambda p, x, y: jax.vmap(lambda x, y: squared(model(p, x), y))(x, y).mean()

    for make in (
        lambda m, **o: fp.training.kfac(m, squared, 0.1, batch, kind="exact", **o),
        lambda m, **o: fp.training.gauss_newton_diagonal(m, squared, 0.1, **o),
        lambda m, **o: fp.training.newton_cg(**o),
    ):
        part, alone = make(model, where="b"), make(of_b)
        new, *_ = fp.training.make_step(mean(model), part)(jax.tree.map(jnp.array, p), part.init(p), batch)
        expected, *_ = fp.training.make_step(mean(of_b), alone)(p["b"].copy(), alone.init(p["b"]), batch)
        np.testing.assert_array_equal(new["a"], p["a"])
        np.testing.assert_allclose(new["b"], expected, rtol=1e-6)
