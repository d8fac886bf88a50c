"""The operator itself: products of every form, sums, blocks, subsets, transformations, and bad input."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from curvature_models import EXAMPLES, LOSSES, MODELS, batched, mean
from quadratic import PARAMS, SIZE, entries, loss, operator, symmetric

import funcprop as fp
from funcprop.operators import products

M = symmetric(1)
V = np.random.default_rng(2).standard_normal((SIZE, 3))
NAMES = operator(M).parameters


def close(actual, expected) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module", params=["hessian", "linearized"])
def A(request: pytest.FixtureRequest):  # noqa: N802
    found = operator(M)
    return found if request.param == "hessian" else found.linearize()


# --- products ---------------------------------------------------------------------------------


def test_products(A) -> None:
    close(A @ V[:, 0], M @ V[:, 0])
    close(A @ V, M @ V)
    tree = A @ NAMES.unravel(jnp.asarray(V[:, 0]))
    assert jax.tree.structure(tree) == jax.tree.structure(PARAMS)
    close(entries(tree), M @ V[:, 0])
    columns = A @ NAMES.unravel_columns(jnp.asarray(V))
    assert columns["a"]["w"].shape == (2, 3, 3)
    close(NAMES.ravel_columns(columns), M @ V)


def test_matrix_and_its_parts(A) -> None:
    assert (A.shape, A.dtype) == ((SIZE, SIZE), np.dtype(float))
    close(A.dense(), M)
    close(A.dense(at_once=3), M)
    close(entries(A.diagonal()), np.diag(M))
    close(A.trace(), np.trace(M))
    close(A.frobenius_norm(), np.linalg.norm(M))
    close(A.block("a"), M[:9, :9])
    close(A.block("a/w", "c"), M[3:9, 9:])
    close(A.block(("a", "b"), "a/w", at_once=2), M[:3, 3:9])


def test_algebra() -> None:
    A, B = operator(M), operator(symmetric(3))
    v = V[:, 0]
    close((2 * A - B / 4 + fp.curvature.identity(A)).dense(), 2 * M - symmetric(3) / 4 + np.eye(SIZE))
    close((np.float64(3) * (A * jnp.array(0.5)) + A + B) @ v, 2.5 * M @ v + symmetric(3) @ v)
    close((-A + B).block("c", "a/b"), (-M + symmetric(3))[9:, :3])
    close((A + B).linearize() @ V, (M + symmetric(3)) @ V)
    with pytest.raises(TypeError, match="unsupported operand"):
        A + 1.0
    with pytest.raises(TypeError, match="is not one real number"):
        jnp.ones(2) * A


def test_a_vector_of_parameters_and_one_number() -> None:
    A = fp.hessian(loss)(jnp.ones(3), jnp.asarray(M[:3, :3]))
    close(A @ V[:3, 0], M[:3, :3] @ V[:3, 0])
    close(A @ V[:3], M[:3, :3] @ V[:3])
    one = fp.hessian(lambda w: w**3)(2.0)
    close(one @ jnp.array(2.0), 24.0)
    close(one.dense(), [[12.0]])


def test_columns_are_chunked_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def lengths(columns: int) -> list[int]:
        jaxpr = jax.make_jaxpr(lambda v: operator(M) @ v)(jnp.ones((SIZE, columns))).jaxpr
        return [eqn.params["length"] for eqn in equations(jaxpr) if eqn.primitive.name == "scan"]

    assert lengths(9) in ([], [1])
    # A column computes the tangent of `M w`, and M is symmetrised: about 300 bytes.
    monkeypatch.setattr(products, "COLUMN_BYTES", 1000)
    (found,) = set(lengths(8))
    assert 3 <= found <= 8


# --- transformations --------------------------------------------------------------------------


def test_an_operator_passes_through_jit_and_vmap() -> None:
    A = operator(M)
    close(jax.jit(lambda A, v: (2 * A) @ v)(A, V), 2 * M @ V)
    close(jax.jit(lambda m: operator(m).linearize())(M) @ V, M @ V)
    several = jax.vmap(lambda m: operator(m).dense())(jnp.stack([M, 2 * M]))
    close(several, np.stack([M, 2 * M]))
    # The trace of the Hessian of ½ wᵀ M w is that of M, and its derivative by M is the identity.
    close(jax.grad(lambda m: operator(m).trace())(jnp.asarray(M)), np.eye(SIZE))


def equations(jaxpr, inside: str | None = None) -> Iterator[Any]:
    """All equations of a jaxpr, at any depth, or those in the bodies of `inside`."""
    for eqn in jaxpr.eqns:
        if inside is None:
            yield eqn
        for value in eqn.params.values():
            for body in value if isinstance(value, tuple | list) else [value]:
                opened = getattr(body, "jaxpr", body)
                if hasattr(opened, "eqns"):
                    yield from equations(opened, None if eqn.primitive.name == inside else inside)


def primitives(jaxpr, inside: str | None = None) -> list[str]:
    """The names of these equations."""
    return [eqn.primitive.name for eqn in equations(jaxpr, inside)]


@pytest.mark.parametrize(
    "ask",
    [lambda A, v: A.solve(v, 1.0), lambda A, v: A.eigsh(1)[0], lambda A, v: A @ V],
)
def test_iterations_do_not_repeat_the_forward_pass(ask) -> None:
    """`tan` is in the forward pass alone, and so not in the body of a loop."""

    def model(w, x):
        return jnp.tan(x @ w)

    G = fp.ggn(model, lambda outputs, y: jnp.sum((outputs - y) ** 2), batched=True)
    x = jnp.ones((2, SIZE)) / SIZE
    jaxpr = jax.make_jaxpr(lambda w, v: ask(G(w, x, jnp.zeros(2)), v))(jnp.ones(SIZE), jnp.ones(SIZE)).jaxpr
    assert "tan" in primitives(jaxpr)
    loops = primitives(jaxpr, "while") + primitives(jaxpr, "scan")
    assert "dot_general" in loops
    assert "tan" not in loops


def test_a_linearised_operator_keeps_no_constants() -> None:
    """The zeros of a relu's derivative are made again, not kept."""
    model = MODELS["mlp"]()
    outputs, y = mean(LOSSES["squared error"]), LOSSES["squared error"].targets(EXAMPLES, 3)
    G = fp.ggn(batched(model), outputs, batched=True)(model.params, model.x, y)
    linearized = G.linearize()
    assert not any(r.size > 1 and not np.asarray(r).any() for r in linearized.multiply.constants)
    v = jnp.ones(G.parameters.size)
    close(linearized @ v, G @ v)
    assert "tanh" not in primitives(jax.make_jaxpr(lambda L, v: L @ v)(linearized, v).jaxpr)


def test_only_the_columns_of_a_block_are_computed() -> None:
    """The tangent of a parameter that has no column in the block is not propagated."""
    G = fp.ggn(lambda p, x: x @ p["first"] @ p["last"], lambda o, y: jnp.sum((o - y) ** 2), batched=True)
    p, x = {"first": jnp.ones((50, 40)), "last": jnp.ones((40, 2))}, jnp.ones((3, 50))
    jaxpr = jax.make_jaxpr(lambda p: G(p, x, jnp.zeros((3, 2))).block("last"))(p).jaxpr
    assert primitives(jaxpr, "scan").count("dot_general") == 2  # the tangent of the outputs, and back
    both = jax.make_jaxpr(lambda p: G(p, x, jnp.zeros((3, 2))).block("last", "first"))(p).jaxpr
    assert primitives(both, "scan").count("dot_general") == 3
    # A block between layers has 80 × 2000 entries; nothing has the matrix's P².
    sizes = [v.aval.size for jaxpr in (jaxpr, both) for eqn in equations(jaxpr) for v in eqn.outvars]
    assert 80 * 2000 <= max(sizes) < 2 * 80 * 2000 < G(p, x, jnp.zeros((3, 2))).parameters.size ** 2


# --- subsets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [
        "a",
        ["a/w", "a/b"],
        lambda path, leaf: leaf.ndim > 0,
        {"a": {"w": True, "b": True}, "c": False},
    ],
)
def test_where(where) -> None:
    A = operator(M, where=where)
    close(A.dense(), M[:9, :9])
    part = A.restrict(PARAMS)
    assert part["c"] is None
    close(entries(A @ part), M[:9, :9].sum(1))
    assert A.parameters.paths == ("a/b", "a/w")


def test_where_leaves_out_what_has_no_derivative() -> None:
    params = {"w": jnp.ones(2), "step": jnp.array(3), "key": jax.random.key(0)}

    def loss(p):
        return p["step"] * jnp.sum(p["w"] ** 2)

    close(fp.hessian(loss, where="w")(params).dense(), 6 * np.eye(2))
    with pytest.raises(TypeError, match="the parameter 'key' is key<fry>, which has no real derivative"):
        fp.hessian(loss)(params)


def test_an_operator_shows_its_parameters_and_no_arrays() -> None:
    A = operator(M)
    said = "10 × 10, of {a/b: float64[3], a/w: float64[2, 3], c: float64[]})"
    assert [repr(B) for B in (A, 2 * A, A + A)] == [f"{name}({said}" for name in ("Hessian", "Scaled", "Sum")]


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda A: A @ {"a": {"w": jnp.ones((2, 3))}}, "it lacks 'a/b', 'c'"),
        (lambda A: A @ (PARAMS | {"d": 1.0}), "it has 'd' besides"),
        (
            lambda A: A @ (PARAMS | {"c": jnp.ones(2)}),
            r"v has shape \(2,\) at 'c', but the parameter has shape \(\)",
        ),
        (lambda A: A @ (1j * jnp.ones(10)), "v is complex128, but the parameters are real"),
        (lambda A: A @ jnp.ones(9), r"v has shape \(9,\), but the operator has shape \(10, 10\)"),
        (lambda A: A @ jnp.ones((2, 10)), r"a vector of shape \(10,\), a matrix of shape \(10, m\)"),
        (lambda A: A.solve(jnp.ones(9)), r"b has shape \(9,\), but a flat b has shape \(10,\)"),
        (lambda A: A.block("a/x"), "path='a/x' is not a parameter; did you mean 'a/"),
        (lambda A: A.dense(budget=100), "the matrix has 10 × 10 entries, 800 bytes, and budget=100"),
        (lambda A: A.block("a", budget=100), "the block has 9 × 9 entries, 648 bytes"),
        (lambda A: A @ A, r"operators have no product, .*; write A @ \(B @ v\)"),
        (lambda A: A + operator(M, where="a"), "operators of different parameters cannot be added"),
        (lambda A: operator(M, where="b"), "path='b' is not a parameter"),
        (
            lambda A: operator(M, where=lambda path, leaf: False),
            "chooses no parameter; the paths are 'a/b', 'a/w'",
        ),
        (lambda A: operator(M, where={"a": True}), "is not a path, several paths, a predicate"),
        (lambda A: fp.hessian(lambda p: 0.0)({}), "has no leaves; there is nothing to differentiate"),
        (
            lambda A: fp.hessian(jnp.sum)({"w": jax.ShapeDtypeStruct((3,), "float32")}),
            r"params/w is a shape \(jax.ShapeDtypeStruct, float32\[3\]\), but curvature needs values; pass "
            r"arrays, or ask fp.second_order_cost\(loss\)",
        ),
        (
            lambda A: fp.ggn(jnp.dot, jnp.sum, batched=True)(
                jnp.ones(3), jax.ShapeDtypeStruct((2, 3), "float32"), 0
            ),
            "argument 1 is a shape .* but curvature needs values",
        ),
        (lambda A: fp.hessian(jnp.sin)(jnp.ones(3)), "loss sin returns .*curvature is of one real scalar"),
        (
            lambda A: fp.hessian(jnp.sum)(jnp.ones(3) * 1j),
            "params is complex128, which has no real derivative",
        ),
        (lambda A: fp.ggn(jnp.argmax, jnp.sum, batched=True)(jnp.ones(3), 0, 0), "model argmax returns"),
        (lambda A: fp.hessian(loss, rules="none")(PARAMS, M), "rules='none' is not a rule set"),
    ],
)
def test_bad_input_is_said(ask, message: str) -> None:
    with pytest.raises((ValueError, TypeError, fp.RuleError), match=message):
        ask(operator(M))


def test_nan_is_reported_with_the_parameters_path() -> None:
    def loss(p):
        return jnp.sum(jnp.sqrt(p["scale"])) + jnp.sum(p["w"] ** 2)

    A = fp.hessian(loss)({"scale": jnp.array([0.0, 1.0]), "w": jnp.ones(3)})
    for ask in (
        lambda: A.dense(),
        lambda: A.diagonal(),
        lambda: A.trace(),
        lambda: A.frobenius_norm(),
        lambda: A.trace(samples=4, key=jax.random.key(0)),
        lambda: A.eigsh(1),
        lambda: A.eigsh(1, solver=fp.curvature.DenseSolver()),
        lambda: A.spectrum(products=2),
        lambda: A.logdet(),
        lambda: A.sqrt(),
        lambda: A.solve(jnp.ones(5)),
        lambda: A.solve(jnp.ones(5), solver=fp.curvature.DenseSolver()),
    ):
        with pytest.raises(FloatingPointError, match="not finite in the rows of 'scale'; "):
            ask()
    np.testing.assert_array_equal(A.block("w"), 2 * np.eye(3))


def test_results_beyond_the_dtypes_range_are_said() -> None:
    A = fp.hessian(lambda w: 1e30 * jnp.sum(w**2))(jnp.ones(2, jnp.float32))
    with pytest.raises(FloatingPointError, match=r"though the operator's products are; .*range of float32"):
        A.frobenius_norm()


def test_operators_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        operator(M).loss = None
