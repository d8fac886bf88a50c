"""Curvature at its edges: each program once gave a wrong number, or said nothing of use."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import funcprop as fp
from funcprop.curvature import accumulate, laplace, merge

HALF = [jnp.bfloat16, jnp.float16]


def squared(output: Any, y: Any) -> Any:
    return jnp.sum((output - y) ** 2) / 2


def linear(w: Any, x: Any) -> Any:
    return x @ w


W, X, Y = jnp.ones((2, 2)), jnp.arange(10.0).reshape(5, 2), jnp.zeros((5, 2))
PARTS = [(X[:2], Y[:2]), (X[2:], Y[2:])]


# --- containers of operators merge, or are refused ----------------------------------------------


def test_kronecker_factors_accumulate() -> None:
    kfac = fp.kfac(linear, squared, kind="exact")
    found = accumulate(lambda x, y: {"k": kfac(W, x, y)}, PARTS).mean["k"]
    np.testing.assert_allclose(found.dense(), kfac(W, X, Y).dense(), rtol=1e-12)
    np.testing.assert_allclose(found.inverse(0.1).dense(), kfac(W, X, Y).inverse(0.1).dense(), rtol=1e-12)


@pytest.mark.parametrize("structure", ["full", "diagonal", "kronecker"])
def test_laplace_posteriors_add_up(structure: str) -> None:
    fitted = laplace(linear, "gaussian", structure=structure)
    found = accumulate(lambda x, y: fitted(W, x, y), PARTS).mean
    whole = fitted(W, X, Y)
    np.testing.assert_allclose(
        found.log_marginal_likelihood(2.0, 0.5), whole.log_marginal_likelihood(2.0, 0.5), rtol=1e-12
    )
    np.testing.assert_allclose(found.predictive(X).covariance, whole.predictive(X).covariance, rtol=1e-10)


def test_estimates_accumulate() -> None:
    of = lambda x, y, key: fp.ggn(linear, squared)(W, x, y).trace(samples=6, key=key)  # noqa: E731
    found = accumulate(lambda x, y: of(x, y, jax.random.key(0)), PARTS).mean
    # The same random vectors in every minibatch are those of the whole, and its error bar is no wider.
    whole = of(X, Y, jax.random.key(0))
    np.testing.assert_allclose(found.value, whole.value, rtol=1e-12)
    assert found.error >= whole.error * (1 - 1e-12)


def test_gradients_of_an_nnx_module_accumulate() -> None:
    net = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    def gradient(x: Any, y: Any) -> Any:
        return jax.grad(lambda net: jnp.mean((net(x) - y) ** 2))(net)

    found, whole = accumulate(gradient, PARTS).mean, gradient(X, Y)
    for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_what_has_no_mean_is_refused() -> None:
    loss = lambda w, x, y: squared(x @ w, y)  # noqa: E731
    refused = {
        lambda x, y: fp.hessian(loss)(
            W, x, y
        ): r"a Hessian of one minibatch has no mean with others; use fp\.c",
        lambda x, y: {"g": 2 * fp.ggn(linear, squared)(W, x, y)}: "a Scaled of one minibatch has no mean",
        lambda x, y: fp.ekfac(linear, squared, kind="exact")(W, x, y): r"in its eigenbasis .*fp\.ekfac",
        lambda x, y: fp.hessian(loss)(W, x, y).spectrum(samples=2): "spectra of minibatches have no mean",
        lambda x, y: laplace(linear, "gaussian", structure="low-rank", rank=1)(
            W, x, y
        ): "no sum of that rank",
    }
    for quantity, message in refused.items():
        for parts in (PARTS, PARTS[:1]):
            with pytest.raises(ValueError, match=message):
                accumulate(quantity, parts)
    influence = fp.curvature.influence(lambda w, x, y: squared(x @ w, y), damping=1.0)
    with pytest.raises(TypeError, match=r"the quantity has a Influence, .* fp\.curvature\.over\(batches\)"):
        accumulate(lambda x, y: influence(W, x, y), PARTS)
    fitted = laplace(linear, "gaussian")
    a, b = (accumulate(lambda x, y, w=w: fitted(w, x, y), PARTS[:1]) for w in (W, 2 * W))
    with pytest.raises(ValueError, match="merge: the posteriors are at different values of the parameters"):
        merge(a, b)


# --- shapes -----------------------------------------------------------------------------------


TAGGER = jnp.array([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
TOKENS, TAGS = jnp.arange(16.0).reshape(2, 4, 2) / 10, jnp.array([[0, 1, 2, 0], [2, 2, 1, 1]])


def test_a_sequence_keeps_its_shape() -> None:
    posterior = laplace(linear, "categorical", structure="full")(TAGGER, TOKENS, TAGS)
    expected = jax.nn.softmax(TOKENS @ TAGGER)
    np.testing.assert_allclose(posterior.probabilities(TOKENS, 1e12), expected, rtol=1e-6)
    found = posterior.predictive(TOKENS, 0.5)
    assert found.mean.shape == (2, 4, 3)
    assert found.covariance.shape == (2, 4, 3, 4, 3)
    J = jax.vmap(jax.jacobian(linear), (None, 0))(TAGGER, TOKENS).reshape(2, 12, 6)
    p = expected.reshape(8, 3)
    inner = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None]
    H = jnp.einsum("tap,tab,tbq->pq", J.reshape(8, 3, 6), inner, J.reshape(8, 3, 6))
    covariance = jnp.einsum("nap,pq,nbq->nab", J, jnp.linalg.inv(H + 0.5 * jnp.eye(6)), J)
    np.testing.assert_allclose(found.covariance.reshape(2, 12, 12), covariance, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.variance.reshape(2, 12), jnp.diagonal(covariance, axis1=1, axis2=2))
    drawn = posterior.probabilities(TOKENS, 20.0, samples=4000, key=jax.random.key(0))
    np.testing.assert_allclose(drawn.sum(-1), 1, rtol=1e-9)
    np.testing.assert_allclose(drawn, posterior.probabilities(TOKENS, 20.0), atol=0.01)


def test_a_noise_that_is_no_number_is_refused_and_one_for_each_output_is_fitted() -> None:
    x = jnp.arange(8.0).reshape(4, 2) / 4
    w = jnp.ones((2, 3))
    y = x @ w + 0.1
    noise = jnp.array([0.1, 0.5, 1.0])
    plain = laplace(linear, "gaussian", structure="full")(w, x, y)
    with pytest.raises(
        ValueError, match=r"noise has shape \(3,\), but it is one number; a noise for each out"
    ):
        plain.log_marginal_likelihood(1.0, noise)
    for structure in ("full", "kronecker", "diagonal"):
        one = lambda i, s=structure: laplace(linear, "gaussian", structure=s)(w[:, i], x, y[:, i])  # noqa: E731
        expected = sum(one(i).log_marginal_likelihood(1.0, noise[i]) for i in range(3))
        found = laplace(linear, "gaussian", structure=structure, noise=noise)(w, x, y)
        if structure != "kronecker":
            np.testing.assert_allclose(found.log_marginal_likelihood(1.0), expected, rtol=1e-10)
            variances = [one(i).predictive(x, 1.0, noise[i]).variance[:, 0] for i in range(3)]
            np.testing.assert_allclose(found.predictive(x).variance, jnp.stack(variances, 1), rtol=1e-10)
        half = laplace(linear, "gaussian", structure=structure, noise=noise / 2)(w, x, y)
        np.testing.assert_allclose(half.log_marginal_likelihood(1.0, 2.0), found.log_marginal_likelihood(1.0))
    with pytest.raises(ValueError, match=r"gaussian: noise has shape \(2,\), but the outputs .* \(3,\)"):
        laplace(linear, "gaussian", noise=noise[:2])(w, x, y)
    with pytest.raises(ValueError, match=r"laplace: noise=0\.1, but the likelihood is 'categorical'"):
        laplace(linear, "categorical", noise=0.1)


# --- an Equinox module as it is -----------------------------------------------------------------

NET = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
INPUTS, TARGETS = jnp.ones((5, 3)), jnp.ones((5, 2))


def net_loss(net: Any, x: Any) -> Any:
    return jnp.mean(jax.vmap(net)(x) ** 2)


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
    for ask in (
        lambda: fp.hessian(net_loss)(NET, INPUTS),
        lambda: fp.per_example(model, squared)(NET, INPUTS, TARGETS, {"norm"}),
        lambda: fp.kfac(model, squared, kind="exact")(NET, INPUTS, TARGETS),
        lambda: fp.curvature.influence(of_one)(NET, INPUTS, TARGETS),
        lambda: fp.curvature.hessian_diagonal(net_loss)(NET, INPUTS),
        lambda: laplace(model, "gaussian")(NET, INPUTS, TARGETS),
    ):
        with pytest.raises(TypeError, match=r"the parameter 'activation' is .* leave it out by where="):
            ask()


# --- losses that are not convex in the outputs ---------------------------------------------------


def nll(o: Any, y: Any) -> Any:
    """Of a Gaussian whose outputs are mean and logarithm of the variance."""
    return (o[1] + (o[0] - y) ** 2 * jnp.exp(-o[1])) / 2


HETEROSCEDASTIC = fp.curvature.Likelihood(
    nll,
    lambda key, o: o[0] + jnp.exp(o[1] / 2) * jax.random.normal(key),
    lambda o, u: jnp.stack([jnp.exp(-o[1]) * u[0], u[1] / 2]),
)
NX, NY = jax.random.normal(jax.random.key(0), (8, 2)), jax.random.normal(jax.random.key(1), (8,))
NW = 0.1 * jnp.ones((2, 2))


def mean_nll(w: Any, x: Any, y: Any) -> Any:
    return jax.vmap(lambda x, y: nll(linear(w, x), y))(x, y).mean()


@pytest.mark.parametrize("kind", ["exact", "mc"])
def test_a_loss_that_is_not_convex_is_named(kind: str) -> None:
    said = (
        r"the loss is not convex in the model's output at 8 of 8 examples \(0, 1, .*kind='empirical', or pass"
    )
    key = jax.random.key(0)
    for of in (fp.kfac, fp.ekfac):
        with pytest.raises(ValueError, match=said):
            of(linear, nll, kind=kind)(NW, NX, NY, key)
    optimizers = {
        "kfac": fp.training.kfac(linear, nll, 0.01, (NX, NY), kind=kind),
        "gauss_newton_diagonal": fp.training.gauss_newton_diagonal(linear, nll, 0.01, kind=kind),
    }
    for name, optimizer in optimizers.items():
        step = fp.training.make_step(mean_nll, optimizer)
        with pytest.raises(Exception, match=f"{name}: {said}"):
            jax.block_until_ready(step(NW.copy(), optimizer.init(NW), (NX, NY)))


def test_the_remedies_work() -> None:
    batch = NX, NY
    for optimizer in (
        fp.training.kfac(linear, HETEROSCEDASTIC, 0.01, batch),
        fp.training.kfac(linear, nll, 0.01, batch, kind="empirical"),
        fp.training.gauss_newton_diagonal(linear, HETEROSCEDASTIC, 0.01),
        fp.training.gauss_newton_diagonal(linear, nll, 0.01, kind="empirical"),
    ):
        new, _, value = fp.training.make_step(mean_nll, optimizer)(NW.copy(), optimizer.init(NW), batch)
        assert mean_nll(new, *batch) < value


def test_the_fisher_matrix_of_any_likelihood() -> None:
    F = fp.fisher(linear, HETEROSCEDASTIC)(NW, NX)
    find = fp.per_example(linear, HETEROSCEDASTIC, samples=500)
    found = find(NW, NX, None, {"diag_ggn", "trace_ggn", "diag_ggn_mc"}, jax.random.key(0))
    np.testing.assert_allclose(found["diag_ggn"], F.diagonal(), rtol=1e-12)
    np.testing.assert_allclose(found["trace_ggn"], F.trace(), rtol=1e-12)
    np.testing.assert_allclose(found["diag_ggn_mc"], F.diagonal(), rtol=0.15)
    one = fp.kfac(linear, HETEROSCEDASTIC, kind="exact")(NW, NX[:1])
    np.testing.assert_allclose(
        one.dense(), fp.fisher(linear, HETEROSCEDASTIC)(NW, NX[:1]).dense(), atol=1e-12
    )
    posterior = laplace(linear, HETEROSCEDASTIC, structure="full")(NW, NX, NY)
    H = 8 * F.dense()
    expected = -8 * mean_nll(NW, NX, NY) - (jnp.sum(NW**2) + jnp.linalg.slogdet(H + jnp.eye(4))[1]) / 2
    np.testing.assert_allclose(posterior.log_marginal_likelihood(1.0), expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"y=None: gradients, and kind='empirical', are at the targets"):
        fp.kfac(linear, HETEROSCEDASTIC, kind="empirical")(NW, NX)
    with pytest.raises(ValueError, match="probabilities: the likelihood is one of your own, which has none"):
        posterior.probabilities(NX)


# --- positions that count -----------------------------------------------------------------------


def masked(outputs: Any, mask: Any) -> Any:
    return jnp.sum(jnp.sum(outputs**2, -1) / 2 * mask) / jnp.sum(mask)


def attention(p: Any, x: Any) -> Any:
    """With an embedding of padding that is not zero, and a bias."""
    tokens, mask = x
    h = tokens @ p["in"] + p["bias"]
    scores = jnp.where(mask > 0, (h @ p["q"]) @ h.T, -jnp.inf)
    return jnp.tanh(jax.nn.softmax(scores) @ h) @ p["out"]


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


# --- half precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_operators_of_half_precision(dtype: Any) -> None:
    loss = lambda w: jnp.sum(jnp.tanh(w["a"]) ** 2) + w["a"][0] * w["b"]  # noqa: E731
    w = {"a": jnp.array([0.1, 0.2, 0.3], dtype), "b": jnp.array(1.0, dtype)}
    H = fp.hessian(loss)(w)
    exact = fp.hessian(loss)(jax.tree.map(lambda x: x.astype(jnp.float32), w)).dense()
    values = jnp.linalg.eigvalsh(exact)
    near = {"rtol": 0.02, "atol": 0.02}
    assert H.dense().dtype == H.diagonal()["a"].dtype == jnp.float32
    np.testing.assert_allclose(H.dense(), exact, **near)
    for solver in (fp.curvature.Lanczos(), fp.curvature.DenseSolver()):
        np.testing.assert_allclose(H.eigsh(2, solver=solver)[0], values[-2:], **near)
    of_spectrum = lambda A: A.spectrum(samples=2).mean(lambda v: v**2).value  # noqa: E731
    single = fp.hessian(loss)(jax.tree.map(lambda x: x.astype(jnp.float32), w))
    np.testing.assert_allclose(of_spectrum(H), of_spectrum(single), **near)
    np.testing.assert_allclose(H.logdet(4.0), jnp.log(values + 4).sum(), **near)
    np.testing.assert_allclose(
        H.solve(jnp.ones(4), 4.0), jnp.linalg.solve(exact + 4 * jnp.eye(4), jnp.ones(4)), **near
    )
    np.testing.assert_allclose(H.trace(), values.sum(), **near)
    positive = H + 4 * fp.curvature.identity(H)
    np.testing.assert_allclose(positive.sqrt(products=4) @ jnp.ones(4), positive.sqrt() @ jnp.ones(4), **near)
    assert H.solve(jax.tree.map(jnp.ones_like, w), 4.0)["a"].dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("a", [16.0, 0.01])
def test_norms_that_half_precision_cannot_square(dtype: Any, a: float) -> None:
    names = {"norm", "gradients", "second_moment", "variance", "diag_ggn", "trace_ggn", "gram"}

    def found(dtype: Any) -> Any:
        arrays = jnp.zeros((2, 1), dtype), jnp.full((1, 2), a, dtype), jnp.full((1, 1), a, dtype)
        return fp.per_example(linear, squared)(*arrays, names)

    half, single = found(dtype), found(jnp.float32)
    for name in names:
        assert half[name].dtype == jnp.float32
        np.testing.assert_allclose(half[name], single[name], rtol=0.02)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("structure", ["full", "low-rank", "diagonal", "kronecker"])
def test_laplace_of_half_precision(dtype: Any, structure: str) -> None:
    x = jax.random.normal(jax.random.key(0), (6, 2))
    y, w = jax.random.normal(jax.random.key(1), (6, 3)), jax.random.normal(jax.random.key(2), (2, 3))
    options = {"rank": 6} if structure == "low-rank" else {}
    fitted = laplace(linear, "gaussian", structure=structure, **options)
    half = fitted(*(a.astype(dtype) for a in (w, x, y)))
    single = fitted(*(a.astype(dtype).astype(jnp.float32) for a in (w, x, y)))
    evidence = half.log_marginal_likelihood(0.5, 0.7)
    np.testing.assert_allclose(evidence, single.log_marginal_likelihood(0.5, 0.7), rtol=0.02)
    ours, expected = half.predictive(x.astype(dtype), 0.5), single.predictive(x.astype(jnp.float32), 0.5)
    assert ours.covariance.dtype == jnp.float32
    np.testing.assert_allclose(ours.covariance, expected.covariance, rtol=0.05, atol=0.02)
    assert half.sample(jax.random.key(0)).dtype == dtype


# --- custom derivatives ---------------------------------------------------------------------------


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


# --- the rest -------------------------------------------------------------------------------------


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


# --- priors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_the_posterior_of_some_data_is_the_prior_of_the_next(structure: str) -> None:
    x = jax.random.normal(jax.random.key(0), (6, 3))
    x = x if structure == "full" else jnp.linalg.qr(x)[0]
    y = jax.random.normal(jax.random.key(1), (6,))
    both = [(x, y)] if structure == "diagonal" else [(x[:2], y[:2]), (x[2:], y[2:])]
    fitted = laplace(linear, "gaussian", structure=structure)
    δ, σ = 0.7, 0.6

    def mean(x: Any, y: Any, precision: Any, at: Any) -> Any:
        return jnp.linalg.solve(x.T @ x / σ**2 + precision, x.T @ y / σ**2 + precision @ at)

    total, prior, P, μ = 0.0, δ, δ * jnp.eye(3), jnp.zeros(3)
    for part in both:
        w = mean(*part, P, μ)
        posterior = fitted(w, *part)
        total += posterior.log_marginal_likelihood(prior, σ, prior_mean=0.0)
        prior = posterior.as_prior(prior, σ)
        P, μ = part[0].T @ part[0] / σ**2 + P, w
        np.testing.assert_allclose(prior.negative_log(w + 1), jnp.ones(3) @ P @ jnp.ones(3) / 2, rtol=1e-9)
    whole = jax.scipy.stats.multivariate_normal.logpdf(y, jnp.zeros(6), σ**2 * jnp.eye(6) + x @ x.T / δ)
    np.testing.assert_allclose(total, whole, rtol=1e-9)  # of the first, then of the second given the first
    new = jnp.eye(3)[:2]
    joint = posterior.predictive(new, prior if structure == "diagonal" else δ, σ, joint=True)
    assert joint.covariance.shape == (2, 1, 2, 1)
    assert joint.variance.shape == (2, 1)


def test_joint_predictive_and_prior_mean() -> None:
    x, y = jax.random.normal(jax.random.key(0), (6, 3)), jax.random.normal(jax.random.key(1), (6,))
    w = jnp.array([0.3, -0.2, 0.5])
    H = x.T @ x / 0.25 + 2 * jnp.eye(3)
    new = jax.random.normal(jax.random.key(2), (4, 3))
    for structure, options in (("full", {}), ("low-rank", {"rank": 3}), ("kronecker", {})):
        found = laplace(linear, "gaussian", structure=structure, **options)(w, x, y)
        joint = found.predictive(new, 2.0, 0.5, joint=True)
        np.testing.assert_allclose(joint.covariance.reshape(4, 4), new @ jnp.linalg.inv(H) @ new.T, atol=1e-9)
        apart = found.predictive(new, 2.0, 0.5)
        np.testing.assert_allclose(joint.variance, apart.variance, rtol=1e-9)
        moved = found.log_marginal_likelihood(2.0, 0.5, prior_mean=jnp.array([1.0, 0, 0]))
        plain = found.log_marginal_likelihood(2.0, 0.5)
        np.testing.assert_allclose(
            moved - plain, jnp.sum(w**2) - jnp.sum((w - jnp.eye(3)[0]) ** 2), rtol=1e-9
        )
    with pytest.raises(ValueError, match="only a posterior with structure='full' or 'diagonal' is the prior"):
        found.as_prior()
    full = laplace(linear, "gaussian", structure="full")(w, x, y)
    with pytest.raises(ValueError, match="prior_precision is a matrix, which is for structure='full'"):
        found.log_marginal_likelihood(full.as_prior())
