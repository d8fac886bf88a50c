"""Contractions of activations and cotangents against gradients that NumPy makes one by one."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from holding import shapes

from funcprop.curvature.example_gradients import contractions
from funcprop.curvature.example_gradients.contractions import NORMS, SQUARES, SUM, Group, WeightedColumns

C, N, T, I, O = 5, 4, 3, 2, 6  # noqa: E741
RNG = np.random.default_rng(0)
WEIGHT = RNG.uniform(1, 2, N)
ALL = frozenset({SUM, SQUARES, NORMS})


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def moments(a: np.ndarray, g: np.ndarray, group: Group) -> dict[str, np.ndarray]:
    """What is asked of a group, from all gradients: `W[c, n] = Σ_t a[n, t] ⊗ g[c, n, t]`."""
    w = np.einsum("nti,cnto->cnio", a, g)
    found = {SUM: 0.0, SQUARES: 0.0, NORMS: np.zeros(len(a))}
    for at, weight in group.members:
        for column in w[at]:
            squares = column**2 * np.reshape(1.0 if weight is None else weight, (-1, 1, 1))
            found[SUM] += column.sum(0)
            found[SQUARES] += squares.sum(0)
            found[NORMS] += squares.sum((1, 2))
    return found


GROUPS = {
    "one column": Group((WeightedColumns(slice(1, 2)),), ALL),
    "columns in the middle": Group((WeightedColumns(slice(1, 4)),), ALL),
    "weights": Group((WeightedColumns(slice(0, 2)), WeightedColumns(slice(2, 5), WEIGHT)), ALL),
    "squares alone": Group((WeightedColumns(slice(2, 5), WEIGHT),), frozenset({SQUARES})),
    "norms alone": Group((WeightedColumns(slice(0, 3)),), frozenset({NORMS})),
}


def test_moments_of_a_single_position() -> None:
    a, g = normal(N, I), normal(C, N, O)
    found = contractions.single_position(a, g, GROUPS)
    assert set(found) == {(name, what) for name, group in GROUPS.items() for what in group.what}
    for (name, what), value in found.items():
        close(value, moments(a[:, None], g[:, :, None], GROUPS[name])[what])


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("names", [list(GROUPS), ["columns in the middle", "squares alone"]])
def test_moments_by_example(blocks: int, names: list[str]) -> None:
    """A block of a grouped kernel has rows and columns of its own; groups need not begin at column 0."""
    a, g = normal(N, T, blocks * I), normal(C, N, T, blocks * O)
    split = lambda x: jnp.moveaxis(x.reshape(T, blocks, -1), 1, 0)  # noqa: E731
    wanted = {name: GROUPS[name] for name in names}
    found = contractions.by_example(split, jnp.asarray(a), split, jnp.asarray(g), wanted)
    assert set(found) == {(name, what) for name, group in wanted.items() for what in group.what}
    each = [
        {name: moments(x, y, wanted[name]) for name in names}
        for x, y in zip(np.split(a, blocks, -1), np.split(g, blocks, -1), strict=True)
    ]
    for (name, what), value in found.items():
        parts = [block[name][what] for block in each]
        close(value, sum(parts) if what == NORMS else np.stack(parts))


@pytest.mark.parametrize("name", GROUPS)
def test_columns_of_a_group(name: str) -> None:
    group, g = GROUPS[name], normal(C, N, O)
    parts = [(g[at], 1.0 if weight is None else weight[:, None]) for at, weight in group.members]
    close(group.total(g), sum(g.sum(0) for g, _ in parts))
    close(group.squares(g), sum((g**2).sum(0) * w for g, w in parts))
    close(group.scaled(jnp.asarray(g)), np.concatenate([g * np.sqrt(w) for g, w in parts]))
    some = group.part(1, 2)
    close(some.squares(g[:, 1:3]), group.squares(g)[1:3])


@pytest.mark.parametrize("unroll", [64, 2])
def test_sums_over_columns(unroll: int) -> None:
    g, factors = normal(C, N, O), normal(3, N)
    close(contractions.over_columns(lambda c: jnp.asarray(g)[c], range(1, 4), unroll), g[1:4].sum(0))
    expected = np.einsum("in,ino->no", factors, g[[4, 0, 2]])
    close(contractions.combination(jnp.asarray(g), [4, 0, 2], list(factors)), expected)


def test_a_combination_of_many_columns_is_a_loop() -> None:
    g, factors = normal(70, 2, 1), normal(70, 2)
    expected = np.einsum("in,ino->no", factors, g[::-1])
    close(contractions.combination(jnp.asarray(g), range(69, -1, -1), list(factors)), expected)


def test_norms_by_pairs_of_positions() -> None:
    a, g = normal(N, T, I), normal(C, N, T, O)
    close(contractions.norms_by_pairs(a, g), moments(a, g, Group((WeightedColumns(slice(0, C)),)))[NORMS])


@pytest.mark.parametrize("positions", [1, T])
@pytest.mark.parametrize("limit", [1, 2 * N * C * O * 8, 2**20])
def test_gram_matrix_from_a_few_rows_at_a_time(positions: int, limit: int) -> None:
    a, g = normal(N, positions, 5), normal(C, N, positions, O)
    w = np.einsum("nti,cnto->ncio", a, g)
    close(contractions.gram_blocks(a, jnp.asarray(g), limit), np.einsum("ncio,mdio->ncmd", w, w))


def test_so_many_bytes_hold_the_gradients_of_a_gram_matrix() -> None:
    a, g = jnp.ones((N, T, 64)), jnp.ones((C, N, T, O))
    for rows in (4, 16):
        gradients = rows * N * C * O
        found = shapes(lambda a, g, r=gradients: contractions.gram_blocks(a, g, 8 * r), a, g)
        assert max(map(math.prod, found - {(N, T, 64), (N, T, rows)})) == max(gradients, N * T * C * O)


def test_low_precision_is_summed_in_single() -> None:
    """300 examples of ones: bfloat16 counts to 256."""
    a, g = jnp.ones((300, T, I), jnp.bfloat16), jnp.ones((1, 300, T, O), jnp.bfloat16)
    one = Group((WeightedColumns(slice(0, 1)),), ALL)
    found = contractions.by_example(lambda x: x[None], a, lambda x: x[None], g, {"": one})
    assert {value.dtype for value in found.values()} == {jnp.dtype(jnp.float32)}
    close(found["", SUM], np.full((1, I, O), 300 * T))
    assert contractions.product(a[:, 0], g[0, :, 0]).dtype == jnp.float32


@pytest.mark.parametrize(
    ("size", "most", "part"),
    [
        (7, 3, 3),
        (7, 7, 7),
        (6, 3, 3),
        (6, 4, 3),
        (5, 4, 4),
        (10, 4, 4),
        (8, 3, 2),
        (3, 1, 1),
        (2, 9, 2),
        (7, 0, 1),
    ],
)
def test_in_parts(size: int, most: int, part: int) -> None:
    """Every example is in one part, and in one alone, however many fit: a divisor if it is more than half."""
    counts = []

    def of_part(start: Any, count: int) -> contractions.Moments:
        counts.append(count)
        here = start + jnp.arange(count)
        return {("a", SUM): here.sum(), ("b", SQUARES): (here**2).sum(), ("b", NORMS): 10 * here}

    found = contractions.in_parts(of_part, size, most)
    every = np.arange(size)
    close(found["a", SUM], every.sum())
    close(found["b", SQUARES], (every**2).sum())
    close(found["b", NORMS], 10 * every)
    assert max(counts) == part
