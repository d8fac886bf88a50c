"""BackPACK: quantities beside PyTorch's backward pass, for sequential networks.

Its quantities of single examples are of one N-th of the example's loss, its share of the mean: N times less
than ours, and N² times where they are squared. Its output factor of a convolution is that of the sum of its
positions' cotangents (ours with "reduce"), and is not compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import backpack
from backpack import extensions

from benchmark_cases.curvature import Problem
from benchmark_cases.curvature_peers import Way
from benchmark_cases.curvature_peers.torch_twin import Twin, twin

LIBRARY, OWN = "BackPACK", "torch"


def _extension(extension: Any, value: Callable[[Twin], Any]) -> Callable[[str, Problem], Way]:
    """A backward pass with an extension; `value` reads what it left with the parameters."""

    def build(name: str, p: Problem) -> Way:
        t = twin(name, p)
        model, loss = backpack.extend(t.model), backpack.extend(t.loss)

        def step() -> None:
            model.zero_grad()
            with backpack.backpack(extension()):
                loss(model(t.x), t.y).backward()

        def after_a_step() -> Any:
            step()
            return value(t)

        return Way(step, after_a_step)

    return build


def _norms(t: Twin) -> Any:
    # One number for each example and parameter: nothing is to be turned around.
    roots = [(len(t.x) * q.batch_l2.sqrt()).numpy() for q in t.params]
    pairs = zip(t.layers, roots[::2], roots[1::2], strict=True)
    return {"params": {layer: {"kernel": kernel, "bias": bias} for layer, kernel, bias in pairs}}


def _input_factors(t: Twin, field: str) -> dict[str, Any]:
    return t.input_factors([getattr(q, field)[1] for q in t.params[::2]])


def _factors(t: Twin) -> dict[str, Any]:
    outputs = t.output_factors([q.kflr[0] for q in t.params[::2]])
    return {layer: here | outputs[layer] for layer, here in _input_factors(t, "kflr").items()}


WAYS: dict[str, Callable[[str, Problem], Way]] = {
    "norms, with gradient": _extension(extensions.BatchL2Grad, _norms),
    "variance, with gradient": _extension(
        extensions.Variance, lambda t: t.as_jax([len(t.x) ** 2 * q.variance for q in t.params])
    ),
    "Gauss-Newton diagonal": _extension(
        extensions.DiagGGNExact, lambda t: t.as_jax([q.diag_ggn_exact for q in t.params])
    ),
    "diagonal, Monte-Carlo": _extension(extensions.DiagGGNMC, lambda t: ()),
    "KFAC factors, Monte-Carlo": _extension(extensions.KFAC, lambda t: _input_factors(t, "kfac")),
    "KFAC factors, exact": _extension(extensions.KFLR, _factors),
}
