"""The same quantities by libraries for PyTorch: same weights, same data, as many threads as JAX has.

None of them is a dependency; this module is imported for `--peer` alone, and what is not installed is left
out with a warning.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torch import nn

from benchmark_cases.curvature import Problem

torch.set_num_threads(os.cpu_count() or 1)


class Twin(NamedTuple):
    """A problem in PyTorch, and its parameters' values in the structure that JAX has them in."""

    model: nn.Module
    loss: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    as_jax: Callable[[list[torch.Tensor]], Any]
    from_jax: Callable[[Any], list[torch.Tensor]]

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())


class Peer(NamedTuple):
    """A library's way to a quantity: a step to be timed, and its result in the form of our program's."""

    library: str
    build: Callable[[Twin, Problem], tuple[Callable[[], Any], Callable[[], Any]]]


def _tensor(array: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(array))


def _dense(kernel: Any, channels: int = 0) -> torch.Tensor:
    """A kernel `in × out` as PyTorch's; `channels` is how many stood last before the flattening, if any."""
    if channels:
        side = round((len(kernel) / channels) ** 0.5)
        kernel = kernel.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
    return _tensor(kernel.T)


def _dense_back(weight: np.ndarray, channels: int = 0) -> np.ndarray:
    kernel = weight.T
    if channels:
        side = round((len(kernel) / channels) ** 0.5)
        kernel = kernel.reshape(channels, side, side, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)
    return kernel


def twin(name: str, p: Problem) -> Twin:
    """The problem of this name in PyTorch."""
    if name == "MLP":
        model: nn.Module = nn.Sequential(
            nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
        )  # fmt: skip
        layers, flattened = [f"layers_{i}" for i in (0, 2, 4)], None
        x = _tensor(p.x)
    else:
        model = nn.Sequential(
            nn.Conv2d(3, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 96, 3), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
        )  # fmt: skip
        layers = [f"Conv_{i}" for i in range(3)] + [f"Dense_{i}" for i in range(3)]
        flattened, x = "Dense_0", _tensor(np.asarray(p.x).transpose(0, 3, 1, 2))

    def from_jax(tree: Any) -> list[torch.Tensor]:
        tensors = []
        for layer in layers:
            kernel = np.asarray(tree["params"][layer]["kernel"])
            if kernel.ndim == 4:
                tensors.append(_tensor(kernel.transpose(3, 2, 0, 1)))
            else:
                tensors.append(_dense(kernel, 128 if layer == flattened else 0))
            tensors.append(_tensor(tree["params"][layer]["bias"]))
        return tensors

    def as_jax(tensors: list[torch.Tensor]) -> Any:
        arrays = [t.detach().numpy() for t in tensors]
        found = {}
        for layer, weight, bias in zip(layers, arrays[::2], arrays[1::2], strict=True):
            if weight.ndim == 4:
                kernel = weight.transpose(2, 3, 1, 0)
            else:
                kernel = _dense_back(weight, 128 if layer == flattened else 0)
            found[layer] = {"kernel": kernel, "bias": bias}
        return {"params": found}

    with torch.no_grad():
        for parameter, value in zip(model.parameters(), from_jax(p.params), strict=True):
            parameter.copy_(value)
    y = _tensor(p.y).long()
    return Twin(model, nn.CrossEntropyLoss(), x, y, as_jax, from_jax)


def _gradient(t: Twin, p: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The neighbours' own gradient, which their times are divided by."""

    def step() -> Any:
        return torch.autograd.grad(t.loss(t.model(t.x), t.y), t.params)

    return step, lambda: t.as_jax(list(step()))


def _curvlinops(kind: str) -> Callable[[Twin, Problem], tuple[Callable[[], Any], Callable[[], Any]]]:
    def build(t: Twin, p: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
        import curvlinops

        operator = getattr(curvlinops, kind)(
            t.model, t.loss, t.params, [(t.x, t.y)], check_deterministic=False
        )
        v = t.from_jax(p.direction)
        return lambda: operator @ v, lambda: t.as_jax(operator @ v)

    return build


def _backpack(extension: str, *fields: str, squared: bool = False) -> Callable[..., Any]:
    """A backward pass with one of BackPACK's extensions; `fields` are what is compared, none if it is random.

    `squared` says that the field is the square of ours, and of each example's share of the mean loss's
    gradient, one N-th of the example's own.
    """

    def build(t: Twin, p: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
        import backpack
        from backpack import extensions

        model, loss = backpack.extend(t.model), backpack.extend(t.loss)

        def step() -> None:
            model.zero_grad()
            with backpack.backpack(getattr(extensions, extension)()):
                loss(model(t.x), t.y).backward()

        def value() -> Any:
            step()
            if not fields:
                return None
            tensors = [getattr(q, fields[0]) for q in t.params]
            if squared:
                # One number for each example and parameter: nothing is to be turned around.
                roots = [(len(t.x) * v.sqrt()).detach().numpy() for v in tensors]
                pairs = zip(t.as_jax(t.params)["params"], roots[::2], roots[1::2], strict=True)
                return {"params": {layer: {"kernel": w, "bias": b} for layer, w, b in pairs}}
            # The variance too is that of one N-th of an example's gradient.
            scale = len(t.x) ** 2 if fields[0] == "variance" else 1
            return t.as_jax([scale * v for v in tensors])

        return step, value

    return build


# What our program computes that is compared with the library's value.
COMPARED = {
    "norms, with gradient": "norm",
    "variance, with gradient": "variance",
    "Gauss-Newton diagonal": "diag_ggn",
}

# For each quantity the libraries that have it.
PEERS: dict[str, list[Peer]] = {
    "value and gradient": [Peer("torch", _gradient)],
    "Hessian-vector product": [Peer("curvlinops", _curvlinops("HessianLinearOperator"))],
    "Gauss-Newton product": [Peer("curvlinops", _curvlinops("GGNLinearOperator"))],
    "norms, with gradient": [Peer("backpack", _backpack("BatchL2Grad", "batch_l2", squared=True))],
    "variance, with gradient": [Peer("backpack", _backpack("Variance", "variance"))],
    "Gauss-Newton diagonal": [Peer("backpack", _backpack("DiagGGNExact", "diag_ggn_exact"))],
    "diagonal, Monte-Carlo": [Peer("backpack", _backpack("DiagGGNMC"))],
    "KFAC factors, Monte-Carlo": [Peer("backpack", _backpack("KFAC"))],
}


def steps(
    name: str, p: Problem, quantities: list[str]
) -> Iterator[tuple[str, str, Callable[[], Any], Callable[[], Any]]]:
    """For each quantity and each library that is installed: what it computes, and the step to be timed."""
    for quantity in quantities:
        for peer in PEERS.get(quantity, []):
            if find_spec(peer.library) is None:
                warnings.warn(f"{peer.library} is not installed and is left out", stacklevel=2)
                continue
            step, value = peer.build(twin(name, p), p)
            yield quantity, peer.library, value, step


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference relative to the largest entry; 0 for an estimate, which is not compared."""
    if theirs is None:
        return 0.0
    leaves = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    largest = max(float(np.abs(a).max()) for a, _ in leaves)
    return max(float(np.abs(np.asarray(a) - b).max()) for a, b in leaves) / largest
