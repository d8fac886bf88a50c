"""Where is XLA's convolution slow? Value, weight gradient and input gradient, by shapes.

Random geometries from the range in `geometries`, with a seed. For each part, XLA's way and the other way of
`rules.primitives.convolution` (the value with a margin, the cotangents by products of patches in chunks)
take turns. The table shows the fastest turn and the temporary bytes of both, and which one the cost model
(`plan`) chooses.

    python experiments/convolution_costs.py [--smoke] [--count N] [--seed N] [--repeats N]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from running import blocking, command_line, interleaved, write

import funcprop as fp
from funcprop.rules.primitives import convolution, patches

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

TITLES = {"value": "value", "weight": "gradient of the weight", "input": "gradient of the input"}
PARTS = tuple(TITLES)
LAYOUTS = {"NHWC": ("NHWC", "HWIO", "NHWC"), "NCHW": ("NCHW", "OIHW", "NCHW")}


class Shape(NamedTuple):
    """A two-dimensional convolution on square images."""

    batch: int
    size: int
    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: str
    layout: str

    @property
    def options(self) -> dict[str, Any]:
        return {
            "window_strides": (self.stride, self.stride),
            "padding": self.padding,
            "dimension_numbers": LAYOUTS[self.layout],
        }

    def arrays(self) -> list[jax.Array]:
        """Input, kernel and output cotangent."""
        named = {"N": self.batch, "H": self.size, "W": self.size, "C": self.inputs}
        kernel = {"H": self.kernel, "W": self.kernel, "I": self.inputs, "O": self.outputs}
        lhs, rhs, _ = LAYOUTS[self.layout]
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], [named[c] for c in lhs])
        w = jax.random.normal(keys[1], [kernel[c] for c in rhs])
        y = jax.eval_shape(lambda x, w: jax.lax.conv_general_dilated(x, w, **self.options), x, w)
        return [x, w, jax.random.normal(keys[2], y.shape)]


def geometries(count: int, seed: int, small: bool) -> Iterator[Shape]:
    """Shapes drawn at random, of 10 million to 1.5 billion products."""
    rng = np.random.default_rng(seed)
    while count:
        stride = int(rng.choice([1, 1, 2]))
        shape = Shape(
            batch=2 if small else int(rng.choice([8, 32, 64, 128])),
            size=int(rng.integers(4, 8 if small else 65)),
            inputs=int(rng.choice([1, 3, 16, 32, 48, 64, 96, 128, 256])),
            outputs=int(rng.choice([16, 32, 48, 64, 96, 128, 256])),
            kernel=int(rng.choice([1, 3, 3, 3, 5, 7])),
            stride=stride,
            padding=str(rng.choice(["SAME", "VALID"])),
            layout=str(rng.choice(["NHWC", "NHWC", "NCHW"])),
        )
        if shape.size < shape.kernel:
            continue
        products = shape.batch * (shape.size // stride * shape.kernel) ** 2 * shape.inputs * shape.outputs
        if small or 1e7 < products < 1.5e9:
            count -= 1
            yield shape


class Cost(NamedTuple):
    """The fastest run in milliseconds, and temporary megabytes."""

    time: float
    temp: float


class Compared(NamedTuple):
    """One part of a convolution both ways, and whether the model chooses the other way."""

    shape: Shape
    part: str
    xla: Cost
    other: Cost
    chosen: bool

    @property
    def time(self) -> float:
        """Time of the chosen way, in milliseconds."""
        return (self.other if self.chosen else self.xla).time

    @property
    def ratio(self) -> float:
        """Time of the other way over XLA's."""
        return self.other.time / self.xla.time


def parts(shape: Shape, rules: fp.RuleSet) -> dict[str, Callable[..., Any]]:
    """Value, weight gradient and input gradient as functions of input, kernel and output cotangent."""

    def conv(x: Any, w: Any) -> Any:
        return jax.lax.conv_general_dilated(x, w, **shape.options)

    pull = lambda x, w, g: fp.vjp(conv, x, w, rules=rules)[1](g)  # noqa: E731
    return {
        "value": lambda x, w, g: fp.with_rules(conv, rules)(x, w),
        "weight": lambda x, w, g: pull(x, w, g)[1],
        "input": lambda x, w, g: pull(x, w, g)[0],
    }


def compare(shape: Shape, repeats: int) -> list[Compared]:
    """All parts of a convolution, both ways in turn."""
    seen: list[patches.Geometry] = []

    def always(geometry: patches.Geometry) -> convolution.ConvolutionPlan:
        seen.append(geometry)
        return convolution.ConvolutionPlan(margin=True, weight=True, input=True)

    other = fp.rules.autodiff.replace({"conv_general_dilated": convolution.rule(always)})
    args = shape.arrays()
    found = []
    for part in PARTS:
        programs = [
            jax.jit(parts(shape, rules)[part]).lower(*args).compile() for rules in (fp.rules.autodiff, other)
        ]
        expected, actual = (program(*args) for program in programs)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * float(jnp.max(jnp.abs(expected))))
        seconds = interleaved({i: blocking(program, args) for i, program in enumerate(programs)}, repeats)
        xla, imposed = (
            Cost(1e3 * float(seconds[i].min()), fp.memory.CompiledGradient.of(program).temp / 1e6)
            for i, program in enumerate(programs)
        )
        plan = convolution.plan(seen[0])
        chosen = {"value": plan.margin, "weight": plan.weight, "input": plan.input}[part]
        found.append(Compared(shape, part, xla, imposed, chosen))
    return found


def draw(rows: list[Compared], path: Path) -> None:
    """Time of the other way over XLA's, by XLA's time; filled where the model chooses it."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
    for axis, part in zip(axes, PARTS, strict=True):
        some = [r for r in rows if r.part == part]
        faces = ["C0" if r.chosen else "none" for r in some]
        times, ratios = [r.xla.time for r in some], [r.ratio for r in some]
        axis.scatter(times, ratios, facecolors=faces, edgecolors="C0", s=18)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=TITLES[part], xlabel="XLA, ms")
        for scale in (axis.xaxis, axis.yaxis):
            # The labels of minor ticks, which a narrow range gets, are written into each other.
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter("{x:g}")
            scale.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("time of the other way ÷ XLA's")
    figure.suptitle("each point a shape; filled: the cost model chooses the other way", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, and write `results/convolution_costs.json` and `.png`."""
    parser = command_line(__doc__, smoke="two small shapes, one turn")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    count, repeats = (2, 1) if options.smoke else (options.count, options.repeats)
    print(f"jax {jax.__version__}, {jax.default_backend()}, {count} shapes, seed {options.seed}")
    columns = ("XLA ms", "other", "ratio", "XLA MB", "other", "chosen")
    print(f"{'batch size in→out kernel/stride':40}{'part':6}" + "".join(f"{c:>9}" for c in columns))
    rows: list[Compared] = []
    for shape in geometries(count, options.seed, options.smoke):
        b, n, i, o, k, s, padding, layout = shape
        for row in compare(shape, repeats):
            rows.append(row)
            numbers = (row.xla.time, row.other.time, row.ratio, row.xla.temp, row.other.temp)
            print(
                f"{f'{b:4} {n:2}² {i:3}→{o:3} {k}×{k}/{s} {padding} {layout}':40}{row.part:6}"
                + "".join(f"{x:9.2f}" for x in numbers)
                + f"{'other' if row.chosen else 'XLA':>9}",
                flush=True,
            )
    for part in PARTS:
        some = [r for r in rows if r.part == part]
        other = [r for r in some if r.chosen]
        best = sum(min(r.xla.time, r.other.time) for r in some)
        total, xla = sum(r.time for r in some), sum(r.xla.time for r in some)
        print(
            f"{part}: the other way chosen in {len(other)} of {len(some)}; in "
            f"{sum(r.ratio > 1.03 for r in other)} of them XLA's is faster; all shapes take "
            f"{total / xla:.2f} of XLA's time, the best choice {best / xla:.2f}"
        )
    content = [
        {**r._asdict(), "shape": r.shape._asdict(), "xla": r.xla._asdict(), "other": r.other._asdict()}
        for r in rows
    ]
    write("convolution_costs", options.smoke, content, lambda path: draw(rows, path))


if __name__ == "__main__":
    main()
