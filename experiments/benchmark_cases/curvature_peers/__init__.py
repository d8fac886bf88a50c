"""The quantities of `curvature_benchmark.py` by other libraries: same weights, same data; one file a library.

None of them is a dependency; this package is imported for `--peer` alone, and what is not installed is left
out with a sentence that says how to install it. A library is added by an entry of `MODULES` and a module with
`LIBRARY`, its name; `OWN`, the library whose gradient is the unit of its times; and `WAYS`, what builds its
`Way` to each quantity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmark_cases.curvature import Problem

# Each with the packages it needs and the command that installs them.
MODULES: dict[str, tuple[tuple[str, ...], str]] = {
    "torch_twin": (("torch",), "pip install torch"),
    "backpack": (("torch", "backpack"), "pip install backpack-for-pytorch"),
    "curvlinops": (("torch", "curvlinops"), "pip install curvlinops-for-pytorch"),
    "laplace": (("torch", "backpack", "curvlinops", "laplace"), "pip install laplace-torch"),
    "kfac_jax": (("kfac_jax",), "pip install kfac-jax six"),
}


class Way(NamedTuple):
    """A library's way to a quantity: the step to be timed, and its value in the form of `SHOWN`."""

    step: Callable[[], Any]
    value: Callable[[], Any]


class Peer(NamedTuple):
    """A way, of which quantity and library, and the library whose gradient it is measured by."""

    quantity: str
    library: str
    own: str
    way: Way


def _kernels(factors: Any) -> dict[str, Any]:
    """The Kronecker factors of each layer's weights, by name."""
    pairs = {layer: here["kernel"] for layer, here in factors["params"].items()}
    return {layer: {"input": a, "output": g} for layer, (a, g) in pairs.items()}


# What of our program's result is compared.
SHOWN: dict[str, Callable[[Any], Any]] = {
    "value and gradient": lambda result: result[1],
    "Hessian-vector product": lambda result: result,
    "Gauss-Newton product": lambda result: result,
    "norms, with gradient": lambda result: result["norm"],
    "variance, with gradient": lambda result: result["variance"],
    "Gauss-Newton diagonal": lambda result: result["diag_ggn"],
    "diagonal, Monte-Carlo": lambda result: result["diag_ggn_mc"],
    "KFAC factors, Monte-Carlo": lambda result: _kernels(result["kfac"]),
    "KFAC factors, exact": lambda result: _kernels(result["kflr"]),
    "posterior variances": lambda result: result.covariance,
}


def peers(name: str, p: Problem, quantities: list[str]) -> Iterator[Peer]:
    """Every installed library's way to each of these quantities, one after the other."""
    for module, (needs, install) in MODULES.items():
        missing = [package for package in needs if find_spec(package) is None]
        if missing:
            print(f"{module} is left out: {', '.join(missing)} is not installed ({install})", flush=True)
            continue
        library = import_module(f"{__name__}.{module}")
        for quantity, build in library.WAYS.items():
            if quantity in quantities:
                yield Peer(quantity, library.LIBRARY, library.OWN, build(name, p))


def difference(ours: Any, theirs: Any) -> float | None:
    """The largest difference, relative to the largest entry of the same leaf; None if there is no leaf.

    A library leaves out of its value what is random, or of another definition.
    """
    leaves = dict(jax.tree_util.tree_leaves_with_path(ours))
    found = []
    for path, b in jax.tree_util.tree_leaves_with_path(theirs):
        a, b = np.asarray(leaves[path]), np.asarray(b)
        if a.shape != b.shape:
            raise ValueError(f"{jax.tree_util.keystr(path)}: shapes {a.shape} and {b.shape}")
        found.append(np.abs(a - b).max() / np.abs(a).max())
    return float(np.max(found)) if found else None
