"""Exercise 2: a bias in the hidden layer. The new graph, the new equations, and what changes.

Forward `z = W1 x + b`; backward one more line, `∂J/∂b = ∂J/∂z`: over a batch the sum of the examples', and
without a λ term, because the bias is not decayed. The difference of the two graphs is drawn, the equations
are derived and verified, and the gradients are compared with `jax.grad` and with central differences.

    python experiments/exercise_2_bias.py [file.py:function] [--smoke]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from running import folder, write
from running.exercises import answered, exercise_line

import funcprop as fp

mpl.use("Agg")
import matplotlib.pyplot as plt

STRENGTHS = (0.0, 0.1, 0.2, 0.4)


def example(inputs: int, hidden: int, outputs: int, batch: int) -> tuple[Any, ...]:
    """Parameters with a hidden bias, a batch, and λ."""
    params = fp.models.init_chapter(jax.random.key(0), inputs, hidden, outputs, bias=True)
    params["b"] = jax.random.normal(jax.random.key(1), (hidden,))
    x = jax.random.normal(jax.random.key(2), (batch, inputs))
    return params, x, jnp.arange(batch) % outputs, jnp.array(STRENGTHS[1])


def objective(params: Any, xs: Any, ys: Any, λ: Any) -> Any:
    """The sum of the examples' objectives, each with its own weight decay."""
    return jnp.sum(jax.vmap(fp.models.chapter, (None, 0, 0, None))(params, xs, ys, λ))


def differences(params: Any, rest: tuple[Any, ...], step: float = 1e-6) -> np.ndarray:
    """Central differences of the objective by the bias."""
    value = jax.jit(lambda b: objective({**params, "b": b}, *rest))
    moved = step * np.eye(params["b"].size)
    return np.array([(value(params["b"] + e) - value(params["b"] - e)) / (2 * step) for e in moved])


def deviation(actual: Any, expected: Any) -> float:
    """The largest, relative to the largest entry."""
    return float(np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected)))


def measure(where: Path, inputs: int, hidden: int, outputs: int, batch: int) -> dict[str, Any]:
    """Both graphs, drawn into a folder, the equations, and the gradients beside their oracles."""
    params, xs, ys, λ = example(inputs, hidden, outputs, batch)
    plain = {name: w for name, w in params.items() if name != "b"}
    one = xs[0], ys[0], λ
    model = fp.models.chapter
    graphs = fp.trace(model)(plain, *one), fp.trace(model)(params, *one)
    sweeps = [fp.backward_graph(model, rules=fp.rules.handwritten)(p, *one) for p in (plain, params)]
    derivations = [fp.derive(model)(p, *one) for p in (plain, params)]
    for derivation in derivations:
        derivation.verify()
    before, after = (str(d).splitlines() for d in derivations)
    new = [" ".join(line.split()) for line in after if line.split() not in [old.split() for old in before]]

    propagation = fp.backprop(objective)(params, xs, ys, λ)
    bias = propagation.gradients["b"]
    of_z = propagation.gradients["z"]
    summed = of_z.sum(axis=of_z.shape.index(batch))
    expected = jax.grad(objective)(params, xs, ys, λ)
    by_strength = [jax.grad(objective)(params, xs, ys, jnp.array(s)) for s in STRENGTHS]
    found = {
        "shape": {"inputs": inputs, "hidden": hidden, "outputs": outputs, "batch": batch},
        "forward_difference": str(fp.diff(*graphs)).splitlines(),
        "both_sweeps_difference": str(fp.diff(*sweeps)).splitlines(),
        "new_equations": new,
        "gradient_of_bias": np.asarray(bias).tolist(),
        "sum_over_batch_of_gradient_of_z": np.asarray(summed).tolist(),
        "deviation_from_sum": deviation(bias, summed),
        "deviation_from_jax_grad": deviation(bias, expected["b"]),
        "deviation_from_differences": deviation(bias, differences(params, (xs, ys, λ))),
        "decay_in_W1": [deviation(g["W1"], by_strength[0]["W1"]) for g in by_strength],
        "decay_in_b": [deviation(g["b"], by_strength[0]["b"]) for g in by_strength],
    }
    assert found["deviation_from_sum"] < 1e-12
    assert found["deviation_from_jax_grad"] < 1e-12
    assert found["deviation_from_differences"] < 1e-6
    assert max(found["decay_in_b"]) == 0 < found["decay_in_W1"][1]
    assert any(line.startswith("∂J/∂b = ") and "λ" not in line for line in new), new
    fp.draw(fp.diff(*graphs), where / "exercise_2_bias.svg")
    fp.draw(fp.diff(*sweeps), where / "exercise_2_bias_both_sweeps.svg")
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """The bias's gradient beside the sum over the batch, and how λ enters the gradients."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    places = np.arange(len(found["gradient_of_bias"]))
    left.bar(places - 0.2, found["gradient_of_bias"], 0.4, label="∂J/∂b")
    left.bar(places + 0.2, found["sum_over_batch_of_gradient_of_z"], 0.4, label="Σ over the batch of ∂J/∂z")
    left.axhline(0, color="grey", linewidth=0.8)
    left.set(xlabel="hidden unit", ylabel="gradient", xticks=places)
    left.legend()
    for key, label in (("decay_in_W1", "∂J/∂W1"), ("decay_in_b", "∂J/∂b")):
        right.plot(STRENGTHS, found[key], "o-", label=label)
    right.set(xlabel="λ", ylabel="change of the gradient, relative to λ = 0")
    right.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure, print, and write `results/exercise_2_bias.json`, `.png` and two `.svg`."""
    parser = exercise_line(__doc__, smoke="a small model")
    options = parser.parse_args()
    if answered(2, options):
        return
    where = folder(options.smoke)
    with jax.enable_x64(True):
        found = measure(where, 3, 4, 2, 3) if options.smoke else measure(where, 8, 6, 3, 32)
    for title in ("new_equations", "forward_difference", "both_sweeps_difference"):
        print(title.replace("_", " "), *("  " + line for line in found[title]), sep="\n")
    for key in ("deviation_from_sum", "deviation_from_jax_grad", "deviation_from_differences"):
        print(f"{key.replace('_', ' '):28}{found[key]:10.1e}")
    changes = ", ".join(
        f"{λ:g}: {w:.3f} and {b:g}"
        for λ, w, b in zip(STRENGTHS, found["decay_in_W1"], found["decay_in_b"], strict=True)
    )
    print(f"relative change of ∂J/∂W1 and of ∂J/∂b by λ: {changes}")
    write("exercise_2_bias", options.smoke, found, lambda path: draw(found, path), ensure_ascii=False)


if __name__ == "__main__":
    main()
