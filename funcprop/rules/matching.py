"""`matches(f)`: what the running engine decides about every operator, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax

from funcprop import _jax
from funcprop.graph.graph import aligned, place_text
from funcprop.program.call import Call, is_array, traced
from funcprop.program.facts import CONTROL_FLOW
from funcprop.program.layer_calls import layer_call
from funcprop.program.linear_map import Arrays
from funcprop.rules.machine import CompileTarget
from funcprop.rules.patterns.recognition import Replacement, recognised
from funcprop.rules.rewrite import ENTERED, Match, Rewriter, match
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import RuleTrace
from funcprop.rules.sets import chosen_rules


class Matches(list[Match]):
    """The decisions about the operators of a function, printed as a table with one row for equal ones."""

    def __str__(self) -> str:
        said = Counter(
            (m.operator, m.reason or "the rule is used", place_text(m.scope, m.source)) for m in self
        )
        rows = [(operator, f"{count}", *rest) for (operator, *rest), count in said.items()]
        if not rows:
            return "No operator has a rule."
        return aligned([("operator", "count", "decision", "where"), *rows], {1}, 100)

    __repr__ = __str__


def matches(fun: Callable[..., Any], rules: RuleSet | None = None) -> Callable[..., Matches]:
    """Every operator for which the rule set has a rule, and whether it fires or why not.

    `matches(fun, rules)(*args, **kwargs)`; arguments may be anything that `fun` takes, for arrays also
    `jax.ShapeDtypeStruct`s, whose sharding says for which platform. The function runs as under `fp.grad`, and
    the decisions are written down.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> [m.operator for m in fp.matches(jnp.tanh, fp.rules.handwritten)(0.0)]
        ['tanh']
    """
    rules = chosen_rules(rules)

    def listed(*args: Any, **kwargs: Any) -> Matches:
        call = Call.of(args, kwargs, is_array)
        rewriter = Rewriter(rules, target=CompileTarget.of(rules.target, call.values))
        decisions: list[Decision] = []

        def flat(*values: Any) -> Arrays:
            call_args, call_kwargs = call.arguments(call.filled(values))
            decisions.clear()
            with _jax.under(lambda parent: RecordingTrace(parent, rewriter, decisions)):
                results = jax.tree.leaves(fun(*call_args, **call_kwargs))
            return [x for x in results if _jax.is_traced(x)]

        traced(flat, call.values, fun)
        return Matches(match for decision in decisions for match in decision.matches)

    return listed


def matches_in(
    rewriter: Rewriter, jaxpr: Any, scope: str = "", source: str | None = None, mapped: bool = False
) -> Iterator[Match]:
    """Matches in a jaxpr; equations of a body are recorded relative to the equation that holds it."""
    refused = _refused(rewriter, jaxpr)
    for eqn in rewriter.equations(jaxpr):
        found = rewriter.match(eqn)
        if found is None and eqn.outvars:
            found = refused.get(eqn.outvars[0])
        inner_scope = "/".join(filter(None, (scope, _jax.scope(eqn))))
        inner_source = _jax.source_line(eqn, source)
        if found is not None:
            yield replace(found, scope=inner_scope, source=inner_source, mapped=mapped)
        whole = found is not None and found.bound is not None and layer_call(eqn) is not None
        if not whole and eqn.primitive.name in ENTERED:
            inside = mapped or eqn.primitive.name == "shard_map"
            for _, body in _jax.sub_jaxprs(eqn):
                yield from matches_in(rewriter.inside(eqn), body, inner_scope, inner_source, inside)


def _refused(rewriter: Rewriter, jaxpr: Any) -> dict[Any, Match]:
    """Functions of several equations whose rule does not apply, and which are left as they are, by result."""

    def reason(eqn: Any) -> Match | None:
        found = match(eqn, rewriter.rules, rewriter.target)
        return None if found is None or found.reason is None else found

    opened = _jax.open_jaxpr(jaxpr)
    own = set(map(id, opened.eqns))
    found = recognised(opened, rewriter.patterns, lambda eqn: reason(eqn) is not None)
    calls = ((eqn.outvars[0], reason(eqn)) for eqn in found if id(eqn) not in own and eqn.outvars)
    return {result: call for result, call in calls if call is not None}


class Decision:
    """The decisions about one operator and the operators in its bodies, and its results."""

    def __init__(self) -> None:
        self.matches: list[Match] = []
        self.results: tuple[Any, ...] = ()


class RecordingTrace(RuleTrace):
    """Attaches rules, and writes down what it decides."""

    def __init__(
        self, parent: Any, rewriter: Rewriter, decisions: list[Decision], mapped: bool = False
    ) -> None:
        super().__init__(parent, rewriter)
        self.decisions, self.mapped = decisions, mapped
        self.refused: Match | None = None

    def inside(self, parent: Any) -> RuleTrace:
        """Make the trace for each device's part of a `shard_map`."""
        return RecordingTrace(parent, self.rewriter, self.decisions, mapped=True)

    def process_primitive(self, primitive: Any, operands: Any, params: Any, /) -> Any:
        """Attach rules, and remember whose results these are."""
        self.decisions.append(decision := Decision())
        self.refused = None
        results = super().process_primitive(primitive, operands, params)
        decision.results = tuple(results) if primitive.multiple_results else (results,)
        if self.refused is not None and not decision.matches:
            decision.matches.append(self.refused)
        return results

    def process_custom_jvp_call(self, *call: Any, **options: Any) -> Any:
        """Remember the results; rules leave a derivative of the user's own alone."""
        self.decisions.append(decision := Decision())
        results = super().process_custom_jvp_call(*call, **options)
        decision.results = tuple(results)
        return results

    def accepts(self, replacement: Replacement) -> bool:
        """Write down a function's rule, or why it does not apply."""
        found = self.rewriter.match(replacement.new[-1])
        if found is not None and found.bound is None:
            self.refused = self._here(found)
        if found is None or not super().accepts(replacement):
            return False
        self.decisions[-1].matches = [self._here(found)]
        return True

    def replaces(self, values: tuple[Any, ...]) -> None:
        """Forget the decisions about operators whose results a pattern has replaced."""
        gone = set(map(id, values))
        for decision in self.decisions:
            if gone.intersection(map(id, decision.results)):
                decision.matches = []

    def operator(self, primitive: Any, operands: Any, params: Mapping[str, Any]) -> Arrays | None:
        """Write down an operator's rule, and those of the operators in its bodies."""
        eqn = _jax.equation_of(primitive, [_jax.Var(jax.typeof(x)) for x in operands], params)
        found = self.rewriter.match(eqn)
        matches = [] if found is None else [self._here(found)]
        whole = found is not None and found.bound is not None and layer_call(eqn) is not None
        if primitive.name in CONTROL_FLOW and not whole:
            scope, source = _jax.here()
            for _, body in _jax.sub_jaxprs(eqn):
                inner = self.rewriter.inside(eqn)
                matches += matches_in(inner, body, scope, source, self.mapped)
        self.decisions[-1].matches = matches
        return super().operator(primitive, operands, params)

    def _here(self, match: Match) -> Match:
        scope, source = _jax.here()
        return replace(match, scope=scope, source=source, mapped=self.mapped)
