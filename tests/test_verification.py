"""`verify` asks only for derivatives that the function has, and says where it compared nothing."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.custom_derivatives import zero_from_primal
from jax.experimental import io_callback

import funcprop as fp
from funcprop import progress as progress_module
from funcprop.equations.verification import Verification

stop = lax.stop_gradient


def doubled(x):
    """A power of two times `x`, by a loop that reverse mode cannot differentiate."""
    return lax.while_loop(lambda c: c < 10, lambda c: 2 * c, x)


def sine_on_host(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@jax.custom_jvp
def without_slope(x):
    return jnp.sin(x)


without_slope.defjvp(
    lambda primals, tangents: (jnp.sin(primals[0]), zero_from_primal(primals[0], symbolic_zeros=True)),
    symbolic_zeros=True,
)


@jax.custom_vjp
def slope_on_host(x):
    return jnp.sin(x)


slope_on_host.defvjp(
    lambda x: (jnp.sin(x), x),
    lambda x, g: (
        jax.pure_callback(lambda x, g: np.cos(x) * g, jax.ShapeDtypeStruct(x.shape, x.dtype), x, g),
    ),
)


def conjugate_gradients(matrix, b):
    return jax.scipy.sparse.linalg.cg(lambda v: matrix * v, b, maxiter=5)[0]


def exported(fun):
    """What is left of a function that was exported, with its derivative; JAX cannot map it."""
    made = export.export(jax.jit(fun))(jax.ShapeDtypeStruct((3,), jnp.float64))
    return export.deserialize(made.serialize(vjp_order=2)).call


# Functions of a vector that are differentiable, though parts of them are not.
ASKED_FOR = {
    "while behind stop_gradient": lambda x: jnp.sum(x) * doubled(stop(x[0])),
    "while of an intermediate": lambda x: jnp.sum(x) * doubled(stop(jnp.sin(x[0]) + 3)),
    "while of what is rounded": lambda x: jnp.sum(x) * doubled(jnp.ceil(x[0])),
    "while of an integer": lambda x: jnp.sum(x) * doubled(jnp.int32(x[1]).astype(float)),
    "while of a loop's constant result": lambda x: (
        jnp.sum(x) * doubled(lax.scan(lambda c, r: (c, stop(c)), x[0], x)[1][2])
    ),
    "while of a branch": lambda x: (
        jnp.sum(x) * doubled(lax.cond(x[0] < 9, lambda v: stop(v), lambda v: 0 * stop(v), x[0]))
    ),
    "while until an argument": lambda x: (
        jnp.sum(x) * lax.while_loop(lambda c: c < 2 * x[1], lambda c: 2 * c, 1.0)
    ),
    "while of a derivative that is zero": lambda x: jnp.sum(x) * doubled(without_slope(x[0]) + 1),
    "host": lambda x: jnp.sum(x * sine_on_host(stop(x))),
    "host of a comparison": lambda x: jnp.sum(x * sine_on_host((x > 1).astype(float))),
    "host in a backward function": lambda x: jnp.sum(slope_on_host(2 * x) ** 2),
    "linear solve by its right side": lambda x: jnp.sum(conjugate_gradients(2.0, x) ** 2),
    "linear solve by both": lambda x: jnp.sum(conjugate_gradients(2 + x, 3 * x)),
    "exported": lambda x: jnp.sum(exported(lambda v: jnp.sin(v) * v)(x) * x),
    "sorted": lambda x: jnp.sum(jnp.sort(x)[jnp.argsort(-x)] * x),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", ASKED_FOR)
def test_no_derivative_is_asked_for_that_the_function_does_not_have(case):
    fun, x = ASKED_FOR[case], jnp.array([1.5, 2.5, 0.5])
    expected = jax.grad(fun)(x)
    np.testing.assert_allclose(fp.backprop(fun)(x).gradient, expected, rtol=1e-12)
    verified = fp.derive(fun)(x).verify()
    assert max(verified.errors.values()) < 1e-13
    assert not verified.unchecked


def test_a_rule_for_what_is_constant_counts_as_its_derivative():
    straight_through = fp.Rule(lambda x, **s: (lax.round(x, **s), ()), lambda r, g, needs, **s: (g,))
    rounded = fp.layer(rule=straight_through)(lambda x: jnp.round(x))
    x = jnp.array([0.3, 1.7])
    for fun, rules in [
        (lambda x: jnp.sum(lax.round(x) * x), fp.rules.handwritten.replace({"round": straight_through})),
        (lambda x: jnp.sum(rounded(x) * x), fp.rules.handwritten),
        (lambda x: lax.scan(lambda c, r: (c + rounded(r) * r, None), 0.0, x)[0], fp.rules.handwritten),
    ]:
        expected = fp.grad(fun, rules=rules)(x)
        assert np.all(expected > x / 2)
        np.testing.assert_allclose(fp.backprop(fun, rules=rules)(x).gradient, expected)


def test_side_effects_happen_once():
    calls = []

    def drawn(x):
        calls.append(float(x))
        return np.asarray(len(calls), x.dtype)

    def loss(x):
        return x * io_callback(drawn, jax.ShapeDtypeStruct((), x.dtype), stop(x)) + x**2

    jax.grad(loss)(2.0)
    assert len(calls) == 1
    derivation = fp.derive(loss)(2.0)
    assert len(calls) == 1
    verified = derivation.verify()
    assert len(calls) == 2
    assert list(verified.unchecked.values()) == ["not computed a second time, for its side effects"]
    assert fp.backprop(loss)(2.0).gradient == 3 + 4
    assert len(calls) == 3


# --- nothing to compare -----------------------------------------------------------------------


def mean_square(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


NOTHING = {
    "NaN": (mean_square, jnp.full((2, 2), jnp.nan), jnp.ones((3, 2)), "no line of forward propagation"),
    "NaN in the data": (mean_square, jnp.ones((2, 2)), jnp.full((3, 2), jnp.nan), "no line of forward prop"),
    "infinite": (lambda w, x: jnp.sum(w * x), jnp.ones(2), jnp.full(2, jnp.inf), "no line of forward"),
    "empty": (lambda w, x: jnp.sum(w * x), jnp.ones(0), jnp.ones(0), "backpropagation .* no entries"),
    "infinite slope": (lambda w, x: jnp.linalg.norm(w * x), jnp.zeros(2), jnp.ones(2), "backpropagation .*"),
    "penalty of NaN": (
        lambda w, x: fp.layers.l2_penalty(x, {"w": w}) + jnp.nan * jnp.sum(w),
        jnp.ones(2),
        1.0,
        "no line of backpropagation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_finite_is_not_a_success(case):
    fun, w, x, message = NOTHING[case]
    with pytest.raises(ValueError, match=rf"verify: .*{message}.* nothing about it was verified\. Derive at"):
        fp.derive(fun)(w, x).verify()


def test_lines_without_a_number_are_listed():
    def loss(x):
        infinite = fp.name(x[2:] / 0, "b")
        return jnp.sum(fp.name(jnp.log(x), "a")[:1]) + jnp.sum(infinite[:0])

    verified = fp.derive(loss)(jnp.array([1.0, 2.0, 3.0])).verify()
    assert verified.unchecked["b"] == "no finite entry to compare"
    assert "b" not in verified.errors
    assert "a" in verified.errors
    assert any(line.endswith("no entries") for line in str(verified).splitlines())
    assert str(Verification({"z": 0.5}, {"h": "why"})).splitlines()[1:] == ["z  5.0e-01", "h  why"]


# --- progress ---------------------------------------------------------------------------------


def test_progress_is_reported_line_by_line():
    derivation = fp.derive(mean_square)(jnp.ones((2, 2)), jnp.ones((3, 2)))
    seen = []
    derivation.verify(progress=lambda done, total: seen.append((done, total)))
    total = len(derivation.forward) + len(derivation.backward)
    assert seen == [(i, total) for i in range(1, total + 1)]


def test_long_derivations_show_a_bar(monkeypatch):
    shown = []

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def bar(doing, total=None, **options):
        shown.append((doing, total))
        return progress_module.bar(doing, total, **options)

    monkeypatch.setattr("funcprop.equations.verification.bar", bar)

    def chain(x, n):
        for _ in range(n):
            x = jnp.sin(x)
        return x

    short, long = (fp.derive(lambda x, n=n: chain(x, n), detail="operators")(0.5) for n in (3, 40))
    short.verify()
    assert not shown
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    long.verify()
    assert shown == [("verifying", 80)]
    assert "verifying" in stderr.getvalue()
    long.verify(progress=False)
    assert len(shown) == 1
    short.verify(progress=True)
    assert len(shown) == 2


@pytest.mark.parametrize("draw", [jax.random.gamma, jax.random.dirichlet])
def test_a_draw_that_depends_on_a_parameter_is_written_and_verified(draw):
    """Its operator reads a key, which is no number."""
    derivation = fp.derive(lambda w, k: jnp.sum(draw(k, w) ** 2))(
        jnp.array([1.0, 2.0, 3.0]), jax.random.key(0)
    )
    derivation.verify()
    assert "random_gamma(k, w)" in str(derivation)
