"""laplace-torch: Laplace posteriors for PyTorch, whose curvature comes from BackPACK or curvlinops.

Its matrices are sums over the examples: N times ours. The diagonal is taken from its BackPACK backend, since
the default builds the Jacobian of all outputs, 3 GB here, first; the factors and the posterior are the
default's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from laplace import DiagLaplace
from laplace.curvature import BackPackGGN, CurvlinopsGGN
from torch.nn.utils import vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

from benchmark_cases.curvature import PREDICTED, Problem
from benchmark_cases.curvature_peers import Way
from benchmark_cases.curvature_peers.torch_twin import twin

LIBRARY, OWN = "laplace-torch", "torch"


def _diagonal(name: str, p: Problem) -> Way:
    t = twin(name, p)
    backend = BackPackGGN(t.model, "classification")

    def step() -> Any:
        t.model.zero_grad()
        return backend.diag(t.x, t.y)[1]

    def value() -> Any:
        like_params = [torch.empty_like(q) for q in t.params]
        vector_to_parameters(step() / len(t.x), like_params)
        return t.as_jax(like_params)

    return Way(step, value)


def _factors(name: str, p: Problem) -> Way:
    t = twin(name, p)
    backend = CurvlinopsGGN(t.model, "classification")

    def step() -> Any:
        return backend.kron(t.x, t.y, len(t.x))[1]

    def value() -> Any:
        weights = step().kfacs[::2]  # a bias has the output factor alone
        inputs = t.input_factors([a for _, a in weights])
        outputs = t.output_factors([g / len(t.x) for g, _ in weights])
        return {layer: here | inputs.get(layer, {}) for layer, here in outputs.items()}

    return Way(step, value)


def _posterior(name: str, p: Problem) -> Way:
    t = twin(name, p)
    posterior = DiagLaplace(t.model, "classification", prior_precision=1.0)
    posterior.fit(DataLoader(TensorDataset(t.x, t.y), batch_size=PREDICTED))

    def step() -> Any:
        jacobians, _ = posterior.backend.jacobians(t.x[:PREDICTED])
        return posterior.functional_variance(jacobians)

    return Way(step, lambda: step().detach().numpy())


WAYS: dict[str, Callable[[str, Problem], Way]] = {
    "Gauss-Newton diagonal": _diagonal,
    "KFAC factors, exact": _factors,
    "posterior variances": _posterior,
}
