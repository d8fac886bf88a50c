"""The summary of a spectrum and `funcprop curvature`, against dense linear algebra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command import module as module  # the fixture
from command import run, run_json
from jax.flatten_util import ravel_pytree
from quadratic import operator, symmetric, with_eigenvalues

import funcprop as fp
from funcprop.cli.target import chapter_example

VALUES = np.concatenate([[-3.0, -1.0], np.linspace(0.5, 2, 50), [7.0, 9.0]])


def chapter_hessian() -> np.ndarray:
    """Dense, by JAX."""
    params, *rest = chapter_example()
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.hessian(lambda flat: fp.models.chapter(unravel(flat), *rest))(flat))


def test_an_exact_summary() -> None:
    matrix = symmetric(1)
    found = fp.curvature.summary(operator(matrix), k=3)
    values = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(found.largest, values[-3:], rtol=1e-10)
    np.testing.assert_allclose(found.smallest, values[:3], rtol=1e-10)
    np.testing.assert_allclose(found.condition, np.abs(values).max() / np.abs(values).min(), rtol=1e-8)
    assert (found.exact, found.signs) == (True, "indefinite")
    assert found.paths == ("a/b", "a/w", "c")
    diagonal = np.diag(matrix)
    parts = [diagonal[:3].sum(), diagonal[3:9].sum(), diagonal[9]]
    np.testing.assert_allclose(found.traces[0], parts, rtol=1e-10)
    np.testing.assert_allclose(found.shares, parts / np.trace(matrix), rtol=1e-10)
    edges, counts, errors = found.counts(4)
    # The outer edges are eigenvalues by another routine, which rounds otherwise.
    wider = edges + 1e-9 * np.array([-1, 0, 0, 0, 1])
    np.testing.assert_allclose(counts, np.histogram(values, wider)[0], atol=1e-9)
    grid, density, _ = found.density()
    np.testing.assert_allclose(np.trapezoid(density, grid), 1, rtol=1e-3)
    assert not errors.any()


def test_an_estimated_summary_agrees_within_its_errors() -> None:
    matrix = with_eigenvalues(VALUES)
    found = fp.curvature.summary(operator(matrix), k=2, samples=40, products=30, exact=0)
    np.testing.assert_allclose(found.largest, [7, 9], rtol=1e-8)
    np.testing.assert_allclose(found.smallest, [-3, -1], rtol=1e-8)
    assert (found.exact, found.signs, found.condition) == (False, "indefinite", None)
    assert abs(found.trace[0] - np.trace(matrix)) < 4 * found.trace[1]
    np.testing.assert_allclose(found.traces[0].sum(), found.trace[0], rtol=1e-10)
    edges, counts, errors = found.counts(5)
    assert (np.abs(counts - np.histogram(VALUES, edges)[0]) < 4 * errors + 1e-6).all()
    assert 0 < errors.max() < 3


@pytest.mark.parametrize(
    ("values", "signs", "condition"),
    [
        (np.linspace(1, 4, 10), "positive definite", 4.0),
        (np.linspace(0, 4, 10), "positive semi-definite", None),
        (np.linspace(-2, 4, 10), "indefinite", None),
    ],
)
def test_signs_and_condition(values: np.ndarray, signs: str, condition: float | None) -> None:
    found = fp.curvature.summary(operator(with_eigenvalues(values)), k=2, samples=4, products=10, exact=0)
    assert found.signs == signs
    assert found.condition == (None if condition is None else pytest.approx(condition))


def test_a_zero_operator_has_a_summary() -> None:
    found = fp.curvature.summary(operator(np.zeros((10, 10))), samples=4, exact=0, products=5)
    assert found.signs == "positive semi-definite"
    assert found.counts(5)[1].sum() == pytest.approx(10)


# --- the command ------------------------------------------------------------------------------


def test_the_command_says_and_plots_the_spectrum(tmp_path: Path) -> None:
    values = np.linalg.eigvalsh(chapter_hessian())
    data = run_json("curvature", "chapter", "--out", str(tmp_path / "a.png"))
    np.testing.assert_allclose(data["largest"], values[-5:], rtol=1e-5)
    np.testing.assert_allclose(data["smallest"], values[:5], rtol=1e-5)
    np.testing.assert_allclose(data["trace"]["value"], values.sum(), rtol=1e-5)
    assert [part["path"] for part in data["shares"]] == ["W1", "W2"]
    assert sum(part["share"] for part in data["shares"]) == pytest.approx(1)
    assert sum(data["histogram"]["counts"]) == pytest.approx(18)
    assert len(data["density"]["at"]) == len(data["density"]["value"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_estimates_with_error_bars() -> None:
    options = ["--exact", "0", "-k", "2", "--products", "12", "--samples", "8"]
    values = np.linalg.eigvalsh(chapter_hessian())
    text = run("curvature", "chapter", *options).stdout
    lines = dict(
        line.split(maxsplit=1) for line in text.splitlines() if line.startswith(("largest", "trace "))
    )
    np.testing.assert_allclose([float(x) for x in lines["largest"].split()], values[:-3:-1], rtol=1e-3)
    value, error = map(float, lines["trace"].split(" ± "))
    assert abs(value - values.sum()) < 4 * error
    assert text.startswith("chapter: Hessian of 18 parameters, indefinite; Lanczos, and estimates ±")
    assert "W1              12" in text


def test_other_arguments_and_what_cannot_be_done(module: Any) -> None:
    name = module("""
        def f(x, w, *, scale):
            return scale * jnp.sum((x @ w["a"]) ** 2)
        def example():
            return (jnp.eye(2), {"a": jnp.ones(2)}), {"scale": 2.0}
        """)
    data = run_json("curvature", f"{name}:f", "--argnums", "1")
    assert (data["largest"], data["condition"]) == ([4.0, 4.0], 1.0)
    for options, message in (
        (["chapter", "--argnums", "7"], "--argnums 7, but there are 4 positional arguments"),
        (["chapter", "--argnums", "0,1"], "is one position"),
        (["chapter", "--argnums", "2"], "which has no real derivative"),
        (["chapter", "--out", "a.txt"], "its suffix is not one of .png, .pdf and .svg"),
        (["chapter", "--out", "/nowhere/a.png"], "cannot be written: No such file"),
    ):
        result = run("curvature", *options)
        assert result.exit_code == 1
        assert message in result.stderr
        assert not result.stdout


def test_targets_whose_curvature_cannot_be_computed(module: Any) -> None:
    name = module("""
        def nan(w):
            return jnp.sum(jnp.sqrt(w["s"]))
        def vector(w):
            return w["s"]
        def example():
            return ({"s": jnp.zeros(2)},)
        """)
    assert "vector returns float64[2]" in run("curvature", f"{name}:vector").stderr
    assert "the curvature is not finite in the rows of 's'" in run("curvature", f"{name}:nan").stderr
