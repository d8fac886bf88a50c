"""The chapter's lines, an activation without a name, and the texts of lines."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import funcprop as fp


def own(z: Any) -> Any:
    """An activation that has no name."""
    return 0.5 * z * (1 + jnp.tanh(0.8 * z))


def texts(lines: Any) -> list[str]:
    return [line.text() for line in lines]


FORWARD = [
    "z = W1 x",
    "h = φ(z)",
    "o = W2 h",
    "L = l(o, y)",
    "s = λ / 2 (‖W1‖²_F + ‖W2‖²_F)",
    "J = L + s",
]


BACKWARD = [
    "∂J/∂L = 1",
    "∂J/∂s = 1",
    "∂J/∂o = prod(∂J/∂L, ∂L/∂o) = ∂L/∂o",
    "∂s/∂W1 = λ W1",
    "∂s/∂W2 = λ W2",
    "∂J/∂W2 = prod(∂J/∂o, ∂o/∂W2) + prod(∂J/∂s, ∂s/∂W2) = ∂J/∂o hᵀ + λ W2",
    "∂J/∂h = prod(∂J/∂o, ∂o/∂h) = W2ᵀ ∂J/∂o",
    "∂J/∂z = prod(∂J/∂h, ∂h/∂z) = ∂J/∂h ⊙ φ′(z)",
    "∂J/∂W1 = prod(∂J/∂z, ∂z/∂W1) + prod(∂J/∂s, ∂s/∂W1) = ∂J/∂z xᵀ + λ W1",
]


def chapter(bias=False):
    params = fp.models.init_chapter(jax.random.key(0), inputs=3, hidden=4, outputs=2, bias=bias)
    return params, jnp.array([1.0, -2.0, 0.5]), jnp.array(1), 0.1
