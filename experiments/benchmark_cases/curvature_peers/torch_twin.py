"""The same models in PyTorch, and its own gradient; as many threads as JAX has."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Threads of torch that wait would else spin while the next program is timed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

from benchmark_cases.curvature import Problem
from benchmark_cases.curvature_peers import Way

LIBRARY = OWN = "torch"

torch.set_num_threads(os.cpu_count() or 1)


class Twin(NamedTuple):
    """A problem in PyTorch.

    `layers` has the names of its layers in JAX, and how many channels stand first among a layer's inputs,
    where JAX has them last: those of a convolution, and of what was flattened before a dense layer.
    """

    model: nn.Sequential
    loss: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    layers: dict[str, int]

    @property
    def params(self) -> list[Any]:
        """The parameters, on which the extensions of BackPACK leave what they find."""
        return list(self.model.parameters())

    def from_jax(self, tree: Any) -> list[torch.Tensor]:
        """What is like the parameters, as a list of PyTorch's."""
        tensors = []
        for layer, channels in self.layers.items():
            kernel = np.asarray(tree["params"][layer]["kernel"])
            if kernel.ndim == 4:
                kernel = kernel.transpose(3, 2, 0, 1)
            else:
                kernel = _reordered(kernel, len(kernel) // channels, channels).T
            tensors += [torch.tensor(kernel), torch.tensor(np.asarray(tree["params"][layer]["bias"]))]
        return tensors

    def as_jax(self, tensors: Any) -> Any:
        """The inverse of `from_jax`."""
        arrays = [t.detach().numpy() for t in tensors]
        found = {}
        for (layer, channels), weight, bias in zip(
            self.layers.items(), arrays[::2], arrays[1::2], strict=True
        ):
            if weight.ndim == 4:
                kernel = weight.transpose(2, 3, 1, 0)
            else:
                kernel = _reordered(weight.T, channels, weight.shape[1] // channels)
            found[layer] = {"kernel": kernel, "bias": bias}
        return {"params": found}

    def input_factors(self, factors: Any) -> dict[str, Any]:
        """Kronecker factors `A` of each dense layer's weights, in JAX's order.

        Those of convolutions are not compared: the libraries' are over all positions, ours over those that
        have a cotangent, and behind relu and max-pool not all do.
        """
        found = {}
        for (layer, channels), factor in zip(self.layers.items(), factors, strict=True):
            if layer.startswith("Conv"):
                continue
            rest = len(factor) // channels
            rows = _reordered(factor.detach().numpy(), channels, rest)
            found[layer] = {"input": _reordered(rows.T, channels, rest)}
        return found

    def output_factors(self, factors: Any) -> dict[str, Any]:
        """Kronecker factors `G` of each layer's weights."""
        return {layer: {"output": g.detach().numpy()} for layer, g in zip(self.layers, factors, strict=True)}


def _reordered(rows: np.ndarray, first: int, second: int) -> np.ndarray:
    """Rows that count two things, the first slowly, as rows that count the second slowly."""
    return rows.reshape(first, second, -1).transpose(1, 0, 2).reshape(rows.shape)


def twin(name: str, p: Problem) -> Twin:
    """The problem of this name in PyTorch."""
    x = np.asarray(p.x)
    if name == "MLP":
        model = nn.Sequential(
            nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
        )  # fmt: skip
        layers = {f"layers_{i}": 1 for i in (0, 2, 4)}
    else:
        model = nn.Sequential(
            nn.Conv2d(3, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 96, 3), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
        )  # fmt: skip
        layers = {"Conv_0": 3, "Conv_1": 64, "Conv_2": 96, "Dense_0": 128, "Dense_1": 1, "Dense_2": 1}
        x = x.transpose(0, 3, 1, 2)
    y = torch.tensor(np.asarray(p.y)).long()
    found = Twin(model, nn.CrossEntropyLoss(), torch.tensor(x), y, layers)
    with torch.no_grad():
        for parameter, value in zip(found.params, found.from_jax(p.params), strict=True):
            parameter.copy_(value)
    return found


def _gradient(name: str, p: Problem) -> Way:
    """What the times of libraries for PyTorch are divided by."""
    t = twin(name, p)

    def step() -> Any:
        return torch.autograd.grad(t.loss(t.model(t.x), t.y), t.params)

    return Way(step, lambda: t.as_jax(step()))


WAYS: dict[str, Callable[[str, Problem], Way]] = {"value and gradient": _gradient}
