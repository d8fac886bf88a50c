"""Verifying equations: every printed form is evaluated and compared with autodiff."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _compat
from funcprop.calls import has_values
from funcprop.expressions import Expression
from funcprop.graph import Operator
from funcprop.sweeps import read
from funcprop.tracing import Traced


class DerivationError(AssertionError):
    """A printed equation does not hold; the message names the line and the form."""


@dataclass(frozen=True, eq=False)
class Line:
    """One equation: `left = forms[0] = forms[1] …`.

    `key` is what the line defines in the environment: `z` for a value, `∂J/∂z` for a cotangent, `∂s/∂W1` for
    a partial derivative of one operator.
    """

    key: str
    left: str
    left_latex: str
    forms: tuple[Expression, ...]
    shape: tuple[int, ...]

    def text(self) -> str:
        """The equation as Unicode text, without its shape."""
        return " = ".join([self.left, *(form.text() for form in self.forms)])

    def latex(self) -> str:
        """The equation as LaTeX, aligned at its first equals sign."""
        return " = ".join([f"{self.left_latex} &", *(form.latex() for form in self.forms)]).replace(
            "& = ", "&= ", 1
        )


@dataclass(frozen=True)
class Verification:
    """The largest relative deviation of each verified line, by what it defines."""

    errors: dict[str, float]

    def __str__(self) -> str:
        width = max(map(len, self.errors), default=0)
        return "\n".join(f"{key:{width}}  {error:.1e}" for key, error in self.errors.items())


def call_operator(op: Operator, inputs: Sequence[Any]) -> list[Any]:
    """The results of one operator, computed by JAX alone."""
    return _compat.evaluate(op.jaxpr, (), inputs)


def verify(lines: Sequence[Line], traced: Traced, tolerance: float | None = None) -> Verification:
    """Evaluate every form of every line and compare it with autodiff; see `Derivation.verify`."""
    if not has_values(traced.leaves):
        raise TypeError(
            "verify: derive was given shapes (jax.ShapeDtypeStruct); give it arrays, so that its equations "
            "can be evaluated."
        )
    oracle = _Oracle(traced)
    environment = dict(oracle.values)
    environment[f"∂{oracle.result}/∂{oracle.result}"] = jnp.ones_like(oracle.values[oracle.result])
    errors: dict[str, float] = {}
    for line in lines:
        truth = oracle.truth(line.key)
        for i, form in enumerate(line.forms):
            value = jnp.asarray(form.evaluate(environment))
            error, allowed = _deviation(value, truth, tolerance)
            if not error <= allowed and (op := oracle.not_linear(line.key)) is not None:
                raise DerivationError(
                    f"verify: `{line.text()}` does not hold, because the backward function of {op.name} "
                    f"({op.op}) is not linear in its cotangent: it is not the derivative of any function. "
                    "Clip, scale or reverse gradients outside of the function that is derived."
                )
            if not error <= allowed:
                raise DerivationError(
                    f"verify: form {i + 1} of `{line.text()}` deviates from autodiff by {error:.3g} relative "
                    f"to the largest entry (allowed {allowed:.3g})."
                )
            errors[line.left] = max(error, errors.get(line.left, 0.0))
            environment[line.key] = value
    return Verification(errors)


class _Oracle:
    """The same quantities by JAX's autodiff alone, without rules, equations or sweeps."""

    def __init__(self, traced: Traced) -> None:
        self.graph = graph = traced.graph
        (output,) = graph.outputs
        self.result = output.name
        inputs = traced.values()

        def run(perturbations: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            values: dict[str, Any] = {}

            def store(name: str, value: Any) -> None:
                values[name] = value + perturbations[name] if name in perturbations else value

            for name, value in inputs.items():
                store(name, value)
            for op in graph.operators:
                results = call_operator(op, [read(v, values) for v in op.inputs])
                for v, result in zip(op.outputs, results, strict=True):
                    store(v.name, result)
            return values[output.name], values

        _, self.values = run({})
        smooth = {k: v for k, v in self.values.items() if _compat.is_differentiable(jax.typeof(v))}
        self.cotangents, _ = jax.grad(run, has_aux=True)({k: jnp.zeros_like(v) for k, v in smooth.items()})

    def truth(self, key: str) -> Any:
        """The value of `z`, of `∂J/∂z`, or of the partial derivative `∂s/∂W` of one operator."""
        if key in self.values:
            return self.values[key]
        above, below = key.removeprefix("∂").split("/∂", 1)
        if above == self.result:
            return self.cotangents[below]
        op = next(op for op in self.graph.operators if any(v.name == above for v in op.outputs))
        index = [v.name for v in op.outputs].index(above)
        inputs = [read(v, self.values) for v in op.inputs]

        def of_input(x: Any) -> Any:
            given = [x if v.name == below else value for v, value in zip(op.inputs, inputs, strict=True)]
            return call_operator(op, given)[index]

        # Such a line is written for scalar results only, whose gradient is the pullback of 1.
        result, pullback = jax.vjp(of_input, self.values[below])
        return pullback(jnp.ones_like(result))[0]

    def not_linear(self, key: str) -> Operator | None:
        """The operator on which `∂J/∂z` depends by way of `z` and whose pullback is no linear function."""
        name = key.removeprefix("∂").partition("/∂")[2]
        for op in self.graph.operators:
            outputs = [(i, v.name) for i, v in enumerate(op.outputs) if v.name in self.cotangents]
            if name not in self.cotangents or all(v.name != name for v in op.inputs):
                continue
            inputs = [read(v, self.values) for v in op.inputs]

            def of_input(x: Any, op: Operator = op, inputs: Any = inputs, outputs: Any = outputs) -> Any:
                given = [x if v.name == name else value for v, value in zip(op.inputs, inputs, strict=True)]
                results = call_operator(op, given)
                return [results[i] for i, _ in outputs]

            pull = jax.vjp(of_input, self.values[name])[1]
            cotangents = [self.cotangents[output] for _, output in outputs]
            (once,) = pull(cotangents)
            for factor in (-1.0, 1e-3, 1e3):
                (scaled,) = pull([jnp.asarray(factor * g, g.dtype) for g in cotangents])
                error, allowed = _deviation(scaled, factor * once, None)
                if not error <= allowed:
                    return op
        return None


def _deviation(value: Any, truth: Any, tolerance: float | None) -> tuple[float, float]:
    """The largest deviation relative to the largest finite entry, and how much is allowed."""
    if value.shape != jnp.shape(truth):
        return float("inf"), 0.0
    if not _compat.is_differentiable(jax.typeof(truth)):
        # Integers, booleans, and PRNG keys, which are no arrays of NumPy's.
        return float(jnp.any(value != truth)), 0.0
    value, expected = np.asarray(value), np.asarray(truth)
    resolution = float(jnp.finfo(expected.dtype).eps)
    allowed = max(1e-10, 2e3 * resolution) if tolerance is None else tolerance
    finite = np.isfinite(expected)
    if not (np.isfinite(value[finite]).all() and _same_nonfinite(value[~finite], expected[~finite])):
        return float("inf"), allowed
    difference = np.abs(np.where(finite, value, 0) - np.where(finite, expected, 0))
    largest = float(np.max(np.abs(expected[finite]), initial=0.0))
    # What is zero but for rounding has no scale of its own.
    scale = largest if largest > 10 * resolution else 1.0
    return float(np.max(difference, initial=0.0)) / scale, allowed


def _same_nonfinite(value: Any, expected: Any) -> bool:
    """Whether infinities are equal, and NaN are in the same places.

    Which parts of a complex number are NaN depends on how a product is computed; there it is only asked that
    it is not finite in the same places.
    """
    if np.iscomplexobj(expected):
        return not np.isfinite(value).any()
    return np.array_equal(value, expected, equal_nan=True)
