"""Layers equal their plain functions under every transformation; rule sets are immutable values."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_jax import HANDWRITTEN, X, Y, Z, assert_same
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import funcprop as fp
from funcprop.program.layer_calls import layer_call

# --- a layer equals its plain function ----------------------------------------------------------


def affine(x, w):
    return jnp.tanh(x * w) + 1


def weak(x, factor):
    """Results of several types: weak, integer, boolean, a pytree, one of its own arguments."""
    return {
        "weak": jnp.sin(factor) * 2,
        "integer": jnp.argmax(x),
        "mask": x > 0,
        "own": x,
        "pair": (x, factor),
    }


def centred(x):
    return x - lax.pmean(jnp.sin(x), "batch")


def two_trees(params, options):
    return jnp.sum(params["w"] * params["b"][0]) if options is None else options[0]


def configured(x, *, mode, times=2, shape=(3,)):
    return jnp.tile(x if mode == "plain" else -x, times).reshape(times, *shape)


def on_mesh(fun):
    """Under `shard_map` with checked varying axes: one argument varies, the other does not."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    types = []

    def body(x, w):
        y = fun(x, w)
        types.append(str(jax.typeof(y)))
        return y, lax.psum(fun(w, w), ()), lax.psum(jnp.sum(y), "data")

    out_specs = (P("data"), P(), P())
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P("data"), P()), out_specs=out_specs)
    results = mapped(jnp.arange(4.0), jnp.array([0.5, 0.25]))
    return results, types[0]


def explicit_mesh(fun):
    """Explicit axes are part of the types."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(4.0), P("data"))
        types = []

        @jax.jit
        def outer(x):
            y = fun(x, 2.0)
            types.append(str(jax.typeof(y)))
            return y

        value, gradient = outer(x), jax.jit(jax.grad(lambda x: jnp.sum(fun(x, 2.0))))(x)
        return value, gradient, types, [str(jax.typeof(value)), str(jax.typeof(gradient))]


def types_of(fun, *args):
    """The types of the results inside a trace, weak types included."""
    return [str(x) for x in jax.make_jaxpr(fun)(*args).out_avals]


def printed(fun, *args):
    """Prints happen, once, in order."""
    notes = []

    def noisy(x):
        jax.debug.callback(lambda v: notes.append(float(v)), x[0], ordered=True)
        return jnp.tanh(x)

    layer = fun(noisy)
    result = jax.jit(jax.grad(lambda x: jnp.sum(layer(layer(x)))))(X)
    jax.effects_barrier()
    return result, notes


def closed_over(fun):
    """A layer made inside a traced function, around its tracers."""

    def outer(w, x):
        layer = fun(lambda x: jnp.tanh(w * x))
        return jnp.sum(jax.vmap(layer)(x) * lax.scan(lambda c, s: (layer(c) + s, c), x, x)[0])

    return jax.jit(jax.grad(outer, (0, 1)))(Y, X)


class Module:
    """A layer defined in a class body; the instance is a pytree."""

    def __init__(self, w):
        self.w = w

    def plain(self, x):
        return jnp.tanh(self.w * x)

    layer = fp.layer(plain)


jax.tree_util.register_pytree_node(Module, lambda m: ((m.w,), None), lambda _, children: Module(*children))

# Each is called with `fp.layer` and with the identity, and must return the same.
CALLS = {
    "eager": lambda t: t(affine)(X, Y),
    "jit": lambda t: jax.jit(t(affine))(X, Y),
    "grad": lambda t: jax.grad(lambda x: jnp.sum(t(affine)(x, Y)))(X),
    "grad of unused argument": lambda t: jax.grad(t(lambda x, y: x), (0, 1))(Z, Y),
    "jvp": lambda t: jax.jvp(t(affine), (X, Y), (Y, X)),
    "linearize": lambda t: jax.linearize(t(affine), X, Y)[1](Y, X),
    "hessian": lambda t: jax.hessian(lambda x: jnp.sum(t(affine)(x, Y)))(X),
    "vmap": lambda t: jax.vmap(t(affine), in_axes=(0, None), out_axes=1)(X, Y),
    "vmap twice": lambda t: jax.vmap(jax.vmap(t(affine), (None, 0)), (0, None))(X, Y),
    "vmap of grad": lambda t: jax.vmap(jax.grad(t(affine)))(X, Y),
    "grad of vmap": lambda t: jax.grad(lambda w: jnp.sum(jax.vmap(t(affine), (0, None))(X, w)))(Z),
    "scan": lambda t: lax.scan(lambda c, x: (t(affine)(c, x), c), Z, X),
    "remat": lambda t: jax.grad(lambda x: jnp.sum(jax.checkpoint(t(affine))(x, Y)))(X),
    "cond": lambda t: lax.cond(Z > 0, t(affine), lambda x, w: x, X, Y),
    "while": lambda t: lax.while_loop(lambda v: v < 1.5, lambda v: t(affine)(v, v), Z),
    "shard_map": lambda t: on_mesh(t(affine)),
    "explicit mesh": lambda t: explicit_mesh(t(affine)),
    "bfloat16": lambda t: t(affine)(X.astype(jnp.bfloat16), 2.0),
    "bfloat16 types": lambda t: types_of(t(affine), X.astype(jnp.bfloat16), 2.0),
    "weak types": lambda t: types_of(t(weak), X, 0.5),
    "mixed results": lambda t: jax.jit(t(weak))(X, 0.5),
    "mixed results, grad": lambda t: jax.grad(lambda x: jnp.sum(t(weak)(x, x)["weak"]))(X),
    "mixed results, vmap": lambda t: jax.vmap(t(weak), in_axes=(0, None))(jnp.stack([X, Y]), 0.5),
    "axis name": lambda t: jax.vmap(t(centred), axis_name="batch")(X),
    "axis name, grad": lambda t: jax.grad(lambda x: jax.vmap(t(centred), axis_name="batch")(x)[0])(X),
    "axis name, vmap twice": lambda t: jax.vmap(jax.vmap(t(centred), axis_name="batch"))(jnp.stack([X, Y])),
    "debug print": printed,
    "closure over tracers": closed_over,
    "pytrees": lambda t: jax.grad(t(two_trees))({"w": X, "b": [Y]}, None),
    "none or a tuple": lambda t: t(two_trees)({"w": X, "b": [Y]}, (X, Y)),
    "static": lambda t: t(configured)(X, mode="negative", times=3),
    "static in grad": lambda t: jax.grad(lambda x: jnp.sum(t(configured)(x, mode="plain") ** 2))(X),
    "arguments by name": lambda t: t(affine)(w=Y, x=X),
    "default of an array": lambda t: t(lambda x, y=2.0: x * y)(X),
    "star": lambda t: t(lambda *xs: sum(xs))(X, Y, Z),
    "number": lambda t: t(affine)(1, 2.5),
    "numpy": lambda t: t(affine)(np.arange(3.0), np.float32(2)),
    "complex": lambda t: t(affine)(X + 1j, Y),
    "empty": lambda t: t(affine)(X[:0], Z),
    "no array result": lambda t: jax.jit(lambda: jnp.asarray(t(lambda: 1.0)()))(),
    "in a layer": lambda t: jax.grad(lambda x: jnp.sum(t(lambda x: t(affine)(t(jnp.exp)(x), Y))(x)))(X),
    "method": lambda t: jax.grad(lambda m: jnp.sum((m.layer if t is fp.layer else m.plain)(X)))(Module(Y)).w,
    "partial": lambda t: t(functools.partial(configured, mode="plain"))(X),
}  # fmt: skip


@pytest.mark.sampled(16)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_layer_equals_its_function(call):
    actual, expected = call(fp.layer), call(lambda f: f)
    assert_same(actual, expected)


def test_layer_is_one_equation():
    """Also under vmap, and with its name; a differentiated layer is what its derivative is made of."""
    layer = fp.layer(affine)

    def calls(fun, *args):
        return [call for e in jax.make_jaxpr(fun)(*args).eqns if (call := layer_call(e)) is not None]

    (plain,) = calls(layer, X, Y)
    assert (plain.layer, plain.axes, repr(plain)) == (layer, (), "affine(x, w)")
    (mapped,) = calls(jax.vmap(layer, in_axes=(0, None), axis_size=3), X, Y)
    assert [axis.size for axis in mapped.axes] == [3]
    assert calls(jax.grad(lambda x: jnp.sum(layer(x, Y))), X) == []


def test_layer_with_static_arguments_is_traced_once_for_each():
    traced = []

    @fp.layer
    def layer(x, *, times):
        traced.append(times)
        return x * times

    for times in (2, 3, 2, 3):
        layer(X, times=times)
    assert traced == [2, 3]


LAYER_ERRORS = {
    "string": (lambda: fp.layer(lambda x: x)("text"), r"argument x='text' is not an array; .*keyword-only"),
    "string in a pytree": (lambda: fp.layer(lambda p: p)({"a": "text"}), r"argument p\['a'\]='text' is not"),
    "unhashable": (
        lambda: fp.layer(configured)(X, mode="plain", shape=[3]),
        r"layer configured: static argument shape=\[3\] is not hashable; .*Pass a tuple",
    ),
    "missing argument": (
        lambda: fp.layer(affine)(X),
        r"layer affine: missing a required argument: .w.; its signature is affine\(x, w\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), LAYER_ERRORS.values(), ids=LAYER_ERRORS)
def test_layer_errors(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_layer_keeps_what_describes_the_function():
    layer = fp.layer(rule=None, init=lambda key: ())(affine)
    assert (layer.__name__, layer.__module__, repr(layer)) == ("affine", __name__, "<layer affine>")
    assert layer.init(None) == ()


# --- rule sets ----------------------------------------------------------------------------------


def rule(**kwargs):
    return fp.Rule(lambda x: (x, ()), lambda r, ct, needs: (ct,), **kwargs)


SQUARE = fp.layer(rule=rule(platforms={"tpu"}))(jnp.square)

RULE_SET_ERRORS = {
    "unknown operator": ({"tanhh": rule()}, r"unknown operator 'tanhh'; use the name of a JAX primitive"),
    "neither": ({jnp.tanh: rule()}, r"neither the name of a JAX primitive nor a layer; .*fp.layer"),
    "no rule": ({"tanh": lambda x: x}, r"'tanh' maps to <function .*>; give an `fp.Rule`, or None"),
}


@pytest.mark.parametrize(("changes", "message"), RULE_SET_ERRORS.values(), ids=RULE_SET_ERRORS)
def test_rule_set_errors(changes, message):
    with pytest.raises(fp.RuleError, match=message):
        fp.rules.autodiff.replace(changes)
    with pytest.raises(fp.RuleError, match=message):
        fp.RuleSet("mine", changes)


def test_rule_sets_are_values():
    tanh = rule()
    one, two = (fp.rules.autodiff.replace({"tanh": tanh}) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != fp.rules.autodiff
    assert one != fp.rules.autodiff.replace({"tanh": rule()})
    assert one.replace({"tanh": None}) != fp.rules.autodiff, "chosen autodiff is remembered"
    assert len({one, two, fp.rules.autodiff}) == 2
    assert one["tanh"] is tanh
    assert dict(one) == {"tanh": tanh}
    assert dict(fp.rules.autodiff) == {}, "the original is as it was"
    with pytest.raises(KeyError):
        one["exp"]


@pytest.mark.parametrize(
    "change",
    [
        lambda rules: rules.__setitem__("tanh", rule()),
        lambda rules: setattr(rules, "name", "other"),
        lambda rules: setattr(rules["tanh"], "backward", None),
        lambda rules: delattr(rules, "name"),
    ],
)
def test_rule_sets_are_immutable(change):
    rules = fp.rules.autodiff.replace({"tanh": rule()})
    with pytest.raises((AttributeError, TypeError)):
        change(rules)


def test_default_has_what_wins_on_the_platform():
    assert set(fp.rules.autodiff) == set()
    assert set(fp.rules.default) < set(HANDWRITTEN)
    for rules, on_cpu, on_tpu in (
        (fp.rules.default, None, SQUARE.rule),
        (HANDWRITTEN, SQUARE.rule, SQUARE.rule),
    ):
        assert (rules.find(SQUARE, "cpu"), rules.find(SQUARE, "tpu")) == (on_cpu, on_tpu)
    assert fp.rules.autodiff.find(SQUARE, "tpu") is None
    assert fp.rules.default.replace({SQUARE: SQUARE.rule}).find(SQUARE, "cpu") is SQUARE.rule
    assert HANDWRITTEN.replace({SQUARE: None}).find(SQUARE, "tpu") is None


def test_rule_set_prints_as_a_table():
    printed = repr(fp.rules.autodiff.replace({"tanh": rule(), "exp": None, SQUARE: rule(platforms={"cpu"})}))
    assert printed.splitlines()[0] == "RuleSet 'autodiff' on cpu: 2 rules"
    rows = {row.split("  ")[1].strip(): row for row in printed.splitlines()[1:]}
    assert "active" in rows["tanh"]
    assert "autodiff" in rows["exp"]
    assert "wins on: cpu" in rows["layer square"]
    assert "each layer's own" in repr(HANDWRITTEN)
