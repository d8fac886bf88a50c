"""Loops with work taken out of them: same values and gradients as JAX's, one contraction after the loop."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from loop_programs import B, H, T, close, normal, products_in_loops

import funcprop as fp
from funcprop.rules.primitives import loop_bodies, loops

RULES = fp.rules.autodiff.replace({"scan": loops.rule(loops.ALWAYS)})


def recurrent(p, xs):
    def step(h, x):
        h = jnp.tanh(x @ p["V"] + h @ p["U"] + p["b"])
        return h, h

    last, ys = jax.lax.scan(step, jnp.zeros((B, H)), xs)
    return jnp.sum(last**2) + jnp.sum(jnp.sin(ys))


def shared_in_several_places(p, xs):
    """A constant in two products, a sum and a penalty inside of the loop."""

    def step(h, x):
        y = jnp.tanh(h @ p["U"]) @ p["U"].T - p["b"] + x
        return y, jnp.sum(p["U"] ** 2) * jnp.sum(y)

    last, ys = jax.lax.scan(step, jnp.zeros((B, H)), xs, reverse=True)
    return jnp.sum(last) + jnp.sum(ys**2)


def constant_on_the_left(p, xs):
    def step(h, x):
        h = jnp.tanh(p["U"] @ h + p["b"][:, None] - x.T)
        return h, None

    return jnp.sum(jax.lax.scan(step, jnp.zeros((H, B)), xs, unroll=2)[0] ** 2)


def nested(p, xs):
    def outer(h, x):
        def inner(c, _):
            return jnp.tanh(c @ p["U"] + x @ p["V"]), None

        h, _ = jax.lax.scan(inner, h, None, length=3)
        return h + p["b"], jnp.sum(h)

    last, ys = jax.lax.scan(outer, jnp.ones((B, H)), xs)
    return jnp.sum(last * jnp.sum(ys))


def integer_carry(p, xs):
    def step(carry, x):
        count, h = carry
        h = jnp.where(count % 2 == 0, h @ p["U"], h + p["b"]) + x
        return (count + 1, h), count

    (count, h), counts = jax.lax.scan(step, (0, jnp.ones((B, H))), xs)
    return jnp.sum(h**2) * count + jnp.sum(counts)


def convolution(p, xs):
    kernel = p["U"].reshape(1, 1, H, H)

    def step(image, x):
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=layout)
        return jnp.tanh(y + x[:, None, None, :]), None

    return jnp.sum(jax.lax.scan(step, jnp.ones((B, 2, 2, H)), xs)[0] ** 2)


def stacked_layers(p, xs):
    """The weights are scanned, not constant; only the sum with `b` has a constant operand."""
    weights = jnp.stack([p["U"], p["V"]])
    step = lambda h, w: (jax.nn.gelu(h @ w + p["b"]), None)  # noqa: E731
    return jnp.sum(jax.lax.scan(step, xs[0], weights)[0] ** 2)


def batched_product(p, xs):
    weights = jnp.stack([p["U"], p["V"]])

    def step(h, x):
        return jnp.tanh(jnp.einsum("gbi,gij->gbj", h, weights) + x), None

    return jnp.sum(jax.lax.scan(step, jnp.ones((2, B, H)), xs)[0] ** 2)


def products_of_one_carry(p, xs):
    """Two of each kind: plain, with a transposed matrix, with a matrix of three axes."""
    u, v = p["U"], p["V"]

    def step(h, x):
        plain = (h @ u) * (h @ v)
        transposed = jnp.einsum("bi,ji->bj", h, u) - jnp.einsum("bi,ji->bj", h, v)
        heads = jnp.einsum("bi,igj->bgj", h, u[:, None]) * jnp.einsum("bi,igj->bgj", h, v[:, None])
        return jnp.tanh(plain + transposed + heads[:, 0] + x), None

    return jnp.sum(jax.lax.scan(step, jnp.ones((B, H)), xs)[0] ** 2)


LOOPS = {
    f.__name__: f
    for f in (
        recurrent,
        shared_in_several_places,
        constant_on_the_left,
        nested,
        integer_carry,
        convolution,
        stacked_layers,
        batched_product,
        products_of_one_carry,
    )
}
ARGS = ({"U": normal(H, H), "V": normal(H, H, seed=1), "b": normal(H, seed=2)}, normal(T, B, H, seed=3))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", LOOPS)
def test_values_and_gradients(name):
    loop = LOOPS[name]
    assert next(m.reason for m in fp.matches(loop, RULES)(*ARGS) if m.operator == "scan") is None

    @compiled
    def both(*args):
        ours = fp.with_rules(loop, RULES)
        directions = jax.tree.map(jnp.cos, args)
        products = [jax.jvp(jax.grad(f, (0, 1)), args, directions)[1] for f in (ours, loop)]
        mapped = [jax.vmap(jax.grad(f), (None, 0))(args[0], jnp.stack([args[1]] * 2)) for f in (ours, loop)]
        summed = [
            jax.grad(lambda p, f=f: jax.vmap(f, (None, 0))(p, jnp.stack([args[1], args[1] * 2])).sum())(
                args[0]
            )
            for f in (ours, loop)
        ]
        first = [jax.value_and_grad(f, (0, 1))(*args) for f in (ours, loop)]
        return list(zip(first, products, mapped, summed, strict=True))

    ours, theirs = both(*ARGS)
    for actual, expected in zip(ours, theirs, strict=True):
        close(actual, expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("cell", [nn.OptimizedLSTMCell, nn.LSTMCell, nn.GRUCell, nn.SimpleCell])
def test_recurrent_networks_of_flax(cell):
    model = nn.RNN(cell(H, param_dtype=float, dtype=float))
    x = normal(B, T, 4)
    params = jax.tree.map(lambda a: a.astype(float), jax.jit(model.init)(jax.random.key(0), x))

    def loss(params, x):
        return jnp.mean(model.apply(params, x) ** 2)

    close(*compiled(lambda *a: (fp.grad(loss, rules=RULES)(*a), jax.grad(loss)(*a)))(params, x))


def test_weight_gradients_leave_the_loop():
    assert (H, H) in products_in_loops(jax.grad(recurrent), *ARGS)
    assert (H, H) not in products_in_loops(fp.grad(recurrent, rules=RULES), *ARGS)


def test_products_of_scanned_inputs_with_constants_leave_the_loop_and_no_others():
    def loss(p, xs, ys):
        def step(h, inputs):
            x, y = inputs
            h = jnp.tanh(h @ p["U"] + x @ y + x @ p["W"])
            return h, h

        return jnp.sum(jax.lax.scan(step, jnp.ones((2, 7)), (xs, ys))[1] ** 2)

    weights = {"U": normal(7, 7), "W": normal(5, 7)}
    ours = products_in_loops(fp.grad(loss, rules=RULES), weights, normal(T, 2, 5), normal(T, 5, 7))
    assert ours == [(2, 7)] * 3  # h U and x y; then the cotangent of h


def test_a_small_matrix_is_transposed_once_before_the_loop():
    """Backwards `g Uᵀ` is a product of rows with a matrix as it lies."""
    contracted = functools.partial(products_in_loops, of=lambda eqn: eqn.params["dimension_numbers"][0])
    assert ((1,), (1,)) in contracted(jax.grad(recurrent), *ARGS)
    ours = fp.grad(recurrent, rules=RULES)
    assert contracted(ours, *ARGS) == [((1,), (0,))] * 2
    assert products_in_loops(ours, *ARGS) == [(B, H)] * 2


def test_products_of_one_carry_are_one():
    def loss(p, xs):
        step = lambda h, x: (jnp.tanh(h @ p["U"]) * (h @ p["V"]) + x, None)  # noqa: E731
        return jnp.sum(jax.lax.scan(step, jnp.ones((B, H)), xs)[0] ** 2)

    assert products_in_loops(jax.grad(loss), *ARGS)[:2] == [(B, H)] * 2
    assert products_in_loops(fp.grad(loss, rules=RULES), *ARGS) == [(B, 2 * H), (B, H)]


@pytest.mark.parametrize("rows", [(2,), (3, 1), (1,)])
def test_few_rows_meet_a_large_matrix_from_the_right(rows):
    """Backwards `(W gᵀ)ᵀ` from two rows on, without a second copy of the matrix."""
    width = 640  # more than 3 MB

    def loss(w, xs):
        step = lambda h, x: (jnp.tanh(h @ w + x), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(step, jnp.ones(xs.shape[1:]), xs)[0] ** 2)

    args = normal(width, width) / width**0.5, normal(2, *rows, width, seed=1)
    count = int(np.prod(rows))
    products = products_in_loops(fp.grad(loss, rules=RULES), *args)
    assert products == [(*rows, width), (width, count) if count > 1 else (*rows, width)]
    direction = normal(width, width, seed=2)

    @compiled
    def both(*args):
        gradients = fp.grad(loss, rules=RULES), jax.grad(loss)
        return [jax.jvp(lambda w, g=g: g(w, *args[1:]), args[:1], (direction,)) for g in gradients]

    close(*both(*args))


def test_what_the_rule_leaves_alone():
    def reasons(fun, *args):
        return [m.reason for m in fp.matches(fun, RULES)(*args)]

    empty = reasons(
        lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=0)[0], *[jnp.eye(2)] * 2
    )
    assert empty == ["the loop has no steps"]
    plain = reasons(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=3)[0], 1.0)
    assert plain == ["no product of the loop has a constant operand"]

    def searching(c, w):
        step = lambda c, _: (jax.lax.while_loop(lambda v: v.sum() > 9, lambda v: v @ w, c), None)  # noqa: E731
        return jax.lax.scan(step, c, None, length=2)[0]

    assert reasons(searching, jnp.eye(2), jnp.eye(2)) == [
        "the body holds a `while`, which has no reverse mode"
    ]

    def printing(x, w):
        def step(c, _):
            jax.debug.print("{}", c.sum())
            return c @ w, None

        return jax.lax.scan(step, x, None, length=2)[0]

    assert reasons(printing, jnp.eye(2), jnp.eye(2)) == ["it has side effects"]


def cross_entropy_by_chunks(w, xs, labels):
    """The logits of one chunk at a time; each chunk has more rows than the vocabulary matrix."""

    def step(total, chunk):
        x, label = chunk
        z = x @ w
        correct = jnp.take_along_axis(z, label[:, None], -1)[:, 0]
        return total + jnp.sum(jax.nn.logsumexp(z, -1) - correct), None

    return jax.lax.scan(step, 0.0, (xs, labels))[0]


def temporary_bytes(fun, *args):
    return compiled(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("rows", [2, 4, 16])
def test_what_leaves_the_loop_holds_no_more_than_it_saves(rows):
    """With 2 and 4 rows the matrix is large against a step's logits, with 16 it is not."""
    args = normal(16, 64), normal(8, rows, 16), jnp.arange(8 * rows).reshape(8, rows) % 64
    theirs = temporary_bytes(jax.value_and_grad(cross_entropy_by_chunks), *args)
    # Without the guard all logits would be there at once, and their cotangents.
    assert temporary_bytes(fp.value_and_grad(cross_entropy_by_chunks), *args) <= 1.02 * theirs
    assert temporary_bytes(fp.value_and_grad(cross_entropy_by_chunks, rules=RULES), *args) > 1.02 * theirs


@pytest.mark.parametrize(
    ("cell", "steps", "batch", "width"),
    [
        (nn.LSTMCell, 12, 4, 16),
        (nn.LSTMCell, 9, 1, 20),
        (nn.GRUCell, 12, 4, 16),
        (nn.GRUCell, 9, 1, 20),
        # Its constants are made of others: sums of their cotangents would be as large.
        (nn.OptimizedLSTMCell, 10, 1, 96),
        # Their reversed loops read the carry itself, for which a result is copied.
        (nn.MGUCell, 100, 8, 64),
        (nn.GRUCell, 100, 1, 96),
        # Short: the constants are larger than all that is stacked.
        (nn.MGUCell, 33, 1, 64),
    ],
)
def test_recurrent_networks_hold_no_more_than_by_autodiff(cell, steps, batch, width):
    model, x = nn.RNN(cell(width, param_dtype=float, dtype=float)), normal(batch, steps, width)
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params, x):
        return jnp.mean(model.apply(params, x) ** 2)

    ours, theirs = (temporary_bytes(grad(loss), params, x) for grad in (fp.grad, jax.grad))
    assert ours <= 1.02 * theirs


def test_the_primal_is_the_loop_itself():
    """Where nothing is differentiated, nothing is taken out of the loop and nothing is stacked."""

    def loops_of(fun):
        jaxpr = jax.make_jaxpr(fun)(*ARGS).jaxpr
        body = next((e.params["call_jaxpr"] for e in jaxpr.eqns if "call_jaxpr" in e.params), jaxpr)
        (eqn,) = (e for e in getattr(body, "jaxpr", body).eqns if e.primitive.name == "scan")
        inner = [e.primitive.name for e in eqn.params["jaxpr"].jaxpr.eqns]
        return [v.aval.shape for v in eqn.outvars], inner

    assert loops_of(fp.with_rules(recurrent, RULES)) == loops_of(recurrent)


def test_few_and_small_values_are_stacked():
    """`tanh` is its own residual, the carry is the last result, and nothing else is needed."""

    def stacked(gradient):
        jaxpr = jax.make_jaxpr(gradient)(*ARGS).jaxpr
        forward = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
        return sum(v.aval.shape[:1] == (T,) for v in forward.outvars)

    assert stacked(fp.grad(recurrent, rules=RULES)) == 1
    assert stacked(jax.grad(recurrent)) > 1


def test_the_cost_model_says_why():
    small = lambda w, x: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=3)[0]  # noqa: E731
    rules = fp.rules.autodiff.replace(loops.RULES)
    (match,) = fp.matches(small, rules)(normal(2, 2), normal(9, 2))
    assert match.reason.startswith("its constants are small against one step's products")
    (match,) = fp.matches(small, rules)(normal(9, 9), normal(2, 9))
    assert match.reason is None


def test_random_numbers_stay_in_the_loop():
    keys = jax.random.split(jax.random.key(1, impl="rbg"), T)

    def noisy(w):
        def step(h, key):
            return jnp.tanh(jax.random.normal(key, (H,)) @ w) + h, None

        return jax.lax.scan(step, jnp.zeros(H), keys)[0].sum()

    w = normal(H, H)
    close(fp.value_and_grad(noisy, rules=RULES)(w), jax.value_and_grad(noisy)(w))


def test_a_loop_in_shard_map_whose_arguments_vary_differently():
    """The body marks the replicated weights as varying where it uses them, once and not twice."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def on_shard(w, xs):
        last, _ = jax.lax.scan(lambda c, x: (jnp.tanh(c @ w + x), None), xs[0], xs)
        return jax.lax.psum(jnp.sum(last), "data")

    fun = jax.shard_map(on_shard, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    args = normal(H, H), normal(4, H, seed=1)
    assert [m.operator for m in fp.matches(fun, RULES)(*args) if m.reason is None] == []
    got = fp.grad(fun, (0, 1), rules=RULES), lambda *a: fp.backprop(fun, (0, 1), rules=RULES)(*a).gradient
    expected = jax.jit(jax.grad(fun, (0, 1)))(*args)
    for gradient in got:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), gradient(*args), expected)


def test_what_only_moves_a_hoisted_product_follows_it():
    def step(w, b, h, x):
        return jnp.tanh(jnp.squeeze(x[None] @ w, 0) + b + h)

    like = jax.make_jaxpr(step)(jnp.ones((3, 3)), jnp.ones(3), jnp.ones(3), jnp.ones(3)).jaxpr
    cut = loop_bodies.split(like, 2, 1, lambda eqn: True)
    assert [eqn.primitive.name for eqn in cut.rest.eqns] == ["add", "tanh"]


def test_zero_and_minus_zero_are_two_numbers():
    """Equal equations are one, but `x · 0` and `x · (−0)` are equal only as numbers: their signs are not."""

    def loss(w, xs):
        def step(c, x):
            signs = jnp.copysign(1.0, x * 0.0), jnp.copysign(1.0, x * -0.0)
            return c * w, c * w * (signs[0] + 2 * signs[1])

        return jnp.sum(jax.lax.scan(step, 1.0, xs)[1])

    value, gradient = fp.value_and_grad(loss, rules=RULES)(0.5, jnp.ones(3))
    np.testing.assert_allclose(value, -(0.5 + 0.25 + 0.125))
    np.testing.assert_allclose(gradient, -(1 + 2 * 0.5 + 3 * 0.25))
