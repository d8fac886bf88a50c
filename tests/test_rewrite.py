"""The rewrite changes what has a rule and nothing else: bodies, effects, caches, exported programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_jax import HANDWRITTEN, JAX, OURS, X, Y, Z, assert_same
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import funcprop as fp


def without_rules(x, y):
    """Jit, scan, cond, checkpoint and a custom derivative, and no operator that has a rule."""
    z = jax.jit(jnp.multiply)(x, y)
    z, _ = lax.scan(lambda c, s: (c * s + jnp.sin(c), None), z, y)
    z = lax.cond(jnp.sum(z) > 0, jnp.cos, jnp.sin, z)
    return jnp.sum(jax.checkpoint(lambda z: jnp.logaddexp(z, 1.0) ** 2)(z))


@pytest.mark.parametrize("rules", [fp.rules.autodiff, HANDWRITTEN], ids=lambda rules: rules.name)
def test_jaxpr_without_rules_is_jax(rules):
    assert str(jax.make_jaxpr(fp.grad(without_rules, rules=rules))(X, Y)) == str(
        jax.make_jaxpr(jax.grad(without_rules))(X, Y)
    )


def equations(jaxpr, name):
    """All equations of one primitive, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for sub in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(sub, "eqns"):
                yield from equations(sub, name)


def params_but_jaxpr(fun, name, *args):
    (eqn,) = equations(jax.make_jaxpr(fun)(*args), name)
    return {key: value for key, value in eqn.params.items() if key not in ("jaxpr", "call_jaxpr")}


def test_jit_keeps_name_shardings_and_donation():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spread, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def body(x, y):
        return jnp.tanh(x) * y

    jitted = jax.jit(
        body,
        in_shardings=(spread, whole),
        out_shardings=spread,
        donate_argnums=0,
        inline=False,
        keep_unused=True,
    )
    x = jnp.ones(8)
    assert params_but_jaxpr(OURS.with_rules(jitted), "jit", x, x) == params_but_jaxpr(jitted, "jit", x, x)
    assert params_but_jaxpr(jitted, "jit", x, x)["donated_invars"] == (True, False)
    actual = fp.grad(lambda x, y: jnp.sum(jitted(x + 1, y)), rules=HANDWRITTEN)(x, x)
    assert_same(actual, jax.grad(lambda x, y: jnp.sum(body(x + 1, y)))(x, x))


CHECKPOINT = jax.make_jaxpr(jax.checkpoint(jnp.sin))(0.0).eqns[0].primitive.name
CHECKPOINTS = {
    "nothing": {},
    "no prevent_cse": {"prevent_cse": False},
    "dots": {"policy": jax.checkpoint_policies.dots_saveable},
    "names": {"policy": jax.checkpoint_policies.save_only_these_names("z")},
    "offload": {
        "policy": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=["z"], names_which_can_be_offloaded=[],
            offload_src="device", offload_dst="pinned_host",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoint_is_honoured(options):
    def block(x, w):
        z = jax.ad_checkpoint.checkpoint_name(jnp.sin(x @ w), "z")
        return jnp.cos(z @ w)

    def saved(fun):
        leaves = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(fun, *args)[1], X, w))
        return sorted((leaf.shape, str(leaf.dtype)) for leaf in leaves)

    w = jnp.ones((3, 3))
    plain = jax.checkpoint(block, **options)
    # A rule for something else in the block, so that its body is really rewritten.
    ruled = jax.checkpoint(lambda x, w: block(x, w) + lax.stop_gradient(jnp.tanh(X)), **options)
    assert params_but_jaxpr(OURS.with_rules(ruled), CHECKPOINT, X, w) == params_but_jaxpr(
        ruled, CHECKPOINT, X, w
    )
    assert saved(OURS.with_rules(plain)) == saved(plain)
    assert saved(OURS.with_rules(ruled)) == saved(ruled)
    assert_same(OURS.grad(lambda x: jnp.sum(ruled(x, w)))(X), jax.grad(lambda x: jnp.sum(plain(x, w)))(X))


def test_checkpoint_recomputes_a_rule():
    """Inside `jax.checkpoint` a rule's residuals are not saved either."""
    block = OURS.with_rules(jax.checkpoint(lambda x: jnp.exp(jnp.tanh(jnp.tanh(x)))))
    saved = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(block, x)[1], X))
    assert [leaf.shape for leaf in saved] == [X.shape]


def test_users_derivative_wins():
    @jax.custom_jvp
    def tripled(x):
        return jnp.tanh(x)

    tripled.defjvp(lambda primals, tangents: (tripled(*primals), 3 * tangents[0]))

    @jax.custom_vjp
    def doubled(x):
        return jnp.tanh(x)

    doubled.defvjp(lambda x: (jnp.tanh(x), None), lambda _, ct: (2 * ct,))
    assert fp.grad(tripled, rules=HANDWRITTEN)(1.0) == 3
    assert (
        fp.grad(lambda x: lax.scan(lambda c, _: (doubled(c), None), x, None, 3)[0], rules=HANDWRITTEN)(1.0)
        == 8
    )


# --- effects ----------------------------------------------------------------------------------


def test_prints_and_references_keep_their_order():
    def loss(x, note):
        ref = jax.new_ref(x)
        for i in range(3):
            jax.debug.callback(note, i, ref[0], ordered=True)
            ref[...] = jnp.tanh(ref[...])
            jax.debug.callback(note, i + 10, jnp.exp(ref[0]), ordered=True)
            ref[0] += x[1]
        return jnp.sum(ref[...])

    def noted(t):
        notes = []
        gradient = t.grad(lambda x: loss(x, lambda i, value: notes.append((int(i), float(value)))))
        result = jax.jit(gradient)(X)
        jax.effects_barrier()
        return result, notes

    (actual, ours), (expected, theirs) = noted(OURS), noted(JAX)
    assert_same(actual, expected)
    assert [i for i, _ in ours] == [i for i, _ in theirs] == [0, 10, 1, 11, 2, 12]
    np.testing.assert_allclose([v for _, v in ours], [v for _, v in theirs])


def test_reference_as_an_argument():
    def accumulate(x, total):
        total[...] += lax.stop_gradient(jnp.tanh(x))
        return jnp.sum(jnp.exp(x) * total[...])

    def called(t):
        total = jax.new_ref(jnp.ones(3))
        values = [t.grad(accumulate)(X, total), jax.jit(t.grad(accumulate))(X, total)]
        return values, total[...]

    assert_same(called(OURS), called(JAX))


# --- caches -----------------------------------------------------------------------------------


def scaled_tanh(factor):
    """Rules under which the derivative of tanh is `factor` times what it should be."""
    rule = HANDWRITTEN["tanh"]

    def backward(*args, **static):
        return (factor * rule.backward(*args, **static)[0],)

    return HANDWRITTEN.replace({"tanh": fp.Rule(rule.forward, backward)})


def test_rule_sets_do_not_share_a_cache():
    inner = jax.jit(jnp.tanh)
    for factor in (2.0, 3.0, 2.0):
        for fun in (inner, lambda x: lax.scan(lambda c, _: (inner(c), None), x, None, 1)[0]):
            fun = fp.with_rules(fun, scaled_tanh(factor))
            np.testing.assert_allclose(jax.jit(jax.grad(fun))(0.5), factor * jax.grad(inner)(0.5))
    np.testing.assert_allclose(fp.grad(inner)(0.5), jax.grad(inner)(0.5))


@pytest.mark.parametrize("shape", [(2,), (3,)], ids=str)
def test_jitted_function_called_twice_is_compiled_once(shape):
    compiled = []

    def note(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    inner = jax.jit(lambda x: jnp.sum(jnp.tanh(x) * jnp.exp(x)))
    gradient = fp.grad(lambda x: inner(x) * 2, rules=HANDWRITTEN)
    x = jnp.ones(shape)
    jax.block_until_ready(gradient(x))
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        jax.block_until_ready(gradient(x))
        assert compiled == []
        gradient(jnp.ones((5, 5)))
        assert compiled, "nothing is noted, so nothing was tested"
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_export_round_trip():
    gradient = jax.jit(
        fp.grad(lambda x, y, z: jnp.sum(jnp.tanh(x * y)) * jnp.exp(z), argnums=(0, 1), rules=HANDWRITTEN)
    )
    exported = jax.export.export(gradient, platforms=("cpu", "cuda", "tpu"))(X, Y, Z)
    again = jax.export.deserialize(exported.serialize())
    assert_same(again.call(X, Y, Z), gradient(X, Y, Z))


def test_matches_tells_what_fires_and_where():
    def fun(x):
        with jax.named_scope("outer"):
            return jnp.sum(lax.map(jnp.tanh, x)) + jnp.sum(jnp.exp(x))

    found = {m.operator: m for m in fp.matches(fun, HANDWRITTEN)(jax.ShapeDtypeStruct((3,), float))}
    assert set(found) >= {"tanh", "exp"}
    assert found["tanh"].reason is None
    assert (found["tanh"].scope, found["exp"].scope) == ("outer", "outer")
    assert "test_rewrite.py" in found["tanh"].source


def test_matches_takes_whatever_the_function_takes():
    def fun(name, x, power, *, model):
        return getattr(jnp, name)(x) ** power + model["bias"] + len(model["tag"])

    found = fp.matches(fun, HANDWRITTEN)("tanh", X, 3, model={"bias": 1.0, "tag": "abc"})
    assert [(m.operator, m.reason) for m in found] == [("tanh", None)]


def test_a_layer_that_closes_over_a_traced_value_is_listed_and_leaves_no_trace():
    def fun(w, x):
        @fp.layer(rule=fp.Rule(lambda x: (2 * x, ()), lambda r, g, needs: (2 * g,)))
        def scaled(x):
            return w * x

        return jnp.sum(scaled(x))

    (found,) = fp.matches(fun, HANDWRITTEN)(2.0, X)
    assert (found.operator, found.reason) == (
        "scaled",
        "it closes over a traced value; pass the value as an argument",
    )
    assert [op.op for op in fp.trace(fun)(X, X)] == ["mul", "reduce_sum"]
    assert_same(fp.grad(fun, (0, 1), rules=HANDWRITTEN)(2.0, X), jax.grad(fun, (0, 1))(2.0, X))


def test_a_custom_derivative_may_index_a_constant_by_a_traced_integer():
    """JAX keeps a constant of a jaxpr as NumPy's array; the user's rule expects JAX's."""

    @jax.custom_vjp
    def times_sum(x, t):
        return x * jnp.sum(t)

    def backward(t, g):
        return jax.lax.fori_loop(0, 2, lambda i, total: total + t[i] * g, jnp.zeros_like(g)), None

    times_sum.defvjp(lambda x, t: (times_sum(x, t), t), backward)

    def fun(x):
        return times_sum(x, jnp.array([1.0, 2.0]))

    assert float(fp.grad(fun)(2.0)) == 3.0
    assert float(jax.jit(fp.grad(fun))(2.0)) == 3.0
    assert float(fp.backprop(fun)(2.0).gradient) == 3.0
    looped = fp.grad(lambda x: jax.lax.scan(lambda c, _: (fun(c), None), x, None, length=2)[0])
    assert float(looped(2.0)) == 9.0


def test_a_result_that_is_shared_under_vmap_beside_one_that_is_not():
    @fp.layer(
        rule=fp.Rule(lambda x, k: ((x * k, x + 1), (x, k)), lambda r, g, n: (g[0] * r[1] + g[1], g[0] * r[0]))
    )
    def both(x, k):
        return x * k, x + 1

    over_k = jax.vmap(both, (None, 0), (0, None))
    loss = lambda x, k: sum(jnp.sum(y**2) for y in over_k(x, k))  # noqa: E731
    x, k = jnp.array(2.0), jnp.array([3.0, 5.0])
    expected = jax.grad(loss, (0, 1))(x, k)
    assert jax.tree.all(
        jax.tree.map(jnp.allclose, fp.grad(loss, (0, 1), rules=fp.rules.handwritten)(x, k), expected)
    )
    (found,) = fp.matches(loss, fp.rules.handwritten)(x, k)
    assert found.reason == "under vmap, a result is the same for all examples and others are not"
