"""Conjugate gradients, and MINRES, which JAX lacks: solutions of symmetric systems by products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

Apply = Callable[[Array], Array]
Loop = Callable[[Callable[[Any], Any], Callable[[Any], Any], Any], Any]


def by_python(unfinished: Callable[[Any], Any], step: Callable[[Any], Any], state: Any) -> Any:
    """`jax.lax.while_loop`, by python."""
    while unfinished(state):
        state = step(state)
    return state


class LinearSystem(NamedTuple):
    """A linear system but for its right side; `enough` is the residual to end at, `loop` iterates."""

    apply: Apply
    precondition: Apply
    enough: Any
    most: int
    loop: Loop

    def solution(self, b: Array, iterate: Callable[[LinearSystem, Array], Array]) -> Array:
        """The solution for `b`; where all is traced, it is differentiated as a solution is, not as a loop."""
        if self.loop is by_python:
            return iterate(self, b)

        def solved(apply: Apply, b: Array) -> Array:
            return iterate(self._replace(apply=apply), b)

        return jax.lax.custom_linear_solve(self.apply, b, solved, symmetric=True)


def conjugate_gradients(system: LinearSystem, b: Array) -> Array:
    """The recurrences of Hestenes and Stiefel."""

    def unfinished(state: Any) -> Any:
        _, residual, _, _, k = state
        return (jnp.linalg.norm(residual) > system.enough) & (k < system.most)

    def step(state: Any) -> Any:
        x, residual, direction, squared, k = state
        turned = system.apply(direction)
        length = squared / (direction @ turned)
        residual = residual - length * turned
        inner = system.precondition(residual)
        following = residual @ inner
        return x + length * direction, residual, inner + following / squared * direction, following, k + 1

    first = system.precondition(b)
    return system.loop(unfinished, step, (jnp.zeros_like(b), b, first, b @ first, 0))[0]


def minres(system: LinearSystem, b: Array) -> Array:
    """The recurrences of Paige and Saunders."""
    apply, precondition = system.apply, system.precondition
    y = precondition(b)
    size = jnp.linalg.norm(b)
    first = jnp.sqrt(b @ y)
    zero = jnp.zeros((), b.dtype)
    tiny, rounding = jnp.finfo(b.dtype).tiny, float(jnp.finfo(b.dtype).eps) ** (7 / 8)

    def unfinished(state: Any) -> Any:
        left = jnp.linalg.norm(state["residual"])
        return (left > system.enough) & (state["beta"] > 0) & (state["k"] < system.most) & ~state["lost"]

    def step(s: Any) -> Any:
        v = s["y"] / s["beta"]
        turned = apply(v)
        norm = jnp.maximum(s["norm"], jnp.linalg.norm(turned) / jnp.linalg.norm(v))
        y = turned - jnp.where(s["k"] > 0, s["beta"] / s["previous"], 0) * s["r1"]
        alpha = v @ y
        y = y - alpha / s["beta"] * s["r2"]
        r1, r2 = s["r2"], y
        y = precondition(r2)
        beta = jnp.sqrt(jnp.maximum(r2 @ y, 0))
        delta = s["c"] * s["delta"] + s["s"] * alpha
        gamma_bar = s["s"] * s["delta"] - s["c"] * alpha
        gamma = jnp.maximum(jnp.hypot(gamma_bar, beta), tiny)
        c, sine = gamma_bar / gamma, beta / gamma
        w = (v - s["epsilon"] * s["w1"] - delta * s["w2"]) / gamma
        x = s["x"] + c * s["phibar"] * w
        lost = ~(rounding * norm * jnp.linalg.norm(x) <= size)  # also where it is NaN
        phibar = sine * s["phibar"]
        ahead = jnp.where(beta > 0, phibar * c / jnp.where(beta > 0, beta, 1), 0)
        return {
            "residual": sine**2 * s["residual"] - ahead * r2,
            "x": jnp.where(lost, s["x"], x), "w1": s["w2"], "w2": w, "r1": r1, "r2": r2, "y": y,
            "previous": s["beta"], "beta": beta, "epsilon": s["s"] * beta, "delta": -s["c"] * beta,
            "c": c, "s": sine, "phibar": phibar, "k": s["k"] + 1, "lost": lost, "norm": norm,
        }  # fmt: skip

    vectors = {name: jnp.zeros_like(b) for name in ("x", "w1", "w2")} | {
        "r1": b,
        "r2": b,
        "residual": b,
        "y": y,
    }
    numbers = {"previous": first, "beta": first, "epsilon": zero, "delta": zero, "c": zero - 1, "s": zero}
    others = {"phibar": first, "norm": zero, "k": 0, "lost": jnp.asarray(False)}
    start: dict[str, Any] = vectors | numbers | others
    return system.loop(unfinished, step, start)["x"]
