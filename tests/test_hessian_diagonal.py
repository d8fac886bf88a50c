"""The exact diagonal against jax.hessian, and which form is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from dense_diagonals import KEY, N, Y, assert_exact, cross_entropy, mixing_backwards, normal, straight_through
from jax.flatten_util import ravel_pytree

import funcprop as fp

# --- models -----------------------------------------------------------------------------------


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.avg_pool(nn.tanh(nn.Conv(4, (3, 3), param_dtype=x.dtype)(x)), (2, 2), (2, 2))
        x = nn.Conv(4, (3, 3), feature_group_count=2, param_dtype=x.dtype)(x)
        x = nn.max_pool(nn.tanh(x), (2, 2), (2, 2))
        x = nn.tanh(nn.Conv(3, (2, 2), strides=1, padding="VALID", param_dtype=x.dtype)(x))
        return nn.Dense(3, param_dtype=x.dtype)(x.reshape(x.shape[0], -1))


class Block(nn.Module):
    """Pre-norm attention, a gelu block and residual connections."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.LayerNorm(param_dtype=x.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, param_dtype=x.dtype)(h, h)
        h = nn.Dense(6, param_dtype=x.dtype)(nn.LayerNorm(param_dtype=x.dtype)(x))
        x = x + nn.Dense(4, param_dtype=x.dtype)(nn.gelu(h))
        return nn.Dense(3, param_dtype=x.dtype)(x.mean(1))


def of_module(module: nn.Module, x: Any) -> tuple[Callable[..., Any], Any]:
    return lambda p, x, y: cross_entropy(module.apply(p, x), y), jax.jit(module.init)(KEY, x)


def test_attention_block() -> None:
    x = normal(N, 2, 4)
    loss, params = of_module(Block(), x)
    plan = fp.curvature.hessian_diagonal(loss).plan(params, x, Y)  # values: tests/test_curvature_oracles.py
    # Examples share their products: as many as a sequence has units, not as weights.
    forms = {path: row for row in plan.rows for path in row.leaves}
    assert forms["params/Dense_0/kernel"].form == "units"
    assert forms["params/Dense_0/kernel"] is forms["params/Dense_0/bias"]
    assert forms["params/Dense_0/kernel"].products == 2 * 6
    assert forms["params/LayerNorm_0/scale"].products == 4


def test_convolutions_pooling_and_groups() -> None:
    x = normal(N, 8, 8, 2)
    loss, params = of_module(Convolutional(), x)
    plan = assert_exact(loss, params, x, Y)
    forms = {path: row.form for row in plan.rows for path in row.leaves}
    assert forms["params/Conv_0/kernel"] == "directions"  # 64 positions, but only 18 inputs
    assert forms["params/Conv_2/kernel"] == "units"  # 1 position, 16 inputs
    assert forms["params/Conv_1/kernel"] == "directions"  # grouped: it is its own node


def test_relu_network_needs_its_outputs_only() -> None:
    params = {"a": normal(4, 9, seed=1), "b": normal(9, seed=2), "c": normal(9, 8, seed=3), "d": normal(8, 2)}

    def loss(p: Any, x: Any) -> Any:
        h = jax.nn.relu(jnp.abs(jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]) - 1)
        return jnp.mean(jnp.cos(h @ p["d"]))  # indefinite: eigenvalues of both signs

    plan = assert_exact(loss, params, normal(N, 4))
    forms = {path: (row.form, row.products) for row in plan.rows for path in row.leaves}
    assert forms["a"] == forms["b"] == ("outputs", 2)
    assert all(products <= 2 for _, products in forms.values())


def test_shared_positions_before_a_mean() -> None:
    # Piecewise affine up to outputs that mix the positions of one example.
    params = {"a": normal(3, 5, seed=1), "b": normal(5, 2, seed=2)}

    def loss(p: Any, x: Any, y: Any) -> Any:
        return jnp.sum((jax.nn.relu(x @ p["a"]).mean(1) @ p["b"] - y) ** 2)

    plan = assert_exact(loss, params, normal(N, 6, 3), normal(N, 2, seed=5))
    assert [row.form for row in plan.rows] == ["outputs", "units"]


def test_outputs_of_which_two_nodes_keep_different_slices_apart() -> None:
    params = {"a": normal(6, 6, seed=1), "b": normal(6, 6, seed=2), "c": normal(6, 2, seed=3)}

    def loss(p: Any, x: Any, y: Any) -> Any:
        h = jnp.einsum("ts,nsd->ntd", normal(2, 2, seed=4), jax.nn.relu(x @ p["a"]))  # mixes positions
        return cross_entropy(jax.nn.relu(h @ p["b"]) @ p["c"], y)  # of every position by itself

    plan = assert_exact(loss, params, normal(3, 2, 6), jnp.arange(6).reshape(3, 2) % 2)
    forms = {path: (row.form, row.products) for row in plan.rows for path in row.leaves}
    assert (forms["a"], forms["b"]) == (("outputs", 4), ("outputs", 2))


def test_tied_embedding_and_loop() -> None:
    params = {"embedding": normal(5, 3, seed=1), "recurrent": normal(3, 3, seed=2), "unused": normal(2)}

    def loss(p: Any, tokens: Any) -> Any:
        x = jnp.moveaxis(p["embedding"][tokens], 1, 0)

        def step(h: Any, x: Any) -> Any:
            h = jnp.tanh(h @ p["recurrent"] + x)
            return h, h

        _, h = jax.lax.scan(step, jnp.zeros((len(tokens), 3)), x)
        logits = jnp.moveaxis(h, 0, 1) @ p["embedding"].T
        return cross_entropy(logits[:, :-1], tokens[:, 1:])

    plan = assert_exact(loss, params, jax.random.randint(KEY, (N, 4), 0, 5))
    forms = {path: (row.form, row.products) for row in plan.rows for path in row.leaves}
    assert forms == {"embedding": ("directions", 15), "recurrent": ("directions", 9), "unused": ("zero", 0)}


def test_layers_under_vmap_with_the_weight_on_the_left() -> None:
    params = [normal(5, 3, seed=1), normal(5, seed=2), normal(2, 5, seed=3)]

    def loss(p: Any, x: Any) -> Any:
        one = lambda x: p[2] @ jnp.tanh(p[0] @ x + p[1])  # noqa: E731
        return jnp.mean(jnp.exp(jax.vmap(one)(x)))

    plan = assert_exact(loss, params, normal(N, 3))
    assert sorted((row.form, len(row.leaves), row.products) for row in plan.rows) == [
        ("units", 1, 1),  # the loss keeps the outputs apart
        ("units", 2, 5),
    ]


def test_weights_through_reshapes_and_several_axes() -> None:
    params = {"w": normal(2, 3, 4, seed=1), "b": normal(4, seed=2), "v": normal(8, 3, seed=3)}

    def loss(p: Any, x: Any) -> Any:
        h = jnp.tanh(jnp.einsum("nij,ijk->nk", x, p["w"]) + p["b"])
        return jnp.mean(jnp.sin(h @ p["v"].reshape(2, 4, 3)[0]) ** 2)

    assert_exact(loss, params, normal(N, 2, 3))


def test_a_batch_that_mixes_is_still_exact() -> None:
    params = {"w": normal(3, 4, seed=1), "b": normal(4, seed=2)}

    def loss(p: Any, x: Any) -> Any:
        h = x @ p["w"] + p["b"]
        h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 0.1)  # batch norm in training mode
        return jnp.sum(jnp.tanh(h) ** 3)

    plan = assert_exact(loss, params, normal(N, 3))
    # Only the features are kept apart; one product serves all of them.
    (row,) = plan.rows
    assert row.leaves == ("w", "b")
    assert row.products == 4


def test_weight_decay_takes_one_product() -> None:
    params = {"w": normal(4, 3, seed=1), "b": normal(3, seed=2), "v": normal(3, 2, seed=3)}

    def loss(p: Any, x: Any, λ: Any) -> Any:
        penalty = sum(jnp.sum(w**2) for w in (p["w"], p["v"])) - jnp.sum(jnp.log(jnp.abs(p["v"])))
        return (jnp.sum(jax.nn.logsumexp(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], -1)) + λ / 2 * penalty) / N

    plan = assert_exact(loss, params, normal(N, 4), jnp.array(0.7))
    assert sorted((row.leaves, row.form, row.products) for row in plan.rows) == [
        (("v",), "directions", 1),
        (("v",), "units", 2),
        (("w",), "directions", 1),
        (("w", "b"), "units", 3),
    ]

    def mixing(p: Any, x: Any) -> Any:  # what is added is no penalty: the norm is not a sum over entries
        return jnp.sum(jnp.tanh(x @ p)) + jnp.linalg.norm(p) ** 3

    plan = assert_exact(mixing, params["w"], normal(N, 4))
    assert [row.products for row in plan.rows] == [12]

    def squared_sum(p: Any, x: Any) -> Any:  # the sum is used twice, once in a square
        total = jnp.sum(jnp.tanh(x @ p)) + jnp.sum(p**2)
        return total**2 + total

    assert_exact(squared_sum, params["w"], normal(N, 4))


def test_layers_and_names_are_seen_through() -> None:
    params = {"w": normal(4, 3, seed=1), "b": normal(3, seed=2)}

    def loss(p: Any, x: Any, y: Any) -> Any:
        h = fp.name(fp.layers.dense(x, p["w"], p["b"]), "h")
        return fp.layers.softmax_cross_entropy(fp.layers.tanh(h), y).mean()

    (row,) = assert_exact(loss, params, normal(N, 4), Y).rows
    assert (row.leaves, row.products) == (("w", "b"), 3)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_incomplete_blocks(at_once: int) -> None:
    params = {"w": normal(4, 5, seed=1), "s": normal(5, seed=2), "v": normal(5, 7, seed=3), "b": normal(7)}

    def loss(p: Any, x: Any) -> Any:
        return jnp.mean(jax.nn.logsumexp(jax.nn.gelu(jnp.sin(x @ p["w"]) * p["s"] @ p["v"] + p["b"]), -1))

    assert_exact(loss, params, normal(N, 4), at_once=at_once)


def test_derivatives_that_are_not_those_of_the_body() -> None:
    assert_exact(lambda w, x: jnp.sum(straight_through(x * w) ** 2), normal(3), normal(N, 3, seed=1))
    w, x = normal(3, 2), normal(N, 3, seed=1)
    diagonal = fp.curvature.hessian_diagonal(lambda w: jnp.sum(jnp.sin(mixing_backwards(x @ w))))(w)
    jacobian = compiled(jax.jacrev(jax.grad(lambda w: jnp.sum(jnp.sin(mixing_backwards(x @ w))))))(w)
    np.testing.assert_allclose(diagonal, jnp.einsum("abab->ab", jacobian), rtol=1e-10)


def test_scale_is_the_losses_own() -> None:
    # ½ (wᵀ diag(c) w) has the diagonal c; a mean of N such losses too.
    c = jnp.array([1.0, 2.0, -3.0])
    half = fp.curvature.hessian_diagonal(lambda w: 0.5 * jnp.sum(c * w**2))(jnp.ones(3))
    np.testing.assert_allclose(half, c, rtol=1e-14)
    mean = fp.curvature.hessian_diagonal(lambda w, x: jnp.mean((x @ w) ** 2))
    np.testing.assert_allclose(
        mean(jnp.ones(3), normal(N, 3)), 2 * jnp.mean(normal(N, 3) ** 2, 0), rtol=1e-12
    )


def test_equal_blocks_share_a_program() -> None:
    params = {
        "blocks": [
            {"w": normal(4, 4, seed=k), "b": normal(4, seed=10 + k), "s": normal(4)} for k in range(4)
        ],
        "out": normal(4, 3, seed=20),
    }

    def loss(p: Any, x: Any, y: Any) -> Any:
        for block in p["blocks"]:
            x = x + jnp.tanh(x @ block["w"] + block["b"]) * block["s"]
        return cross_entropy(x @ p["out"], y)

    x = normal(N, 4)
    plan = assert_exact(loss, params, x, Y)
    programs = {row.program for row in plan.rows}
    assert len(plan.rows) == 9
    assert len(programs) <= 2
    jaxpr = jax.make_jaxpr(fp.curvature.hessian_diagonal(loss))(params, x, Y).jaxpr
    (call,) = jaxpr.eqns
    assert sum(eqn.primitive.name == "scan" for eqn in call.params["jaxpr"].eqns) == len(programs)


def test_programs_are_not_shared_where_running_costs_more() -> None:
    """Wide layers: each has a program of its own, and pays for what comes after it."""

    def loss(p: Any, x: Any, y: Any) -> Any:
        return cross_entropy(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"], y)

    def planned(width: int) -> Any:
        shapes = {"a": (4, 5 * width), "b": (5 * width, 4 * width), "c": (4 * width, 3)}
        params = {name: jax.ShapeDtypeStruct(shape, float) for name, shape in shapes.items()}
        x = jax.ShapeDtypeStruct((N, 4), float)
        return fp.curvature.hessian_diagonal(loss).plan(params, x, Y).rows

    assert len({row.program for row in planned(1)}) == 1
    rows = planned(100)
    assert len({row.program for row in rows}) > 1
    flops = [row.flops / row.products for row in sorted(rows, key=lambda row: row.leaves)]
    assert flops == sorted(flops, reverse=True)


# --- plan and progress ------------------------------------------------------------------------


def test_plan_from_shapes_alone_and_under_jit() -> None:
    x = normal(N, 2, 4)
    loss, params = of_module(nn.Dense(3, param_dtype=x.dtype), x.mean(1))
    diagonal = fp.curvature.hessian_diagonal(loss)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, x.mean(1), Y))
    plan = diagonal.plan(*shapes)
    assert plan.parameters == 15
    assert plan.products == sum(row.products for row in plan.rows) == 3
    assert plan.flops > plan.gradient_flops > 0
    assert plan.nbytes == max(row.nbytes for row in plan.rows) > 0
    assert "params/kernel, params/bias" in str(plan)
    under_jit = jax.jit(diagonal)(params, x.mean(1), Y)
    for a, b in zip(jax.tree.leaves(under_jit), jax.tree.leaves(diagonal(params, x.mean(1), Y)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_predicted_bytes_bound_the_block() -> None:
    w, x = normal(6, 40), normal(N, 6)
    options: dict[str, Any] = {"budget": 12_000}
    loss = lambda w, x: jnp.mean(jnp.sum(jnp.tanh(x @ w), 1) ** 4)  # noqa: E731
    small = fp.curvature.hessian_diagonal(loss, **options).plan(w, x)
    large = fp.curvature.hessian_diagonal(loss).plan(w, x)
    assert small.nbytes <= 12_000 < large.nbytes
    assert_exact(loss, w, x, **options)


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    diagonal = fp.curvature.hessian_diagonal(
        lambda w, x: jnp.sum(jnp.prod(jnp.tanh(x @ w), 1)),
        at_once=2,
        progress=lambda *s: seen.append(s),
    )
    compiled = jax.jit(diagonal)
    for _ in range(2):
        compiled(normal(3, 5), normal(N, 3))
        jax.effects_barrier()
    assert seen == [(2, 5), (3, 5), (5, 5)] * 2


def test_progress_never_counts_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks may end in any order: here the last of the last leaf is heard of first."""
    pending: list[Any] = []
    call = jax.debug.callback
    monkeypatch.setattr(
        jax.debug, "callback", lambda f, *args: call(lambda *args: pending.append((f, args)), *args)
    )
    seen: list[tuple[int, int]] = []
    loss = lambda w, x: jnp.sum(jnp.prod(jnp.tanh(jnp.sin(x @ w[0]) @ w[1]), 1))  # noqa: E731
    diagonal = fp.curvature.hessian_diagonal(loss, at_once=2, progress=lambda *s: seen.append(s))
    diagonal((normal(3, 4), normal(4, 5)), normal(N, 3))
    jax.effects_barrier()
    assert not seen
    for report, args in reversed(pending):
        report(*args)
    done = [number for number, _ in seen]
    assert done == sorted(set(done))
    assert len(seen) == len(pending) > 3
    assert seen[-1] == (seen[-1][1],) * 2


# --- operators between ------------------------------------------------------------------------


# With the number of products: examples share them, and what moves features alone keeps examples apart.
BETWEEN: dict[str, tuple[Callable[..., Any], int]] = {
    "an axis more": (lambda w, x: jnp.einsum("ni,kij->knj", x, w[None]), 1),
    "reversed": (lambda w, x: x @ w[::-1, ::-1], 1),
    "tiled": (lambda w, x: jnp.tile(x @ w, (1, 2)), 4),
    "split and stacked": (lambda w, x: jnp.stack(jnp.split(x @ w, 2, 1)), 4),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_views_of_a_weight_and_of_its_product_keep_it_one(name: str) -> None:
    fun, products = BETWEEN[name]
    plan = assert_exact(lambda w, x: jnp.sum(jnp.sin(fun(w, x))), normal(3, 4), normal(N, 3, seed=1))
    assert [(row.form, row.products) for row in plan.rows] == [("units", products)]


def test_a_sum_behind_a_barrier_is_not_taken_apart() -> None:
    # The loss is linear in the first result of the barrier, and curved in the second.
    def loss(w: Any, x: Any) -> Any:
        first, second = jax.lax.optimization_barrier((jnp.sum(w**4), jnp.sum(w**2) + jnp.sum(w**3)))
        return jnp.where(x > 0, first, jnp.sin(second))

    assert_exact(loss, normal(1), jnp.array(-1.0))


def test_the_absolute_value_of_complex_numbers_is_curved() -> None:
    assert_exact(lambda w: jnp.sum(jnp.abs(w + 1j * w[::-1])), normal(3))


# --- errors -----------------------------------------------------------------------------------


def test_errors() -> None:
    diagonal = fp.curvature.hessian_diagonal(lambda p, x: p["w"] * x)
    with pytest.raises(TypeError, match=r"loss returns \(float64\[2\]\).*mean or the sum"):
        diagonal({"w": jnp.ones(2)}, jnp.ones(2))
    with pytest.raises(TypeError, match=r"parameter .w/k. is .*no real"):
        diagonal({"w": {"k": jnp.arange(2)}}, jnp.ones(2))
    with pytest.raises(ValueError, match="at_once=0; pass a positive"):
        fp.curvature.hessian_diagonal(jnp.sum, at_once=0)
    with pytest.raises(ValueError, match="budget=-1"):
        fp.curvature.hessian_diagonal(jnp.sum, budget=-1)
    roots = fp.curvature.hessian_diagonal(lambda p: jnp.sum(p["v"] ** 3) + jnp.sum(jnp.sqrt(p["w"])))
    params = {"v": jnp.ones(2), "w": jnp.arange(2.0)}
    with pytest.raises(FloatingPointError, match="the diagonal is not finite at 'w'; "):
        roots(params)
    assert not np.isfinite(jax.jit(roots)(params)["w"]).all()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_where_the_loss_is_affine_before_a_cut(dtype: Any) -> None:
    """Eigenvalues exist of single precision alone; a relu network is one of the cases that need them."""

    def loss(p: Any, x: Any) -> Any:
        return jnp.mean(jax.nn.logsumexp((jax.nn.relu(x @ p["w"]) @ p["v"]).astype(jnp.float32), -1))

    params, x = ({"w": normal(3, 4), "v": normal(4, 2, seed=1)}, normal(N, 3, seed=2))
    half = jax.tree.map(lambda a: a.astype(dtype), (params, x))
    found = fp.curvature.hessian_diagonal(loss)(*half)
    flat, unravel = ravel_pytree(jax.tree.map(lambda a: a.astype(jnp.float32), half[0]))
    hessian = jax.jit(jax.hessian(lambda v: loss(unravel(v), half[1].astype(jnp.float32))))(flat)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    expected = jnp.diagonal(hessian)
    np.testing.assert_allclose(ravel_pytree(found)[0], expected, atol=0.02 * float(jnp.abs(expected).max()))
