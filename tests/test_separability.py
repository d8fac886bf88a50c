"""Which axes of its operand an operator keeps apart, by the coupling that the dense Hessian shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from dense_diagonals import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from funcprop import _jax
from funcprop.curvature.diagonal.separability import _KEEPS, is_separable
from funcprop.program.facts import TABLE

ROWS = jnp.array([2, 0, 1, 2])
START = np.int32(0), np.int32(1), np.int32(0)


def weighted(z: Any, results: Any, curve: Callable[[Any], Any]) -> Any:
    """A sum of functions of single entries of an operator's results, each with another weight."""
    total: Any = 0.0
    for y in jax.tree.leaves(results):
        if y.dtype == z.dtype:
            total += jnp.sum(curve(y) * jnp.cos(1 + jnp.arange(y.size)).reshape(y.shape))
    return total


def loss_of(operator: Callable[[Any], Any], curve: Callable[[Any], Any] = jnp.tanh) -> Callable[[Any], Any]:
    """The loss after an operator; its own sum is of entries, so that it separates every axis."""
    return lambda z: weighted(z, operator(z), curve)


def coupled_axes(loss: Callable[[Any], Any], z: Any) -> list[bool]:
    """For each axis, whether the dense Hessian has an entry between two slices along it."""
    hessian = np.abs(np.asarray(compiled(jax.hessian(loss))(z))).reshape(*z.shape, *z.shape)
    found = []
    for axis, size in enumerate(z.shape):
        over = tuple(d for d in range(2 * z.ndim) if d not in (axis, axis + z.ndim))
        blocks = hessian.max(axis=over)
        found.append(bool((blocks * (1 - np.eye(size))).max() > 1e-13))
    return found


def separable_axes(loss: Callable[[Any], Any], z: Any) -> list[bool]:
    """What the analysis says."""
    closed = jax.make_jaxpr(loss)(z)
    return [is_separable(_jax.inlined(closed), 0, axis) for axis in range(z.ndim)]


def gathered(z: Any) -> Any:
    """Rows by their number: the second axis is taken whole."""
    numbers = lax.GatherDimensionNumbers((1, 2), (0,), (0,))
    return lax.gather(z, ROWS[:, None], numbers, (1, *z.shape[1:]), mode="clip") ** 2 + jnp.sin(z).sum(0)


def windows(name: str, *window: int, strides: tuple[int, ...] = (1, 1, 1), padding: str = "SAME") -> Any:
    start, by = {"sum": (0.0, lax.add), "max": (-jnp.inf, lax.max), "min": (jnp.inf, lax.min)}[name]
    return lambda z: lax.reduce_window(jnp.sinh(z), start, by, window, strides, padding)


def convolved(x: Any, kernel: Any, of: str, to: str) -> Any:
    """A convolution along the axis H of a kernel as HIO."""
    return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=(of, "HIO", to))


W = normal(3, 5, seed=1)
# By primitive: operators on an array of [4, 3, 2], none of whose axes is like another.
OPERATORS: dict[str, list[Callable[[Any], Any]]] = {
    "broadcast_in_dim": [
        lambda z: lax.broadcast_in_dim(z, (2, 4, 3, 2), (1, 2, 3)) * normal(2, 4, 3, 2),
        lambda z: lax.broadcast_in_dim(z.sum(2, keepdims=True), (4, 3, 5), (0, 1, 2)),
    ],
    "concatenate": [
        lambda z: jnp.cumsum(jnp.concatenate([z, jnp.sin(z)], 0), 0),
        lambda z: jnp.concatenate([z, jnp.sin(z)], 2).sum(2),
    ],
    "conv_general_dilated": [
        lambda z: convolved(z, normal(2, 2, 5), "NHC", "NHC"),
        lambda z: convolved(z, normal(2, 4, 5), "CNH", "CHN"),
        lambda z: convolved(jnp.ones((2, 5, 3)), z, "NHC", "NHC"),
    ],
    "dot_general": [
        lambda z: jnp.einsum("nij,ik->njk", z, W),
        lambda z: jnp.einsum("ki,nij->kjn", W.T, z),
        lambda z: jnp.einsum("nij,ijk->ikn", z, normal(3, 2, 2)),
        lambda z: jnp.einsum("nij,nik->njk", z, jnp.sin(z)),
        lambda z: jnp.einsum("nij,mij->nm", z, jnp.sin(z)),
    ],
    "dynamic_slice": [lambda z: lax.dynamic_slice(z, START, (4, 2, 2)).sum(1)],
    "dynamic_update_slice": [
        lambda z: lax.dynamic_update_slice(z, z[:, :1] * 2, START) * z,
        lambda z: lax.dynamic_update_slice(jnp.ones((4, 3, 2)), z[:2] * 2, (np.int32(1),) * 3) * z,
    ],
    "fft": [lambda z: jnp.abs(lax.fft(z + 0j, "FFT", (2,)))],
    "gather": [gathered, lambda z: jnp.take_along_axis(z, jnp.array([1, 0, 1])[None, :, None], 1) * z],
    "pad": [
        lambda z: lax.pad(z, 0.5, ((0, 0, 0), (1, 0, 0), (0, 0, 0)))[:, :3] * z,
        lambda z: lax.pad(z, 0.5, ((-1, 1, 0), (0, 0, 0), (1, 0, 1)))[:, :, :2] * z,
    ],
    "reduce_window_sum": [
        windows("sum", 1, 2, 1),
        windows("sum", 3, 1, 1),
        windows("sum", 1, 1, 2),
        windows("sum", 2, 2, 1, padding="VALID"),
    ],
    "reduce_window_max": [lambda z: windows("max", 1, 3, 1)(z) * z, lambda z: windows("max", 3, 1, 1)(z) * z],
    "reduce_window_min": [lambda z: windows("min", 1, 3, 1)(z) * z, lambda z: windows("min", 3, 1, 1)(z) * z],
    "reshape": [
        lambda z: z.reshape(4, 6).sum(1),
        lambda z: z.reshape(12, 2).sum(0),
        lambda z: z.reshape(2, 2, 6).sum((0, 2)),
        lambda z: z.reshape(4, 3, 2, 1).sum(2),
    ],
    "rev": [lambda z: lax.rev(z, (1,)) * z],
    "slice": [lambda z: z[:, 1:] * z[:, :2], lambda z: z[::2].sum(0)],
    "sort": [
        lambda z: lax.sort(z, dimension=1) * z,
        lambda z: lax.sort([z, jnp.cos(z)], dimension=0, num_keys=1)[1] * z,
    ],
    "split": [lambda z: math.prod(lax.split(z, (1, 1, 1), 1)), lambda z: math.prod(lax.split(z, (2, 2), 0))],
    "squeeze": [
        lambda z: lax.squeeze(z.sum(1, keepdims=True), (1,)),
        lambda z: lax.squeeze(z.sum(0, keepdims=True), (0,)),
    ],
    "stack": [
        lambda z: jnp.stack([z, jnp.sin(z)], 0).sum(0),
        lambda z: jnp.stack([z, jnp.sin(z)], 2).sum(3),
        lambda z: jnp.stack([z, jnp.sin(z)], 3).sum(1),
    ],
    "tile": [lambda z: lax.tile_p.bind(z, reps=(1, 2, 1))[:, 2:5] * z],
    "top_k": [lambda z: lax.top_k(z, 1)[0] * z],
    "transpose": [lambda z: lax.transpose(z, (2, 0, 1)).sum(0), lambda z: lax.transpose(z, (1, 2, 0)).sum(0)],
    "unstack": [
        lambda z: jnp.stack([a * b for a in jnp.unstack(z, axis=1) for b in jnp.unstack(z, axis=1)]),
        lambda z: math.prod(jnp.unstack(z, axis=0)),
    ],
    "reduce_sum": [lambda z: z.sum(1), lambda z: z.sum((0, 2)), lambda z: jnp.exp(z).sum(2)],
    "reduce_max": [lambda z: z.max(1, keepdims=True) * z],
    "reduce_min": [lambda z: z.min(0) * z],
    "reduce_prod": [lambda z: z.prod(1), lambda z: z.prod((0, 2))],
    "cumsum": [lambda z: lax.cumsum(z, 1), lambda z: lax.cumsum(z, 0)],
    "cumprod": [lambda z: lax.cumprod(z, 2)],
    "cummax": [lambda z: lax.cummax(z, 1) * z],
    "cummin": [lambda z: lax.cummin(z, 0) * z],
    "cumlogsumexp": [lambda z: lax.cumlogsumexp(z, 1)],
    "optimization_barrier": [lambda z: lax.optimization_barrier(z).sum(1)],
    "clamp": [lambda z: lax.clamp(-0.5, z, jnp.cos(z)).sum(1)],
    "select_n": [lambda z: jnp.where(z > 0, z, jnp.exp(z[..., ::-1])) * z],
}
CASES = [(name, i) for name, found in OPERATORS.items() for i in range(len(found))]


def test_every_operator_that_keeps_an_axis_is_tried() -> None:
    listed = {n for n, found in TABLE.items() if found.cumulative or (found.reduces and not found.flat)}
    assert {*_KEEPS, *listed} <= set(OPERATORS)


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("name", "i"), CASES)
def test_operators_keep_the_axes_apart_that_the_dense_hessian_does(name: str, i: int) -> None:
    operator, z = OPERATORS[name][i], normal(4, 3, 2)
    assert name in {e.primitive.name for e in _jax.equations(jax.make_jaxpr(operator)(z))}
    loss = loss_of(operator)
    assert separable_axes(loss, z) == [not coupled for coupled in coupled_axes(loss, z)]


@pytest.mark.sampled(33)
@pytest.mark.parametrize(("name", "i"), CASES)
def test_what_adds_up_slices_is_no_product_of_them(name: str, i: int) -> None:
    loss, z = loss_of(OPERATORS[name][i], lambda y: y), normal(4, 3, 2)
    pairs = zip(separable_axes(loss, z), coupled_axes(loss, z), strict=True)
    assert not any(separable and coupled for separable, coupled in pairs)


def test_a_reshape_that_merges_an_axis_with_one_before_it_mixes_both() -> None:
    def operator(z: Any) -> Any:
        return z.reshape(2, 6).sum(1)

    z = normal(2, 2, 3)
    assert coupled_axes(loss_of(operator), z) == [False, True, True]
    assert separable_axes(loss_of(operator), z) == [True, False, False]


SHAPES = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.randoms(use_true_random=False), st.data())
def test_reshapes_keep_no_axis_that_the_entries_do_not(shape: list[int], random: Any, data: Any) -> None:
    factors = [f for n in shape for f in (n, 1)]
    random.shuffle(factors)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(factors)), max_size=3)))
    result = [math.prod(factors[a:b]) for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]
    axis = data.draw(st.integers(0, len(result) - 1))
    others = tuple(d for d in range(len(result)) if d != axis)
    entries = np.arange(math.prod(shape)).reshape(shape)

    def fun(z: Any) -> Any:
        return jnp.sum(jnp.tanh(lax.reshape(z, result).sum(others)))

    z = jnp.zeros(shape)
    closed = jax.make_jaxpr(fun)(z)
    for of in range(len(shape)):
        if is_separable(_jax.inlined(closed), 0, of):
            # Then each sum is of entries of one slice.
            slices = np.moveaxis(entries.reshape(result), axis, 0).reshape(result[axis], -1)
            number = np.unravel_index(slices, shape)[of]
            assert (number == number[:, :1]).all()
