"""What is the curvature of a language model over a whole corpus?

The claims: the spectrum of a trained network is a bulk near zero and few eigenvalues far outside (Ghorbani,
Krishnan and Xiao 2019, "An investigation into neural net optimization via Hessian eigenvalue density"); the
blocks of a transformer differ in curvature by orders of magnitude, which is said to be why it is trained by
Adam and not by SGD (Zhang et al. 2024, "Why transformers need Adam: a Hessian perspective"); and Kronecker
factors keep the blocks' traces, whatever they lose of the rest (Eschenhagen et al. 2023, "Kronecker-factored
approximate curvature for modern neural network architectures").

A transformer of characters (two blocks of one attention head and a feed-forward layer, width 32) learns the
project's own README. All sequences of it, in minibatches whose last is padded and weighted, go through
`fp.curvature.over(minibatches, weighted=True)`: the density of the Gauss-Newton matrix's eigenvalues with
error bars, its largest eigenvalues, the trace of every block with error bars, and KFAC's trace of every
block.

Found (1,056 sequences, 32,448 parameters, a loss of 1.12): the bulk at zero is there, but no clear gap: 1,614
± 30 eigenvalues are above a hundredth of the largest, 31.7, and the density falls over three decades. The
blocks' traces go from 2.7 (the last normalisation's scale) to 774 (the first feed-forward's second matrix), a
factor of 90 for each parameter; all of the first block's are larger than the second's. KFAC's traces are 0.75
to 1.18 of the estimated ones, median 1.01; it is the values and what follows them that differ.

    python experiments/language_model_curvature.py [--smoke]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from running import command_line, write

import funcprop as fp

mpl.use("Agg")
import matplotlib.pyplot as plt

WIDTH, LENGTH, BATCH, BLOCKS = 32, 32, 64, 2
README = Path(__file__).parents[1] / "README.md"


def initial(vocabulary: int, key: jax.Array) -> Any:
    keys = iter(jax.random.split(key, 3 + 6 * BLOCKS))

    def matrix(rows: int, columns: int, scale: float = 1.0) -> jax.Array:
        return scale * jax.random.normal(next(keys), (rows, columns)) / np.sqrt(rows)

    blocks = [
        {
            "query": matrix(WIDTH, WIDTH), "key": matrix(WIDTH, WIDTH), "value": matrix(WIDTH, WIDTH),
            "mix": matrix(WIDTH, WIDTH, 0.5), "up": matrix(WIDTH, 4 * WIDTH),
            "down": matrix(4 * WIDTH, WIDTH, 0.5), "scale 1": jnp.ones(WIDTH), "scale 2": jnp.ones(WIDTH),
        }
        for _ in range(BLOCKS)
    ]  # fmt: skip
    return {
        "embedding": matrix(vocabulary, WIDTH, np.sqrt(vocabulary) / 5),
        "position": matrix(LENGTH, WIDTH, np.sqrt(LENGTH) / 5),
        "blocks": blocks,
        "out": matrix(WIDTH, vocabulary),
    }


def normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def transformer(params: Any, tokens: jax.Array) -> jax.Array:
    """The logits of the next character at every position of one sequence."""
    x = params["embedding"][tokens] + params["position"]
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    for block in params["blocks"]:
        h = normalised(x, block["scale 1"])
        scores = (h @ block["query"]) @ (h @ block["key"]).T / np.sqrt(WIDTH)
        attended = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) @ (h @ block["value"])
        x = x + attended @ block["mix"]
        x = x + jax.nn.gelu(normalised(x, block["scale 2"]) @ block["up"]) @ block["down"]
    return x @ params["out"]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over the positions of one sequence."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def sequences(limit: int | None) -> tuple[np.ndarray, int]:
    """The text in rows of LENGTH + 1 characters, by their numbers, and how many different ones there are."""
    text = README.read_text("utf-8")
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([number[c] for c in text])
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    return rows[:limit], len(number)


def minibatches(rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All of equal size, so that all is compiled once; the last is padded."""
    found = []
    for i in range(0, len(rows), BATCH):
        part = rows[i : i + BATCH]
        padded = np.zeros((BATCH, LENGTH + 1), rows.dtype)
        padded[: len(part)] = part
        weights = (np.arange(BATCH) < len(part)).astype(np.float32)
        found.append((padded[:, :-1], padded[:, 1:], weights))
    return found


def trained(params: Any, rows: np.ndarray, steps: int) -> tuple[Any, float]:
    adam = optax.adam(3e-3)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, y: cross_entropy(transformer(params, x), y))(x, y).mean()

    step = fp.training.make_step(loss, adam)
    state, draw, value = adam.init(params), np.random.default_rng(0), jnp.nan
    for _ in range(steps):
        batch = rows[draw.integers(len(rows), size=BATCH)]
        params, state, value = step(params, state, (batch[:, :-1], batch[:, 1:]))
    return params, float(value)


def draw(path: Path, spectrum: Any, traces: Any, kfac: list[float], paths: list[str]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    spectrum.plot(axes=left)
    left.set_title("Gauss-Newton matrix of the corpus", fontsize="medium")
    order = np.argsort([-float(t) for t in jax.tree.leaves(traces.value)])
    low, high = ([float(x) for x in jax.tree.leaves(end)] for end in traces.interval())
    at = np.arange(len(paths))
    middle = (np.array(low) + np.array(high))[order] / 2
    half = (np.array(high) - np.array(low))[order] / 2
    right.errorbar(middle, at, xerr=half, fmt="o", markersize=4, capsize=3, label="trace, 95 % interval")
    right.plot(np.array(kfac)[order], at, "x", label="KFAC")
    right.set_yticks(at, [paths[i] for i in order])
    right.invert_yaxis()
    right.set(xscale="log", xlabel="trace of the block")
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    smoke = command_line(__doc__, "100 sequences, 30 steps, few products").parse_args().smoke
    rows, vocabulary = sequences(100 if smoke else None)
    params, value = trained(initial(vocabulary, jax.random.key(0)), rows, 30 if smoke else 1500)
    over = fp.curvature.over(minibatches(rows), weighted=True, progress=not smoke)
    G = over(fp.ggn(transformer, cross_entropy))(params)
    samples, products = (2, 8) if smoke else (4, 40)
    spectrum = G.spectrum(samples=samples, products=products, key=jax.random.key(1))
    traces = G.traces(samples=4 if smoke else 32, key=jax.random.key(2))
    factored = over(fp.kfac(transformer, cross_entropy, samples=2))(params, key=jax.random.key(3))
    kfac = [float(x) for x in jax.tree.leaves(factored.traces())]
    paths = list(G.parameters.paths)
    estimated = [float(x) for x in jax.tree.leaves(traces.value)]
    each = np.array(estimated) / np.array(G.parameters.sizes)
    largest = np.asarray(spectrum.nodes).max()
    bulk = spectrum.count(-np.inf, float(largest) / 100)
    found = {
        "parameters": G.parameters.size,
        "sequences": len(rows),
        "training loss": value,
        "largest eigenvalue": float(largest),
        "eigenvalues above a hundredth of it": float(G.parameters.size - bulk.value),
        "their standard error": float(bulk.error),
        "trace of each block": dict(zip(paths, estimated, strict=True)),
        "KFAC's trace of each block": dict(zip(paths, kfac, strict=True)),
        "largest over smallest trace per parameter": float(each.max() / each.min()),
        "nodes": np.asarray(spectrum.nodes).tolist(),
    }
    for name in list(found)[:6]:
        print(f"{name}: {found[name]:,.4g}")
    print(f"largest over smallest trace per parameter: {each.max() / each.min():.3g}")
    ratio = np.array(kfac) / np.array(estimated)
    median, ends = np.median(ratio), (ratio.min(), ratio.max())
    print(f"KFAC's traces over the estimated: median {median:.2f}, {ends[0]:.2f} to {ends[1]:.2f}")
    write("language_model_curvature", smoke, found, lambda path: draw(path, spectrum, traces, kfac, paths))


if __name__ == "__main__":
    main()
