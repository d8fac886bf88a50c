"""Equal functions are compiled once, and kept alive by nobody."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest
from changing_sources import (
    CALLED,
    KEY,
    OPERATORS,
    QUERIES,
    Functions,
    Source,
    V,
    W,
    X,
    Y,
    close,
)

import funcprop as fp


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


# All operators have the queries of one class: each is asked of a Hessian, a few of the others.
ASKED = {
    # The user's own jit is compiled by itself.
    "hessian": [query for query in QUERIES if query != "under jit"],
    "ggn": ["@ v", "dense", "diagonal", "solve", "linearize"],
    "fisher": ["@ v", "dense", "diagonal"],
}
ROUTES: dict[str, Callable[[Functions], Any]] = {
    **{
        f"{operator} {query}": lambda f, operator=operator, query=query: QUERIES[query][0](
            OPERATORS[operator](f)(W, X, Y) + fp.curvature.identity(W)
        )
        for operator, asked in ASKED.items()
        for query in asked
    },
    "sampled Fisher": lambda f: fp.fisher(f.batched, "gaussian", kind="mc", batched=True)(W, X, key=KEY) @ V,
    "empirical Fisher": lambda f: (
        fp.fisher(f.batched, "gaussian", kind="empirical", batched=True)(W, X, Y) @ V
    ),
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


@pytest.mark.usefixtures("small_heap")
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


@pytest.mark.usefixtures("small_heap")
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
