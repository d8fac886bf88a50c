"""What is drawn are the numbers; coverage of error bars; clipped sums of gradients."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot

import funcprop as fp

mpl.use("Agg")

KEYS = jax.random.split(jax.random.key(0), 5)
PARAMS = {"a": jax.random.normal(KEYS[0], (3, 4)), "b": jax.random.normal(KEYS[1], (4, 2))}
X, Y = jax.random.normal(KEYS[2], (9, 3)), jax.random.normal(KEYS[3], (9, 2))


def model(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["a"]) @ p["b"]


def squared(output: Any, y: Any) -> Any:
    return jnp.sum((output - y) ** 2) / 2


@pytest.fixture(scope="module")
def operator() -> Any:
    return fp.ggn(model, squared)(PARAMS, X, Y)


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    pyplot.close("all")


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_yticklabels()]


def test_a_spectrum(operator: Any) -> None:
    spectrum = operator.spectrum(samples=4, key=KEYS[4])
    axes = spectrum.plot(points=50)
    x, y = axes.lines[0].get_data()
    found = spectrum.density(x)
    floor = 1e-6 * float(found.value.max())
    np.testing.assert_allclose(y, np.maximum(found.value, floor), rtol=1e-9)
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose(band.max(), found.interval()[1].max(), rtol=1e-9)
    assert axes.get_yscale() == "log"
    again = pyplot.subplots()[1]
    assert operator.plot(key=KEYS[4], axes=again) is again


def test_traces_and_diagonals(operator: Any) -> None:
    exact = operator.plot("traces")
    traces = [float(t) for t in operator.traces().values()]
    np.testing.assert_allclose([bar.get_width() for bar in exact.patches], traces, rtol=1e-12)
    assert labels(exact) == ["a", "b"]
    assert not exact.containers[0].errorbar
    estimate = operator.traces(samples=5, key=KEYS[4])
    drawn = operator.plot("traces", samples=5, key=KEYS[4])
    segments = drawn.containers[-1].errorbar.lines[2][0].get_segments()
    low, high = estimate.interval()
    np.testing.assert_allclose([s[:, 0] for s in segments], [[low[k], high[k]] for k in "ab"], rtol=1e-9)
    boxes = operator.plot("diagonal")
    assert labels(boxes) == ["a", "b"]
    medians = [line.get_xdata()[0] for line in boxes.lines if line.get_color() == "C1"]
    expected = [np.median(leaf) for leaf in operator.diagonal().values()]
    np.testing.assert_allclose(medians, expected, rtol=1e-9)
    with pytest.raises(ValueError, match="plot: what='trace' is not known; choose 'spectrum', 'diagonal' or"):
        operator.plot("trace")


def test_a_summary(operator: Any) -> None:
    for exact in (0, 1000):
        density, traces = fp.curvature.summary(operator, exact=exact, samples=3, products=10).plot()
        assert density.get_xlabel() == "eigenvalue"
        assert bool(traces.containers[-1].errorbar) == (exact == 0)


def test_posteriors_and_predictive_intervals() -> None:
    line = lambda w, x: w[0] + w[1] * x  # noqa: E731
    x = jnp.linspace(-1.0, 1.0, 8)
    posterior = fp.curvature.laplace(line, "gaussian", structure="full")(jnp.array([0.0, 2.0]), x, 2 * x)
    axes = posterior.plot(x[::-1], 0.5, 0.3)
    found = posterior.predictive(x, 0.5, 0.3)
    at, mean = axes.lines[0].get_data()
    np.testing.assert_allclose(at, x, rtol=1e-12)
    np.testing.assert_allclose(mean, found.mean[:, 0], rtol=1e-9)
    variance = found.variance[:, 0]
    for collection, added in zip(axes.collections, (0, 0.09), strict=True):
        ends = collection.get_paths()[0].vertices[:, 1]
        np.testing.assert_allclose(ends.max(), (mean + 2 * jnp.sqrt(variance + added)).max(), rtol=1e-9)
    shares = posterior.plot()
    assert labels(shares) == ["params"]
    many = fp.curvature.laplace(model, "gaussian")(PARAMS, X, Y).plot(X)
    assert many.get_xlabel() == "example"
    with pytest.raises(ValueError, match="plot: the prior is a matrix; give x"):
        posterior.plot(None, posterior.as_prior())


def test_matplotlib_is_an_extra(operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"plot\(\) needs matplotlib.* pip install 'funcprop\[draw\]'"
    ):
        operator.plot("traces")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("samples", [2, 4, 30])
@pytest.mark.parametrize("quantity", ["trace", "spectrum"])
def test_the_coverage_of_intervals(samples: int, quantity: str) -> None:
    """Of 1000 intervals by Student's quantiles, also for two samples, 93 to 97 in 100 hold the truth."""
    root = jax.random.normal(jax.random.key(5), (40, 40))
    matrix = root @ root.T / 40
    A = fp.hessian(lambda w: w @ matrix @ w / 2)(jnp.zeros(40)).linearize()

    def inside(key: Any) -> Any:
        if quantity == "trace":
            found, truth = A.trace(samples=samples, key=key), jnp.trace(matrix)
        else:
            found = A.spectrum(samples=samples, products=12, key=key).mean(lambda v: v**2)
            truth = jnp.sum(matrix**2) / 40
        low, high = found.interval(0.95)
        return (low <= truth) & (truth <= high)

    covered = jax.jit(lambda keys: jax.lax.map(inside, keys, batch_size=100))
    found = float(covered(jax.random.split(jax.random.key(7), 1000)).mean())
    assert 0.93 <= found <= 0.97


@pytest.mark.parametrize("microbatch", [None, 4])
def test_clipped_sums(microbatch: int | None) -> None:
    gradients = jax.vmap(jax.grad(lambda p, x, y: squared(model(p, x), y)), (None, 0, 0))(PARAMS, X, Y)
    norms = jnp.sqrt(sum(jnp.sum(g**2, (1, 2)) for g in gradients.values()))
    C = float(jnp.median(norms))
    weights = jnp.arange(9.0) % 3
    for w in (None, weights):
        scale = jnp.minimum(1, C / norms) * (1 if w is None else w)
        found = fp.curvature.clipped_sum(model, squared, norm=C, microbatch=microbatch)(
            PARAMS, X, Y, weights=w
        )
        np.testing.assert_allclose(found.norms, norms, rtol=1e-12)
        for name, g in gradients.items():
            np.testing.assert_allclose(found.gradient[name], jnp.tensordot(scale, g, 1), rtol=1e-10)
    last = fp.curvature.clipped_sum(model, squared, norm=C, where="b")(PARAMS, X, Y)
    np.testing.assert_allclose(last.norms, jnp.linalg.norm(gradients["b"], axis=(1, 2)), rtol=1e-12)
    assert last.gradient["a"] is None
    with pytest.raises(ValueError, match=r"clipped_sum: norm=0; pass the largest norm"):
        fp.curvature.clipped_sum(model, squared, norm=0)
    with pytest.raises(ValueError, match=r"clipped_sum: microbatch=0; pass a number of examples"):
        fp.curvature.clipped_sum(model, squared, norm=1.0, microbatch=0)
