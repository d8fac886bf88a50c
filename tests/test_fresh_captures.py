"""What a function reads besides its arguments is never stale, compiled once, and kept alive by nobody.

A linear model `scale · x w` with squared error, of which every curvature is `scale² · XᵀX / N`; the scale is
a global, a closed-over array, a number, an attribute of `self`, or a variable of a captured nnx model.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import funcprop as fp

X = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)))
Y = jnp.asarray(np.random.default_rng(1).standard_normal(5))
W = jnp.array([0.5, -1.0, 2.0])
V = np.array([1.0, 2.0, -1.0])
KEY = jax.random.key(0)
GRAM = np.asarray(X.T @ X) / 5

SCALE = jnp.array(1.0)


class Source(NamedTuple):
    """How a scale is read, and how it is changed."""

    read: Callable[[], Any]
    change: Callable[[float], None]


def from_global() -> Source:
    def change(value: float) -> None:
        global SCALE
        SCALE = jnp.array(value)

    return Source(lambda: SCALE, change)


def from_closure() -> Source:
    scale = jnp.array(1.0)

    def change(value: float) -> None:
        nonlocal scale
        scale = jnp.array(value)

    return Source(lambda: scale, change)


def from_number() -> Source:
    scale = 1.0

    def change(value: float) -> None:
        nonlocal scale
        scale = value

    return Source(lambda: scale, change)


class Trainer:
    def __init__(self) -> None:
        self.scale = jnp.array(1.0)

    def read(self) -> Any:
        return self.scale

    def change(self, value: float) -> None:
        self.scale = jnp.array(value)


def from_attribute() -> Source:
    trainer = Trainer()
    return Source(trainer.read, trainer.change)


def from_nnx() -> Source:
    class Scale(nnx.Module):
        def __init__(self) -> None:
            self.value = nnx.Param(jnp.array(1.0))

    module = Scale()

    def change(value: float) -> None:
        module.value[...] = jnp.array(value)

    return Source(lambda: module.value[...], change)


SOURCES = {
    "a global": from_global,
    "a closed-over array": from_closure,
    "a number": from_number,
    "an attribute of self": from_attribute,
    "an nnx model": from_nnx,
}


def squared(output: Any, y: Any) -> Any:
    return jnp.sum((output - y) ** 2) / 2


class Functions:
    """The functions of one source; `jitted` hides what they read in a jit of their own."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def model(self, w: Any, x: Any) -> Any:
        """Of one example."""
        return self.source.read() * (x @ w)

    def batched(self, w: Any, x: Any) -> Any:
        return self.source.read() * (x @ w)

    def loss(self, w: Any, x: Any, y: Any) -> Any:
        return squared(self.batched(w, x), y) / len(x)

    def loss_of_one(self, w: Any, x: Any, y: Any) -> Any:
        return squared(self.model(w, x), y)


def mean(outputs: Any, y: Any) -> Any:
    return squared(outputs, y) / len(y)


OPERATORS: dict[str, Callable[[Functions], Any]] = {
    "hessian": lambda f: fp.hessian(f.loss),
    "ggn": lambda f: fp.ggn(f.batched, mean, batched=True),
    "fisher": lambda f: lambda w, x, y: fp.fisher(f.batched, "gaussian", batched=True)(w, x),
    "a sum": lambda f: lambda *a: (fp.hessian(f.loss)(*a) + fp.ggn(f.batched, mean, batched=True)(*a)) / 2,
    "a subset": lambda f: (
        lambda w, x, y: fp.hessian(lambda p, x, y: f.loss(p["w"], x, y) + p["name"][1] ** 2, where="w")(
            {"w": w, "name": ("n", 2.0)}, x, y
        )
    ),
}


def leaves(tree: Any) -> Any:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def root(A: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(A)
    return vectors * np.sqrt(values) @ vectors.T


QUERIES: dict[str, tuple[Callable[[Any], Any], Callable[[np.ndarray], Any]]] = {
    "@ v": (lambda A: A @ V, lambda M: M @ V),
    "@ matrix": (lambda A: A @ np.eye(3)[:, :2], lambda M: M[:, :2]),
    "@ pytree": (lambda A: leaves(A @ A.parameters.unravel(jnp.asarray(V))), lambda M: M @ V),
    "dense": (lambda A: A.dense(), lambda M: M),
    "diagonal": (lambda A: leaves(A.diagonal()), np.diag),
    "trace": (lambda A: A.trace(), np.trace),
    "traces": (lambda A: sum(leaves(A.traces())), np.trace),
    "frobenius": (lambda A: A.frobenius_norm(), np.linalg.norm),
    "block": (lambda A: A.block(A.parameters.paths[0]), lambda M: M),
    "eigsh": (lambda A: A.eigsh(2)[0], lambda M: np.linalg.eigvalsh(M)[1:]),
    "eigsh dense": (lambda A: A.eigsh(3, method="dense")[0], np.linalg.eigvalsh),
    "spectrum": (lambda A: A.spectrum(samples=2).range[1], lambda M: np.linalg.eigvalsh(M)[-1]),
    "logdet": (lambda A: A.logdet(), lambda M: np.linalg.slogdet(M)[1]),
    "solve": (lambda A: A.solve(V, tolerance=1e-12), lambda M: np.linalg.solve(M, V)),
    "solve by cg": (
        lambda A: A.solve(V, method="cg", preconditioner=lambda v: v, tolerance=1e-12),
        lambda M: np.linalg.solve(M, V),
    ),
    "sqrt": (lambda A: A.sqrt() @ V, lambda M: root(M) @ V),
    "sqrt by Lanczos": (lambda A: A.sqrt(products=3) @ V, lambda M: root(M) @ V),
    "to_scipy": (lambda A: A.to_scipy() @ V, lambda M: M @ V),
    "linearize": (lambda A: A.linearize() @ V, lambda M: M @ V),
    "scaled": (lambda A: (2 * A - A / 2) @ V, lambda M: 1.5 * M @ V),
    "under jit": (lambda A: jax.jit(lambda A, v: A @ v)(A, V), lambda M: M @ V),
    "estimate": (lambda A: 0 * A.trace(samples=2, key=KEY).value + A.trace(), np.trace),
}


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-10)


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


def of_training(optimizer: Any) -> Any:
    return optimizer.update(W, optimizer.init(W), W, batch=(X, Y))[0]


def lean(f: Functions, budget: float = 0.5) -> Any:
    return fp.memory.rematerialize(lambda w: f.loss(jnp.sin(jnp.sin(w)), X, Y), budget)


# Each is made once, and called before and after the change.
CALLED: dict[str, Callable[[Functions], Callable[[], Any]]] = {
    "per_example": lambda f: (
        lambda of: lambda: of(W, X, Y, ["gradients", "norm", "diag_ggn", "value", "ntk"])
    )(fp.per_example(f.model, squared)),
    "kfac": lambda f: (lambda of: lambda: of(W, X, Y, KEY).dense())(fp.kfac(f.model, squared)),
    "ekfac": lambda f: (lambda of: lambda: of(W, X, Y).dense())(fp.ekfac(f.model, squared, kind="exact")),
    "hessian_diagonal": lambda f: (lambda of: lambda: of(W, X, Y))(fp.curvature.hessian_diagonal(f.loss)),
    **{
        f"laplace {structure}": lambda f, structure=structure: (
            lambda of: lambda: (of(W, X, Y).log_marginal_likelihood(), of(W, X, Y).predictive(X))
        )(fp.curvature.laplace(f.model, "gaussian", structure=structure))
        for structure in ("full", "diagonal", "low-rank", "kronecker")
    },
    "influence": lambda f: (lambda of: lambda: (of(W, X, Y).on_losses(X, Y), of(W, X, Y).on_parameters(1)))(
        fp.curvature.influence(f.loss_of_one, damping=0.1)
    ),
    "hessian": lambda f: (lambda of: lambda: of(W, X, Y) @ V)(fp.hessian(f.loss)),
    "accumulate": lambda f: lambda: fp.curvature.accumulate(lambda x, y: f.loss(W, x, y), [(X, Y)]).mean,
    "over_batches": lambda f: (
        lambda: (
            fp.curvature.over_batches(
                fp.ggn(f.batched, mean, batched=True), W, lambda: [(X, Y), (X[:2], Y[:2])]
            )
            @ V
        )
    ),
    "training.kfac": lambda f: (lambda o: lambda: of_training(o))(
        fp.training.kfac(f.model, squared, 0.1, (X, Y), kind="exact")
    ),
    "training.gauss_newton_diagonal": lambda f: (lambda o: lambda: of_training(o))(
        fp.training.gauss_newton_diagonal(f.model, squared, 0.1)
    ),
    "training.scale_by_diagonal": lambda f: (lambda o: lambda: of_training(o))(
        fp.training.scale_by_diagonal(
            lambda params, batch: fp.curvature.hessian_diagonal(f.loss)(params, *batch)
        )
    ),
    "make_step": lambda f: (
        lambda: fp.training.make_step(f.loss, optax.sgd(0.1))(W + 0, optax.sgd(0.1).init(W), (X, Y))[0]
    ),
    "rematerialize": lambda f: (lambda of: lambda: jax.value_and_grad(of)(W))(lean(f)),
    "grad": lambda f: (lambda of: lambda: of(W, X, Y))(fp.grad(f.loss)),
    "hvp": lambda f: (lambda of: lambda: of(W, V, X, Y))(fp.hvp(f.loss)),
}


def test_whatever_is_called_again_reads_again() -> None:
    """Called after the change, it is what another one made afterwards is, which never saw the first value."""
    for kind, make_source in SOURCES.items():
        for name, make in CALLED.items():
            source, other = make_source(), from_closure()
            called = make(Functions(source))
            source.change(1.0)
            before = leaves(called())
            source.change(3.0)
            other.change(3.0)
            after, expected = leaves(called()), leaves(make(Functions(other))())
            np.testing.assert_allclose(after, expected, rtol=1e-7, atol=1e-9, err_msg=f"{name}, {kind}")
            assert not np.allclose(before, after), (name, kind)


def test_footprint_and_plans_are_of_the_array_that_is_there() -> None:
    table = jnp.ones((10, 3))

    def loss(w: Any) -> Any:
        return jnp.sum(jnp.sin(table @ jnp.sin(w)) ** 2)

    plan, footprint = fp.memory.remat_plan(loss, 0.5), fp.memory.footprint(loss)
    before = plan(W).plain_residual_bytes, footprint(W).training.predicted
    table = jnp.ones((1000, 3))
    assert plan(W).plain_residual_bytes > 10 * before[0]
    assert footprint(W).training.predicted > 10 * before[1]


# --- compiled once, kept by nobody ------------------------------------------------------------


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The programs that XLA compiles."""
    found: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def fresh_functions(value: float) -> tuple[Functions, Any]:
    """Functions that nobody else has, which read an array in a jit of their own; and the array."""
    array = jnp.array([value])

    class Own(Functions):
        @staticmethod
        @jax.jit
        def inner(z: Any) -> Any:
            return jnp.squeeze(array * z, 0) if jnp.ndim(z) == 0 else array * z

        def model(self, w: Any, x: Any) -> Any:
            return jax.nn.relu(self.inner(x @ w) + 9.0)

        batched = model

    return Own(Source(lambda: array, lambda _: None)), array


ROUTES: dict[str, Callable[[Functions], Any]] = {
    **{
        f"{operator} {query}": lambda f, operator=operator, query=query: QUERIES[query][0](
            OPERATORS[operator](f)(W, X, Y) + fp.curvature.identity(W)
        )
        for operator in ("hessian", "ggn")
        for query in QUERIES
        if query != "under jit"  # the user's own jit is compiled by itself
    },
    **{f"fisher {query}": lambda f, query=query: QUERIES[query][0](OPERATORS["fisher"](f)(W, X, Y))
       for query in ("@ v", "dense", "diagonal")},
    "sampled Fisher": lambda f: fp.fisher(f.batched, "gaussian", kind="mc", batched=True)(W, X, key=KEY) @ V,
    "empirical Fisher":
        lambda f: fp.fisher(f.batched, "gaussian", kind="empirical", batched=True)(W, X, Y) @ V,
    **{name: lambda f, name=name: CALLED[name](f)() for name in CALLED},
}  # fmt: skip
# These jit, or enter a branch, whenever they are called; what they compile is their own.
COMPILE_AGAIN = {name for name in ROUTES if name.startswith(("training", "make_step", "grad", "hvp"))}


def test_equal_functions_share_their_compilations(compilations: list[str]) -> None:
    for name, route in ROUTES.items():
        if name in COMPILE_AGAIN:
            continue
        route(fresh_functions(1.0)[0])
        before = len(compilations)
        route(fresh_functions(2.0)[0])
        assert len(compilations) == before, name


def test_no_function_and_no_array_is_kept_alive() -> None:
    references: dict[str, list[Any]] = {}
    for name, route in ROUTES.items():
        references[name] = []
        losses = 5 if name.endswith("@ v") else 2
        for value in range(losses):
            functions, array = fresh_functions(1.0 + value)
            route(functions)
            references[name] += map(weakref.ref, (functions, type(functions), array))
            del functions, array
    gc.collect()
    assert {n for n, found in references.items() if any(r() is not None for r in found)} == set()


def test_made_under_tracing_nothing_is_kept_either() -> None:
    references = []
    for value in range(3):
        functions, array = fresh_functions(1.0 + value)
        expected = jax.hessian(functions.loss)(W, X, Y)
        H = jax.jit(fp.hessian(functions.loss))(W, X, Y)
        close(H @ V, expected @ V)
        slope = jax.grad(lambda w, f=functions: W @ (fp.hessian(f.loss)(w, X, Y) @ w))(W)
        close(slope, expected @ W)
        references += [weakref.ref(functions), weakref.ref(array)]
        del functions, array, H
    gc.collect()
    assert [r() for r in references] == [None] * 6


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
