"""The first value or cotangent that is not finite, in the order in which the sweeps compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcprop as fp


@jax.custom_jvp
def bad_slope(x):
    """The identity; its derivative is NaN where `x` is 7."""
    return x


bad_slope.defjvp(lambda x, dx: (x[0], dx[0] * jnp.where(x[0] == 7, jnp.nan, 1.0)))


def first(loss, *args, argnums=0):
    return fp.backprop(loss, argnums)(*args).first_nonfinite()


# --- outside of loops -------------------------------------------------------------------------


def test_of_the_forward_sweep():
    def loss(w):
        with jax.named_scope("encoder"):
            hidden = jnp.log(w)
        return jnp.sum(jnp.exp(hidden) * 0)

    found = first(loss, jnp.array([1.0, 0.0, 0.0]))
    assert (found.sweep, found.name, found.operator) == ("forward", "encoder/log", "encoder/log")
    assert (found.scope, found.index, found.count, found.iteration) == ("encoder", (1,), 2, ())
    assert "test_nonfinite.py" in found.source
    assert "forward sweep: value of encoder/log is not finite in 2 places, first at [1]" in str(found)


def test_of_the_backward_sweep():
    def loss(w):
        return jnp.sum(jnp.sqrt(fp.name(w * 1, "z")))

    found = first(loss, jnp.array([4.0, 0.0]))
    assert (found.sweep, found.name, found.operator) == ("backward", "z", "sqrt")
    assert "test_nonfinite.py" in found.source
    assert "cotangent of z is not finite in 1 place, at [1]; operator sqrt" in str(found)
    assert first(loss, jnp.ones(2)) is None


@pytest.mark.parametrize("closed_over", [True, False])
def test_of_what_was_given(closed_over):
    mask = jnp.array([0.0, -jnp.inf])
    if closed_over:
        found = first(lambda x: jnp.sum(x + mask), jnp.ones(2))
    else:
        found = first(lambda x, mask: jnp.sum(x + mask), jnp.ones(2), mask)
    assert (found.sweep, found.operator, found.index) == ("forward", None, (1,))
    assert found.name == ("constant" if closed_over else "mask")
    assert "an input or constant" in str(found)


def test_of_several_uses_the_one_that_is_bad():
    """`z` is first used by `cos`, but the bad contribution is that of the square root, which comes later."""

    def loss(w):
        z = fp.name(w * 1, "z")
        return jnp.sum(jnp.cos(z)) + jnp.sum(jnp.sqrt(z)) + jnp.sum(jnp.sin(z))

    found = first(loss, jnp.array([1.0, 0.0]))
    assert (found.name, found.operator, found.index, found.count) == ("z", "sqrt", (1,), 1)


def test_a_contribution_comes_before_cotangents_that_are_complete_earlier():
    """The last use of `a` sends back infinity first; the cotangent of `b` is complete, and bad, earlier."""

    def loss(w):
        a = fp.name(w * 1, "a")
        b = fp.name(a + w, "b")
        root = jnp.sqrt(b)
        return root + jnp.sqrt(a)

    p = fp.backprop(loss)(0.0)
    assert list(p.gradients).index("b") < list(p.gradients).index("a")
    assert (p.first_nonfinite().name, p.first_nonfinite().operator) == ("a", "sqrt_1")


def test_a_sum_of_finite_contributions_that_overflows():
    def loss(w):
        z = fp.name(w * 1, "z")
        return z * 1e308 + 1e308 * z

    found = first(loss, 0.5)
    assert (found.sweep, found.name, found.operator) == ("backward", "z", "mul_1")


# --- inside loops, forwards -------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_iterations_come_before_the_order_in_the_body(reverse):
    """`early` is computed first in the body, but is bad in a later iteration than `late`."""

    def loss(w, xs):
        def step(c, x):
            early = fp.name(w / (x - 3), "early")
            late = fp.name(w / (x - 1), "late")
            return c + early + late, None

        return jax.lax.scan(step, 0.0, xs, reverse=reverse)[0]

    found = first(loss, 1.0, jnp.array([0.0, 1.0, 2.0, 3.0, 4.0]))
    name, operator, place = ("early", "div", 3) if reverse else ("late", "div_1", 1)
    assert (found.sweep, found.name, found.operator) == ("forward", f"scan/{name}", operator)
    assert (found.iteration, found.index, found.count) == ((place,), (place,), 1)
    assert f"operator {operator} in iteration {place}" in str(found)


def test_an_iteration_that_reads_what_an_earlier_one_spoiled():
    """In the body `log` stands before `div`, and is NaN in iteration 3 because of `div` in iteration 2."""

    def loss(w, xs):
        def step(c, x):
            log = fp.name(jnp.log(c), "log")
            return fp.name((w + 0 * log) / x, "div"), None

        return jax.lax.scan(step, w, xs)[0]

    xs = jnp.array([1.0, 2.0, 0.0, 1.0])
    found = first(loss, 1.0, xs)
    assert (found.name, found.operator, found.iteration, found.count) == ("scan/div", "div", (2,), 1)


def test_nested_loops_forwards():
    """Reversed inside, forwards outside; `outer` is computed first in its body and bad in iteration 2."""

    def loss(w, xs):
        def inside(c, x):
            a = fp.name(1 / (x - 5) * w, "a")
            b = fp.name(1 / (x - 6) * w, "b")
            return c + a + b, None

        def outside(c, row):
            outer = fp.name(1 / (row[0] - 8), "outer")
            return jax.lax.scan(inside, c + outer, row, reverse=True)[0], None

        return jax.lax.scan(outside, 0.0, xs)[0]

    xs = jnp.arange(12.0).reshape(3, 4)
    assert first(loss, 1.0, xs + 0.5) is None
    found = first(loss, 1.0, xs)
    # In row 1, which is 4 5 6 7, the reversed loop meets 6 before 5.
    assert (found.iteration, found.index, found.operator) == ((1, 2), (1, 2), "div_1")
    assert found.name.startswith("scan/scan/")
    assert "in iteration 1, 2" in str(found)


# --- inside loops, backwards ------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_iterations_backwards(reverse):
    """Within an iteration `late` comes first; but `early` is bad in the iteration that is visited first."""

    def loss(w, xs):
        def step(c, x):
            early = fp.name(w * x[0], "early")
            late = fp.name(w * x[1], "late")
            return c + bad_slope(early) + bad_slope(late), None

        return jax.lax.scan(step, 0.0, xs, reverse=reverse)[0]

    xs = jnp.ones((5, 2)).at[3, 0].set(7.0).at[1, 1].set(7.0)
    found = first(loss, 1.0, xs)
    assert (found.sweep, found.name, found.iteration) == (
        ("backward", "scan/late", (1,)) if reverse else ("backward", "scan/early", (3,))
    )
    assert found.index == found.iteration
    gradients = fp.backprop(loss)(1.0, xs).gradients
    assert np.isnan(gradients[found.name][found.index])


def test_operators_in_reverse_within_an_iteration():
    def loss(w, xs):
        def step(c, x):
            early = fp.name(w * x, "early")
            late = fp.name(w * x, "late")
            return c + bad_slope(early) * bad_slope(late), None

        return jax.lax.scan(step, 0.0, xs)[0]

    found = first(loss, 1.0, jnp.array([7.0, 7.0, 1.0]))
    assert (found.name, found.iteration) == ("scan/late", (1,))


def test_what_a_loop_carries_is_named_where_it_was_computed():
    """The derivative of `sqrt` in iteration 2 spoils the cotangent of the `h` of iteration 1."""

    def loss(w, xs):
        def step(h, x):
            return fp.name(jnp.sqrt(h) * x * w, "h"), None

        return jax.lax.scan(step, w, xs)[0]

    found = first(loss, 1.0, jnp.array([1.0, 0.0, 1.0]))
    assert (found.name, found.operator, found.iteration, found.index) == ("scan/h", "sqrt", (2,), (1,))


def test_constants_and_slices_are_named_outside():
    def loss(w, xs):
        def step(c, x):
            return c + jnp.sum(bad_slope(w) * x), None

        return jax.lax.scan(step, 0.0, xs)[0]

    w, xs = jnp.array([1.0, 7.0]), jnp.ones((3, 2))
    found = first(loss, w, xs)
    assert (found.name, found.iteration, found.index) == ("w", (2,), (1,))
    found = first(lambda w, xs: loss(xs, w), jnp.array([[1.0, 1.0], [1.0, 7.0], [1.0, 1.0]]), jnp.ones(2))
    assert found is None
    of_slices = lambda xs: jax.lax.scan(lambda c, x: (c + jnp.sum(bad_slope(x)), None), 0.0, xs)[0]  # noqa: E731
    found = first(of_slices, jnp.ones((3, 2)).at[1, 0].set(7.0))
    assert (found.name, found.iteration, found.index) == ("xs", (1,), (1, 0))


def test_what_is_carried_unchanged_is_what_was_given():
    def loss(w, xs):
        def step(carry, x):
            v, c = carry
            return (v, c + jnp.sum(bad_slope(v)) * x), None

        return jax.lax.scan(step, (fp.name(w * 1, "v"), 0.0), xs)[0][1]

    found = first(loss, jnp.array([1.0, 7.0]), jnp.ones(3))
    assert (found.sweep, found.name, found.iteration, found.index) == ("backward", "v", (2,), (1,))


def test_nested_loops_backwards():
    def loss(w, xs):
        def inside(c, x):
            return c + bad_slope(fp.name(w * x, "z")), None

        def outside(c, row):
            return jax.lax.scan(inside, c, row, reverse=True)[0], None

        return jax.lax.scan(outside, 0.0, xs)[0]

    xs = jnp.ones((3, 4)).at[2, 0].set(7.0).at[2, 3].set(7.0).at[1, 1].set(7.0)
    found = first(loss, 1.0, xs)
    # The outer loop is visited from its last iteration; the inner one runs backwards, so it is visited
    # from its first slice.
    assert (found.name, found.iteration, found.index) == ("scan/scan/z", (2, 0), (2, 0))


def test_a_constant_of_the_inner_loop_is_a_slice_of_the_outer():
    def loss(rows):
        def inside(c, x, w):
            return c + bad_slope(w) * x, None

        def outside(c, w):
            return jax.lax.scan(lambda c, x: inside(c, x, w), c, jnp.ones(2))[0], None

        return jax.lax.scan(outside, 0.0, rows)[0]

    found = first(loss, jnp.array([7.0, 1.0, 1.0]))
    assert (found.name, found.iteration, found.index) == ("rows", (0, 1), (0,))


def test_a_bad_cotangent_that_nobody_asked_for_is_not_reported():
    """The cotangent of the initial carry, a constant of the program."""

    def loss(w, xs):
        return jax.lax.scan(lambda c, x: (jnp.sqrt(c) + w * x, None), 0.0, xs)[0]

    p = fp.backprop(loss)(1.0, jnp.ones(3))
    assert np.isfinite(p.gradient)
    assert p.first_nonfinite() is None


def test_of_a_jitted_propagation():
    def loss(x):
        return jax.lax.scan(lambda c, _: (fp.name(jnp.log(c), "log"), None), x, None, length=3)[0]

    found = jax.jit(fp.backprop(loss))(2.0).first_nonfinite()
    assert (found.name, found.index, found.iteration) == ("scan/log", (2,), (2,))


def test_a_batch_of_propagations_has_no_order():
    p = jax.vmap(fp.backprop(lambda x: 1 / x))(jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"stacked by vmap over axes \(2,\).*pick one by"):
        p.first_nonfinite()
    assert jax.tree.map(lambda a: a[0], p).first_nonfinite() is None
    assert jax.tree.map(lambda a: a[1], p).first_nonfinite().name == "div"


# --- what does no harm ------------------------------------------------------------------------


def masked(x, z):
    """A mask, a maximum over segments, a maximum that a loop carries: all −∞ at some time."""
    attended = jax.nn.softmax(x + jnp.array([0.0, 0.0, -jnp.inf])) @ x
    largest = jax.ops.segment_max(x, jnp.array([0, 1, 0]), num_segments=2)
    running = jax.lax.scan(lambda c, a: (jnp.maximum(c, a), c), jnp.array([-jnp.inf]), x[:, None])[0]
    return attended + jnp.sum(largest) + jnp.sum(running) + jnp.sum(z)


def test_infinities_that_are_removed_again_are_none():
    x, z = jnp.array([1.0, 2.0, 3.0]), jnp.ones(2)
    p = fp.backprop(masked, None)(x, z)
    expected = jax.grad(masked, (0, 1))(x, z)
    assert all(np.isfinite(g).all() for g in expected)
    assert p.first_nonfinite() is None


def test_infinities_that_are_removed_again_do_not_hide_the_cause():
    x = jnp.array([1.0, 2.0, 3.0])
    found = first(lambda x, z: masked(x, fp.name(jnp.log(z), "bad")), x, jnp.array([1.0, 0.0]))
    assert (found.sweep, found.name, found.operator, found.index) == ("forward", "bad", "log", (1,))
    found = first(lambda z, x: masked(x, fp.name(jnp.sqrt(z), "root")), jnp.array([1.0, 0.0]), x)
    assert (found.sweep, found.name, found.operator, found.index) == ("backward", "z", "sqrt", (1,))


def test_a_value_that_is_selected_away_is_the_cause_of_a_bad_gradient():
    """The loss is finite, but the logarithm's derivative is 0 · ∞."""
    loss = lambda x: jnp.sum(jnp.where(x > 0, fp.name(jnp.log(x), "log"), 0.0))  # noqa: E731
    found = first(loss, jnp.array([1.0, 0.0]))
    assert (found.sweep, found.name, found.index) == ("forward", "log", (1,))
    in_loop = lambda w, xs: jax.lax.scan(lambda c, x: (c + loss(w * x), None), 0.0, xs)[0]  # noqa: E731
    found = first(in_loop, 1.0, jnp.array([[1.0], [0.0], [1.0]]))
    assert (found.sweep, found.operator, found.iteration, found.index) == ("forward", "log", (1,), (1, 0))


def test_only_the_iterations_that_lead_to_the_result():
    """Iteration 1 makes an infinity that iteration 2 removes; iteration 3 makes the one that stays."""

    def loss(w, xs):
        def step(c, x):
            made = fp.name(w / x, "made")
            return jnp.where(jnp.isinf(c), 0.0, c) + made, None

        return jax.lax.scan(step, 0.0, xs)[0]

    assert first(loss, 1.0, jnp.array([1.0, 2.0, 1.0])) is None
    found = first(loss, 1.0, jnp.array([1.0, 2.0, 0.0]))
    assert (found.name, found.iteration) == ("scan/made", (2,))
