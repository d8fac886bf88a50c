"""Curvature over a data set in minibatches is the curvature of one batch of all examples."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import funcprop as fp
from funcprop.curvature import LoaderError, over

KEYS = jax.random.split(jax.random.key(0), 6)
N = 21
X, Y = jax.random.normal(KEYS[0], (N, 3)), jax.random.normal(KEYS[1], (N, 2))
WEIGHTS = jax.random.uniform(KEYS[2], (N,)).at[3].set(0)
PARAMS = {"a": jax.random.normal(KEYS[3], (3, 4)), "b": jax.random.normal(KEYS[4], (4, 2))}
CUTS = ((0, 10), (10, 20), (20, 21))  # the last one smaller: a plain mean over minibatches would be wrong
DEVICES = [None, jax.devices()]


def model(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["a"]) @ params["b"]


def squared(output: Any, y: Any) -> Any:
    return jnp.sum((output - y) ** 2) / 2


def mean_loss(params: Any, x: Any, y: Any, weights: Any = None) -> Any:
    losses = jax.vmap(lambda x, y: squared(model(params, x), y))(x, y)
    return losses.mean() if weights is None else (weights * losses).sum() / weights.sum()


def batches(weighted: bool = False) -> list[Any]:
    arrays = (X, Y, WEIGHTS) if weighted else (X, Y)
    return [tuple(a[i:j] for a in arrays) for i, j in CUTS]


def of_all(factory: Any, weighted: bool, *more: Any, **options: Any) -> Any:
    return factory(PARAMS, X, Y, *more, **options, **({"weights": WEIGHTS} if weighted else {}))


def assert_same(ours: Any, expected: Any, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(ravel_pytree(ours)[0], ravel_pytree(expected)[0], rtol=1e-12, atol=atol)


OPERATORS = {
    "hessian": fp.hessian(mean_loss),
    "ggn": fp.ggn(model, squared),
    "fisher": fp.fisher(model, "gaussian", kind="empirical"),
    "last layer": fp.ggn(model, squared, where="b"),
    "kfac": fp.kfac(model, squared, kind="exact"),
    "ekfac": fp.ekfac(model, squared, kind="exact"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("devices", DEVICES, ids=["one device", "8 devices"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_matrix_of_all_data(name: str, weighted: bool, devices: Any) -> None:
    factory = OPERATORS[name]
    found = over(batches(weighted), weighted=weighted, devices=devices)(factory)(PARAMS)
    assert_same(found.dense(), of_all(factory, weighted).dense())


def test_weights_against_a_dense_oracle() -> None:
    flat, unravel = ravel_pytree(PARAMS)
    expected = jax.jit(jax.hessian(lambda v: mean_loss(unravel(v), X, Y, WEIGHTS)))(flat)
    found = over(batches(True), weighted=True)(fp.hessian(mean_loss))(PARAMS)
    assert_same(found.dense(), expected)
    repeated = jnp.array([0, 2, 2, 5])  # weights 1, 2, 1 are examples that occur as often
    ours = fp.ggn(model, squared)(PARAMS, X[:6], Y[:6], weights=jnp.array([1.0, 0, 2, 0, 0, 1]))
    assert_same(ours.dense(), fp.ggn(model, squared)(PARAMS, X[repeated], Y[repeated]).dense())


@pytest.fixture(scope="module")
def both() -> Any:
    factory = fp.ggn(model, squared)
    return over(batches())(factory)(PARAMS), factory(PARAMS, X, Y)


def test_every_query(both: Any) -> None:
    ours, whole = both
    key, b = KEYS[5], jax.tree.map(jnp.ones_like, PARAMS)
    drawn = {"samples": 3, "key": key}
    for ask in (
        lambda A: A @ b,
        lambda A: A @ jnp.ones((20, 2)),
        lambda A: A.block("a", "b"),
        lambda A: (A.diagonal(), A.trace(), A.traces(), A.frobenius_norm()),
        lambda A: [e.value for e in (A.trace(**drawn), A.diagonal(**drawn), A.frobenius_norm(**drawn))],
        lambda A: A.traces(**drawn).value,
        lambda A: A.eigsh(2, solver=fp.curvature.DenseSolver())[0],
        lambda A: A.eigsh(2, which="BE")[0],
        lambda A: A.spectrum(samples=3).nodes,
        lambda A: (A.logdet(5.0), A.logdet(5.0, **drawn).value),
        lambda A: A.sqrt().dense(),
        lambda A: (A + 0.5 * fp.curvature.identity(A)).dense(),
        lambda A: ((2 * A - A / 2) @ b, (A + A).diagonal()),
        lambda A: fp.curvature.summary(A).traces,
        lambda A: A.to_scipy() @ np.ones(20),
    ):
        assert_same(ask(ours), ask(whole), atol=1e-11)


@pytest.mark.parametrize("solver", [fp.curvature.Minres, fp.curvature.ConjugateGradients])
def test_solutions(both: Any, solver: Any) -> None:
    ours, whole = both
    b = jax.tree.map(jnp.ones_like, PARAMS)
    matrix = whole.dense() + 0.1 * jnp.eye(20)
    expected = jnp.linalg.solve(matrix, jnp.ones(20))
    inverse = fp.kfac(model, squared, kind="exact")(PARAMS, X, Y).inverse(0.1)
    for operator in (ours, whole):
        for preconditioner, start in ((None, None), (inverse, None), (None, 0.9 * expected)):
            by = solver(preconditioner=preconditioner, tolerance=1e-12)
            x = operator.solve(b, 0.1, solver=by, start=start)
            np.testing.assert_allclose(ravel_pytree(x)[0], expected, rtol=1e-8, atol=1e-9)
        x = operator.solve(b, 0.1, solver=fp.curvature.DenseSolver())
        np.testing.assert_allclose(ravel_pytree(x)[0], expected, rtol=1e-10)


def test_a_warm_start_takes_fewer_products(both: Any) -> None:
    _, whole = both
    b = jnp.ones(20)
    x = whole.solve(b, 0.1)
    # From the solution nothing is left to do, however few products are allowed.
    assert_same(whole.solve(b, 0.1, start=x, solver=fp.curvature.Minres(products=0)), x)
    with pytest.warns(fp.curvature.ConvergenceWarning):
        whole.solve(b, 0.1, solver=fp.curvature.Minres(products=0))
    with pytest.raises(ValueError, match=r"start has shape \(3,\), but a flat start has shape \(20,\)"):
        whole.solve(b, 0.1, start=jnp.ones(3))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("structure", ["full", "diagonal", "kronecker", "low-rank"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_laplace(structure: str, weighted: bool) -> None:
    options = {"rank": 4} if structure == "low-rank" else {}
    factory = fp.curvature.laplace(model, "gaussian", structure=structure, **options)
    found, whole = over(batches(weighted), weighted=weighted)(factory)(PARAMS), of_all(factory, weighted)
    assert_same(found.log_marginal_likelihood(2.0, 0.3), whole.log_marginal_likelihood(2.0, 0.3), atol=1e-10)
    assert_same(found.predictive(X[:2], 2.0), whole.predictive(X[:2], 2.0))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
def test_influence(weighted: bool) -> None:
    factory = fp.curvature.influence(
        lambda p, x, y: squared(model(p, x), y),
        regularizer=lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2),
        damping=3.0,
        solver=fp.curvature.Minres(tolerance=1e-13),
    )
    found, whole = over(batches(weighted), weighted=weighted)(factory)(PARAMS), of_all(factory, weighted)
    effects = whole.on_losses(X, Y)
    assert_same(found.on_losses(X[:2], Y[:2]), effects[:2])
    assert_same(found.on_itself(), jnp.diagonal(effects))
    assert_same(found.on_parameters(15), whole.on_parameters(15))
    pair = jax.tree.map(jnp.add, whole.on_parameters(2), whole.on_parameters(20))
    assert_same(found.on_parameters([2, 20]), pair)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_per_example(weighted: bool) -> None:
    names = {"gradient", "variance", "norm", "gradients", "diag_ggn", "value", "trace_ggn", "snr"}
    factory = fp.per_example(model, squared)
    found = over(batches(weighted), weighted=weighted)(factory)(PARAMS, names)
    assert_same(found, of_all(factory, weighted, names))
    with pytest.raises(ValueError, match=r"'gram' is of all pairs of examples.* one batch"):
        over(batches())(factory)(PARAMS, {"gram"})
    with pytest.raises(ValueError, match=r"'kflr' of a data set is fp\.curvature\.over\(batches\)\(fp\.kfac"):
        over(batches())(factory)(PARAMS, {"kflr"})


def test_any_mean() -> None:
    assert_same(
        over(batches())(fp.curvature.hessian_diagonal(mean_loss))(PARAMS),
        fp.curvature.hessian_diagonal(mean_loss)(PARAMS, X, Y),
    )


def test_what_is_drawn_has_a_key_for_every_minibatch() -> None:
    drawn = over(batches())(fp.kfac(model, squared, samples=200))(PARAMS, key=KEYS[5])
    exact = fp.kfac(model, squared, kind="exact")(PARAMS, X, Y)
    np.testing.assert_allclose(drawn.dense(), exact.dense(), atol=0.2)
    again = over(batches())(fp.kfac(model, squared, samples=200))(PARAMS, key=KEYS[5])
    assert_same(drawn.dense(), again.dense())


def test_a_padded_minibatch_counts_for_its_examples() -> None:
    padded = [(x, y, jnp.ones(len(x))) for x, y in batches()[:2]]
    x, y = (jnp.zeros((10, *a.shape[1:])).at[:1].set(a) for a in batches()[2])
    padded.append((x, y, jnp.zeros(10).at[0].set(1)))
    padded.append((x, y, jnp.zeros(10)))  # one of padding alone
    factory = fp.ggn(model, squared)
    found = over(padded, weighted=True)(factory)(PARAMS)
    assert_same(found.dense(), factory(PARAMS, X, Y).dense())
    kfac = fp.kfac(model, squared, kind="exact")
    assert_same(over(padded, weighted=True)(kfac)(PARAMS).dense(), kfac(PARAMS, X, Y).dense())


def test_a_pass_is_resumed() -> None:
    class StoppedError(Exception):
        pass

    states: list[Any] = []

    def save(number: int, state: Any) -> None:
        states.append(state)
        if number == 2:
            raise StoppedError

    kfac = fp.kfac(model, squared, kind="exact")
    with pytest.raises(StoppedError):
        over(batches(), progress=save)(kfac)(PARAMS)
    found = over(batches(), state=states[-1])(kfac)(PARAMS)
    assert_same(found.dense(), kfac(PARAMS, X, Y).dense())
    with pytest.raises(ValueError, match=r"over: state= continues a mean .* start="):
        over(batches(), state=states[-1])(fp.ggn(model, squared))(PARAMS)


def test_loaders_that_are_not_the_same_again() -> None:
    noise = iter(range(99))
    factory = fp.ggn(model, squared)
    with pytest.raises(
        LoaderError, match=r"over: minibatch 1 differs from that of the first pass; fix the ord"
    ):
        over(lambda: [(X, Y + next(noise))])(factory)(PARAMS).trace()
    lengths = iter([3, 3, 2])
    operator = over(lambda: batches()[: next(lengths)])(factory)(PARAMS)
    operator.trace()
    with pytest.raises(LoaderError, match="over: there are 2 minibatches, but 3 in the first pass"):
        operator.trace()
    used_up = iter(batches())
    with pytest.raises(LoaderError, match="an iterator is used up after one pass"):
        over(used_up)(fp.ekfac(model, squared, kind="exact"))(PARAMS)
    with pytest.raises(LoaderError, match="over: there are no minibatches"):
        over([])(factory)(PARAMS)


def test_errors() -> None:
    factory = fp.ggn(model, squared)
    operator = over(batches())(factory)(PARAMS)
    with pytest.raises(
        TypeError, match="cannot be used inside of jit, grad or vmap: its products are passes"
    ):
        jax.jit(lambda v: operator.linear_map()(v))(PARAMS)
    with pytest.raises(ValueError, match="Lobpcg is not for an operator over a data set"):
        operator.eigsh(2, solver=fp.curvature.Lobpcg())
    with pytest.raises(ValueError, match="sqrt: products= is not for an operator over a data set"):
        operator.sqrt(products=3)
    with pytest.raises(TypeError, match=r"over: devices=8; pass jax\.devices\(\), a jax\.sharding\.Mesh"):
        over(batches(), devices=8)(factory)(PARAMS)
    with pytest.raises(ValueError, match="minibatch 1 has no weights; with weighted=True"):
        over([X], weighted=True)(factory)(PARAMS)
    with pytest.raises(ValueError, match=r"weights of minibatch 1 have shape \(2,\), and it has 21 examples"):
        over([(X, Y, jnp.ones(2))], weighted=True)(factory)(PARAMS)
    with pytest.raises(ValueError, match=r"minibatch 1 has arrays of shapes \(21, 3\), \(20, 2\)"):
        over([(X, Y[:-1])])(factory)(PARAMS)
    with pytest.raises(FloatingPointError, match=r"over: the quantity of minibatch 2 is not finite at"):
        over([(X, Y), (X * jnp.nan, Y)])(fp.kfac(model, squared, kind="exact"))(PARAMS)
    bent = lambda o, y: jnp.sum(o * y) - jnp.sum(o**2)  # noqa: E731
    with pytest.raises(ValueError, match=r"kfac: the loss is not convex .*\(an fp\.curvature\.Likelihood"):
        over(batches())(fp.kfac(model, bent, kind="exact"))(PARAMS)
    with pytest.raises(ValueError, match=r"ggn: weights have shape \(3,\), but there are 21 examples"):
        factory(PARAMS, X, Y, weights=jnp.ones(3))
    with pytest.raises(ValueError, match=r"ggn: a weight is -0\.97.*, but weights are numbers ≥ 0"):
        factory(PARAMS, X, Y, weights=-WEIGHTS)
    with pytest.raises(ValueError, match="with batched=True the loss is of a whole batch; weigh"):
        fp.ggn(jax.vmap(model, (None, 0)), squared, batched=True)(PARAMS, X, Y, weights=WEIGHTS)


def test_a_loss_that_takes_no_weights() -> None:
    plain = fp.hessian(lambda p, x, y: mean_loss(p, x, y))
    with pytest.raises(TypeError, match=r"over: with weighted=True .* let it take weights=None and return"):
        over(batches(True), weighted=True)(plain)(PARAMS)


def test_a_mesh_is_a_set_of_devices() -> None:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    factory = fp.ggn(model, squared)
    found = over(batches(), devices=mesh)(factory)(PARAMS)
    assert_same(found.trace(), factory(PARAMS, X, Y).trace())


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_a_batch_that_is_spread_over_devices(dtype: Any) -> None:
    """An Equinox module on eight devices: as on one; of explicit axes it is refused by name."""
    net = jax.tree.map(
        lambda a: a.astype(dtype) if eqx.is_array(a) else a,
        eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)),
    )
    x, y = jnp.sin(jnp.arange(48.0)).reshape(16, 3).astype(dtype), jnp.arange(16) % 2
    arguments = (lambda net, x: net(x)), optax.softmax_cross_entropy_with_integer_labels
    ggn, kfac, per_example = (
        make(*arguments, where="layers", **options)
        for make, options in ((fp.ggn, {}), (fp.kfac, {"kind": "exact"}), (fp.per_example, {}))
    )

    def on(kind: AxisType) -> Any:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        return jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("data")))

    def quantity(x: Any, y: Any) -> Any:
        return ggn(net, x, y).trace() if dtype == jnp.float64 else kfac(net, x, y).trace()

    rtol = 1e-12 if dtype == jnp.float64 else 0.02
    np.testing.assert_allclose(quantity(*on(AxisType.Auto)), quantity(x, y), rtol=rtol)
    spread, y = on(AxisType.Explicit)
    for call in (
        lambda: ggn(net, spread, y),
        lambda: kfac(net, spread, y),
        lambda: per_example(net, spread, y, {"norm"}),
        lambda: fp.fisher(arguments[0], "categorical", where="layers")(net, spread),
    ):
        with pytest.raises(ValueError, match=r"x is \w+\[16@data,3\], laid out over explicit axes"):
            call()


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
def test_clipped_sums_are_of_all_data(weighted: bool, devices: Any) -> None:
    """Not their mean; gradients and norms of single examples are the oracle."""
    loss = lambda params, x, y: squared(model(params, x), y)  # noqa: E731
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(PARAMS, X, Y)
    rows = jax.vmap(lambda g: ravel_pytree(g)[0])(gradients)
    norms = jnp.linalg.norm(rows, axis=1)
    norm = float(jnp.median(norms))
    counts = WEIGHTS if weighted else jnp.ones(N)
    expected = (counts * jnp.minimum(1, norm / norms)) @ rows
    clipped = fp.curvature.clipped_sum(model, squared, norm=norm, microbatch=4)
    found = over(batches(weighted), weighted=weighted, devices=devices)(clipped)(PARAMS)
    assert_same(found.gradient, expected)
    assert_same(found.norms, norms)
    if devices is None:
        quantity = lambda *batch, **options: clipped(PARAMS, *batch, **options)  # noqa: E731
        each = fp.curvature.accumulate(quantity, batches(weighted), weighted=weighted).mean
        assert_same(each, found)
