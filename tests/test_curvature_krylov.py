"""Eigenpairs, linear systems, determinants and roots, against dense linear algebra of NumPy and SciPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from matfree import decomp
from quadratic import PARAMS, SIZE, entries, operator, symmetric, with_eigenvalues

import funcprop as fp

LARGE = 60
INDEFINITE = symmetric(1, LARGE)
POSITIVE = with_eigenvalues(np.geomspace(0.1, 30, LARGE), 2)
# Five eigenvalues that are not zero, one of them three times.
LOW_RANK = with_eigenvalues(np.concatenate([np.zeros(LARGE - 5), [1.0, 2.0, 5.0, 5.0, 5.0]]), 3)
B = np.random.default_rng(4).standard_normal(LARGE)
ConvergenceWarning = fp.curvature.ConvergenceWarning
CG, Minres, DenseSolver = fp.curvature.ConjugateGradients, fp.curvature.Minres, fp.curvature.DenseSolver
Lanczos, Lobpcg = fp.curvature.Lanczos, fp.curvature.Lobpcg


def expected(matrix: np.ndarray, k: int, which: str) -> np.ndarray:
    values = np.linalg.eigvalsh(matrix)
    if which == "LM":
        return np.sort(values[np.argsort(np.abs(values))[-k:]])
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    return np.concatenate([values[:low], values[len(values) - k + low :]])


# --- eigenpairs -------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("solver", "which"),
    [
        *(("Lanczos", which) for which in ("LA", "SA", "BE", "LM")),
        *(("Lobpcg", which) for which in ("LA", "LM")),  # the second runs from both ends
        *(("DenseSolver", which) for which in ("SA", "BE")),
    ],
)
def test_eigenpairs(solver: str, which: str) -> None:
    A = operator(INDEFINITE)
    values, vectors = A.eigsh(5, which, solver=getattr(fp.curvature, solver)())
    np.testing.assert_allclose(values, expected(INDEFINITE, 5, which), rtol=1e-10)
    np.testing.assert_allclose(INDEFINITE @ vectors, vectors * values, atol=1e-8)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(5), atol=1e-8)


def test_a_larger_krylov_space_goes_on_from_the_smaller_one() -> None:
    """A product over a data set is a pass: 80 dimensions are 80 passes, though 40 were tried first."""
    matrix, passes = symmetric(5, 120), 0

    class Batches:
        def __iter__(self) -> Any:
            nonlocal passes
            passes += 1
            return iter([(matrix,)])

    hessian = fp.hessian(lambda w, matrix: w @ matrix @ w / 2)
    values, _ = fp.curvature.over(Batches())(hessian)(np.ones(120)).eigsh(1)
    np.testing.assert_allclose(values, expected(matrix, 1, "LM"), rtol=1e-10)
    assert 80 < passes < 90


def test_eigenvectors_are_pytrees() -> None:
    matrix = symmetric(2)
    values, vectors = operator(matrix).eigsh(3)
    assert jax.tree.map(jnp.shape, vectors) == {"a": {"w": (2, 3, 3), "b": (3, 3)}, "c": (3,)}
    applied = operator(matrix) @ vectors
    jax.tree.map(lambda a, v: np.testing.assert_allclose(a, v * values, atol=1e-9), applied, vectors)
    one = operator(matrix) @ jax.tree.map(lambda v: v[..., 0], vectors)
    np.testing.assert_allclose(entries(one), values[0] * entries(vectors).reshape(SIZE, 3)[:, 0], atol=1e-9)


@pytest.mark.parametrize(("solver", "which"), [("Lanczos", "LA"), ("Lanczos", "BE"), ("Lobpcg", "SA")])
def test_low_rank_and_repeated_eigenvalues(solver: str, which: str) -> None:
    values, vectors = operator(LOW_RANK).eigsh(6, which, solver=getattr(fp.curvature, solver)())
    np.testing.assert_allclose(values, expected(LOW_RANK, 6, which), atol=1e-9)
    np.testing.assert_allclose(LOW_RANK @ vectors, vectors * values, atol=1e-7)


def test_a_krylov_space_that_ends_exactly() -> None:
    """Of a piecewise linear loss the Hessian is zero. This is what our own Lanczos iteration is for."""
    for matrix in (np.zeros((LARGE, LARGE)), 2 * np.eye(LARGE), np.diag((B > 0) * 1.0)):
        values, vectors = operator(matrix).eigsh(3)
        np.testing.assert_allclose(values, np.sort(np.diag(matrix))[-3:], atol=1e-12)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    assert np.isnan(decomp.tridiag_sym(3)(lambda v: 0 * v, jnp.asarray(B)).Q_tall).any()


def test_eigenpairs_of_float32() -> None:
    A = fp.hessian(lambda w, m: 0.5 * w @ m @ w)(jnp.ones(LARGE, "float32"), jnp.asarray(POSITIVE, "float32"))
    values, vectors = A.eigsh(4, "BE")
    assert values.dtype == vectors.dtype == jnp.float32
    np.testing.assert_allclose(values, expected(POSITIVE, 4, "BE"), rtol=1e-3)


def test_eigenvalues_pass_through_jit_and_are_scipys() -> None:
    A = operator(INDEFINITE)
    values = jax.jit(lambda A: A.eigsh(3)[0])(A)
    np.testing.assert_allclose(values, expected(INDEFINITE, 3, "LA"), rtol=1e-10)
    by_scipy = scipy.sparse.linalg.eigsh(A.to_scipy(), 3, which="LA")[0]
    np.testing.assert_allclose(values, by_scipy, rtol=1e-8)
    np.testing.assert_allclose(A.to_scipy() @ np.eye(LARGE)[:, :2], INDEFINITE[:, :2], atol=1e-12)
    solution, info = scipy.sparse.linalg.minres(A.to_scipy(), B, rtol=1e-10)
    assert info == 0
    np.testing.assert_allclose(solution, np.linalg.solve(INDEFINITE, B), rtol=1e-5)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda A: A.eigsh(61), "k=61, but the operator has 60 eigenvalues; take 1 ≤ k ≤ 60"),
        (lambda A: A.eigsh(0), "k=0, but"),
        (lambda A: A.eigsh(12, solver=Lobpcg()), "k=12 is too many for Lobpcg on 60 parameters"),
        (lambda A: A.eigsh(2, "top"), r"which='top' is not known; choose one of LA \(largest\), SA"),
        (lambda A: A.eigsh(5, solver=Lanczos(products=3)), "products=3 are fewer than k=5"),
        (lambda A: A.solve(B, -0.5), r"damping=-0.5 is negative; \(A \+ damping I\) needs a finite damping"),
        (
            lambda A: A.solve(B, np.nan),
            r"damping=nan is not finite; \(A \+ damping I\) needs a finite damping",
        ),
        (lambda A: A.solve(B, np.ones(3)), r"damping has shape \(3,\), but it is one number"),
        (
            lambda A: A.solve(B, solver=DenseSolver(budget=100)),
            "the matrix has 60 × 60 entries, .* budget=100",
        ),
        (lambda A: A.logdet(-1.0), "damping=-1.0 is negative"),
        (
            lambda A: A.logdet(),
            "the operator is not positive definite: .*an eigenvalue is -.*add damping",
        ),
        (lambda A: A.sqrt(), "sqrt: the operator is indefinite: an eigenvalue is -"),
        (lambda A: A.sqrt(products=8), "sqrt: the operator is indefinite: an eigenvalue is -"),
    ],
)
def test_bad_input(ask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(operator(INDEFINITE))


def test_what_is_no_solver_is_refused() -> None:
    A = operator(POSITIVE)
    for given in ("cg", Minres, Lanczos()):
        with pytest.raises(TypeError, match=r"solve: solver=.* is none; pass fp.curvature.Minres\(\)"):
            A.solve(B, solver=given)
    for given in ("power", Minres()):
        with pytest.raises(TypeError, match=r"eigsh: solver=.* is none; pass fp.curvature.Lanczos\(\)"):
            A.eigsh(2, solver=given)


def test_a_right_hand_side_that_is_not_finite_is_named() -> None:
    with pytest.raises(FloatingPointError, match="solve: b is not finite in the entries of params"):
        operator(INDEFINITE).solve(np.where(np.arange(LARGE) == 3, np.nan, 1.0), 1.0)


# --- what did not converge --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda A: A.eigsh(3, solver=Lanczos(products=5)),
            r"eigsh: the largest residual .* k=3 pairs \(LA\) is \d.* 5 products",
        ),
        (lambda A: A.eigsh(3, solver=Lobpcg(iterations=2)), "after 2 iterations, above tolerance"),
        (
            lambda A: A.solve(B, solver=Minres(products=3)),
            r"solve: the residual .* by Minres is \d.*; raise damping= or products=, "
            "give a positive definite preconditioner=",
        ),
        (
            lambda A: A.solve(B, solver=CG(products=3)),
            r"ConjugateGradients is .*; raise .* or use Minres\(\) if the operator is indefinite",
        ),
        (lambda A: A.sqrt(products=4) @ B, r"sqrt: the last of 4 products still changed the result by \d"),
    ],
)
def test_what_has_not_converged_warns_with_its_residual(ask, message: str) -> None:
    with pytest.warns(ConvergenceWarning, match=message):
        ask(operator(POSITIVE))


def test_a_compiled_program_warns_when_it_runs() -> None:
    compiled = (
        jax.jit(lambda A, b: A.solve(b, solver=Minres(products=3))).lower(operator(POSITIVE), B).compile()
    )
    with pytest.warns(ConvergenceWarning, match="by Minres is"):
        jax.block_until_ready(compiled(operator(POSITIVE), B))


def test_the_residual_that_is_reported_is_true() -> None:
    A = operator(POSITIVE)
    with pytest.warns(ConvergenceWarning) as warned:
        x = A.solve(B, solver=Minres(products=3))
    shown = float(str(warned[0].message).split(" is ")[1].split(",")[0])
    np.testing.assert_allclose(shown, np.linalg.norm(POSITIVE @ x - B), rtol=1e-2)


# --- linear systems ---------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [CG(), Minres(), DenseSolver()], ids=str)
def test_solve(solver: Any) -> None:
    matrix = POSITIVE if isinstance(solver, CG) else INDEFINITE
    x = operator(matrix).solve(B, 0.3, solver=solver)
    np.testing.assert_allclose(x, np.linalg.solve(matrix + 0.3 * np.eye(LARGE), B), rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(operator(matrix).solve(0 * B, 0.3, solver=solver), 0 * B)


@pytest.mark.parametrize("solver", [CG, Minres])
def test_a_preconditioner_saves_products(solver: Any) -> None:
    """With the inverse itself one product is enough; as an operator, and as a function."""
    A = operator(POSITIVE)
    inverse = operator(np.linalg.inv(POSITIVE))
    exact = np.linalg.solve(POSITIVE, B)
    for preconditioner in (inverse, lambda v: inverse @ v):
        x = A.solve(B, solver=solver(preconditioner=preconditioner, products=2))
        np.testing.assert_allclose(x, exact, rtol=1e-8)


def test_an_indefinite_operator_is_solved_without_being_asked_to(recwarn: pytest.WarningsRecorder) -> None:
    """Conjugate gradients break down: along b there is no curvature."""
    A, b = operator(np.diag([1.0, -1.0])), jnp.ones(2)
    np.testing.assert_allclose(A.solve(b), [1, -1], rtol=1e-12)
    with pytest.raises(FloatingPointError, match=r"conjugate gradients break down; use Minres\(\), or raise"):
        A.solve(b, solver=CG())
    preconditioner = operator(np.diag(1 / np.abs(np.linspace(-3, 4, LARGE))))
    A = operator(np.diag(np.linspace(-3, 4, LARGE)))
    x = A.solve(
        B, solver=Minres(preconditioner=preconditioner, products=4)
    )  # an indefinite A with two eigenvalues, ±1
    np.testing.assert_allclose(x, B / np.linspace(-3, 4, LARGE), rtol=1e-8)
    assert not recwarn.list


def test_a_singular_system_without_a_solution_has_a_small_residual() -> None:
    """There is an end to it before the steps are rounding divided by next to nothing."""
    singular = INDEFINITE - np.linalg.eigvalsh(INDEFINITE)[LARGE // 2] * np.eye(LARGE)
    for matrix in (LOW_RANK, singular, np.diag([1.0, 0]), np.diag([1.0, 0, 3])):
        b = np.ones(len(matrix))
        with pytest.warns(ConvergenceWarning, match="take b in the range of A"):
            x = operator(matrix).solve(b)
        least = np.linalg.norm(matrix @ np.linalg.pinv(matrix, rcond=1e-10) @ b - b)
        assert np.linalg.norm(matrix @ x - b) < least + 0.02 * np.linalg.norm(b)


def test_a_singular_matrix_is_said() -> None:
    with pytest.raises(
        FloatingPointError, match=r"A \+ damping I, with damping=0.0, is singular; raise damping"
    ):
        operator(np.diag([1.0, 0])).solve(jnp.ones(2), solver=DenseSolver())


@pytest.mark.parametrize("solver", [CG(), Minres(), DenseSolver()], ids=str)
@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_a_right_hand_side_whose_square_is_no_number(solver: Any, size: float) -> None:
    b = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(operator(np.diag([1.0, 4])).solve(size * b, solver=solver) / size, [1, 0.5])


def test_minres_is_scipys() -> None:
    """After few products, far from convergence, the iterate is that of SciPy."""
    with pytest.warns(ConvergenceWarning):
        ours = operator(INDEFINITE).solve(B, solver=Minres(products=7))
    theirs = scipy.sparse.linalg.minres(INDEFINITE, B, maxiter=7)[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-8)


def test_solve_of_pytrees_and_its_derivative() -> None:
    matrix = with_eigenvalues(np.linspace(1, 4, SIZE))
    b = jax.tree.map(lambda leaf: jnp.sin(leaf + jnp.arange(leaf.size).reshape(leaf.shape)), PARAMS)
    x = operator(matrix).solve(b)
    assert jax.tree.structure(x) == jax.tree.structure(PARAMS)
    np.testing.assert_allclose(entries(x), np.linalg.solve(matrix, entries(b)), rtol=1e-8)
    slope = jax.grad(lambda d: jnp.sum(operator(matrix).solve(entries(b), d)))(0.5)
    inverse = np.linalg.inv(matrix + 0.5 * np.eye(SIZE))
    np.testing.assert_allclose(slope, -np.sum(inverse @ inverse @ entries(b)), rtol=1e-6)


# --- determinants and roots -------------------------------------------------------------------


def test_logdet() -> None:
    A = operator(POSITIVE)
    np.testing.assert_allclose(A.logdet(), np.linalg.slogdet(POSITIVE)[1], rtol=1e-10)
    damped = np.linalg.slogdet(POSITIVE + 0.7 * np.eye(LARGE))[1]
    np.testing.assert_allclose(A.logdet(0.7), damped, rtol=1e-10)
    assert np.isnan(jax.jit(lambda A: A.logdet())(operator(INDEFINITE)))
    estimate = A.logdet(0.7, samples=10, key=jax.random.key(0))
    assert abs(estimate.value - damped) < 4 * estimate.error < 0.3 * damped


@pytest.mark.parametrize("products", [None, 25])
def test_sqrt(products: int | None) -> None:
    for matrix in (with_eigenvalues(np.linspace(1, 9, LARGE)), LOW_RANK):
        S = operator(matrix).sqrt(products=products)
        values, vectors = np.linalg.eigh(matrix)
        root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        # The root of a zero that rounding made 1e-16 is 1e-8.
        np.testing.assert_allclose(S @ B, root @ B, atol=1e-6)
        np.testing.assert_allclose(S @ (S @ B), matrix @ B, atol=1e-6)
        np.testing.assert_array_equal(S @ (0 * B), 0 * B)
