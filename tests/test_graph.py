"""Graphs: names, scopes, types, bodies, floating-point operations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import funcprop as fp


def ops(graph):
    return [op.op for op in graph.operators]


def names(graph):
    return [v.name for v in graph.variables]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(4, name="hidden")(x))


def test_variables_and_operators_carry_what_a_reader_needs():
    def fun(params, x):
        with jax.named_scope("net"):
            return jnp.sum(fp.name(jnp.tanh(params["w"] @ x), "h"))

    graph = fp.trace(fun)({"w": jnp.ones((3, 2))}, jnp.ones(2))
    assert names(graph) == ["w", "x", "net/dot_general", "net/h", "net/reduce_sum"]
    product = graph.operators[0]
    assert (product.op, product.scope, product.flops) == ("dot_general", "net", 2 * 3 * 2)
    assert [v.name for v in product.inputs] == ["w", "x"]
    h = graph.operators[1].outputs[0]
    assert (h.shape, h.dtype, h.nbytes, h.named, h.scope) == ((3,), jnp.float64, 24, True, "net")
    assert product.source is not None
    assert "test_graph.py" in product.source
    assert graph.outputs[0].name == "net/reduce_sum"


def test_print_is_an_aligned_table():
    table = str(fp.trace(lambda x: jnp.sum(jnp.tanh(x)))(jnp.ones((128, 1000)))).splitlines()
    assert table[0] == "<lambda>: 2 operators, 256,000 flops"
    assert table[1].split() == ["variable", "operator", "inputs", "type", "bytes", "flops", "scope"]
    column = table[1].index("bytes") + len("bytes")
    assert [line[:column].split()[-1] for line in table[3:]] == ["1,024,000", "1,024,000", "8"]


def test_nothing_is_computed_and_shapes_are_enough():
    huge = jax.ShapeDtypeStruct((1_000_000, 1_000_000), jnp.float32)
    graph = fp.trace(lambda x: x @ x)(huge)
    assert graph.operators[0].nbytes == 4 * 10**12
    assert graph.flops == 2 * 10**18


def test_repeated_names_get_an_index():
    def fun(x):
        for _ in range(3):
            x = fp.name(jnp.sin(x), "a")
        return x

    assert names(fp.trace(fun)(1.0)) == ["x", "a", "a_1", "a_2"]


def test_argument_paths_are_prefixed_only_where_they_clash():
    def fun(online, target, rest):
        return online["w"] * target["w"] * rest["v"]

    graph = fp.trace(fun)({"w": 1.0}, {"w": 2.0}, {"v": 3.0})
    assert names(graph)[:3] == ["online/w", "target/w", "v"]
    assert names(fp.trace(lambda ps: ps[0] * ps[1])([1.0, 2.0]))[:2] == ["ps/0", "ps/1"]


def test_nested_jit_is_shown_as_its_body_and_vmap_does_not_rename():
    def fun(x):
        with jax.named_scope("outer"):
            return jax.vmap(jax.jit(lambda v: fp.name(jnp.sin(jnp.cos(v)), "y")))(x)

    graph = fp.trace(fun)(jnp.ones(3))
    assert ops(graph) == ["cos", "sin"]
    assert names(graph) == ["x", "outer/cos", "outer/y"]


def test_layers_stay_whole_also_under_vmap():
    def loss(w, x):
        return jnp.sum(jax.vmap(lambda row: fp.layers.dense(row, w))(x))

    assert ops(fp.trace(loss)(jnp.ones((2, 3)), jnp.ones((5, 2)))) == ["dense", "reduce_sum"]
    assert "dense" in ops(fp.trace(lambda x, w: fp.layers.dense(x, w))(jnp.ones((5, 2)), jnp.ones((2, 3))))


def test_scopes_and_checkpoint_names_of_foreign_code():
    model = Block()
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 3)))
    graph = fp.trace(model.apply)(params, jnp.ones((2, 3)))
    assert {op.scope for op in graph.operators} == {"Block", "Block/hidden"}
    assert "params/hidden/kernel" in names(graph)

    named = fp.trace(lambda x: jax.ad_checkpoint.checkpoint_name(jnp.sin(x), "kept"))(1.0)
    assert named.operators[0].outputs[0].name == "kept"


@jax.custom_vjp
def with_custom_vjp(x):
    return jnp.sin(x)


with_custom_vjp.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


@jax.custom_jvp
def with_custom_jvp(x):
    return jnp.sin(x)


with_custom_jvp.defjvp(lambda p, t: (jnp.sin(p[0]), t[0] * jnp.cos(p[0])))

CONTROL_FLOW = {
    "scan": lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=2)[0],
    "while": lambda x: jax.lax.while_loop(lambda c: c < 9, lambda c: jnp.sin(c) + 9, x),
    "cond": lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x),
    "checkpoint": jax.checkpoint(jnp.sin),
    "custom_vjp_call": with_custom_vjp,
    "custom_jvp_call": with_custom_jvp,
}


@pytest.mark.parametrize("kind", CONTROL_FLOW)
def test_bodies_are_reachable(kind):
    graph = fp.trace(CONTROL_FLOW[kind])(1.0)
    (holder,) = [op for op in graph.operators if op.bodies]
    assert any("sin" in ops(body) for body in holder.bodies.values())


def test_values_without_a_size_have_no_bytes():
    def fun(x, key):
        ref = jax.new_ref(x)
        ref[...] = ref[...] * 2
        return ref[...] + jax.random.normal(key)

    graph = fp.trace(fun)(1.0, jax.random.key(0))
    assert {v.name: v.nbytes for v in graph.inputs} == {"x": 8, "key": None}
    assert "references" in ops(graph)
    assert "key<fry>[]" in str(graph)

    traced = fp.trace(lambda ref: ref[...])(jax.new_ref(jnp.ones(2)))
    assert traced.inputs[0].nbytes is None


def test_other_arguments_stay_what_they_are():
    def fun(x, n, mode, *, scale):
        assert (n, mode) == (3, "sin")
        for _ in range(n):
            x = getattr(jnp, mode)(x)
        return x * scale

    graph = fp.trace(fun)(1.0, 3, "sin", scale=2.0)
    assert ops(graph) == ["sin"] * 3 + ["mul"]
    assert [v.name for v in graph.inputs] == ["x", "scale"]


def test_a_name_must_be_a_string():
    with pytest.raises(TypeError, match="label=3 is not a name; pass a non-empty string"):
        fp.name(jnp.ones(2), 3)


# --- floating-point operations against XLA ----------------------------------------------------


def mlp(params, x):
    for w in params:
        x = jnp.maximum(x @ w, 0)
    return x


COUNTED = {
    "product": (jnp.matmul, (np.ones((7, 5)), np.ones((5, 3)))),
    "batched product": (
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b),
        (np.ones((4, 7, 5)), np.ones((4, 5, 3))),
    ),
    "mlp": (mlp, ([np.ones((6, 8)), np.ones((8, 4))], np.ones((32, 6)))),
    "elementwise": (lambda x: x * x + x, (np.ones((9, 9)),)),
    "reduction": (jnp.sum, (np.ones((64, 64)),)),
    "reduction by a function": (
        lambda x: jax.lax.reduce(x, 0.0, lambda a, b: a * b + a, (0, 1)),
        (np.ones((64, 64)),),
    ),
    "stacked": (lambda x: jnp.stack([x, x]) * 2.0, (np.ones((9, 9)),)),
    "convolution": (
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (np.ones((2, 8, 8, 3)), np.ones((3, 3, 3, 5))),
    ),
    "grouped convolution": (
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        ),
        (np.ones((2, 8, 8, 4)), np.ones((3, 3, 2, 6))),
    ),
}


@pytest.mark.parametrize("case", COUNTED)
def test_flops_are_those_of_xla(case):
    fun, args = COUNTED[case]
    counted = jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]
    # XLA leaves out the first addition of a reduction.
    assert fp.trace(fun)(*args).flops == pytest.approx(counted, rel=2e-3)


def test_what_is_added_at_places_is_one_addition_each():
    # XLA's count has the arithmetic of its CPU backend's loop in it.
    graph = fp.trace(lambda x: x.at[np.array([0, 2, 2])].add(np.ones((3, 5))))(np.ones((4, 5)))
    assert graph.operators[-1].op == "scatter-add"
    assert graph.operators[-1].flops == 3 * 5


def test_loops_count_every_iteration_and_cond_its_dearest_branch():
    x = jnp.ones((4, 4))
    loop = fp.trace(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=10)[0])(x)
    assert loop.flops == 10 * 2 * 4**3
    branch = fp.trace(lambda x: jax.lax.cond(x[0, 0] > 0, lambda v: v @ v, jnp.sin, x))(x)
    assert branch.operators[-1].flops == 2 * 4**3
