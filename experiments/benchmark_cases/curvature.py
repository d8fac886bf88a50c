"""The quantities of `curvature_benchmark.py`: a program for each, the bounds that are sought, and its law.

The law is what a quantity takes in products at the least, in floating-point operations. With `f` those of all
layers for the batch, and `b` those of all but the first, whose input needs no cotangent, a gradient takes
`f + b + f`; a column more to go backward takes `b`; symmetric matrices take half.

A quantity is added by one entry of `QUANTITIES`; if a neighbour has it, by one of `curvature_peers.SHOWN` and
of the neighbour's `WAYS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import funcprop as fp
from benchmark_cases.case import normal
from benchmark_cases.dense import MLP
from benchmark_cases.vision import CNN


class Problem(NamedTuple):
    """A classifier: `model(params, x)` and `loss(outputs, y)` of a batch; the mean cross-entropy."""

    model: Callable[[Any, jax.Array], Any]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    params: Any
    x: jax.Array
    y: jax.Array

    def of_params(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """The loss as a function of the parameters."""
        return self.loss(self.model(params, x), y)

    @property
    def direction(self) -> Any:
        """A vector like the parameters, with entries that are easy to make again elsewhere."""
        return jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), self.params)


class Program(NamedTuple):
    """A function to be jitted, and its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


class Layer(NamedTuple):
    """A layer as a product: rows of all examples and positions, inputs and outputs; and the examples."""

    rows: int
    inputs: int
    outputs: int
    examples: int

    @property
    def flops(self) -> int:
        """Of the product."""
        return 2 * self.rows * self.inputs * self.outputs

    @property
    def single(self) -> bool:
        """Whether an example has one position, so that no gradient of one example is made for its square."""
        return self.rows == self.examples

    def factors(self, columns: int = 1) -> int:
        """Of the symmetric matrices of inputs, and of cotangents of so many columns."""
        return self.rows * (self.inputs**2 + columns * self.outputs**2)


class Layers(NamedTuple):
    """The layers of a model, and what their products take."""

    all: tuple[Layer, ...]

    @classmethod
    def of(cls, p: Problem) -> Layers:
        """Read off the products and convolutions of the traced model."""
        found = []
        for eqn in jax.make_jaxpr(p.model)(p.params, p.x).jaxpr.eqns:
            if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
                outputs = eqn.outvars[0].aval.shape[-1]
                rows = eqn.outvars[0].aval.size // outputs
                found.append(Layer(rows, eqn.invars[1].aval.size // outputs, outputs, len(p.x)))
        return cls(tuple(found))

    @property
    def forward(self) -> int:
        """`f`."""
        return sum(layer.flops for layer in self.all)

    @property
    def back(self) -> int:
        """`b`."""
        return self.forward - self.all[0].flops

    def squares(self, columns: int) -> int:
        """Sums of squares of gradients of so many columns."""
        return sum(layer.flops * (1 if layer.single else columns) for layer in self.all)

    def factors(self, columns: int = 1) -> int:
        """Kronecker factors."""
        return sum(layer.factors(columns) for layer in self.all)


class Quantity(NamedTuple):
    """How a quantity is computed, for each problem the bound on its time ÷ the gradient's, and its law.

    Where a problem is left out, `left_out` says why.
    """

    program: Callable[[Problem], Program]
    law: Callable[[Layers], int]
    bounds: dict[str, float]
    left_out: Mapping[str, str] = MappingProxyType({})


def _classifier(model: nn.Module, x: jax.Array) -> Problem:
    params = jax.jit(model.init)(jax.random.key(1), x[:1])

    def loss(outputs: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

    return Problem(model.apply, loss, params, x, jnp.arange(len(x)) % CLASSES)


def _mlp(batch: int) -> Problem:
    return _classifier(MLP, normal(batch, 784))


def _cnn(batch: int) -> Problem:
    return _classifier(CNN(), normal(batch, 32, 32, 3))


# In full, and in small for `--smoke`.
PROBLEMS: dict[str, tuple[Callable[[], Problem], Callable[[], Problem]]] = {
    "MLP": (lambda: _mlp(128), lambda: _mlp(4)),
    "CNN": (lambda: _cnn(128), lambda: _cnn(2)),
}


def gradient(p: Problem) -> Program:
    """What every quantity is measured by: plain JAX."""
    return Program(jax.value_and_grad(p.of_params), (p.params, p.x, p.y))


def _hessian_product(p: Problem) -> Program:
    hessian = fp.hessian(p.of_params)
    return Program(lambda params, v, x, y: hessian(params, x, y) @ v, (p.params, p.direction, p.x, p.y))


def _ggn_product(p: Problem) -> Program:
    ggn = fp.ggn(p.model, p.loss, batched=True)
    return Program(lambda params, v, x, y: ggn(params, x, y) @ v, (p.params, p.direction, p.x, p.y))


def _next_ggn_product(p: Problem) -> Program:
    linearized = fp.ggn(p.model, p.loss, batched=True)(p.params, p.x, p.y).linearize()
    return Program(lambda operator, v: operator @ v, (linearized, p.direction))


def _per_example(*names: str) -> Callable[[Problem], Program]:
    """Quantities of every example, by one pass."""

    def program(p: Problem) -> Program:
        quantities = fp.per_example(
            lambda params, x: p.model(params, x[None])[0], optax.softmax_cross_entropy_with_integer_labels
        )
        return Program(
            lambda params, x, y, key: quantities(params, x, y, names, key),
            (p.params, p.x, p.y, jax.random.key(0)),
        )

    return program


def _predictive(p: Problem) -> Program:
    """The outputs' covariances of a few examples, by a posterior that has been fitted."""
    fit = fp.curvature.laplace(lambda params, x: p.model(params, x[None])[0], "categorical")
    posterior = jax.jit(fit)(p.params, p.x, p.y)
    return Program(lambda posterior, x: posterior.predictive(x), (posterior, p.x[:PREDICTED]))


# What the joint pass is measured by: its time ÷ the sum of the times of these.
PARTS = (
    "variance, with gradient",
    "norms, with gradient",
    "Gauss-Newton diagonal",
    "KFAC factors, Monte-Carlo",
)
PREDICTED = 2  # examples whose outputs' covariances are computed
CLASSES = 10
JOINT, JOINT_BOUND = "norms, variance, diagonal, KFAC", 0.65


def gradient_law(m: Layers) -> int:
    """Forward, backward, and the weights' gradients."""
    return 2 * m.forward + m.back


def _predictive_law(m: Layers) -> int:
    of_one = m.forward + CLASSES * m.back
    covariances = sum(2 * (a.inputs + CLASSES**2) * a.outputs for a in m.all)
    return PREDICTED * (of_one // m.all[0].examples + covariances)


_COLUMNS = CLASSES - 1  # of the root of the cross-entropy's Hessian
QUANTITIES: dict[str, Quantity] = {
    "Hessian-vector product": Quantity(
        # A relu has no second derivative: the cotangent of the first layer's result is not needed.
        _hessian_product,
        lambda m: 3 * m.forward + 5 * m.back - m.all[1].flops,
        {"MLP": 2.0, "CNN": 1.25},
    ),
    "Gauss-Newton product": Quantity(
        _ggn_product, lambda m: 3 * m.forward + 2 * m.back, {"MLP": 1.6, "CNN": 1.4}
    ),
    "one more, linearised": Quantity(
        _next_ggn_product, lambda m: 2 * m.forward + 2 * m.back, {"MLP": 1.1, "CNN": 0.9}
    ),
    "norms, with gradient": Quantity(
        _per_example("norm", "gradient"), gradient_law, {"MLP": 1.15, "CNN": 0.75}
    ),
    "variance, with gradient": Quantity(
        _per_example("variance", "gradient"),
        lambda m: gradient_law(m) + sum(layer.flops for layer in m.all if layer.single),
        {"MLP": 1.6, "CNN": 0.8},
    ),
    "Gauss-Newton diagonal": Quantity(
        _per_example("diag_ggn"),
        lambda m: m.forward + _COLUMNS * m.back + m.squares(_COLUMNS),
        {"MLP": 2.2, "CNN": 5.0},
    ),
    "diagonal, Monte-Carlo": Quantity(_per_example("diag_ggn_mc"), gradient_law, {"MLP": 1.2, "CNN": 0.8}),
    "KFAC factors, Monte-Carlo": Quantity(
        _per_example("kfac"), lambda m: m.forward + m.back + m.factors(), {"MLP": 1.6, "CNN": 1.1}
    ),
    "KFAC factors, exact": Quantity(
        _per_example("kflr"), lambda m: m.forward + _COLUMNS * m.back + m.factors(_COLUMNS), {}
    ),
    "posterior variances": Quantity(
        _predictive, _predictive_law, {}, {"CNN": "left out: fitting takes minutes (MLP alone)"}
    ),
    JOINT: Quantity(
        _per_example("norm", "variance", "diag_ggn", "kfac"),
        lambda m: (
            m.forward + _COLUMNS * m.back + m.squares(1) + m.forward + m.squares(_COLUMNS) + m.factors()
        ),
        {},
    ),
}
