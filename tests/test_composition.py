"""Every ordered pair of JAX's transformations, with `with_rules` under, between and over them.

Two things are asked of each composition: its value is that of the same composition of the plain function, and
the hand-written backward runs where it should. Each rule signs the cotangents it returns with an operation
that nothing else in the program contains and that every transformation keeps: rounding to a certain number of
bits, far below the tolerance. It is linear, its own transpose, and one operation under `vmap`. The signatures
are counted in the final program, after what does not contribute to its result has been removed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.interpreters import partial_eval
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import funcprop as fp

SIGNATURES = {"layer": 48, "primitive": 49}  # bits of the mantissa, of 52


def signed(cotangent, by):
    return lax.reduce_precision(cotangent, exponent_bits=11, mantissa_bits=SIGNATURES[by])


def layer_backward(residuals, cotangent, needs):
    x, w = residuals
    ct = signed(cotangent, "layer") * jnp.cos(x @ w)
    return w @ ct, jnp.outer(x, ct)


def tanh_backward(residuals, cotangent, needs, **_):
    return (signed(cotangent, "primitive") * (1 - residuals[0] ** 2),)


@fp.layer(rule=fp.Rule(lambda x, w: (jnp.sin(x @ w), (x, w)), layer_backward))
def sine_layer(x, w):
    return jnp.sin(x @ w)


def tanh_forward(x, **static):
    y = lax.tanh(x, **static)
    return y, (y,)


RULES = fp.rules.handwritten.replace({"tanh": fp.Rule(tanh_forward, tanh_backward)})


def function(z):
    """Both operators, of both arguments of the layer."""
    return jnp.tanh(sine_layer(z[0], z[1:]))


Z = 0.1 * jnp.arange(6.0).reshape(3, 2)


# --- the transformations ----------------------------------------------------------------------
# Each takes a function of Z's shape to another such function, whatever the shape of its result.


def scalar(f):
    return lambda z: jnp.sum(f(z))


def vmap(f, axis):
    return lambda z: jax.vmap(f)(jnp.stack([z, 2 * z]))


def scan(f, axis):
    return lambda z: lax.scan(lambda carry, s: (carry * s, f(carry)), z, jnp.array([0.5, 0.7]))[1]


def cond(f, axis):
    def otherwise(z):
        y = jax.eval_shape(f, z)
        return jnp.full(
            y.shape, 0 * jnp.sum(z), y.dtype
        )  # Inside `shard_map` it varies as the argument does.

    return lambda z: lax.cond(z[0, 1] > 0, f, otherwise, z)


def shard_map(f, axis):
    def on_shard(z):
        return f(z[0])[None]

    mapped = jax.shard_map(on_shard, in_specs=P(axis), out_specs=P(axis), axis_names={axis})
    return lambda z: mapped(jnp.stack([z, 2 * z]))


TRANSFORMATIONS = {
    "jit": lambda f, axis: jax.jit(f),
    "vmap": vmap,
    "grad": lambda f, axis: jax.grad(scalar(f)),
    "jvp": lambda f, axis: lambda z: jax.jvp(f, (z,), (jnp.cos(z),))[1],
    "linearize": lambda f, axis: lambda z: jax.linearize(f, z)[1](jnp.cos(z)),
    "hessian": lambda f, axis: jax.hessian(scalar(f)),
    "scan": scan,
    "remat": lambda f, axis: jax.checkpoint(f),
    "cond": cond,
    "shard_map": shard_map,
}
DIFFERENTIATING = {"grad", "jvp", "linearize", "hessian"}

with_rules = functools.partial(fp.with_rules, rules=RULES)

PLACES = {
    "under": lambda outer, inner: outer(inner(with_rules(function))),
    "between": lambda outer, inner: outer(with_rules(inner(function))),
    "over": lambda outer, inner: with_rules(outer(inner(function))),
}


def check_signatures(counts, place, outer, inner):
    """A rule runs where the function that carries it is differentiated, in the first order once."""
    applied = {"under": (outer, inner), "between": (outer,), "over": ()}[place]
    orders = [name for name in applied if name in DIFFERENTIATING]
    expected = {"layer", "primitive"} if orders else set()
    if place == "between" and inner in DIFFERENTIATING:
        # A differentiated layer is its derivative's operators, no layer any more; its `tanh` still is one.
        expected -= {"layer"}
    assert set(counts) == expected, (place, outer, inner)
    if len(orders) == 1 and inner not in DIFFERENTIATING and orders != ["hessian"]:
        assert set(counts.values()) == {1}, (place, outer, inner)


def count_signatures(closed):
    """How many signatures are in the program for what contributes to the results of a jaxpr."""
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    program = jax.jit(jaxpr_as_fun(closed.replace(jaxpr=live))).lower(Z).as_text()
    return {by: count for by, bits in SIGNATURES.items() if (count := program.count(f"e11m{bits}"))}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("outer", TRANSFORMATIONS)
def test_pairs(outer):
    plain, programs = {}, {}
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("outer", "inner"))
    with jax.set_mesh(mesh):
        by_outer = functools.partial(TRANSFORMATIONS[outer], axis="outer")
        for inner, transformation in TRANSFORMATIONS.items():
            by_inner = functools.partial(transformation, axis="inner")
            plain[inner] = by_outer(by_inner(function))
            for place, composed in PLACES.items():
                program = jax.make_jaxpr(composed(by_outer, by_inner))(Z)
                check_signatures(count_signatures(program), place, outer, inner)
                programs[inner, place] = program

        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        def values(z):
            actual = {key: jaxpr_as_fun(program)(z)[0] for key, program in programs.items()}
            return actual, {inner: f(z) for inner, f in plain.items()}

        actual, expected = values(Z)
    for inner, place in programs:
        np.testing.assert_allclose(
            actual[inner, place], expected[inner], rtol=1e-11, atol=1e-12, err_msg=f"{inner}, {place}"
        )
