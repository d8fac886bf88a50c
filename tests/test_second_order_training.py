"""Second-order optimizers in optax's chains: closed forms on quadratics, and digits against SGD."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from digits_training import by_sgd, cross_entropy, network, trained

import funcprop as fp
from funcprop.training import newton_cg, scale_by_diagonal

A = jnp.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
B = jnp.array([1.0, -2.0, 3.0])
START = {"a": jnp.array([0.5, 1.0]), "b": jnp.array([-1.0])}


def flat(w: Any) -> Any:
    return jnp.concatenate([w["a"], w["b"]])


def quadratic(w: Any) -> Any:
    return 0.5 * flat(w) @ A @ flat(w) - B @ flat(w)


def step(optimizer: Any, f: Any, w: Any, state: Any = None) -> tuple[Any, Any]:
    value, grad = jax.value_and_grad(f)(w)
    state = optimizer.init(w) if state is None else state
    updates, state = jax.jit(optimizer.update, static_argnames="value_fn")(
        grad, state, w, value=value, grad=grad, value_fn=f
    )
    return optax.apply_updates(w, updates), state


# --- Newton with conjugate gradients ----------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_one_step_on_a_quadratic_is_the_closed_form(damping: float) -> None:
    chain = optax.chain(optax.clip_by_global_norm(1e6), newton_cg(damping=damping, tolerance=1e-12))
    w, (_, state) = step(chain, quadratic, START)
    gradient = A @ flat(START) - B
    expected = flat(START) - jnp.linalg.solve(A + damping * jnp.eye(3), gradient)
    np.testing.assert_allclose(flat(w), expected, rtol=1e-10)
    np.testing.assert_allclose(state.ratio, 1, rtol=1e-9)  # a quadratic model of a quadratic
    np.testing.assert_allclose(state.damping, damping / 1.5)
    assert (int(state.steps), bool(state.accepted)) == (3, True)
    assert state.residual < 1e-12


def test_updates_that_the_chain_has_changed_are_what_is_solved_for() -> None:
    chain = optax.chain(optax.add_decayed_weights(0.1), newton_cg(damping=0.0, tolerance=1e-12))
    w, _ = step(chain, quadratic, START)
    gradient = A @ flat(START) - B + 0.1 * flat(START)
    np.testing.assert_allclose(flat(w), flat(START) - jnp.linalg.solve(A, gradient), rtol=1e-10)


def test_leaves_of_different_precision() -> None:
    start = {"a": START["a"].astype(jnp.float32), "b": START["b"]}
    w, _ = step(
        newton_cg(damping=0.0), lambda w: quadratic(jax.tree.map(lambda x: x.astype(B.dtype), w)), start
    )
    assert (w["a"].dtype, w["b"].dtype) == (jnp.float32, B.dtype)
    np.testing.assert_allclose(flat(w), jnp.linalg.solve(A, B), rtol=1e-5)


def test_a_step_that_raises_the_value_is_not_taken() -> None:
    f = lambda w: jnp.sqrt(1 + w**2)  # noqa: E731  # Newton from 2 goes to −8
    optimizer = newton_cg(damping=0.01)
    w, state = step(optimizer, f, jnp.array(2.0))
    assert w == 2.0
    assert not state.accepted
    np.testing.assert_allclose(state.damping, 0.01 * 1.5**4)
    for _ in range(60):
        w, state = step(optimizer, f, w, state)
    np.testing.assert_allclose(w, 0, atol=1e-6)


@pytest.mark.parametrize("broken", ["gradient", "value", "curvature"])
def test_what_is_not_finite_is_seen_in_the_update(broken: str) -> None:
    """As of any optimizer of optax; `apply_if_finite` skips a step whose gradient is not."""
    w = START["a"]
    grad = jnp.array([jnp.nan, 1.0]) if broken == "gradient" else w
    value = jnp.nan if broken == "value" else 1.0
    of = (
        {"curvature": lambda params: jnp.nan * fp.curvature.identity(params)} if broken == "curvature" else {}
    )
    newton = newton_cg(damping=0.5, **of)
    given: dict[str, Any] = {"value": value, "grad": grad, "value_fn": lambda w: jnp.sum(w**2) / 2}
    update, state = newton.update(grad, newton.init(w), w, **given)
    assert np.isnan(update).all()
    assert (float(state.damping), bool(state.accepted)) == (0.5, False)
    skipping = optax.apply_if_finite(newton, 3)
    update, state = skipping.update(grad, skipping.init(w), w, **given)
    assert np.all(update == 0) == (broken == "gradient") == bool(state.notfinite_count)


def test_negative_curvature_ends_the_solve() -> None:
    saddle = lambda w: 0.5 * (w[0] ** 2 - w[1] ** 2)  # noqa: E731
    w = jnp.array([0.1, 1.0])
    moved, state = step(newton_cg(damping=0.0), saddle, w)
    # The first direction, the gradient's, has negative curvature: a plain gradient step.
    np.testing.assert_allclose(moved, w - jax.grad(saddle)(w), rtol=1e-12)
    assert int(state.steps) == 1
    # Here the first direction is fine and the second is not: the step is what the first gave.
    w = jnp.array([1.0, 0.5])
    moved, state = step(newton_cg(damping=0.0), saddle, w)
    g = jax.grad(saddle)(w)
    length = (g @ g) / (g[0] ** 2 - g[1] ** 2)
    np.testing.assert_allclose(moved, w - length * g, rtol=1e-12)
    assert int(state.steps) == 2


def test_rosenbrock_valley() -> None:
    rosenbrock = lambda w: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2  # noqa: E731
    optimizer = newton_cg(damping=1.0)
    w, state = jnp.array([-1.2, 1.0]), optimizer.init(jnp.ones(2))
    for _ in range(60):
        w, state = step(optimizer, rosenbrock, w, state)
    np.testing.assert_allclose(w, 1, rtol=1e-6)


# --- diagonals --------------------------------------------------------------------------------


def test_a_diagonal_quadratic_is_solved_in_one_step() -> None:
    c, target = jnp.array([1.0, 4.0, -100.0]), jnp.array([1.0, 2.0, 3.0])
    f = lambda w: 0.5 * jnp.sum(c * (w - target) ** 2)  # noqa: E731
    hessian = lambda params, value_fn: fp.curvature.hessian_diagonal(value_fn)(params)  # noqa: E731
    chain = optax.chain(scale_by_diagonal(hessian, damping=0.0), optax.scale(-1.0))
    w, _ = step(chain, f, jnp.zeros(3))
    # Magnitudes: from a maximum it goes away.
    np.testing.assert_allclose(w, [1, 2, -3], rtol=1e-12)


def test_a_diagonal_of_more_precision_than_the_parameters() -> None:
    w = jnp.ones(2, jnp.bfloat16)
    optimizer = scale_by_diagonal(lambda params: jnp.array([1.0, 4.0], jnp.float32), damping=0.0)
    updates, state = optimizer.update(w, optimizer.init(w), w)
    assert updates.dtype == state.average.dtype == jnp.bfloat16
    np.testing.assert_allclose(updates.astype(float), [1, 0.25], rtol=0.02)


def test_moving_average_of_diagonals() -> None:
    seen = iter([1.0, 3.0, 5.0])
    diagonals = lambda params, number: jnp.full(2, number)  # noqa: E731
    transformation = scale_by_diagonal(diagonals, damping=0.5, decay=0.8, every=2)
    state, found = transformation.init(jnp.ones(2)), []
    for k in range(5):
        number = next(seen) if k % 2 == 0 else 1e9  # not looked at
        u, state = transformation.update(jnp.ones(2), state, jnp.ones(2), number=number)
        found.append(float(u[0]))
    second = (0.8 * 1 + 3) / 1.8
    third = (0.64 * 1 + 0.8 * 3 + 5) / (0.64 + 0.8 + 1)
    np.testing.assert_allclose(
        found, [1 / 1.5] * 2 + [1 / (second + 0.5)] * 2 + [1 / (third + 0.5)], rtol=1e-6
    )


# --- digits -----------------------------------------------------------------------------------


def test_newton_beats_sgd_on_digits() -> None:
    def mean(outputs: Any, y: Any) -> Any:
        return cross_entropy(outputs, y).mean()

    def curvature(params: Any, batch: Any) -> Any:
        return fp.ggn(network, mean, batched=True)(params, *batch)

    optimizer = optax.chain(newton_cg(damping=0.03, curvature=curvature, products=8))
    # 15 steps of at most 8 products, each less than 2 gradients.
    assert trained(optimizer, 15) < by_sgd(250) / 2


# --- errors -----------------------------------------------------------------------------------


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"newton_cg: damping=-1 is negative"):
        newton_cg(damping=-1)
    with pytest.raises(ValueError, match=r"newton_cg: damping=nan is not finite"):
        newton_cg(damping=float("nan"))
    with pytest.raises(ValueError, match="newton_cg: products=0"):
        newton_cg(products=0)
    with pytest.raises(ValueError, match=r"newton_cg: factor=1; .* more than 1"):
        newton_cg(factor=1)
    optimizer = newton_cg()
    with pytest.raises(
        ValueError, match=r"newton_cg: update\(\) lacks params, grad, value_fn; call .*make_step"
    ):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), value=1.0)
    for arguments, message in (
        ({"damping": -1}, "damping=-1 is negative"),
        ({"decay": 1.0}, r"decay=1\.0; pass a number from 0"),
        ({"every": 0}, "every=0; pass a number of updates"),
    ):
        with pytest.raises(ValueError, match=message):
            scale_by_diagonal(lambda params: params, **arguments)
    diagonal = scale_by_diagonal(lambda params: params)
    with pytest.raises(ValueError, match=r"scale_by_diagonal: update\(\) lacks params"):
        diagonal.update(jnp.ones(2), diagonal.init(jnp.ones(2)))


@pytest.mark.parametrize("name", ["newton_cg", "kfac", "gauss_newton_diagonal"])
def test_a_part_of_the_parameters_is_refused(name):
    model, squared = lambda p, x: x @ p["w"] + p["b"], lambda output, y: jnp.sum((output - y) ** 2)
    params, batch = {"w": jnp.ones((2, 1)), "b": jnp.zeros(1)}, (jnp.ones((3, 2)), jnp.ones((3, 1)))
    second_order = {
        "newton_cg": lambda: fp.training.newton_cg(),
        "kfac": lambda: fp.training.kfac(model, squared, 0.1, batch),
        "gauss_newton_diagonal": lambda: fp.training.gauss_newton_diagonal(model, squared, 0.1),
    }[name]()
    masked = optax.masked(second_order, {"w": True, "b": False})
    with pytest.raises(ValueError, match=f"{name}: some of params are masked .*make the step of all and set"):
        masked.update(params, masked.init(params), params, batch=batch)
