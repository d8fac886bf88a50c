"""JAX's signatures and semantics: whatever `jax.grad` does with a function, `fp.grad` does too."""

from __future__ import annotations

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_jax import HANDWRITTEN, JAX, OURS, X, Y, Z, assert_same
from jax import lax

import funcprop as fp


def three(x, y, z):
    return jnp.sum(jnp.tanh(x * y)) * jnp.exp(z)


def with_aux(x, y):
    aux = {
        "text": "abc",
        "none": None,
        "numpy": np.arange(3),
        "int": 3,
        "traced": jnp.exp(x),
        "object": with_aux,
    }
    return jnp.sum(jnp.tanh(x) * y), aux


def configured(x, activation, *, repeat, mode="plain", offset=None):
    """Strings, integers in `range`, callables, None: none of them is an array."""
    for _ in range(repeat):
        x = activation(x)
    if mode == "shifted":
        x = x + offset
    return jnp.sum(x)


class Model:
    def __init__(self, w):
        self.w = w

    def loss(self, x):
        return jnp.sum(jnp.tanh(self.w * x))

    def __call__(self, x):
        return self.loss(x)

    @classmethod
    def unit_loss(cls, x):
        return cls(1.0).loss(x)


def dropped(x, key):
    return jnp.sum(jnp.tanh(x) * jax.random.bernoulli(key, 0.5, x.shape))


def nested(t):
    """Closures over tracers of an outer transformation."""

    def outer(w):
        return jnp.sum(t.grad(lambda x: jnp.sum(jnp.tanh(w * x) * w))(X))

    return t.grad(outer)(Y)


CALLS = {
    "argnums tuple": lambda t: t.grad(three, argnums=(0, 2))(X, Y, Z),
    "argnums out of order": lambda t: t.grad(three, argnums=(2, 0))(X, Y, Z),
    "argnums negative": lambda t: t.grad(three, argnums=-1)(X, Y, Z),
    "argnums negative tuple": lambda t: t.value_and_grad(three, (-3, -2))(X, Y, Z),
    "has_aux": lambda t: t.grad(with_aux, has_aux=True)(X, Y),
    "value_and_grad has_aux": lambda t: t.value_and_grad(with_aux, has_aux=True)(X, Y),
    "vjp has_aux": lambda t: (lambda value, pullback, aux: (value, pullback(Z), aux))(
        *t.vjp(functools.partial(with_aux, y=Y), X, has_aux=True)
    ),
    "vjp of several results": lambda t: t.vjp(lambda x, y: (jnp.tanh(x), [x * y]), X, Y)[1]((X, [Y])),
    "jacobian": lambda t: t.jacobian(lambda x, y: jnp.outer(jnp.tanh(x), y), argnums=(0, 1))(X, Y),
    "jacobian has_aux": lambda t: t.jacobian(lambda x: (jnp.tanh(x), "aux"), has_aux=True)(X),
    "holomorphic": lambda t: t.grad(lambda z: jnp.tanh(z) * z, holomorphic=True)(0.3 + 0.2j),
    "holomorphic jacobian": lambda t: t.jacobian(lambda z: jnp.exp(z), holomorphic=True)(X + 1j * Y),
    "complex argument": lambda t: t.grad(lambda z: jnp.sum(jnp.abs(jnp.tanh(z)) ** 2))(X + 1j * Y),
    "complex inside": lambda t: t.grad(lambda x: jnp.sum(jnp.real(jnp.exp(1j * x) * jnp.tanh(x))))(X),
    "allow_int": lambda t: t.grad(lambda i, x: jnp.tanh(x) * i, (0, 1), allow_int=True)(jnp.array(3), Z),
    "float0 of a bool": lambda t: t.vjp(lambda b, x: jnp.where(b, jnp.tanh(x), x), X > 0.15, X)[1](Y),
    "keyword arguments": lambda t: t.grad(configured)(X, jnp.tanh, repeat=2, mode="shifted", offset=Y),
    "not arrays": lambda t: t.value_and_grad(configured)(X, activation=jax.nn.sigmoid, repeat=3),
    "method": lambda t: t.grad(Model(Y).loss)(X),
    "callable object": lambda t: t.grad(Model(Y))(X),
    "classmethod": lambda t: t.grad(Model.unit_loss)(X),
    "object as argument": lambda t: t.grad(lambda x, model: model.loss(x))(X, Model(Y)),
    "partial": lambda t: t.grad(functools.partial(configured, repeat=1, activation=jnp.exp))(X),
    "builtin": lambda t: t.grad(jnp.tanh)(Z),
    "new key": lambda t: t.grad(dropped)(X, jax.random.key(0)),
    "old key": lambda t: t.grad(dropped)(X, jax.random.PRNGKey(0)),
    "key in aux": lambda t: jax.random.key_data(
        t.grad(lambda x, k: (jnp.tanh(x), jax.random.fold_in(k, 1)), has_aux=True)(Z, jax.random.key(0))[1]
    ),
    "python scalar": lambda t: t.value_and_grad(lambda x: jnp.tanh(x) * 2)(0.5),
    "weak and strong": lambda t: t.value_and_grad(lambda x, y: jnp.sum(jnp.tanh(x) * y), (0, 1))(0.5, Y),
    "weak result": lambda t: jax.jit(t.with_rules(lambda x: (jnp.tanh(x), jnp.exp(x) + 1, x)))(0.5),
    "numpy argument": lambda t: t.grad(lambda x: jnp.sum(jnp.tanh(x)))(np.array([0.1, 0.2])),
    "numpy scalar": lambda t: t.value_and_grad(lambda x: jnp.tanh(x) * 2)(np.float32(0.5)),
    "empty": lambda t: t.value_and_grad(lambda x: jnp.sum(jnp.tanh(x)))(jnp.zeros((0, 3))),
    "constant function": lambda t: t.value_and_grad(lambda x: 1.0)(X),
    "argument returned": lambda t: t.vjp(lambda x, y: (x, y, x), X, Y)[1]((X, Y, Z * X)),
    "none and empty pytrees": lambda t: t.grad(lambda p: jnp.tanh(p["a"]))({"a": Z, "b": None, "c": ()}),
    "closures over tracers": nested,
    "closures under jit": lambda t: jax.jit(lambda: nested(t))(),
    "closures under vmap": lambda t: jax.vmap(lambda w: t.grad(lambda x: jnp.sum(jnp.tanh(w * x)))(X))(Y),
    "closures in scan": lambda t: lax.scan(lambda c, w: (c + t.grad(lambda x: jnp.tanh(x * w))(Z), c), Z, Y),
    "Hessian": lambda t: jax.jacfwd(t.grad(lambda x: jnp.sum(jnp.tanh(x) ** 2)))(X),
    "module": lambda t: eqx.filter(
        eqx.filter_grad(t.with_rules(lambda m, x: jnp.sum(m(x))))(
            eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0)), X
        ),
        eqx.is_array,
    ),
}  # fmt: skip


@pytest.mark.sampled(12)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_same_as_jax(call):
    assert_same(call(OURS), call(JAX))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes(dtype):
    x = jnp.linspace(-1, 1, 4).astype(dtype)
    loss = {
        "mean": lambda x: jnp.mean(jnp.exp(jnp.tanh(x))),
        "mixed": lambda x: jnp.sum(jnp.tanh(x).astype(float)),
    }
    for fun in loss.values():
        actual, expected = fp.value_and_grad(fun, rules=HANDWRITTEN)(x), jax.value_and_grad(fun)(x)
        assert_same(actual, expected, rtol=4 * float(jnp.finfo(dtype).eps))


def test_hessian_vector_product():
    def loss(scale, x, y, *, power):
        return jnp.sum(jnp.tanh(x * y) ** power) * scale

    v, w = jnp.ones(3), jnp.arange(3.0)
    expected = jax.jvp(jax.grad(lambda x, y: loss(2.0, x, y, power=3), (0, 1)), (X, Y), (v, w))[1]
    both = fp.hvp(loss, argnums=(1, 2), rules=HANDWRITTEN)((X, Y), (v, w), 2.0, power=3)
    assert_same(both, expected)
    assert_same(
        fp.hvp(loss, argnums=(-1, 1), rules=HANDWRITTEN)((Y, X), (w, v), 2.0, power=3), expected[::-1]
    )
    single = jax.jvp(jax.grad(lambda x: loss(2.0, x, Y, power=3)), (X,), (v,))[1]
    assert_same(fp.hvp(loss, 1, rules=HANDWRITTEN)(X, v, 2.0, Y, power=3), single)
    assert_same(fp.hvp(loss, np.int64(1), rules=HANDWRITTEN)(X, v, 2.0, Y, power=3), single)
    assert_same(fp.hvp(loss, np.array([1, 2]), rules=HANDWRITTEN)((X, Y), (v, w), 2.0, power=3), both)


ERRORS = {
    "not a rule set": (
        lambda: fp.grad(jnp.tanh, rules={"tanh": None})(1.0),
        fp.RuleError,
        r"rules=\{'tanh': None\} is not a rule set; pass `fp.rules.default` or another RuleSet",
    ),
    "not a scalar": (lambda: fp.grad(jnp.tanh)(X), TypeError, r"tanh returns float64\[3\], .* fp.jacobian"),
    "integer argument": (lambda: fp.grad(jnp.tanh)(1), TypeError, "argument 0 of tanh is 1 .*no derivative"),
    "complex result": (lambda: fp.grad(lambda x: x + 1j)(1.0), TypeError, "real-valued outputs"),
    "argnums too large": (
        lambda: fp.grad(jnp.tanh, argnums=1)(1.0),
        TypeError,
        "argnums=1, but tanh is called with 1",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def branches(x):
    return x if x > 0 else -x


def test_python_branches_on_values():
    assert fp.grad(branches)(-3.0) == -1.0
    assert fp.grad(lambda x, sign: branches(sign) * x)(2.0, -3.0) == 3.0


def concrete(x, flags, repeats):
    """Everything that python may do with the value of an array."""
    if jnp.sum(flags) > 0:
        x = x * float(jnp.maximum(flags[0], 0))
    for _ in range(int(jnp.round(repeats))):
        x = jnp.sin(x)
    return jnp.sum(x) * np.asarray(flags * 2)[1]


@pytest.mark.parametrize("rules", [fp.rules.autodiff, HANDWRITTEN])
def test_python_uses_the_values_of_arrays_that_are_not_differentiated(rules):
    flags, repeats = jnp.array([2.0, 1.0]), jnp.array(2.2)
    expected = jax.value_and_grad(concrete)(X, flags, repeats)
    assert_same(fp.value_and_grad(concrete, rules=rules)(X, flags, repeats), expected)
    each = [jax.vmap(t.grad(lambda x: concrete(x, flags, repeats)))(X) for t in (OURS, JAX)]
    assert_same(*each)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(fp.grad(concrete, rules=rules))(X, flags, repeats)
