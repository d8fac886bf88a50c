"""`Operator.source` and `first_nonfinite` name the user's line, however deep in a library the operator is."""

from __future__ import annotations

import inspect
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import funcprop as fp
from funcprop._jax import source_lines


def norm(x):
    return jnp.linalg.norm(x) ** 2


def deviation(x):
    return jnp.sum(x) + jnp.std(x)


def inverse_variance(x):
    return 1 / jnp.var(x)


def eigenvalues(x):
    return jnp.sum(jnp.linalg.eigh(jnp.outer(x, x))[1] ** 3)


def log_of_softmax(x):
    return jnp.log(jax.nn.relu(x)).sum()


def cross_entropy(x):
    return jnp.sum(optax.softmax_cross_entropy(jnp.log(x), x))


def optimizer(x):
    return jnp.sum(optax.scale_by_trust_ratio().update(x, optax.ScaleByTrustRatioState(), jnp.sqrt(x))[0])


@jax.jit
def jitted(x):
    y = 2 * x
    return jnp.sqrt(jnp.sum(y * y))


def through_jit(x):
    return jitted(x)


def in_scan(x):
    def body(c, row):
        return c + jnp.linalg.norm(row), None

    return jax.lax.scan(body, 0.0, x[:, None])[0]


def in_cond(x):
    return jax.lax.cond(x[0] < 1, lambda x: jnp.linalg.norm(x), lambda x: jnp.sum(x), x)


def in_checkpoint(x):
    return jax.checkpoint(lambda x: jnp.linalg.norm(x))(x)


@jax.custom_jvp
def own(x):
    return jnp.linalg.norm(x)


@own.defjvp
def _own_jvp(primals, tangents):
    return jax.jvp(jnp.linalg.norm, primals, tangents)


def in_custom_jvp(x):
    return own(x)


def in_vmap(x):
    return jnp.sum(jax.vmap(jnp.linalg.norm)(x[:, None]))


# What is not finite at zeros, and after how many lines of which function that is.
CASES = [
    (norm, norm, 1),
    (deviation, deviation, 1),
    (inverse_variance, inverse_variance, 1),
    (eigenvalues, eigenvalues, 1),
    (log_of_softmax, log_of_softmax, 1),
    (cross_entropy, cross_entropy, 1),
    (optimizer, optimizer, 1),
    (through_jit, jitted.__wrapped__, 3),
    (in_scan, in_scan, 2),
    (in_cond, in_cond, 1),
    (in_checkpoint, in_checkpoint, 1),
    (in_custom_jvp, in_custom_jvp, 1),
    (in_vmap, in_vmap, 1),
]


@pytest.mark.parametrize(("fun", "where", "line"), CASES, ids=[c[0].__name__ for c in CASES])
def test_what_is_not_finite_names_the_users_line(fun, where, line):
    found = fp.backprop(fun)(jnp.zeros(3)).first_nonfinite()
    expected = f"{__file__}:{inspect.getsourcelines(where)[1] + line} ("
    assert found.source.startswith(expected)
    assert str(found).endswith(found.source)


@pytest.mark.parametrize("fun", [c[0] for c in CASES], ids=lambda f: f.__name__)
def test_every_operator_has_a_line_of_this_file(fun):
    def operators(graph):
        for op in graph.operators:
            yield op
            for body in op.bodies.values():
                yield from operators(body)

    sources = [op.source for op in operators(fp.trace(fun)(jnp.zeros(3)))]
    assert sources
    assert all(source is not None and source.startswith(f"{__file__}:") for source in sources)


def test_one_jitted_function_called_twice_has_the_line_of_each_call():
    def twice(x):
        first = jnp.linalg.norm(x)
        return first * jnp.linalg.norm(x)

    start = inspect.getsourcelines(twice)[1]
    lines = [int(op.source.split(":")[1].split(" ")[0]) - start for op in fp.trace(twice)(jnp.ones(3))]
    assert sorted(set(lines)) == [1, 2]
    assert lines == sorted(lines)


def test_where_all_code_is_installed_its_own_line_is_named(tmp_path, monkeypatch):
    package = tmp_path / "site-packages"
    package.mkdir()
    (package / "installed_model.py").write_text("import jax.numpy as jnp\ndef f(x):\n    return jnp.std(x)\n")
    monkeypatch.syspath_prepend(package)
    from installed_model import f

    try:
        source = fp.trace(f)(jnp.ones(3)).operators[0].source
        assert source == f"{package}/installed_model.py:3 (f)"
        # Called from here, this file's line says more.
        assert f"{__file__}:" in fp.trace(lambda x: f(x))(jnp.ones(3)).operators[0].source
    finally:
        del sys.modules["installed_model"]
        source_lines._owner.cache_clear()
