"""The programs that are compared: a whole function, or one of its operators, by any rule set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop import _jax
from funcprop.graph.objective import Argnums, differentiable, positions
from funcprop.graph.tracing import Arguments
from funcprop.program.call import Call, has_values, is_array
from funcprop.rules.rewrite import Rewriter
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.transforms import value_and_grad

Program = Callable[..., Any]


@dataclass(frozen=True)
class RuledProgram:
    """A program for every rule set, and the operands to run it on; shapes, if it can only be compiled."""

    by: Callable[[RuleSet], Program]
    operands: Sequence[Any]
    runs: bool

    def compiled(self, rules: RuleSet) -> Any:
        """Compile the program by a rule set."""
        return jax.jit(self.by(rules)).lower(*self.operands).compile()


def whole(
    scalar: Callable[..., Any], label: str, argnums: Argnums, args: Any, kwargs: Any
) -> tuple[RuledProgram, Call]:
    """`value_and_grad` of a function in some of its arguments, and its call."""
    call = Call.of(args, kwargs, is_array)
    at = None if argnums is None else positions(argnums)
    chosen = differentiable(Arguments.of(call), call.variables, call.leaves, at)

    def by(rules: RuleSet) -> Program:
        def program(*values: Any) -> Any:
            leaves = call.filled(values)

            def of_chosen(differentiated: Sequence[Any]) -> Any:
                full = list(leaves)
                for i, value in zip(chosen, differentiated, strict=True):
                    full[i] = value
                call_args, call_kwargs = call.arguments(full)
                return scalar(*call_args, **call_kwargs)

            of_chosen.__name__ = label
            return value_and_grad(of_chosen, rules=rules)([leaves[i] for i in chosen])

        return program

    return RuledProgram(by, call.values, has_values(call.leaves)), call


def alone(equation: Any, runs: bool, device: Any) -> RuledProgram:
    """One operator by itself: value and cotangents, for random operands; on a device, or on JAX's own."""
    jaxpr = _jax.one_equation_jaxpr(equation)
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=sharding) for v in jaxpr.invars]
    smooth = [i for i, aval in enumerate(avals) if _jax.is_differentiable(aval)]

    def by(rules: RuleSet) -> Program:
        def value_and_cotangents(*operands: Any) -> Any:
            def of_smooth(*values: Any) -> list[Any]:
                full = list(operands)
                for i, value in zip(smooth, values, strict=True):
                    full[i] = value
                results = Rewriter(rules).run(jaxpr, full)
                return [y for y in results if _jax.is_differentiable(jax.typeof(y))]

            values, pullback = jax.vjp(of_smooth, *(operands[i] for i in smooth))
            return values, pullback(values)

        return value_and_cotangents

    # There are no random numbers of the type of a key.
    runs = runs and all(isinstance(aval.dtype, np.dtype) for aval in avals)
    rng = np.random.default_rng(0)
    return RuledProgram(by, [random_operand(rng, aval) for aval in avals] if runs else avals, runs)


def random_operand(rng: np.random.Generator, aval: Any) -> Any:
    """Standard normal numbers; zeros of a type without derivative."""
    if not _jax.is_differentiable(aval):
        return jnp.zeros(aval.shape, aval.dtype)
    return jnp.asarray(rng.standard_normal(aval.shape), aval.dtype)
