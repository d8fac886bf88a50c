"""`(A + δ I) x = b`, by products alone or by the matrix.

An operator on a data loader has its products made by python, and then python runs the iterations too.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from funcprop.operators.convergence import is_traced, tolerance_of, warn_unless
from funcprop.operators.finite import nonfinite_rows, require_finite
from funcprop.operators.iterations import (
    Apply,
    LinearSystem,
    Loop,
    by_python,
    conjugate_gradients,
    minres,
)
from funcprop.operators.parameters import shown
from funcprop.operators.products import DENSE_BYTES, flat_map, flat_product, matrix_of
from funcprop.operators.symmetric_map import SymmetricMap
from funcprop.program.program import Program


class Solved(NamedTuple):
    """A solution, the norms of its residual and of `b`, and which share of this that may be."""

    x: Float[Array, " P"]
    residual: Array
    length: Array
    tolerance: float


class Solver(abc.ABC):
    """A way to solve `(A + δ I) x = b`, for `LinearOperator.solve`."""

    remedies: ClassVar[str]  # where the residual is too large
    breaks: ClassVar[str | None] = None  # where the result is not finite though all else is

    @abc.abstractmethod
    def solved(self, operator: SymmetricMap, b: Array, damping: Any, start: Array | None) -> Solved:
        """The solution, on flat vectors."""

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True, eq=False, kw_only=True)
class Krylov(Solver):
    """A solver by products alone.

    Attributes:
        preconditioner: an approximate inverse, positive definite: an operator, or a function of pytrees.
        tolerance: on `‖(A + damping I) x − b‖ / ‖b‖`; `ε^(2/3)` of the parameters' dtype if None.
        products: at most so many; 10 P if None.
    """

    preconditioner: SymmetricMap | Callable[[PyTree], PyTree] | None = None
    tolerance: float | None = None
    products: int | None = None

    @staticmethod
    @abc.abstractmethod
    def iteration(system: LinearSystem, b: Array) -> Array:
        """The solution for `b`."""

    def solved(self, operator: SymmetricMap, b: Array, damping: Any, start: Array | None) -> Solved:
        """By iterations, until the residual is small or there were too many."""
        names, inverse = operator.parameters, self.preconditioner
        tolerance = tolerance_of(operator, self.tolerance)
        most = 10 * names.size if self.products is None else self.products
        if inverse is not None and not hasattr(inverse, "linear_map"):
            inverse = Program.of(inverse, names.structs)
        iterate = _on_host if operator.on_host else _compiled
        x, residual, length = iterate(
            operator, b, damping, inverse, start, iteration=self.iteration, tolerance=tolerance, most=most
        )
        return Solved(x, residual, length, tolerance)


@dataclass(frozen=True, eq=False, kw_only=True)
class DenseSolver(Solver):
    """The matrix, by P products, and its LU decomposition; for eigenpairs all of them.

    Attributes:
        budget: the most bytes that the matrix may have.
    """

    budget: int | str = DENSE_BYTES

    remedies: ClassVar[str] = "raise damping="
    breaks: ClassVar[str | None] = "is singular; raise damping="

    def solved(self, operator: SymmetricMap, b: Array, damping: Any, start: Array | None) -> Solved:
        """By a decomposition; nothing is gained by a start."""
        x, residual, length = _by_matrix(matrix_of(operator, self.budget), b, damping)
        return Solved(x, residual, length, tolerance_of(operator))


def solve(
    operator: SymmetricMap,
    b: Float[Array, " P"],
    damping: Any,
    solver: Solver | None,
    start: Float[Array, " P"] | None,
) -> Float[Array, " P"]:
    """`LinearOperator.solve`, where the arguments are explained, on flat vectors."""
    require_solver(solver)
    require_damping(damping)
    solver = Minres() if solver is None else solver
    x, residual, length, tolerance = solver.solved(operator, b, damping, start)
    if not isinstance(length, jax.core.Tracer) and not jnp.isfinite(length):
        paths = zip(operator.parameters.paths, jax.tree.leaves(operator.parameters.unravel(b)), strict=True)
        broken = shown(*(path for path, leaf in paths if not jnp.isfinite(leaf).all()))
        raise FloatingPointError(f"solve: b is not finite in the entries of {broken or 'its norm'}.")
    broke = solver.breaks and not is_traced((x, residual)) and not jnp.isfinite(residual)
    if broke and not nonfinite_rows(operator):
        raise FloatingPointError(f"solve: A + damping I, with damping={damping}, {solver.breaks}.")
    require_finite(operator, (x, residual), "solve()")
    warn_unless(
        residual <= 2 * tolerance * length,  # The iteration's own residual drifts from this one by rounding.
        f"solve: the residual ‖(A + δ I) x − b‖ by {solver} is {{}}, above tolerance={tolerance:.1e} times "
        f"‖b‖={{}}; {solver.remedies}.",
        residual,
        length,
    )
    return x


def require_solver(solver: Any, of: str = "solve") -> None:
    """Raise a TypeError if that is no solver; None stands for the default."""
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(
            f"{of}: solver={solver!r} is none; pass fp.curvature.Minres(), ConjugateGradients() or "
            "DenseSolver()."
        )


def require_damping(damping: Any, of: str = "") -> None:
    """Raise a ValueError if damping is negative, infinite, NaN or not one number; `of` begins the message."""
    who = of and f"{of}: "
    if isinstance(damping, str):
        raise TypeError(f"{who}damping={damping!r} is text; pass a number ≥ 0.")
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
    iteration: Callable[[LinearSystem, Array], Array],
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

    unit = _unit(b)
    scaled = b / unit
    length = jnp.linalg.norm(scaled)
    right = scaled if start is None else scaled - apply(start / unit)
    system = LinearSystem(apply, precondition, tolerance * jax.lax.stop_gradient(length), most, loop)
    x = system.solution(right, iteration)
    x = x if start is None else x + start / unit
    residual = jnp.linalg.norm(apply(x) - scaled)
    return unit * x, unit * residual, unit * length


def _unit(b: Array) -> Array:
    """What `b` is divided by, so that squares neither vanish nor overflow."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(b), initial=0))
    return jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)


def inverse_map(inverse: SymmetricMap) -> Apply:
    """A preconditioner's linear map on flat vectors."""
    return (lambda x: flat_product(inverse, x)) if inverse.on_host else flat_map(inverse)


@functools.partial(jax.jit, static_argnames=("iteration", "most"))
def _compiled(operator: SymmetricMap, *given: Any, iteration: Any, tolerance: Any, most: int) -> Any:
    b, damping, inverse, start = given
    loop, product = jax.lax.while_loop, flat_map(operator)
    return _solve(operator, b, damping, inverse, start, iteration, tolerance, most, product, loop)


def _on_host(operator: SymmetricMap, *given: Any, iteration: Any, tolerance: Any, most: int) -> Any:
    b, damping, inverse, start = given
    product = functools.partial(flat_product, operator)
    return _solve(operator, b, damping, inverse, start, iteration, tolerance, most, product, by_python)


@dataclass(frozen=True, eq=False, kw_only=True)
class Minres(Krylov):
    """The x in the Krylov space of smallest residual; for symmetric operators of any signs.

    It ends at a small residual in the norm that conjugate gradients end at, not in the preconditioner's; or
    before a step to an `x` with `ε^(7/8) ‖A‖ ‖x‖ > ‖b‖`, as there is where a singular system has no solution:
    of its residual, rounding would be a part that can be seen. Its residual is never larger than that of
    conjugate gradients.

    Reference: Paige and Saunders, "Solution of sparse indefinite systems of linear equations", SIAM Journal
    on Numerical Analysis 1975; the recurrences and their names are theirs.
    """

    iteration = staticmethod(minres)
    remedies: ClassVar[str] = (
        "raise damping= or products=, give a positive definite preconditioner=, or take b in the range of A "
        "if that is singular"
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class ConjugateGradients(Krylov):
    """The x in the Krylov space of smallest error in the norm of `A`, which is positive definite.

    Reference: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", Journal of
    Research of the National Bureau of Standards 1952.
    """

    iteration = staticmethod(conjugate_gradients)
    remedies: ClassVar[str] = (
        "raise damping= or products=, give a positive definite preconditioner=, or use Minres() if the "
        "operator is indefinite"
    )
    breaks: ClassVar[str | None] = (
        "is indefinite or singular, where conjugate gradients break down; use Minres(), or raise damping="
    )


@jax.jit
def _by_matrix(matrix: Array, b: Array, damping: Any) -> tuple[Array, Array, Array]:
    damped = matrix + jnp.asarray(damping, matrix.dtype) * jnp.eye(len(matrix), dtype=matrix.dtype)
    unit = _unit(b)
    x = jnp.linalg.solve(damped, b / unit)
    return unit * x, unit * jnp.linalg.norm(damped @ x - b / unit), unit * jnp.linalg.norm(b / unit)
