"""`fp.memory.batch_limit`: the limit against a formula, and against the footprint on both of its sides."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import ShapeDtypeStruct

import funcprop as fp
from funcprop._jax.xla_options import without_folding


def f32(*dims: int) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(dims, "float32")


def predict(w: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w["W1"]) @ w["W2"]


def loss(w: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((predict(w, x) - y) ** 2)


@settings(max_examples=6)
@given(st.integers(8, 40), st.integers(2, 30), st.integers(1, 7), st.integers(30_000, 3_000_000))
def test_prediction_by_its_formula(d: int, h: int, q: int, budget: int) -> None:
    """`4 (P + Bd + Bh + Bq) ≤ budget`, up to the alignment of `Bh` to 64 bytes."""
    w, p = {"W1": f32(d, h), "W2": f32(h, q)}, d * h + h * q
    limit = fp.memory.batch_limit(predict, budget, program="inference", by="estimate")(w, f32(1, d))
    exact = (budget // 4 - p) // (d + h + q)
    assert exact - 16 <= limit <= exact


def test_the_next_batch_does_not_fit() -> None:
    w, budget, optimizer = {"W1": f32(20, 30), "W2": f32(30, 4)}, 400_000, optax.adam(0.1)
    limit = fp.memory.batch_limit(loss, "400kB", optimizer=optimizer)(w, f32(8, 20), f32(8, 4))

    def needs(batch: int) -> int:
        account = fp.memory.footprint(loss, optimizer=optimizer)
        found = account(w, f32(batch, 20), f32(batch, 4)).training
        assert found is not None
        return found.held

    assert needs(limit) <= budget < needs(2 * limit)
    assert needs(limit) > 0.9 * budget


def test_memory_that_falls_with_the_batch() -> None:
    """Beyond 32 examples they are taken one by one: the limit lies behind that."""

    def several(w: jax.Array, x: jax.Array) -> jax.Array:
        if x.shape[0] > 32:
            return jax.lax.map(lambda row: jnp.sum(jnp.tanh(row @ w)), x).sum()
        return jnp.sum(jnp.cumsum(jnp.tanh(x @ w), 0))

    found = fp.memory.batch_limit(several, 120_000, program="inference")(f32(8, 500), f32(4, 8))
    small, large = (
        fp.memory.footprint(several, programs=["inference"])(f32(8, 500), f32(b, 8)).inference
        for b in (32, int(found))
    )
    assert small is not None
    assert large is not None
    assert large.held <= 120_000 < small.held
    assert found > 1000


def test_no_limit() -> None:
    w = {"W1": f32(8, 4), "W2": f32(4, 2)}
    assert fp.memory.batch_limit(predict, 10**17, program="inference")(w, f32(1, 8)) == math.inf


def test_by_compiling() -> None:
    w = {"W1": f32(8, 4), "W2": f32(4, 2)}
    limit = fp.memory.batch_limit(predict, 10_000, program="inference", by="compiled")(w, f32(100, 8))
    found = [fp.memory.footprint(predict)(w, f32(b, 8)).inference for b in (limit, limit + 1)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].compiled is not None
    assert found[1].compiled is not None
    assert found[0].compiled <= 10_000 < found[1].compiled


def test_other_batch_axes() -> None:
    w = {"W1": f32(8, 4), "W2": f32(4, 2)}
    columns = lambda w, x, scale: predict(w, x.T) * scale  # noqa: E731
    by: Any = {"program": "inference", "by": "estimate"}
    limited = fp.memory.batch_limit(columns, 10_000, batch_axes=(None, 1, None), **by)
    plain = fp.memory.batch_limit(predict, 10_000, **by)(w, f32(1, 8))
    assert limited(w, f32(8, 5), f32(2)) == pytest.approx(plain, abs=4)


def test_errors() -> None:
    w = {"W1": f32(8, 4), "W2": f32(4, 2)}
    with pytest.raises(
        ValueError, match=r"budget=100 bytes, but a batch of one needs [0-9,]+; the largest: W1 128"
    ):
        fp.memory.batch_limit(predict, 100, program="inference")(w, f32(1, 8))
    with pytest.raises(ValueError, match="have the lengths 3, 5; give batch_axes"):
        fp.memory.batch_limit(loss, 10**6)(w, f32(3, 8), f32(5, 2))
    with pytest.raises(ValueError, match="have the lengths none at all; give batch_axes"):
        fp.memory.batch_limit(lambda w: jnp.sum(w**2), 10**6)(f32(3))
    with pytest.raises(ValueError, match="have the lengths none at all; give batch_axes"):
        fp.memory.batch_limit(lambda w: jnp.sum(w**2), 10**6)(w=f32(3))
    with pytest.raises(ValueError, match="2 entries for 3 arguments"):
        fp.memory.batch_limit(loss, 10**6, batch_axes=(None, 0))(w, f32(3, 8), f32(3, 2))
    with pytest.raises(ValueError, match="the memory does not depend on batch_axes"):
        fp.memory.batch_limit(lambda w, x: jnp.sum(w), 10**6, program="inference")(f32(3), f32(2))
    with pytest.raises(ValueError, match="batch_limit: budget='x' is not a number of bytes; write '100000'"):
        fp.memory.batch_limit(loss, "x")  # type: ignore[arg-type]
    for nothing in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"budget={nothing} holds nothing; pass bytes, more than 0"):
            fp.memory.batch_limit(loss, nothing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_axes='first' is not known; use 'leading', or one entry for"):
        fp.memory.batch_limit(loss, 10**6, batch_axes="first")
    with pytest.raises(ValueError, match="program='both' is not known"):
        fp.memory.batch_limit(loss, 10**6, program="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="by='guess' is not known"):
        fp.memory.batch_limit(loss, 10**6, by="guess")  # type: ignore[arg-type]


def test_constants_that_are_not_computed_by_the_compiler_take_no_other_buffers() -> None:
    """A scatter of millions of equal numbers takes a minute to compile; the buffers are the same without."""

    def entropy(w: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(jnp.tanh(x @ w), y).mean()

    options = without_folding({"xla_disable_hlo_passes": "cse_barrier_expander"})
    assert options == {"xla_disable_hlo_passes": "cse_barrier_expander,constant_folding"}
    gradient = jax.jit(jax.value_and_grad(entropy)).lower(
        f32(8, 5), f32(4096, 8), ShapeDtypeStruct((4096,), "int32")
    )
    temp = [
        gradient.compile(compiler_options=o).memory_analysis().temp_size_in_bytes
        for o in ({}, without_folding({}))
    ]
    assert temp[0] == temp[1]
