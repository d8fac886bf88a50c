"""The values and cotangents of a function by JAX's autodiff alone, without rules, equations or sweeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop._jax.xla_options import jit_once
from funcprop.equations.chain_rule import call_operator, pullback
from funcprop.equations.deviations import deviation
from funcprop.equations.rounding import spread
from funcprop.graph.graph import Operator
from funcprop.graph.tracing import Traced
from funcprop.sweeps.sweeps import read


@jax.custom_jvp
def _tapped(value: Any, tap: Any) -> Any:
    """A value as it is, whose derivative by `tap` is the identity; adding zero would change `-0`."""
    return value


@_tapped.defjvp
def _tapped_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    return primals[0], tangents[0] + tangents[1]


class Oracle:
    """One run of a traced function and of its backward sweep, by `jax.vjp` of the whole.

    `values` are by name; `cotangents` those of the variables in `wanted`, and no others are differentiated.
    """

    def __init__(self, traced: Traced, wanted: Collection[str]) -> None:
        self.graph = graph = traced.graph
        (output,) = graph.outputs
        self.result = output.name
        self.maker = {v.name: (op, i) for op in graph.operators for i, v in enumerate(op.outputs)}
        self.readers: dict[str, dict[Operator, None]] = defaultdict(dict)
        for op in graph.operators:
            for v in op.inputs:
                self.readers[v.name][op] = None
        inputs = traced.values()
        # Made outside of what is differentiated, they have no derivative.
        held = [v.name for v in (*graph.inputs, *graph.constants) if _jax.is_reference(v.aval)]
        references = {name: jax.new_ref(inputs[name]) for name in held}

        def run(taps: dict[str, Any], inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
            values: dict[str, Any] = {}
            called_back: dict[str, Any] = {}

            def store(name: str, value: Any) -> None:
                values[name] = _tapped(value, taps[name]) if name in taps else value

            for name, value in inputs.items():
                store(name, value)
            for op in graph.operators:
                given = [references[v.name] if v.name in references else read(v, values) for v in op.inputs]
                results = _jax.evaluate(op.jaxpr, (), given)
                for v, result in zip(op.outputs, results, strict=True):
                    store(v.name, result)
                    if _jax.calls_back(op.jaxpr):
                        called_back[v.name] = result
            return read(output, values), called_back

        @jit_once
        def backward(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
            taps = {v.name: jnp.zeros(v.shape, v.dtype) for v in graph.variables if v.name in wanted}
            result, pull, called_back = jax.vjp(lambda taps: run(taps, inputs), taps, has_aux=True)
            one = jnp.ones_like(result)
            return pull(one)[0] | {self.result: one}, called_back

        @jit_once
        def forward(inputs: Mapping[str, Any], called_back: Mapping[str, Any]) -> dict[str, Any]:
            values = dict(inputs)
            for op in graph.operators:
                results: Sequence[Any] = [called_back.get(v.name) for v in op.outputs]
                if any(x is None for x in results):
                    results = call_operator(op, [read(v, values) for v in op.inputs])
                values.update(zip([v.name for v in op.outputs], results, strict=True))
            return values

        self.cotangents, called_back = backward(inputs)
        # Values are computed once more without derivatives, which may come with other entries where a
        # result is not specified, such as above the diagonal of a Cholesky factor.
        self.values = forward(inputs, called_back)

    def cotangent_key(self, name: str) -> str:
        """Name the cotangent of a variable as a line does."""
        return f"∂{self.result}/∂{name}"

    def environment(self) -> dict[str, Any]:
        """Collect all values, and the cotangents by their keys, from which equations are evaluated."""
        return self.values | {self.cotangent_key(name): ct for name, ct in self.cotangents.items()}

    def truth(self, key: str) -> Any:
        """The value of `z`, of `∂J/∂z`, or of the partial derivative `∂s/∂W` of one operator."""
        if key in self.values:
            return self.values[key]
        above, below = split_key(key)
        if above == self.result:
            return self.cotangents[below]
        fun, args = self.local(key)
        return fun(*args)

    def local(self, key: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The same as a function of what the operators next to it compute it from, and these values."""
        if key in self.values:
            op, i = self.maker[key]
            return lambda *inputs: call_operator(op, inputs)[i], tuple(self._inputs(op))
        above, below = split_key(key)
        if above != self.result:
            # Such a line is written for scalar results only, whose gradient is the pullback of 1.
            op, i = self.maker[above]
            one = jnp.ones_like(self.values[above])
            return lambda *inputs: pullback(op, inputs, {below}, [i])([one])[below], tuple(self._inputs(op))
        uses = self.uses(below)

        def total(inputs: Sequence[Sequence[Any]], cotangents: Sequence[Sequence[Any]]) -> Any:
            terms = [
                pullback(op, values, self.cotangents, reached)(given)[below]
                for (op, reached), values, given in zip(uses, inputs, cotangents, strict=True)
            ]
            return sum(terms[1:], start=terms[0]) if terms else jnp.zeros_like(self.values[below])

        given = [[self.cotangents[op.outputs[i].name] for i in reached] for op, reached in uses]
        return total, ([self._inputs(op) for op, _ in uses], given)

    def uses(self, name: str) -> list[tuple[Operator, list[int]]]:
        """The operators by which the result depends on a variable, each with its results that do."""
        found = []
        for op in self.readers.get(name, ()):
            reached = [i for i, v in enumerate(op.outputs) if v.name in self.cotangents]
            if reached:
                found.append((op, reached))
        return found

    def not_run_again(self, key: str) -> str | None:
        """Why a line is not evaluated: an operator that it runs has side effects, which `run` had once."""
        above, below = split_key(key)
        if key in self.values or above != self.result:
            operators = [self.maker[above][0]]
        else:
            operators = [op for op, _ in self.uses(below)]
        calls_back = any(_jax.calls_back(op.jaxpr) for op in operators)
        return "not computed a second time, for its side effects" if calls_back else None

    def not_linear(self, key: str) -> Operator | None:
        """The operator on which `∂J/∂z` depends by way of `z` and whose pullback is no linear function."""
        above, below = split_key(key)
        if key in self.values or above != self.result:
            return None
        for op, reached in self.uses(below):
            pull = pullback(op, self._inputs(op), self.cotangents, reached)
            cotangents = [self.cotangents[op.outputs[i].name] for i in reached]
            once = pull(cotangents)[below]
            # Powers of two: the cotangent may be narrower than its pullback, and these products are exact.
            for factor in (-1.0, 2.0**-10, 2.0**10):
                given = [jnp.asarray(factor * g, g.dtype) for g in cotangents]

                def rounding(pull: Any = pull, given: Any = given) -> Any:
                    return spread(lambda given: pull(given)[below], given)

                if not deviation(pull(given)[below], factor * once, None, rounding).is_allowed:
                    return op
        return None

    def _inputs(self, op: Operator) -> list[Any]:
        return [read(v, self.values) for v in op.inputs]


def split_key(key: str) -> tuple[str, str]:
    """The two variables of `∂J/∂z`."""
    above, _, below = key.removeprefix("∂").partition("/∂")
    return above, below
