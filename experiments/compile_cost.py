"""What do the rules cost before the first step? Trace, lower and compile time, and what the program holds.

`fp.grad` traces the function, emits it again with its rules, and lets JAX differentiate that. On a Flax
transformer of about 990 equations this must cost at most 1.10 times `jax.grad`'s way from function to
executable, and the executable must hold the same temporary bytes; on an MLP, FLOPs and bytes accessed of the
two programs must be equal. Every way starts with empty caches; they take turns and the fastest turn counts.

    python experiments/compile_cost.py [--smoke] [--repeats N]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from benchmark_cases.language import Transformer, next_token_loss
from flax import linen as nn
from running import command_line, write

import funcprop as fp

mpl.use("Agg")
import matplotlib.pyplot as plt

WAYS: dict[str, Callable[..., Any]] = {
    "jax.grad": jax.grad,
    "fp.grad": fp.grad,
    "fp.grad, handwritten": lambda fun: fp.grad(fun, rules=fp.rules.handwritten),
}


def transformer(blocks: int) -> tuple[Any, tuple[Any, ...]]:
    """The loss of a transformer, and the shapes of its arguments."""
    model = Transformer(blocks)
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return next_token_loss(model), (params, tokens)


def mlp() -> tuple[Any, tuple[Any, ...]]:
    """The loss of an MLP, and the shapes of its arguments."""
    model = nn.Sequential([nn.Dense(512), nn.relu, nn.Dense(256), nn.relu, nn.Dense(10)])
    x, y = jax.ShapeDtypeStruct((128, 784), jnp.float32), jax.ShapeDtypeStruct((128,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    return loss, (params, x, y)


class Cost(NamedTuple):
    """Seconds from function to executable, and what the executable is."""

    trace: float
    lower: float
    compile: float
    temp_bytes: float
    flops: float
    bytes_accessed: float

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.trace + self.lower + self.compile


def cost(gradient: Any, args: tuple[Any, ...]) -> Cost:
    """One cold run from function to executable."""
    jax.clear_caches()
    start = time.perf_counter()
    traced = jax.jit(gradient).trace(*args)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    analysis = compiled.cost_analysis()
    return Cost(
        after_trace - start,
        after_lower - after_trace,
        end - after_lower,
        compiled.memory_analysis().temp_size_in_bytes,
        analysis["flops"],
        analysis["bytes accessed"],
    )


def measure(loss: Any, args: tuple[Any, ...], repeats: int) -> dict[str, Cost]:
    """The ways take turns; each keeps its fastest trace, lowering and compilation."""
    turns: dict[str, list[Cost]] = {name: [] for name in WAYS}
    for turn in range(repeats + 1):
        for name, way in WAYS.items():
            measured = cost(way(loss), args)
            if turn > 0:  # The first turn imports and warms up.
                turns[name].append(measured)
    return {name: Cost(*np.min(np.array(costs), axis=0)) for name, costs in turns.items()}


def equations(loss: Any, args: tuple[Any, ...]) -> int:
    """How many equations the loss has; a jitted function inside counts as one."""
    return len(jax.make_jaxpr(loss)(*args).jaxpr.eqns)


def report(name: str, costs: dict[str, Cost]) -> None:
    """A table of one model, each way also relative to `jax.grad`."""
    base = costs["jax.grad"]
    columns = ("trace s", "lower s", "compile s", "total s", "ratio", "temp bytes", "FLOPs", "bytes accessed")
    print(f"{name:22}" + "".join(f"{column:>15}" for column in columns))
    for way, c in costs.items():
        seconds = (c.trace, c.lower, c.compile, c.total, c.total / base.total)
        counts = (c.temp_bytes, c.flops, c.bytes_accessed)
        print(f"  {way:20}" + "".join(f"{x:15.3f}" for x in seconds) + "".join(f"{x:15,.0f}" for x in counts))


def draw(costs: dict[str, Cost], path: Path) -> None:
    """Where the time of the transformer goes."""
    figure, axes = plt.subplots(figsize=(6, 2.5), layout="constrained")
    left = np.zeros(len(costs))
    for part in ("trace", "lower", "compile"):
        seconds = np.array([getattr(c, part) for c in costs.values()])
        axes.barh(list(costs), seconds, left=left, label=part)
        left += seconds
    axes.invert_yaxis()
    axes.set_xlabel("seconds from function to executable, cold")
    figure.legend(ncols=3, loc="outside upper center")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, and write `results/compile_cost.json` and `.png`."""
    parser = command_line(__doc__, smoke="a small model, one turn")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    repeats = 1 if options.smoke else options.repeats
    deep = transformer(1 if options.smoke else 12)
    count = equations(*deep)
    print(f"jax {jax.__version__}, {jax.default_backend()}; transformer: {count} equations, {repeats} turns")
    results = {"transformer": measure(*deep, repeats), "mlp": measure(*mlp(), repeats)}
    for name, costs in results.items():
        report(name, costs)
    numbers = {name: {way: c._asdict() for way, c in costs.items()} for name, costs in results.items()}
    content = {"jax": jax.__version__, "equations": count, "repeats": repeats, **numbers}
    write(
        "compile_cost", options.smoke, content, lambda path: draw(results["transformer"], path), default=float
    )


if __name__ == "__main__":
    main()
