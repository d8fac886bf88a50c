"""`with_rules(f)`: the same function, carrying hand-written backward rules.

Rules are attached while the function runs. A trace of our own stands between the function and the
transformation around it (`jax.grad`, `jit`, `vmap` …). It makes no tracers: an operator with a rule becomes
a function whose derivative is that rule (`attach`), and everything is bound where it would have
been bound without us. So what is concrete stays concrete, python control flow works as under `jax.grad`,
and all that JAX composes still composes.

Bodies of loops, branches and jitted functions are jaxprs by the time they arrive; `rewrite` gives
them their rules.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from funcprop import _jax
from funcprop.program.call import name_of, require_callable
from funcprop.program.facts import CONTROL_FLOW
from funcprop.program.linear_map import Arrays
from funcprop.rules.bound_rule import BoundRule
from funcprop.rules.looking_back import Past
from funcprop.rules.machine import CompileTarget
from funcprop.rules.patterns import FUNCTIONS
from funcprop.rules.patterns.recognition import Replacement
from funcprop.rules.rewrite import Rewriter
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.sets import chosen_rules


def with_rules(fun: Callable[..., Any], rules: RuleSet | None = None) -> Callable[..., Any]:
    """Carry hand-written rules into a function: the same function, whose derivatives use them.

    For every operator `y = f(x)` that has a rule in `rules`, reverse mode computes `x̄ = (∂y/∂x)ᵀ ȳ` by
    the rule; all other operators are differentiated by JAX. The result composes with `jit`, `vmap`,
    `grad`, `jvp`, `scan`, `checkpoint`, `shard_map` and any framework's own transformations. The function is
    called once, with the arguments themselves.

    Args:
        fun: any JAX function, also a method, with positional and keyword arguments.
        rules: a rule set; `fp.rules.default` if None.

    Raises:
        RuleError: a rule returned something that does not fit its operator.

    Example:
        >>> import jax, jax.numpy as jnp, funcprop as fp
        >>> f = fp.with_rules(lambda x: jnp.sum(jnp.tanh(x)))
        >>> print(jax.jit(jax.grad(f))(jnp.zeros(2)))
        [1. 1.]
    """
    require_callable(fun)
    rules = chosen_rules(rules)

    @functools.wraps(fun)
    def ruled(*args: Any, **kwargs: Any) -> Any:
        def trace(parent: Any) -> RuleTrace:
            staged_out = _jax.is_staged_out(parent)
            target = CompileTarget.of(rules.target, staged_out=staged_out)
            follows = rules.target is None and not staged_out
            return RuleTrace(parent, Rewriter(rules, target=target), follows)

        with _jax.under(trace):
            return fun(*args, **kwargs)

    ruled.__name__ = name_of(fun, "<unnamed function>")  # as JAX calls it
    with contextlib.suppress(TypeError, ValueError):  # Not every callable has one.
        ruled.__signature__ = inspect.signature(fun)  # type: ignore[attr-defined]  # JAX asks at every call.
    return ruled


class RuleTrace(_jax.PassingTrace):
    """Attaches rules to what a function applies to traced values; everything else passes.

    Where it `follows` the operands, they say for which platform: the first that is bound to a device.
    """

    def __init__(self, parent: Any, rewriter: Rewriter, follows: bool = False) -> None:
        super().__init__(parent)
        self.rewriter, self.follows = rewriter, follows
        self.past = Past(rewriter.patterns_by_last)

    def ended(self) -> None:
        """Forget the operators that were applied, with their values."""
        self.past.forget()

    def inside(self, parent: Any) -> RuleTrace:
        """Make the trace for a function that an operator calls, under the operator's own trace."""
        return RuleTrace(parent, self.rewriter)

    def process_primitive(self, primitive: Any, operands: Any, params: Any, /) -> Any:
        """Attach a rule, or bind the primitive with new bodies, or as it is."""
        results = None
        if self.enters(operands):
            results = self.function(primitive, operands, params)
            if results is None:
                results = self.operator(primitive, operands, params)
            if results is None:
                results = _listed(primitive, self.bind(primitive, operands, params))
            _jax.note_origin(results)
        if results is None:
            results = self.bind(primitive, operands, params)
        elif not primitive.multiple_results:
            (results,) = results
        self.past.add(primitive, operands, params, results)
        return results

    def enters(self, operands: Sequence[Any]) -> bool:
        """Whether any operand is looked at; one that is bound to a device says which rules there are."""
        if not any(map(_jax.is_traced, operands)):
            return False
        platform = _jax.platform_of(operands) if self.follows else None
        self.follows = self.follows and platform is None
        if platform not in (None, self.rewriter.target.platform):
            self.rewriter = Rewriter(self.rewriter.rules, target=CompileTarget.of(None, operands))
            self.past.patterns = self.rewriter.patterns_by_last
        return True

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, operands: Any, /, **options: Any
    ) -> Any:
        """A function with a derivative of its own: the user's stays, a known one of JAX's may have a rule."""
        results = super().process_custom_jvp_call(primitive, fun, jvp, operands, **options)
        function = next((f for f in FUNCTIONS if _jax.is_call_of(f, fun, jvp)), None)
        if function is not None and self.enters(operands):
            params = {"function": function}
            found = self.function(primitive, operands, params)
            results = results if found is None else found
            self.past.add(primitive, operands, params, results)
        return results

    def process_shard_map(self, primitive: Any, fun: Any, operands: Any, /, **params: Any) -> Any:
        """A function of the parts that each device has, which runs under a trace like this one."""

        def ruled(*parts: Any) -> Any:
            with _jax.under(self.inside):
                return fun(*parts)

        return super().process_shard_map(primitive, ruled, operands, **params)

    def function(self, primitive: Any, operands: Any, params: Mapping[str, Any]) -> Arrays | None:
        """The results of a function of several operators that ends here, if it has a rule."""
        found = self.past.find(primitive, operands, params, self.accepts)
        if found is None:
            return None
        self.replaces(found.replaced)
        values = dict(found.values)
        with _jax.outside(self):
            for eqn in found.equations:
                given = [a.val if isinstance(a, _jax.Literal) else values[a] for a in eqn.invars]
                bound = self.rewriter.find(eqn)
                if bound is None:
                    results = _jax.one_equation(eqn)(*given)
                else:
                    results = self.rewriter.apply(bound, eqn, given)
                values.update(zip(eqn.outvars, results, strict=True))
        return [values[v] for v in found.equations[-1].outvars]

    def accepts(self, replacement: Replacement) -> bool:
        """Whether a function of several operators is computed by its rule."""
        return all(
            self.rewriter.find(eqn) is not None for eqn in (replacement.new[-1], *replacement.requires)
        )

    def replaces(self, values: tuple[Any, ...]) -> None:
        """Called with the values computed on the way to a function's results, for a subclass to look at."""

    def operator(self, primitive: Any, operands: Any, params: Mapping[str, Any]) -> Arrays | None:
        """The results of an operator that has a rule, or whose bodies may have; None for others."""
        if self.rewriter.may_match(primitive, params):
            eqn = _jax.equation_of(primitive, [_jax.Var(jax.typeof(x)) for x in operands], params)
            bound = self.rule_at(eqn)
            if bound is not None:
                with _jax.outside(self):
                    return self.rewriter.apply(bound, eqn, operands)
        if primitive.name not in CONTROL_FLOW:
            return None
        new, extra = self.rewriter.with_new_bodies(primitive, params)
        return _listed(primitive, self.bind(primitive, [*extra, *operands], new))

    def rule_at(self, eqn: Any) -> BoundRule | None:
        """The rule that fires at an operator."""
        found = self.rewriter.match(eqn)
        return None if found is None else found.bound


def _listed(primitive: Any, results: Any) -> Arrays:
    return list(results) if primitive.multiple_results else [results]
