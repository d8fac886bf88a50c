"""Python that looks at values: control flow, conversions, shapes that depend on data, as under `jax.grad`."""

from __future__ import annotations

import bisect
import copy
import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drop_in import WAYS, assert_as_jax, assert_differentiates_as_jax
from jax import lax

S, X, Y, N = jnp.array(2.5), jnp.array([1.0, -2.0, 3.0]), jnp.array([1.0, -1.0, 2.0]), jnp.array(2)


class Pair(NamedTuple):
    """A named tuple with methods, used as the differentiated argument."""

    first: jax.Array
    second: jax.Array

    @property
    def is_zero(self):
        return self.first == 0 and not self.second


class Sign(Pair):
    def value(self):
        return jnp.tanh(self.second) if self.is_zero else self.first**2


def root(x):
    """Newton's iteration to a tolerance."""
    y = x
    while abs(y * y - x) > 1e-9:
        y = (y + x / y) / 2
    return y


def power(x, depth=0):
    return x if x > 100 or depth > 20 else power(x * x, depth + 1)


def matched(x):
    match x > 2, bool(x < 0):
        case True, False:
            return jnp.tanh(x) * 3
        case _:
            return x


def caught(x):
    def checked(x):
        if not 0 < x < 2:
            raise ValueError("out of range")
        return jnp.exp(x)

    try:
        return checked(x)
    except ValueError:
        return jnp.tanh(x)


def split_at_computed(x):
    left, right = jnp.split(x, [int(jnp.argmin(x))])
    return jnp.sum(jnp.tanh(left)) + jnp.prod(right)


def inside_of_jit(x):
    return jax.jit(lambda x: jnp.tanh(x) if x > 0 else x)(x)


def concrete_while(x):
    c = x
    while jnp.sum(c) < 10:
        c = jnp.tanh(c) + c
    return c


# --- values of the differentiated argument ----------------------------------------------------

DIFFERENTIATED = {
    "if": (lambda x: jnp.tanh(x) if x > 0 else -x, S),
    "if of an intermediate": (lambda x: x * 3 if jnp.tanh(x * x) < 0.5 else jnp.exp(x), S),
    "if of a stopped gradient": (lambda x: jnp.tanh(x) if lax.stop_gradient(x) > 0 else x, S),
    "chain of comparisons": (lambda x: jnp.exp(x) if 0 < x < 2 or not x else jnp.tanh(x), S),
    "while": (concrete_while, S),
    "Newton to a tolerance": (root, S),
    "recursion": (power, S),
    "match": (matched, S),
    "exception caught": (caught, S),
    "range of int": (lambda x: sum(jnp.tanh(x) for _ in range(int(x))), S),
    "item": (lambda x: jnp.tanh(x) * x.item(), S),
    "item of an intermediate": (lambda x: jnp.tanh(x) * (x * 2).item(), S),
    "bool": (lambda x: jnp.tanh(x) * bool(x) * (not x > 3), S),
    "int": (lambda x: x ** int(x), S),
    "round": (lambda x: round(x) * jnp.tanh(x), S),
    "divmod": (lambda x: divmod(x, 2.0)[1] + abs(-x), S),
    "float of a stopped gradient": (lambda x: jnp.tanh(x) * float(lax.stop_gradient(x)), S),
    "numpy of a stopped gradient": (lambda x: jnp.sum(jnp.tanh(x)) * np.asarray(lax.stop_gradient(x))[2], X),
    "max and min": (lambda x: max(x, 0.0) * min(jnp.tanh(x), 1.0, key=lambda v: v), S),
    "max of elements": (lambda x: max(x) * min(*x), X),
    "sorted": (lambda x: sorted(x)[0] + sorted(jnp.tanh(x), key=lambda v: -v)[0], X),
    "any and all": (lambda x: jnp.sum(x) * any(x > 0) * (not all(x > 0)), X),
    "in": (lambda x: jnp.tanh(x) if x in [1.0, 2.5] else x, S),
    "index in a list": (lambda x: [1.0, 2.5].index(x) * jnp.tanh(x), S),
    "bisect": (lambda x: bisect.bisect([1.0, 2.0, 3.0], x) * jnp.tanh(x), S),
    "list indexed by a value": (lambda x: [jnp.sin, jnp.cos, jnp.tanh][x.astype(int)](x), S),
    "dictionary of branches": (lambda x: {True: jnp.tanh, False: jnp.sin}[bool(x > 0)](x), S),
    "table by id": (lambda x: {id(x): jnp.tanh(x)}[id(x)], S),
    "iteration": (lambda x: sum(jnp.tanh(v) * i for i, v in enumerate(x) if v > 0), X),
    "iterator": (lambda x: next(v for v in iter(x) if v < 0) * 2, X),
    "filter and reduce": (lambda x: functools.reduce(operator.mul, filter(lambda v: v > 0, x)), X),
    "assert": (lambda x: [jnp.tanh(x), operator.truth(x > 0)][0], S),
    "mask": (lambda x: jnp.sum(jnp.tanh(x[x > 0])), X),
    "mask of an intermediate": (lambda x: jnp.sum(x[jnp.tanh(x) > 0] ** 2), X),
    "nonzero": (lambda x: jnp.sum(x[jnp.nonzero(x > 0)]), X),
    "compress and extract": (lambda x: jnp.sum(jnp.compress(x > 0, x)) * jnp.prod(jnp.extract(x > 0, x)), X),
    "unique": (lambda x: jnp.unique(x).size * jnp.sum(jnp.tanh(x)), X),
    "int of argmax": (lambda x: jnp.tanh(x)[int(jnp.argmax(x))], X),
    "split": (split_at_computed, X),
    "ones of a value": (lambda x: x * jnp.ones(x.astype(int)).sum(), S),
    "arange of a value": (lambda x: jnp.tanh(x) * jnp.arange(x).sum(), S),
    "one_hot of a value": (
        lambda x: jnp.sum(jnp.tanh(x) @ jax.nn.one_hot([0, 1, 2], int(jnp.max(x)) + 1)),
        X,
    ),
    "loop to a value": (lambda x: lax.fori_loop(0, x.astype(int), lambda _, c: jnp.tanh(c) * 2, x), S),
    "scan of a length": (
        lambda x: lax.scan(lambda c, _: (jnp.tanh(c), None), x, length=int(x))[0],
        S,
    ),
    "static argument": (
        lambda x: jax.jit(lambda x, n: jnp.tanh(x) * n, static_argnums=1)(x, int(x)),
        S,
    ),
    "named tuple": (lambda p: Sign(*p).value(), Pair(S, S)),
    "named tuple that is zero": (lambda p: Sign(*p).value(), Pair(S * 0, S * 0)),
    "python number": (lambda x: jnp.tanh(x) if x > 0 else x, 2.5),
    "numpy number": (lambda x: jnp.tanh(x) if x > 0 else x, np.float64(2.5)),
    "parameters in a dictionary": (
        lambda p: jnp.tanh(p["a"]) if p["a"] > p["b"][0] else jnp.sum(p["b"]),
        {"a": S, "b": X},
    ),
    "cond in a branch": (lambda x: lax.cond(x > 0, jnp.tanh, jnp.sin, x) if x > 1 else x, S),
    "if in a jitted function": (lambda x: jnp.tanh(x) + jax.jit(lambda x: jnp.exp(x))(x) * (x > 0), S),
    "copy": (lambda x: copy.copy(x) * copy.deepcopy(jnp.tanh(x)), S),
    "nested gradient": (lambda x: jax.grad(lambda y: jnp.tanh(y) * x if y > 1 else y)(x) * 2, S),
    "vmap around": (lambda x: jnp.sum(jax.vmap(jnp.tanh)(x[x > 0])), X),
}

# --- values of what is not differentiated -----------------------------------------------------

OTHERS = {
    "mask": (lambda x, y: jnp.sum(jnp.tanh(x[y > 0])), X, Y),
    "range": (lambda x, n: sum(jnp.tanh(x) * i for i in range(n + 1)), S, N),
    "ones": (lambda x, n: jnp.tanh(x) * jnp.ones(n * 2).sum(), S, N),
    "fori_loop": (lambda x, n: lax.fori_loop(0, n + 1, lambda _, c: jnp.tanh(c) * 2, x), S, N),
    "format": (lambda x, n: (f"{n + 1.0:.2f}", jnp.tanh(x))[1] * len(f"{n + 1.0:.3f}"), S, N),
    "format by %": (lambda x, n: jnp.tanh(x) * float("%.1f" % (n + 0.5)), S, N),
    "text": (lambda x, n: jnp.tanh(x) * int(str(n * 2)), S, N),
    "if": (lambda x, y: jnp.tanh(x).sum() if jnp.any(y > 0) else x.sum(), X, Y),
    "float, int, bool, complex": (
        lambda x, y: jnp.tanh(x) * float(y[0]) * int(y[2] + 1) * bool(y[1]) * complex(y[2] * 2).real,
        S,
        Y,
    ),
    "item and tolist": (lambda x, y: jnp.tanh(x) * (y * 2)[0].item() * sum((y + 1).tolist()), S, Y),
    "numpy": (lambda x, y: jnp.tanh(x) * np.linalg.norm(np.asarray(y * 2)), S, Y),
    "numpy's functions": (lambda x, y: jnp.tanh(x) * np.sin(y * 2)[1] * np.sort(y - 1)[0], S, Y),
    "numpy's indices": (lambda x, y: jnp.sum(jnp.tanh(x)[np.flatnonzero(y > 0)]), X, Y),
    "math": (lambda x, n: jnp.tanh(x) * math.exp(n * 0.5) * math.floor(n / 2), S, N),
    "nonzero": (lambda x, y: jnp.sum(jnp.tanh(x)[jnp.nonzero(y > 0)[0]]), X, Y),
    "unique": (lambda x, y: jnp.sum(jnp.tanh(x)) * jnp.unique(y * y).size, X, Y),
    "unique labels": (
        lambda x, y: sum(jnp.sum(jnp.tanh(x[y * y == v])) * i for i, v in enumerate(np.unique(y * y))),
        X,
        Y,
    ),
    "split": (lambda x, n: jnp.prod(jnp.split(jnp.tanh(x), [int(n) - 1])[0]), X, N),
    "arange": (lambda x, n: jnp.tanh(x) * jnp.sum(jnp.arange(n * 2)), S, N),
    "linspace": (lambda x, n: jnp.sum(jnp.tanh(x * jnp.linspace(0, 1, n + 3))), S, N),
    "reshape": (lambda x, n: jnp.sum(jnp.tanh(jnp.tile(x, n).reshape(int(n * 3), -1)) ** 2), X, N),
    "eye": (lambda x, n: jnp.sum(jnp.tanh(x) @ jnp.eye(int(n + 1))), X, N),
    "slice": (lambda x, n: jnp.sum(jnp.tanh(x)[: n + 1][:: int(n)]), X, N),
    "one_hot": (lambda x, y: jnp.sum(x[0] * jax.nn.one_hot(y.astype(int), int(jnp.max(y)) + 1)), X, Y),
    "key by value": (lambda x, n: {3: jnp.tanh, 4: jnp.sin}[int(n) + 1](x), S, N),
    "memo by value": (lambda x, y: jnp.tanh(x) * dict.fromkeys((y + 1).tolist(), 3.0)[2.0], S, Y),
    "sorted and max": (lambda x, y: jnp.tanh(x) * max(y + 1) * sorted((y * 2).tolist())[0], S, Y),
    "in": (lambda x, n: jnp.tanh(x) if n + 1 in (3, 4) else x, S, N),
    "scan length": (lambda x, n: lax.scan(lambda c, _: (jnp.tanh(c), None), x, length=int(n + 1))[0], S, N),
    "static argument": (
        lambda x, n: jax.jit(lambda x, k: jnp.tanh(x) * k, static_argnames="k")(x, k=int(n + 1)),
        S,
        N,
    ),
    "equal arrays": (lambda x, y: jnp.tanh(x) if np.array_equal(y * 2, [2.0, -2.0, 4.0]) else x, S, Y),
    "padding to the longest": (
        lambda x, lengths: jnp.sum(jnp.pad(jnp.tanh(x), (0, int(jnp.max(lengths)) - 2)) ** 2),
        X,
        jnp.array([2, 4]),
    ),
    "ragged sum": (
        lambda x, lengths: sum(
            jnp.sum(jnp.tanh(part)) ** 2 for part in jnp.split(x, jnp.cumsum(lengths)[:-1])
        ),
        X,
        jnp.array([1, 2]),
    ),
}


@pytest.mark.parametrize("way", ["eager", "jit"])
@pytest.mark.parametrize("row", DIFFERENTIATED.values(), ids=DIFFERENTIATED)
def test_python_on_differentiated_values(row, way):
    assert_differentiates_as_jax(way, *row)


@pytest.mark.parametrize("way", ["eager", "jit of all"])
@pytest.mark.parametrize("row", OTHERS.values(), ids=OTHERS)
def test_python_on_other_values(row, way):
    assert_differentiates_as_jax(way, *row)


BOTH = {f"{name} of x": row for name, row in DIFFERENTIATED.items()} | OTHERS


@pytest.mark.parametrize("way", [way for way in WAYS if way != "eager"])
@pytest.mark.parametrize(
    "name", ["exception caught of x", "mask of an intermediate of x", "item of x", "if", "ones"]
)
def test_every_transformation(name, way):
    assert_differentiates_as_jax(way, *BOTH[name])


# What JAX refuses as well, by the same class.
REFUSED = {
    "float": (lambda t: t.grad(lambda x: x * float(x))(S), jax.errors.ConcretizationTypeError),
    "tolist": (lambda t: t.grad(lambda x: x * len(x.tolist()))(X), jax.errors.ConcretizationTypeError),
    "numpy": (lambda t: t.grad(lambda x: x[0] * np.asarray(x)[0])(X), jax.errors.TracerArrayConversionError),
    "numpy's function": (lambda t: t.grad(lambda x: np.sin(x))(S), jax.errors.TracerArrayConversionError),
    "math": (lambda t: t.grad(lambda x: x * math.sin(x))(S), jax.errors.ConcretizationTypeError),
    "hash": (lambda t: t.grad(lambda x: {x: 1.0}[x] * x)(S), TypeError),
    "format": (lambda t: t.grad(lambda x: (f"{x:.2f}", x)[1])(S), TypeError),
    "assignment": (lambda t: t.grad(lambda x: x.__setitem__(0, 1.0))(X), TypeError),
    "truth of several": (lambda t: t.grad(lambda x: jnp.sum(x) if x > 0 else x)(X), ValueError),
    "while_loop": (
        lambda t: t.grad(lambda x: lax.while_loop(lambda c: c < 10, lambda c: c * 2, x))(S),
        ValueError,
    ),
    "if in a jitted function": (lambda t: t.grad(inside_of_jit)(S), jax.errors.TracerBoolConversionError),
    "if under jit": (
        lambda t: jax.jit(t.grad(lambda x: jnp.tanh(x) if x > 0 else x))(S),
        jax.errors.TracerBoolConversionError,
    ),
    "mask under jit": (
        lambda t: jax.jit(t.grad(lambda x: jnp.sum(x[x > 0])))(X),
        jax.errors.NonConcreteBooleanIndexError,
    ),
    "shape under jit": (lambda t: jax.jit(t.grad(lambda x, n: x * jnp.ones(n).sum()))(S, N), TypeError),
    "devices": (
        lambda t: t.grad(lambda x: x * len(x.devices()))(S),
        jax.errors.ConcretizationTypeError,
    ),
}


@pytest.mark.parametrize(("program", "error"), REFUSED.values(), ids=REFUSED)
def test_what_jax_refuses(program, error):
    assert_as_jax(program, raises=error)
