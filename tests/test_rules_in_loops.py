"""Rules inside of loops, and the rule of the loop: which differentiates what."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from compiling import compiled
from flax import linen as nn
from loop_programs import B, H, T, close, normal, products_in_loops

import funcprop as fp
from funcprop.rules.primitives import loops, pooling


def test_rules_inside_of_a_loop_fire_too():
    def pooled(w, x):
        def step(c, _):
            y = nn.max_pool(jnp.tanh(c @ w), (2, 2), (1, 1), "SAME")
            return y, None

        return jnp.sum(jax.lax.scan(step, x, None, length=3)[0] ** 2)

    args = normal(H, H), normal(2, 4, 4, H, seed=1)
    everywhere = {"scan": loops.rule(loops.ALWAYS), "reduce_window_max": pooling.rule(everywhere=True)}
    both = fp.rules.handwritten.replace(everywhere)
    operators = [m.operator for m in fp.matches(pooled, both)(*args)]
    assert operators == ["scan", "dot_general", "tanh", "reduce_window_max"]
    program = str(jax.make_jaxpr(fp.grad(pooled, rules=both))(*args))
    assert "select_and_scatter" not in program
    assert "select_and_gather" not in program
    close(*compiled(lambda *a: (fp.grad(pooled, rules=both)(*a), jax.grad(pooled)(*a)))(*args))


def rows_of_three_axes(p, xs):
    """An outer product of the batch; one of the two products is in a jit of its own."""

    def step(h, x):
        h = jnp.tanh(jax.jit(jnp.matmul)(h, p["U"]) + jnp.stack([x, -x], 1) @ p["V"])
        return h, h

    return jnp.sum(jax.lax.scan(step, jnp.ones((B, 2, 18)), xs)[1] ** 2)


WIDE = {"U": normal(18, 18), "V": normal(18, 18, seed=1)}, normal(T, B, 18, seed=3)


def test_products_that_leave_the_loop_keep_no_rule_of_their_own():
    """Otherwise the rule of a product would hide it from that of the loop."""
    own = fp.rules.autodiff.replace({"scan": None, "dot_general": fp.rules.handwritten["dot_general"]})
    assert [m.reason for m in fp.matches(rows_of_three_axes, own)(*WIDE)] == [None, None]
    found = fp.matches(rows_of_three_axes)(*WIDE)
    reasons = [m.reason for m in found if m.operator in ("scan", "dot_general")]
    assert reasons == [None, *["the rule of the loop around it derives it"] * 2]
    assert (18, 18) in products_in_loops(jax.grad(rows_of_three_axes), *WIDE)
    here = fp.rules.default.on("cpu")
    assert (18, 18) not in products_in_loops(fp.grad(rows_of_three_axes, rules=here), *WIDE)

    @compiled
    def both(*args):
        return [
            jax.value_and_grad(f, (0, 1))(*args)
            for f in (fp.with_rules(rows_of_three_axes), rows_of_three_axes)
        ]

    close(*both(*WIDE))


def test_a_jitted_function_in_new_loops_is_rewritten_once():
    """What is claimed in a loop has another identity at each tracing; the function's own body has not."""
    traced = []

    def forward(x, **_):
        traced.append(x)
        return jnp.sin(x), (x,)

    sine = fp.Rule(forward, lambda residuals, g, needs, **_: (g * jnp.cos(residuals[0]),))
    rules = fp.rules.default.replace({"sin": sine})
    function = jax.jit(jnp.sin)
    counts = []
    for _ in range(3):

        def loss(w, xs):
            step = lambda h, x: (function(h @ w + x), None)  # noqa: E731
            return jnp.sum(jax.lax.scan(step, jnp.ones((2, 9)), xs)[0] ** 2)

        traced.clear()
        jax.eval_shape(fp.with_rules(loss, rules), normal(9, 9), normal(T, 2, 9))
        counts.append(len(traced))
    assert counts[0] > counts[1] == counts[2]


def test_a_function_used_in_a_loop_and_beside_it_has_the_rules_of_its_place():
    """In the loop a jitted function's product is left to the loop's rule; beside it, it has its own.

    Whatever a loop of so few steps would hold for it, which is for the plans of loops to weigh.
    """
    cell = jax.jit(lambda h, u: jnp.tanh(h @ u))

    def loss(p, xs):
        def step(h, x):
            h = cell(h, p["U"]) + jnp.stack([x, -x], 1) @ p["V"]
            return h, h

        return jnp.sum(jax.lax.scan(step, cell(jnp.ones((B, 2, 18)), p["U"]), xs)[1] ** 2)

    rules = fp.rules.handwritten.replace({"scan": loops.rule(loops.ALWAYS)}).on("cpu")
    ours = fp.grad(loss, rules=rules)
    assert (18, 18) in products_in_loops(jax.grad(loss), *WIDE)
    assert (18, 18) not in products_in_loops(ours, *WIDE)
    close(*compiled(lambda *args: (ours(*args), jax.grad(loss)(*args)))(*WIDE))


def test_a_rule_that_the_user_put_in_stays_in_loops():
    """Here one that says of itself that it ran."""
    product = fp.rules.handwritten["dot_general"]
    ran = []

    def backward(*args, **static):
        ran.append(static)
        return product.backward(*args, **static)

    own = fp.rules.default.replace({"dot_general": fp.Rule(product.forward, backward)})
    close(fp.grad(rows_of_three_axes, rules=own)(*WIDE), jax.grad(rows_of_three_axes)(*WIDE))
    assert ran
