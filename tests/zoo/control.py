"""Control flow, custom derivatives, effects, named axes, several devices, layers."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import funcprop as fp
from zoo.entry import Family, normal

FAMILY = Family()


# --- control flow -----------------------------------------------------------------------------


@FAMILY()
def scan_in_cond_in_scan():
    def loss(w, xs):
        def inner(h, x):
            h = jnp.tanh(w @ h + x)
            return h, jnp.sum(jnp.exp(h))

        def outer(h, x):
            def taken(h):
                h, sums = lax.scan(inner, h, jnp.stack([x, x * x]))
                return h + sums.sum()

            h = lax.cond(x[0] > 0, taken, lambda h: jax.nn.sigmoid(h) - x, h)
            return h, h

        h, hs = lax.scan(outer, jnp.ones(3), xs)
        return jnp.sum(h) + jnp.sum(hs**2)

    return loss, (normal(0, 3, 3, scale=0.5), normal(1, 4, 3))


@FAMILY()
def switch_in_map_in_remat():
    def loss(w, xs):
        branches = (jnp.tanh, lambda x: jnp.sqrt(x * x + 1), lambda x: w * jnp.exp(-x * x))

        @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
        def block(x):
            return lax.map(lambda ix: lax.switch(ix[0], branches, ix[1]) * w, (jnp.arange(3), x))

        return jnp.sum(jax.vmap(block)(xs) ** 2)

    return loss, (normal(0, 3), normal(1, 2, 3, 3))


@FAMILY(twice=False)
def while_loop_beside_scan():
    """A while loop with rules inside and no derivative needed; a fori_loop that becomes a scan."""

    def loss(w, x):
        steps = lax.while_loop(lambda s: s[1] < 3.0, lambda s: (s[0] + 1, s[1] + jnp.exp(s[1])), (0, 0.1))
        scale = lax.while_loop(
            lambda v: v < 5, lambda v: v * 2 + jnp.tanh(v), lax.stop_gradient(jnp.sum(x**2))
        )
        y = lax.fori_loop(0, 3, lambda i, y: jnp.tanh(w * y + i), x)
        return jnp.sum(y) * steps[0] + scale * jnp.sum(w)

    return loss, (normal(0, 3), normal(1, 3))


@FAMILY()
def checkpoint_policies():
    def loss(params, x):
        for i, policy in enumerate(
            (
                None,
                jax.checkpoint_policies.everything_saveable,
                jax.checkpoint_policies.save_only_these_names("hidden"),
                jax.checkpoint_policies.save_from_both_policies(
                    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
                    jax.checkpoint_policies.save_any_names_but_these("hidden"),
                ),
            )
        ):

            @partial(jax.checkpoint, policy=policy, prevent_cse=bool(i % 2), static_argnums=2)
            def block(w, x, power):
                hidden = jax.ad_checkpoint.checkpoint_name(jnp.tanh(x @ w), "hidden")
                return jnp.exp(-(hidden**power)) @ w.T

            x = x + block(params[i], x, 2)
        return jnp.sum(x**2)

    return loss, (tuple(normal(i, 3, 4) for i in range(4)), normal(5, 2, 3))


@FAMILY()
def jitted_subfunctions():
    """A donated argument, a static one, a jit called twice, and a jit in a jit."""

    @partial(jax.jit, donate_argnums=1, static_argnames="power")
    def inner(w, x, *, power):
        return jnp.tanh(w @ x) ** power

    @jax.jit
    def outer(w, x):
        return inner(w, inner(w, x, power=2), power=1)

    return lambda w, x: jnp.sum(outer(w, outer(w, x + 1))), (normal(0, 3, 3), normal(1, 3))


# --- custom derivatives -----------------------------------------------------------------------


@FAMILY()
def custom_jvp():
    @jax.custom_jvp
    def clipped_exp(x):
        return jnp.exp(jnp.minimum(x, 2.0))

    @clipped_exp.defjvp
    def _(primals, tangents):
        # Deliberately not the true derivative: a rule for `exp` inside must not replace it.
        y = clipped_exp(*primals)
        return y, y * tangents[0] * 3

    return lambda w, x: jnp.sum(jnp.tanh(clipped_exp(w * x))), (normal(0, 4), normal(1, 4))


@FAMILY()
def custom_vjp():
    @partial(jax.custom_vjp, nondiff_argnums=(1,))
    def reversed_tanh(x, scale):
        return jnp.tanh(x) * scale

    reversed_tanh.defvjp(
        lambda x, scale: (jnp.tanh(x) * scale, x),
        lambda scale, x, ct: (-scale * ct * jnp.cos(x),),
    )
    return lambda w, x: jnp.sum(jnp.exp(reversed_tanh(w * x, 2.0))), (normal(0, 4), normal(1, 4))


@FAMILY()
def custom_derivatives_in_control_flow():
    @jax.custom_jvp
    def softsign(x):
        return x / (1 + jnp.sqrt(x * x))

    softsign.defjvps(lambda dot, y, x: dot * (1 - jnp.abs(y)) ** 2)

    @jax.custom_gradient
    def noisy(x):
        return jnp.exp(x), lambda ct: ct * jnp.tanh(x)

    def loss(w, xs):
        def step(h, x):
            h = lax.cond(jnp.sum(x) > 0, lambda h: softsign(w * h + x), lambda h: noisy(-h * h) * w, h)
            return jnp.tanh(h), None

        return jnp.sum(lax.scan(jax.checkpoint(step), jnp.ones(3), xs)[0])

    return loss, (normal(0, 3), normal(1, 4, 3))


# --- effects ----------------------------------------------------------------------------------


@FAMILY()
def references():
    """Accumulation in a mutable array, in a loop."""

    def loss(w, x):
        total = jax.new_ref(jnp.zeros(3))

        def body(i, h):
            h = jnp.tanh(w * h + x[i])
            total[...] += jnp.exp(h)
            return h

        h = lax.fori_loop(0, 3, body, jnp.ones(3))
        return jnp.sum(total[...] * h)

    return loss, (normal(0, 3), normal(1, 3, 3))


@FAMILY()
def debug_prints_and_callbacks():
    def loss(w, x):
        y = jnp.tanh(w * x)
        jax.debug.print("tanh {y}", y=y[0])
        jax.debug.callback(lambda v: None, jnp.exp(y), ordered=True)
        host = jax.pure_callback(np.sort, jax.ShapeDtypeStruct((3,), float), lax.stop_gradient(y))
        return jnp.sum(y * host)

    return loss, (normal(0, 3), normal(1, 3))


# --- names and devices ------------------------------------------------------------------------


@FAMILY()
def named_axes():
    def loss(w, xs):
        def of_one(x):
            h = jnp.tanh(x @ w)
            centred = h - lax.pmean(h, "batch")
            shifted = lax.ppermute(jnp.exp(centred), "batch", [(0, 1), (1, 2), (2, 0)])
            return lax.psum(shifted, "batch") * lax.axis_index("batch") + lax.all_gather(h, "batch").sum(0)

        return jnp.sum(jax.vmap(of_one, axis_name="batch")(xs) ** 2)

    return loss, (normal(0, 3, 2), normal(1, 3, 3))


@FAMILY()
def shard_map_data_parallel():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))

    def loss(params, x):
        @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        def mapped(params, x):
            h = jnp.tanh(x @ params["w"] + params["b"])
            return lax.pmean(jnp.sum(jnp.exp(-h) @ params["v"]), "data")

        return mapped(params, x)

    params = {"w": normal(0, 3, 2), "b": normal(1, 2), "v": normal(2, 2)}
    return loss, (params, normal(3, 8, 3))


@FAMILY()
def shard_map_tensor_parallel():
    """Weights over one axis, the batch over the other, a scan inside, jit with shardings outside."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))

    def loss(w, x):
        @partial(jax.shard_map, mesh=mesh, in_specs=(P(None, "model"), P("data")), out_specs=P("data"))
        def mapped(w, x):
            def step(h, _):
                return jnp.tanh(lax.psum(jax.nn.sigmoid(h @ w) @ w.T, "model")), None

            return lax.scan(step, x, None, length=2)[0]

        place = partial(jax.jit, out_shardings=NamedSharding(mesh, P("data", None)))
        return jnp.sum(place(jnp.exp)(mapped(w, x)))

    return loss, (normal(0, 3, 4), normal(1, 4, 3))


# --- layers with their own rule ---------------------------------------------------------------


class DenseTanhResiduals(NamedTuple):
    y: jax.Array
    x: jax.Array
    w: jax.Array


def dense_tanh_forward(x, params, *, scale=1.0):
    y = jnp.tanh(scale * (x @ params["w"]) + params["b"])
    return y, DenseTanhResiduals(y, x, params["w"])


def dense_tanh_backward(residuals, cotangent, needs, *, scale=1.0):
    dz = cotangent * (1 - residuals.y**2)
    dx = scale * dz @ residuals.w.T
    batch = tuple(range(dz.ndim - 1))
    dw = scale * jnp.tensordot(residuals.x, dz, (batch, batch))
    return dx, {"b": jnp.sum(dz, batch), "w": dw}


@fp.layer(rule=fp.Rule(dense_tanh_forward, dense_tanh_backward))
def dense_tanh(x, params, *, scale=1.0):
    return jnp.tanh(scale * (x @ params["w"]) + params["b"])


@fp.layer
def squared_distance(x, y):
    """A layer without a rule."""
    return jnp.sum((jnp.exp(x) - y) ** 2)


LAYER_PARAMS = {"w": normal(0, 3, 3), "b": normal(1, 3)}


@FAMILY()
def layers():
    def loss(params, x, y):
        h = dense_tanh(x, params, scale=0.5)
        return squared_distance(dense_tanh(h, params), y)

    return loss, (LAYER_PARAMS, normal(2, 4, 3), normal(3, 4, 3))


@FAMILY()
def layers_under_vmap_and_scan():
    """A shared and a mapped parameter, a vmap in a scan, and a scan in a vmap."""

    def loss(params, x):
        over_examples = jax.vmap(dense_tanh, in_axes=(0, None))
        h, _ = lax.scan(lambda h, _: (over_examples(h, params), None), x, None, length=2)
        stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p, p * p]), params)

        def sequence(x, params):
            return lax.scan(lambda h, s: (dense_tanh(s * h, params), h), x, jnp.array([1.0, -0.5]))[0]

        return jnp.sum(jax.vmap(sequence)(h, stacked) ** 2)

    return loss, (LAYER_PARAMS, normal(2, 4, 3))


@FAMILY()
def layers_under_shard_map_and_remat():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def loss(params, x):
        @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
        def mapped(params, x):
            return jax.checkpoint(lambda x: dense_tanh(dense_tanh(x, params), params))(x)

        return squared_distance(mapped(params, x), 0.5 * x)

    return loss, (LAYER_PARAMS, normal(2, 4, 3))


@FAMILY(tolerance=5e-2, twice=False)
def layers_in_bfloat16():
    def loss(params, x):
        low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return jnp.sum(dense_tanh(x.astype(jnp.bfloat16), low).astype(jnp.float32) ** 2)

    return loss, (jax.tree.map(lambda p: p.astype(jnp.float32), LAYER_PARAMS), normal(2, 4, 3))
