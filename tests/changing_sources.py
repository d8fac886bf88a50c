"""What a function reads besides its arguments, and what reads it.

A linear model `scale · x w` with squared error, of which every curvature is `scale² · XᵀX / N`; the scale is
a global, a closed-over array, a number, an attribute of `self`, or a variable of a captured nnx model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
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
    "eigsh dense": (lambda A: A.eigsh(3, solver=fp.curvature.DenseSolver())[0], np.linalg.eigvalsh),
    "spectrum": (lambda A: A.spectrum(samples=2).range[1], lambda M: np.linalg.eigvalsh(M)[-1]),
    "logdet": (lambda A: A.logdet(), lambda M: np.linalg.slogdet(M)[1]),
    "solve": (
        lambda A: A.solve(V, solver=fp.curvature.Minres(tolerance=1e-12)),
        lambda M: np.linalg.solve(M, V),
    ),
    "solve by cg": (
        lambda A: A.solve(
            V, solver=fp.curvature.ConjugateGradients(preconditioner=lambda v: v, tolerance=1e-12)
        ),
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
