"""Exercise 4: second derivatives. What happens to the graph, and how long does it take?

An N-layer network of equal widths, differentiated by its weights alone. The closed forms count its matrix
products: forward N, gradient 3N − 1, Hessian-vector product 8N − 5, Gauss-Newton product 5N − 2, dense
Hessian of P parameters 2N − 1 + P (6N − 4). Beside them stand what `fp.second_order_cost` predicts from the
jaxpr, what it counts in XLA's program, and the predicted and measured times. The classes of the operators of
a Hessian-vector product (`fp.second_order_graph`) say what happened to the graph.

    python experiments/exercise_4_second_derivatives.py [file.py:function] [--smoke] [--repeats N]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from running import write
from running.exercises import answered, exercise_line

import funcprop as fp

mpl.use("Agg")
import matplotlib.pyplot as plt


def network(weights: Any, x: Any, y: Any) -> Any:
    """N layers of equal widths, without bias."""
    for w in weights:
        x = fp.layers.tanh(x @ w)
    return fp.layers.mean_squared_error(x, y)


def laws(layers: int, parameters: int) -> dict[str, int]:
    """Matrix products, by the closed forms."""
    return {
        "value": layers,
        "gradient": 3 * layers - 1,
        "HVP forward-over-reverse": 8 * layers - 5,
        "HVP reverse-over-reverse": 8 * layers - 5,
        "Gauss-Newton product": 5 * layers - 2,
        "dense Hessian": 2 * layers - 1 + parameters * (6 * layers - 4),
    }


def measure(layers: int, width: int, batch: int, repeats: int) -> dict[str, Any]:
    """Everything about one network; the counts must be those of the closed forms."""
    keys = jax.random.split(jax.random.key(0), layers + 1)
    weights = [jax.random.normal(k, (width, width)) / width**0.5 for k in keys[1:]]
    x = jax.random.normal(keys[0], (batch, width))
    arguments = weights, x, jnp.zeros((batch, width))
    cost = fp.second_order_cost(network, repeats=repeats)(*arguments)
    expected = laws(layers, layers * width**2)
    for row in cost.rows:
        assert row.predicted.products == expected[row.name], row
        assert row.measured is None or row.measured.products == expected[row.name], row
    classes = fp.second_order_graph(network)(*arguments).count()
    data = {"layers": layers, "width": width, "batch": batch, "law": expected, "classes": classes}
    return {**data, **cost.as_dict()}


def line(name: str, law: int, row: dict[str, Any]) -> str:
    """One line of the table."""
    predicted, measured = row["predicted"], row["measured"]
    if measured is None:
        return f"  {name:26}{law:14,}{predicted['products']:14,}{'-':>14}{predicted['seconds'] * 1e3:12.4g}"
    return (
        f"  {name:26}{law:14,}{predicted['products']:14,}{measured['products']:14,}"
        f"{predicted['seconds'] * 1e3:12.4g}{measured['seconds'] * 1e3:12.4g}{row['time']:8.2f}"
    )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Products against layers, and predicted against measured time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    narrow = [r for r in results if r["width"] == results[0]["width"]]
    layers = [r["layers"] for r in narrow]
    fine = np.linspace(min(layers), max(layers), 50)
    for i, name in enumerate(narrow[0]["law"]):
        if name == "HVP reverse-over-reverse":
            continue  # The same number of products as forward over reverse.
        rows = [next(row for row in r["rows"] if row["name"] == name) for r in narrow]
        counted = [None if row["measured"] is None else row["measured"]["products"] for row in rows]
        colour = f"C{i}"
        width = narrow[0]["width"]
        left.plot(fine, [laws(n, n * width**2)[name] for n in fine], color=colour, linewidth=1)
        label = "Hessian-vector product" if name.startswith("HVP") else name
        left.plot(layers, counted, "o", color=colour, label=label)
    left.set(xlabel="layers N", ylabel="matrix products", yscale="log", xticks=layers)
    left.set_title("lines: closed forms; points: counted in XLA's program", fontsize=10)
    left.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.54))
    everything = [
        (name, row["predicted"]["seconds"] * 1e3, row["measured"]["seconds"] * 1e3)
        for name in results[0]["law"]
        for r in results
        for row in r["rows"]
        if row["name"] == name and row["measured"] is not None
    ]
    for i, name in enumerate(results[0]["law"]):
        points = np.array([(p, m) for n, p, m in everything if n == name])
        right.plot(points[:, 0], points[:, 1], "o", color=f"C{i}", label=name, alpha=0.8)
    ends = np.array([min(min(p, m) for _, p, m in everything), max(max(p, m) for _, p, m in everything)])
    right.plot(ends, ends, color="grey", linewidth=1)
    right.fill_between(ends, ends / 2, ends * 2, color="grey", alpha=0.15, label="within a factor of 2")
    right.set(xscale="log", yscale="log", xlabel="predicted ms", ylabel="measured ms")
    right.set_title("time, predicted from the gradient's and rates of the same run", fontsize=10)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure, print, and write `results/exercise_4_second_derivatives.json` and `.png`."""
    parser = exercise_line(__doc__, smoke="two small networks, one turn")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if answered(4, options):
        return
    sizes = [(2, 8, 8), (3, 8, 8)] if options.smoke else [(n, 16, 64) for n in (1, 2, 3, 4, 6, 8)]
    sizes += [] if options.smoke else [(n, 256, 256) for n in (2, 4, 8)]
    results = []
    print(f"jax {jax.__version__}, {jax.default_backend()}, rules {fp.rules.default.name}")
    print(f"  {'':26}{'law':>14}{'jaxpr':>14}{'XLA':>14}{'ms':>12}{'measured':>12}{'ratio':>8}")
    for layers, width, batch in sizes:
        found = measure(layers, width, batch, 1 if options.smoke else options.repeats)
        results.append(found)
        print(f"{layers} layers of width {width}, batch {batch}; {found['parameters']:,} parameters")
        for row in found["rows"]:
            print(line(row["name"], found["law"][row["name"]], row))
        counts = ", ".join(f"{n} {name}" for name, n in found["classes"].items())
        print(f"  operators of the Hessian-vector product: {counts}", flush=True)
    write("exercise_4_second_derivatives", options.smoke, results, lambda path: draw(results, path))


if __name__ == "__main__":
    main()
