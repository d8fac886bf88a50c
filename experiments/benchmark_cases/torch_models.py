"""The same models in PyTorch: eager, channels last, and compiled; as many threads as JAX has.

PyTorch is no dependency; this module is imported for `--peer torch` alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

torch.set_num_threads(os.cpu_count() or 1)

Step = Callable[[], object]


def _classified(model: Any, x: torch.Tensor) -> Step:
    """One gradient of the cross-entropy of a module, compiled or not; the gradients are made anew."""
    y = torch.arange(len(x)) % 10
    parameters = list(model.parameters())

    def step() -> object:
        return torch.autograd.grad(functional.cross_entropy(model(x), y), parameters)

    return step


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 96, 3), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 128, 3, padding="same"), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


def _channels_last(x: Any) -> Any:
    """A tensor or a module, in the order of memory that PyTorch's convolutions prefer."""
    return x.to(memory_format=torch.channels_last)


def _images(batch: int) -> dict[str, Step]:
    x = torch.randn(batch, 3, 32, 32)
    last = _channels_last(x)
    return {
        "torch eager": _classified(_cnn(), x),
        "torch eager, channels last": _classified(_channels_last(_cnn()), last),
        "torch compiled": _classified(torch.compile(_cnn()), x),
        "torch compiled, channels last": _classified(torch.compile(_channels_last(_cnn())), last),
    }


def _pool(batch: int) -> dict[str, Step]:
    x = torch.randn(batch, 64, 32, 32, requires_grad=True)
    last = _channels_last(x.detach()).requires_grad_()

    def step(x: torch.Tensor) -> Step:
        return lambda: torch.autograd.grad((functional.max_pool2d(x, 2) ** 2).sum(), x)

    return {"torch eager": step(x), "torch eager, channels last": step(last)}


def _rows(batch: int) -> dict[str, Step]:
    x = torch.randn(batch, 784)
    return {
        "torch eager": _classified(_mlp(), x),
        "torch compiled": _classified(torch.compile(_mlp()), x),
    }


def _recurrent(network: type[nn.Module], steps: int, batch: int, width: int) -> dict[str, Step]:
    model, x = network(width, width, batch_first=True), torch.randn(batch, steps, width)
    parameters = list(model.parameters())

    def step() -> object:
        return torch.autograd.grad((model(x)[0] ** 2).mean(), parameters)

    return {"torch eager": step}


MODELS: dict[str, tuple[Callable[[], dict[str, Step]], Callable[[], dict[str, Step]]]] = {
    "Flax CNN, batch 128": (lambda: _images(128), lambda: _images(2)),
    "2×2 max-pool, 128×32×32×64": (lambda: _pool(128), lambda: _pool(2)),
    "MLP 784-512-256-10, batch 128": (lambda: _rows(128), lambda: _rows(2)),
    "LSTM, T64 B4 H512": (
        lambda: _recurrent(nn.LSTM, 64, 4, 512),
        lambda: _recurrent(nn.LSTM, 3, 2, 8),
    ),
    "LSTM, T256 B16 H128": (
        lambda: _recurrent(nn.LSTM, 256, 16, 128),
        lambda: _recurrent(nn.LSTM, 3, 2, 8),
    ),
    "GRU, T64 B4 H512": (lambda: _recurrent(nn.GRU, 64, 4, 512), lambda: _recurrent(nn.GRU, 3, 2, 8)),
    "RNN, T256 B16 H128": (
        lambda: _recurrent(nn.RNN, 256, 16, 128),
        lambda: _recurrent(nn.RNN, 3, 2, 8),
    ),
}


def measure(name: str, repeats: int, smoke: bool) -> dict[str, float]:
    """Fastest seconds of a gradient of the model of this name, by way of running it; empty without one."""
    if name not in MODELS:
        return {}
    full, small = MODELS[name]
    fastest = {}
    for label, step in (small if smoke else full)().items():
        step()  # The first call compiles.
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        fastest[label] = min(seconds)
    return fastest
