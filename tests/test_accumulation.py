"""Curvature of a data set in minibatches, against that of the whole data set at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

import funcprop as fp
from funcprop.curvature import LoaderError, accumulate, check_deterministic, merge, over_batches

X = jax.random.normal(jax.random.key(0), (7, 3))
Y = jax.random.normal(jax.random.key(1), (7, 2))
PARAMS = {"w": jax.random.normal(jax.random.key(2), (3, 2)), "b": jnp.array([0.5, -0.5])}
SIZES = [3, 3, 1]  # the last one smaller: a plain mean over minibatches would be wrong


def loss(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean(jnp.sum(jnp.tanh(x @ params["w"] + params["b"] - y) ** 2, 1))


def batches() -> list[tuple[Any, Any]]:
    ends = np.cumsum(SIZES)
    return [(X[e - n : e], Y[e - n : e]) for e, n in zip(ends, SIZES, strict=True)]


def diagonal(x: Any, y: Any) -> Any:
    return fp.curvature.hessian_diagonal(loss)(PARAMS, x, y)


@pytest.fixture(scope="module")
def whole() -> Any:
    return diagonal(X, Y)


@pytest.fixture(scope="module")
def hessian() -> Any:
    flat, unravel = ravel_pytree(PARAMS)
    return jax.hessian(lambda v: loss(unravel(v), X, Y))(flat)


def assert_same(a: Any, b: Any) -> None:
    np.testing.assert_allclose(ravel_pytree(a)[0], ravel_pytree(b)[0], rtol=1e-12)


def test_mean_over_minibatches_of_different_sizes(whole: Any) -> None:
    seen: list[int] = []
    found = accumulate(diagonal, batches, progress=lambda number, state: seen.append(number))
    assert_same(found.mean, whole)
    assert (int(found.examples), int(found.batches), seen) == (7, 3, [1, 2, 3])


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_on_a_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    operator = over_batches(fp.hessian(loss), PARAMS, batches, check=False, progress=True)
    assert (operator @ np.zeros(8)).shape == (8,)
    of_product = capsys.readouterr()
    accumulate(lambda x, y: jnp.mean(x), iter(batches()), progress=True)
    of_mean = capsys.readouterr()
    assert not of_product.out + of_mean.out
    assert ("a product over minibatches" in of_product.err) == ("3/3" in of_product.err) == terminal
    assert ("curvature of minibatches" in of_mean.err) == terminal


def test_an_error_ends_the_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(FloatingPointError, match="minibatch 1") as caught:
        accumulate(lambda x, y: jnp.log(-jnp.sum(x**2)), batches, progress=True)
    hidden, shown = "\x1b[?25l", "\x1b[?25h"  # of the terminal's cursor
    # The traceback is still there, as in a notebook.
    assert caught.tb is not None
    assert capsys.readouterr().err.rpartition(hidden)[2].count(shown) == 1


def test_a_progress_bar_needs_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ModuleNotFoundError, match=r"progress=True needs 'rich'; pip install .*, or pass a"):
        accumulate(lambda x, y: jnp.mean(x), batches, progress=True)


def test_interrupted_saved_and_continued(whole: Any, tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def save(number: int, state: Any) -> None:
        np.savez(tmp_path / "state.npz", *jax.tree.leaves(state))
        if number == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        accumulate(diagonal, batches, progress=save)
    structure = jax.tree.structure(fp.curvature.Accumulated(PARAMS, 0, 0, 0))
    with np.load(tmp_path / "state.npz") as saved:
        state = jax.tree.unflatten(structure, [saved[name] for name in saved.files])
    assert int(state.batches) == 2
    visited: list[int] = []
    found = accumulate(diagonal, batches, state=state, progress=lambda number, _: visited.append(number))
    assert visited == [3]
    assert_same(found.mean, whole)
    straight = accumulate(diagonal, batches)
    assert int(straight.checksum) == int(found.checksum)


def test_merged_parts_are_the_whole(whole: Any) -> None:
    parts = [accumulate(diagonal, [batch]) for batch in batches()]
    assert_same(merge(parts[2], merge(parts[0], parts[1])).mean, whole)
    assert int(merge(*parts[:2]).examples) == 6
    with pytest.raises(ValueError, match=r"merge: the means are .* of the same quantity"):
        merge(parts[0], accumulate(jnp.mean, [X]))
    with pytest.raises(ValueError, match=r"merge: the means are \(3,\) and \(\); .* of the same quantity"):
        merge(accumulate(lambda x: x.mean(0), [X]), accumulate(jnp.mean, [X]))


def test_continuing_with_other_data_is_an_error() -> None:
    state = accumulate(lambda x, y: jnp.mean(x), batches()[:2])
    changed = [(x + 1e-15 * (i == 0), y) for i, (x, y) in enumerate(batches())]
    with pytest.raises(LoaderError, match="first 2 minibatches are not those that were accumulated"):
        accumulate(lambda x, y: jnp.mean(x), changed, state=state)
    with pytest.raises(LoaderError, match="there are 1 minibatches, but 2 were accumulated"):
        accumulate(lambda x, y: jnp.mean(x), batches()[:1], state=state)


def test_what_is_wrong_with_a_minibatch() -> None:
    bad = [*batches(), (X[:2].at[0, 0].set(jnp.nan), Y[:2])]
    with pytest.raises(FloatingPointError, match=r"minibatch 4 is not finite at '[bw]'"):
        accumulate(diagonal, bad)
    with pytest.raises(ValueError, match=r"minibatch 1 has arrays of shapes \(7, 3\), \(6, 2\)"):
        accumulate(lambda x, y: jnp.mean(x), [(X, Y[:6])])
    with pytest.raises(ValueError, match="yielded nothing; an iterator"):
        accumulate(diagonal, [])


def test_deterministic_loaders() -> None:
    assert check_deterministic(batches) == 3
    calls = iter(range(10))

    def augmenting() -> Any:
        noise = next(calls)
        return [(X, Y), (X, Y + (noise > 0) * 1e-14)]

    with pytest.raises(LoaderError, match=r"minibatch 2 differs between two passes, in array \[1\]"):
        check_deterministic(augmenting)
    lengths = iter([2, 1])
    with pytest.raises(LoaderError, match="the second pass ends before minibatch 2, the other does not"):
        check_deterministic(lambda: batches()[: next(lengths)])
    shapes = iter([[X], [X[:3]]])
    with pytest.raises(LoaderError, match=r"minibatch 1 .*shapes \(7, 3\) and \(3, 3\)"):
        check_deterministic(lambda: next(shapes))


def test_products_over_the_data_set(hessian: Any) -> None:
    operator = over_batches(fp.hessian(loss), PARAMS, batches)
    np.testing.assert_allclose(operator @ np.eye(8), hessian, rtol=1e-10, atol=1e-14)
    values = scipy.sparse.linalg.eigsh(operator, 2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(hessian)[-2:], rtol=1e-9)
    noise = iter(range(9))
    with pytest.raises(LoaderError, match="over: there are no minibatches, the loader yielded nothing"):
        over_batches(fp.hessian(loss), PARAMS, list)
    with pytest.raises(LoaderError, match="minibatch 1 differs"):
        over_batches(fp.hessian(loss), PARAMS, lambda: [(X, Y + next(noise))])
