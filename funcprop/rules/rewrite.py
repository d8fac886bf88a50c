"""Rules inside of bodies: a jaxpr is emitted again, with hand-written rules attached to its operators.

The body of a loop, a branch or a jitted function is a jaxpr before it runs. Its equations are emitted
again, unchanged, except that an operator with a rule becomes a function whose derivative is that rule
(`attach`); control flow keeps its equation and gets new bodies. Custom derivatives and opaque
kernels are left as they are. What runs outside of bodies is the matter of `running`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from funcprop import _jax
from funcprop._jax.layouts import bound_to_layouts, without_layouts
from funcprop.program.facts import CHECKPOINTS, CONTROL_FLOW
from funcprop.program.layer_calls import broken_layer_call, ends_in_boundary, layer_call
from funcprop.program.linear_map import Arrays
from funcprop.rules.attach import attach, why_not
from funcprop.rules.bound_rule import BoundRule
from funcprop.rules.machine import CompileTarget
from funcprop.rules.patterns import PATTERNS
from funcprop.rules.patterns.recognition import Pattern, recognised
from funcprop.rules.rule import PLATFORMS
from funcprop.rules.rule_set import RuleSet

# Bodies of control flow are rewritten in place. All others (those of custom derivatives above all: the user's
# own rule wins) are emitted as they stand.
ENTERED = CONTROL_FLOW | {"shard_map"}

_REWRITTEN: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Match:
    """An operator of a function and what was decided about it: a rule, or the reason for none.

    `mapped` says that it is inside of a `shard_map`, whose axes it may use.
    """

    operator: str
    scope: str
    source: str | None
    bound: BoundRule | None = field(repr=False)
    reason: str | None
    equation: Any = field(repr=False)
    mapped: bool = field(repr=False, default=False)


def match(eqn: Any, rules: RuleSet, target: CompileTarget, beside: Any = None) -> Match | None:
    """Match one equation with a rule set: a rule, a reason why its rule does not apply, or None."""
    platform = target.platform
    if (broken := broken_layer_call(eqn)) is not None:
        layer, why_cut = broken
        if rules.find(layer, platform) is None:
            return None
        return Match(layer.name, _jax.scope(eqn), _jax.source_line(eqn), None, why_cut, eqn)
    call = layer_call(eqn)
    rule = rules.find(call.layer if call is not None else eqn.primitive.name, platform)
    if rule is None:
        return None
    operator = eqn.primitive.name if call is None else call.layer.name
    matched = functools.partial(Match, operator, _jax.scope(eqn), _jax.source_line(eqn), equation=eqn)
    arguments, results = ([v.aval for v in atoms] for atoms in (eqn.invars, eqn.outvars))
    if not all(hasattr(a, "shape") and hasattr(a, "dtype") for a in (*arguments, *results)):
        return matched(None, "an operand or a result is no array")
    bound = BoundRule.of_primitive(rule, eqn) if call is None else BoundRule.of_layer(rule, call, eqn)
    elsewhere = _elsewhere(eqn, call, rules, target)
    bound = replace(bound, machine=target.machine, elsewhere=elsewhere, beside=beside)
    reason = _cannot_attach(eqn, arguments, results)
    if reason is None and call is None and eqn.primitive.name in CONTROL_FLOW:
        reason = _cannot_align(arguments) or _cannot_forget_layouts(eqn)
    if call is not None and any(None in axis.out_axes for axis in call.axes):
        reason = reason or "under vmap, a result is the same for all examples and others are not"
    if reason is None:
        reason = why_not(bound, arguments if call is None else call.unbatched(arguments))
    return matched(bound if reason is None else None, reason)


def _elsewhere(eqn: Any, call: Any, rules: RuleSet, target: CompileTarget) -> Callable[..., Arrays] | None:
    """The operator itself, for other platforms, if its rule does not win on all that it may be lowered for.

    A loop is not one of these: its body may hold values of the trace around it.
    """
    operator = eqn.primitive.name if call is None else call.layer
    platforms = rules.platforms_of(operator)
    if target.certain or platforms is None or platforms.issuperset(PLATFORMS) or operator in CONTROL_FLOW:
        return None
    if call is None:
        return _jax.one_equation(eqn)
    return lambda *leaves: list(map(jax.numpy.asarray, jax.tree.leaves(call.plain(*leaves))))


def _cannot_attach(eqn: Any, arguments: Sequence[Any], results: Sequence[Any]) -> str | None:
    if eqn.effects:
        return "it has side effects"
    if not any(map(_jax.is_differentiable, arguments)):
        return "no argument is differentiable"
    if any(_jax.has_symbolic_size(aval) for aval in results if not _jax.is_differentiable(aval)):
        return "a result that has no derivative has a symbolic size"
    union = frozenset().union(*map(_jax.varying_axes, arguments))
    if any(_jax.varying_axes(aval) != union for aval in results):
        return "a result varies over fewer manual axes than the arguments"
    return None


def _cannot_align(arguments: Sequence[Any]) -> str | None:
    # A rule's arguments are made to vary over the same axes, but the body was traced for those it had.
    if len({_jax.varying_axes(aval) for aval in arguments}) > 1:
        return "its arguments vary over different manual axes, for which its body was traced"
    return None


def _cannot_forget_layouts(eqn: Any) -> str | None:
    if not any(_jax.explicitly_sharded(v.aval) for v in (*eqn.invars, *eqn.outvars)):
        return None
    name = bound_to_layouts(eqn)
    return name and f"its types carry an explicit sharding, for which {name} in its body was traced"


@functools.lru_cache(maxsize=64)
def _patterns(rules: RuleSet, platform: str) -> tuple[tuple[Pattern, ...], dict[str, list[Pattern]]]:
    """Functions of several operators with a rule, also by their last operator; asked at every eager call."""
    patterns = tuple(p for p in PATTERNS if rules.find(p.layer, platform) is not None)
    return patterns, {last: [p for p in patterns if p.last == last] for last in {p.last for p in patterns}}


class Rewriter:
    """One pass over a function with one rule set.

    `claimed` are the identities of equations that the rule of an operator around them differentiates.
    """

    def __init__(
        self, rules: RuleSet, claimed: frozenset[int] = frozenset(), target: CompileTarget | None = None
    ) -> None:
        self.rules, self.claimed = rules, claimed
        self.target = CompileTarget.of(rules.target) if target is None else target
        self.patterns, self.patterns_by_last = _patterns(rules, self.target.platform)
        self._applied: dict[Any, Any] = {}  # by an operator and its first operand's type, the last that was
        # Keyed by identity; the object is kept beside the answer so that its identity is not reused.
        self._found: dict[int, tuple[Any, BoundRule | None]] = {}
        self._ruled: dict[int, tuple[Any, bool]] = {}
        self._equations: dict[int, tuple[Any, list[Any]]] = {}

    def match(self, eqn: Any) -> Match | None:
        """Match an equation: a rule, a reason why it does not fire, or None."""
        found = match(eqn, self.rules, self.target, self._applied.get(_place(eqn)))
        if found is None or id(eqn) not in self.claimed or self.rules.is_replaced(eqn.primitive.name):
            return found
        return replace(found, bound=None, reason=found.reason or "the rule of the loop around it derives it")

    def may_match(self, primitive: Any, params: Mapping[str, Any]) -> bool:
        """Whether `match` may find something at an operator; much cheaper than to ask it."""
        if primitive.name == _jax.JIT:
            return ends_in_boundary(params["jaxpr"])
        return self.rules.find(primitive.name, self.target.platform) is not None

    def inside(self, eqn: Any) -> Rewriter:
        """The pass over the bodies of an equation."""
        bound = self.find(eqn)
        if bound is None or bound.rule.claims is None:
            return self
        return Rewriter(self.rules, self.claimed.union(map(id, bound.claims())), self.target)

    def find(self, eqn: Any) -> BoundRule | None:
        """The rule that fires at an equation, if any."""
        if id(eqn) not in self._found:
            found = self.match(eqn)
            self._found[id(eqn)] = eqn, None if found is None else found.bound
        return self._found[id(eqn)][1]

    def equations(self, jaxpr: Any) -> list[Any]:
        """The equations of a jaxpr; several that together are an operator with a rule are one."""
        if id(jaxpr) not in self._equations:
            found = recognised(_jax.open_jaxpr(jaxpr), self.patterns, lambda eqn: self.find(eqn) is not None)
            self._equations[id(jaxpr)] = jaxpr, found
        return self._equations[id(jaxpr)][1]

    def has_rule(self, jaxpr: Any) -> bool:
        """Whether any operator in a jaxpr, at any depth, has a rule."""
        if id(jaxpr) not in self._ruled:
            equations = self.equations(jaxpr)
            self._ruled[id(jaxpr)] = (
                jaxpr,
                any(self.find(eqn) is not None or self.enters(eqn) for eqn in equations),
            )
        return self._ruled[id(jaxpr)][1]

    def enters(self, eqn: Any) -> bool:
        """Whether the equation has a body in which a rule fires."""
        if eqn.primitive.name not in ENTERED:
            return False
        return any(self.has_rule(body) for _, body in _jax.sub_jaxprs(eqn))

    def run(self, closed: Any, args: Sequence[Any]) -> Arrays:
        """Evaluate a jaxpr with rules attached. Runs of equations without rules stay whole."""
        jaxpr, consts = _jax.open_jaxpr(closed), _jax.array_constants(closed)
        if not self.has_rule(closed):
            return _jax.evaluate(jaxpr, consts, args)
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, _jax.Literal) else values[atom]

        for eqns, outvars in self._steps(self.equations(closed), jaxpr.outvars):
            if len(eqns) == 1 and (bound := self.find(eqns[0])) is not None:
                results = self.apply(bound, eqns[0], [read(a) for a in eqns[0].invars])
            elif len(eqns) == 1 and self.enters(eqns[0]):
                results = self._enter(eqns[0], [read(a) for a in eqns[0].invars])
            else:
                invars = _jax.free_variables(eqns)
                run = _jax.jaxpr_of(eqns, invars, outvars, "without_rules")
                results = _jax.evaluate(run, (), [values[v] for v in invars])
            values.update(zip(outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _steps(
        self, equations: Sequence[Any], results: Sequence[Any]
    ) -> Iterator[tuple[list[Any], list[Any]]]:
        """Single equations that are ruled or entered, and the runs between them, with their results."""
        last_read: dict[Any, int] = {}
        for i, eqn in enumerate(equations):
            last_read.update((v, i) for v in eqn.invars if not isinstance(v, _jax.Literal))
        last_read.update((v, len(equations)) for v in results if not isinstance(v, _jax.Literal))
        pending: list[Any] = []
        for i, eqn in enumerate(equations):
            if self.find(eqn) is None and not self.enters(eqn):
                pending.append(eqn)
                continue
            if pending:
                yield pending, [v for e in pending for v in e.outvars if last_read.get(v, -1) >= i]
                pending = []
            yield [eqn], list(eqn.outvars)
        if pending:
            yield pending, [v for e in pending for v in e.outvars if last_read.get(v, -1) >= len(equations)]

    def apply(self, bound: BoundRule, eqn: Any, args: Sequence[Any]) -> Arrays:
        """The results of an operator, with its rule attached."""
        if bound.rule.neighbourly:
            self._applied[_place(eqn)] = tuple(v.aval for v in eqn.invars), tuple(eqn.params.items())
        explicit = any(_jax.explicitly_sharded(v.aval) for v in (*eqn.invars, *eqn.outvars))
        fun = self._with_layouts(bound, eqn) if explicit else self._attached(bound, eqn)
        with _jax.context_of(eqn):
            results = list(fun(*args))
        pairs = zip(results, eqn.outvars, strict=True)
        return [_jax.with_weak_type(x, bool(getattr(v.aval, "weak_type", False))) for x, v in pairs]

    def _attached(self, bound: BoundRule, eqn: Any) -> Callable[..., Any]:
        call = layer_call(eqn)
        if call is None and eqn.primitive.name in CONTROL_FLOW:
            # The rule of a loop is given a body that carries its own rules.
            params = _jax.map_jaxprs(eqn.params, self.inside(eqn).body)
            bound = replace(
                BoundRule.of_primitive(bound.rule, eqn.replace(params=params)), machine=bound.machine
            )
        fun: Callable[..., Any] = lambda *leaves: attach(bound, leaves)  # noqa: E731
        for axis in () if call is None else call.axes:
            fun = _mapped(fun, axis)
        return fun

    def _with_layouts(self, bound: BoundRule, eqn: Any) -> Callable[..., Any]:
        """Rules say nothing of layouts: inside, XLA chooses them; outside, they are those of the operator."""

        def of_loop(*leaves: Any) -> Arrays:
            found = without_layouts(eqn, [jax.typeof(x) for x in leaves])
            inside = replace(BoundRule.of_primitive(bound.rule, found), machine=bound.machine)
            return self._attached(inside, found)(*leaves)

        is_loop = layer_call(eqn) is None and eqn.primitive.name in CONTROL_FLOW
        fun = of_loop if is_loop else self._attached(bound, eqn)
        return jax.sharding.auto_axes(fun, out_sharding=[v.aval.sharding for v in eqn.outvars])

    def _enter(self, eqn: Any, args: Arrays) -> Arrays:
        if eqn.primitive.name == "shard_map":
            return self._enter_shard_map(eqn, args)
        params, extra = self.with_new_bodies(eqn.primitive, eqn.params)
        new = eqn.replace(invars=[*(_jax.Var(jax.typeof(c)) for c in extra), *eqn.invars], params=params)
        return _jax.one_equation(new)(*extra, *args)

    def with_new_bodies(self, primitive: Any, params: Mapping[str, Any]) -> tuple[Mapping[str, Any], Arrays]:
        """The parameters with rewritten bodies, and constants of the bodies that have become operands."""
        if primitive.name == _jax.JIT:  # The many small ones of jax.numpy have no rule inside.
            body = self.body(params["jaxpr"])
            return params if body is params["jaxpr"] else {**params, "jaxpr": body}, []
        if primitive.name not in CHECKPOINTS:  # Their bodies are stored without constants.
            return _jax.map_jaxprs(params, self.body), []
        extra: list[Any] = []

        def change(body: Any) -> Any:
            opened, consts = _jax.with_constants_as_inputs(self.body(body))
            extra.extend(consts)
            return opened

        return _jax.map_jaxprs(params, change), extra

    def body(self, body: Any) -> Any:
        """The rewritten body of a control-flow equation; itself, if no rule fires in it.

        It is remembered as long as the body lives, so that a jitted function called again is compiled once.
        """
        # Of what is claimed around it, only what it holds: the rest has other identities at each tracing.
        key = (
            self.rules,
            self.target,
            self.claimed and self.claimed.intersection(map(id, _jax.equations(body))),
        )
        rewritten = _REWRITTEN.setdefault(body, {})
        if key not in rewritten:
            # A body that stays is not its own value, which would keep it alive.
            changed = self.has_rule(body)
            rewritten[key] = _jax.retrace(lambda *args: self.run(body, args), body) if changed else None
        return body if rewritten[key] is None else rewritten[key]

    def _enter_shard_map(self, eqn: Any, args: Arrays) -> Arrays:
        params = eqn.params
        with _jax.context_of(eqn):
            mapped = jax.shard_map(
                lambda *values: tuple(self.run(params["jaxpr"], values)),
                mesh=params["mesh"],
                in_specs=tuple(params["in_specs"]),
                out_specs=tuple(params["out_specs"]),
                axis_names=frozenset(params["newly_manual_axes"]),
                check_vma=params["check_vma"],
            )
            return list(mapped(*args))


def _place(eqn: Any) -> Any:
    return eqn.primitive, eqn.invars[0].aval if eqn.invars else None


def _mapped(fun: Callable[..., Any], axis: Any) -> Callable[..., Any]:
    return jax.vmap(
        fun,
        in_axes=axis.in_axes,
        out_axes=list(axis.out_axes),
        axis_size=axis.size,
        axis_name=axis.name,
        spmd_axis_name=axis.spmd_name,
    )
