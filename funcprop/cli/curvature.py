"""`funcprop curvature TARGET`: the Hessian's spectrum, as numbers and as a plot."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

import funcprop as fp
from funcprop.cli.errors import TargetError, users_code
from funcprop.cli.options import AsJson, HasAux, TargetName, parse_argnums
from funcprop.cli.output import Output, emit, number
from funcprop.cli.target import Target, load
from funcprop.operators.spectrum_summary import EXACT, Summary
from funcprop.progress import bar


def curvature(
    target: TargetName,
    argnums: Annotated[str, typer.Option(help="position of the argument with the parameters")] = "0",
    k: Annotated[int, typer.Option("-k", min=1, help="eigenvalues at each end")] = 5,
    samples: Annotated[int, typer.Option(min=2, help="random vectors of the estimates")] = 10,
    products: Annotated[int, typer.Option(min=1, help="Lanczos steps of each")] = 64,
    exact: Annotated[
        int, typer.Option(min=0, help="up to so many parameters all eigenvalues are computed")
    ] = EXACT,
    seed: Annotated[int, typer.Option(help="of the random vectors")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="a plot to write: .png, .pdf or .svg")
    ] = None,
    has_aux: HasAux = False,
    as_json: AsJson = False,
) -> None:
    """The Hessian: top eigenvalues, spectral density, trace, each parameter's share, condition."""

    def compute() -> Output:
        loaded, key = load(target, has_aux), jax.random.key(seed)
        return report(loaded, parse_argnums(argnums), out, k=k, samples=samples, products=products,
                      exact=exact, key=key)  # fmt: skip

    emit(compute, as_json, out)


def report(target: Target, argnums: Sequence[int] | None, out: Path | None, **options: Any) -> Output:
    """Summarise the Hessian, and plot it if there is a file to write."""
    if argnums is None or len(argnums) != 1:
        raise TargetError("--argnums for `curvature` is one position, of the argument with the parameters.")
    target.require_arrays("curvature", "`funcprop second` and `funcprop memory` take shapes")
    if out is not None:
        _require_plots(out)
    with (
        bar(f"{target.label}: curvature", counted=False),
        users_code(f"target {target.label!r}: its curvature failed", None),
        warnings.catch_warnings(record=True, category=fp.curvature.ConvergenceWarning) as warned,
    ):
        warnings.simplefilter("always", fp.curvature.ConvergenceWarning)
        found = fp.curvature.summary(_hessian(target, argnums[0]), **options)
    said = [str(w.message) for w in warned]
    text = "\n\n".join([f"{target.label}: Hessian of {found}", *(f"Warning: {message}" for message in said)])
    data = _data(found, target.label) | {"warnings": said, "out": None}
    if out is None:
        return Output(text, data)
    return Output(f"the plot\n\n{text}", data, _plot(found, target.label, out.suffix[1:]))


def _hessian(target: Target, position: int) -> fp.curvature.Hessian:
    count = len(target.args)
    if not -count <= position < count:
        raise TargetError(f"--argnums {position}, but there are {count} positional arguments.")
    params = target.args[position]
    before, after = target.args[: position % count], target.args[position % count + 1 :]

    def loss(params: Any, before: Any, after: Any, **kwargs: Any) -> Any:
        return target.function(*before, params, *after, **kwargs)

    loss.__name__ = target.function.__name__
    return fp.hessian(loss)(params, before, after, **target.kwargs)


def _data(found: Summary, label: str) -> dict[str, Any]:
    edges, counts, count_errors = found.counts()
    grid, density, density_errors = found.density()
    parameters = zip(found.paths, found.sizes, *found.traces, found.shares, strict=True)
    return {
        "target": label,
        "parameters": sum(found.sizes),
        "exact": found.exact,
        "signs": found.signs,
        "largest": found.largest.tolist(),
        "smallest": found.smallest.tolist(),
        "condition": found.condition,
        "trace": {"value": found.trace[0], "error": found.trace[1]},
        "shares": [
            {"path": path, "size": size, "trace": float(value), "error": float(error), "share": number(share)}
            for path, size, value, error, share in parameters
        ],
        "histogram": {
            "edges": edges.tolist(),
            "counts": counts.tolist(),
            "errors": count_errors.tolist(),
        },
        "density": {"at": grid.tolist(), "value": density.tolist(), "error": density_errors.tolist()},
    }


def _require_plots(out: Path) -> None:
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise TargetError(f"--out {str(out)!r}: its suffix is not one of .png, .pdf and .svg.")
    if importlib.util.find_spec("matplotlib") is None:
        raise TargetError(f"--out {str(out)!r} needs matplotlib; pip install 'funcprop[draw]'.")


def _plot(found: Summary, label: str, kind: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.25 * len(found.paths) + 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid, density, errors = found.density()
    left.plot(grid, density, linewidth=1)
    left.fill_between(grid, density - 2 * errors, density + 2 * errors, alpha=0.3)
    ends = [*found.smallest, *found.largest]
    left.plot(ends, [density.max() / 1e5] * len(ends), "k|", markersize=12, label="eigenvalues at the ends")
    left.set_yscale("log")
    left.set_ylim(density.max() / 1e5, 2 * density.max())
    left.set_xlabel("eigenvalue")
    left.set_ylabel("density")
    left.legend()
    right.barh(found.paths, found.traces[0], xerr=2 * found.traces[1], ecolor="grey")
    right.axvline(0, color="grey", linewidth=0.8)
    right.invert_yaxis()
    right.set_xlabel("trace of the parameter's block")
    figure.suptitle(f"{label}: Hessian of {sum(found.sizes)} parameters")
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=150)
    return content.getvalue()
