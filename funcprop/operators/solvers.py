"""`(A + δ I) x = b`: MINRES, which JAX lacks, for operators of any signs, and conjugate gradients.

An operator on a data loader has its products made by python, and then python runs the iterations too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from funcprop.operators.convergence import is_traced, warn_unless
from funcprop.operators.finite import nonfinite_rows, require_finite
from funcprop.operators.parameters import shown
from funcprop.operators.products import flat_map, flat_product
from funcprop.operators.symmetric_map import SymmetricMap
from funcprop.program.program import Program

Apply = Callable[[Array], Array]
Loop = Callable[[Callable[[Any], Any], Callable[[Any], Any], Any], Any]


def solve(
    operator: SymmetricMap,
    b: Float[Array, " P"],
    damping: Any,
    method: str | None,
    preconditioner: Any,
    start: Float[Array, " P"] | None,
    tolerance: float | None,
    most: int | None,
) -> Float[Array, " P"]:
    """`LinearOperator.solve`, where the arguments are explained, on flat vectors."""
    require_solver(method)
    method = method or DEFAULT
    require_damping(damping)
    if tolerance is None:
        tolerance = operator.parameters.rounding ** (2 / 3)
    most = 10 * operator.parameters.size if most is None else most
    inverse = preconditioner
    if inverse is not None and not hasattr(inverse, "linear_map"):
        inverse = Program.of(preconditioner, operator.parameters.structs)
    iterate = _on_host if operator.on_host else _compiled
    x, residual, length = iterate(
        operator, b, damping, inverse, start, method=method, tolerance=tolerance, most=most
    )
    if not isinstance(length, jax.core.Tracer) and not jnp.isfinite(length):
        paths = zip(operator.parameters.paths, jax.tree.leaves(operator.parameters.unravel(b)), strict=True)
        broken = shown(*(path for path, leaf in paths if not jnp.isfinite(leaf).all()))
        raise FloatingPointError(f"solve: b is not finite in the entries of {broken or 'its norm'}.")
    broke = method == "cg" and not is_traced((x, residual)) and not jnp.isfinite(residual)
    if broke and not nonfinite_rows(operator):
        raise FloatingPointError(
            f"solve: method='cg' broke down, as it does where A + damping I, with damping={damping}, is "
            "indefinite or singular; use method='minres', or raise damping=."
        )
    require_finite(operator, (x, residual), "solve()")
    warn_unless(
        residual <= 2 * tolerance * length,  # The iteration's own residual drifts from this one by rounding.
        f"solve: the residual ‖(A + δ I) x − b‖ is {{}}, above tolerance={tolerance:.1e} times ‖b‖={{}}, "
        f"after at most {most} products by method={method!r}; raise damping= or products=, "
        + ("give a preconditioner=, " if preconditioner is None else "see that preconditioner= is positive, ")
        + ("or use method='minres' if the operator is indefinite." if method == "cg" else "")
        + ("or take b in the range of A if that is singular." if method == "minres" else ""),
        residual,
        length,
    )
    return x


def require_solver(method: str | None, of: str = "") -> None:
    """Raise a ValueError if there is no such solver; None stands for the default."""
    if method is not None and method not in SOLVERS:
        who = of and f"{of}: "
        raise ValueError(f"{who}method={method!r} is not known; choose one of {', '.join(SOLVERS)}.")


def require_damping(damping: Any, of: str = "") -> None:
    """Raise a ValueError if damping is negative, infinite, NaN or not one number; `of` begins the message."""
    who = of and f"{of}: "
    if jnp.ndim(damping):
        raise ValueError(f"{who}damping has shape {jnp.shape(damping)}, but it is one number.")
    if isinstance(damping, jax.core.Tracer) or 0 <= damping < math.inf:
        return
    what = "negative" if damping < 0 else "not finite"
    raise ValueError(f"{who}damping={damping} is {what}; (A + damping I) needs a finite damping ≥ 0.")


def _solve(
    operator: SymmetricMap,
    b: Array,
    damping: Any,
    inverse: SymmetricMap | Program | None,
    start: Array | None,
    method: str,
    tolerance: float,
    most: int,
    product: Apply,
    loop: Loop,
) -> tuple[Array, Array, Array]:
    names = operator.parameters
    precondition: Apply = lambda x: x  # noqa: E731
    if isinstance(inverse, Program):
        precondition = lambda x: names.ravel(inverse(names.unravel(x)))  # noqa: E731
    elif inverse is not None:
        precondition = inverse_map(inverse)

    def apply(x: Array) -> Array:
        return product(x) + jnp.asarray(damping, x.dtype) * x

    # Of a b of order one, whose squares neither vanish nor overflow.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(b), initial=0))
    unit = jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)
    scaled = b / unit
    length = jnp.linalg.norm(scaled)
    right = scaled if start is None else scaled - apply(start / unit)
    system = LinearSystem(apply, precondition, tolerance * jax.lax.stop_gradient(length), most, loop)
    x = SOLVERS[method](system, right)
    x = x if start is None else x + start / unit
    residual = jnp.linalg.norm(apply(x) - scaled)
    return unit * x, unit * residual, unit * length


def inverse_map(inverse: SymmetricMap) -> Apply:
    """A preconditioner's linear map on flat vectors."""
    return (lambda x: flat_product(inverse, x)) if inverse.on_host else flat_map(inverse)


@functools.partial(jax.jit, static_argnames=("method", "most"))
def _compiled(operator: SymmetricMap, *given: Any, method: str, tolerance: Any, most: int) -> Any:
    b, damping, inverse, start = given
    loop, product = jax.lax.while_loop, flat_map(operator)
    return _solve(operator, b, damping, inverse, start, method, tolerance, most, product, loop)


def _on_host(operator: SymmetricMap, *given: Any, method: str, tolerance: Any, most: int) -> Any:
    b, damping, inverse, start = given
    product = functools.partial(flat_product, operator)
    return _solve(operator, b, damping, inverse, start, method, tolerance, most, product, _while)


def _while(unfinished: Callable[[Any], Any], step: Callable[[Any], Any], state: Any) -> Any:
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
        if self.loop is _while:
            return iterate(self, b)

        def solved(apply: Apply, b: Array) -> Array:
            return iterate(self._replace(apply=apply), b)

        return jax.lax.custom_linear_solve(self.apply, b, solved, symmetric=True)


def conjugate_gradients(system: LinearSystem, b: Array) -> Array:
    """The x in the Krylov space of smallest error in the norm of `A`, which is positive definite.

    Reference: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", Journal of
    Research of the National Bureau of Standards 1952.
    """
    return system.solution(b, _conjugate_gradients)


def _conjugate_gradients(system: LinearSystem, b: Array) -> Array:
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
    """The x in the Krylov space of smallest residual; for symmetric operators of any signs.

    It ends at a small residual in the norm that conjugate gradients end at, not in the preconditioner's; or
    before a step to an `x` with `ε^(7/8) ‖A‖ ‖x‖ > ‖b‖`, as there is where a singular system has no solution:
    of its residual, rounding would be a part that can be seen.

    Reference: Paige and Saunders, "Solution of sparse indefinite systems of linear equations", SIAM Journal
    on Numerical Analysis 1975; the recurrences and their names are theirs.
    """
    return system.solution(b, _minres)


def _minres(system: LinearSystem, b: Array) -> Array:
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


# The residual of conjugate gradients is never smaller, and their steps mean nothing where A is indefinite.
DEFAULT = "minres"
SOLVERS: dict[str, Callable[..., Array]] = {"minres": minres, "cg": conjugate_gradients}
