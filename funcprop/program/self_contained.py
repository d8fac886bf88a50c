"""A jaxpr made self-contained: no array and no python function is left inside of it.

Arrays that nested jits carry become inputs. Custom derivatives, which a jaxpr keeps as python functions that
may read and hold anything, are traced here and now: what is put in their place evaluates jaxprs
(`funcprop.program.custom_rules`). Derivatives of derivatives are traced as well, until a rule has repeated
itself. The tangent maps of our rules (`funcprop.program.linear_map`) are replaced by what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax

from funcprop import _jax
from funcprop.program.custom_rules import (
    TANGENT,
    CustomRule,
    python_rule,
    tangent_map,
    traced_rule,
)
from funcprop.program.facts import CHECKPOINTS, CONTROL_FLOW, CUSTOM_RULES
from funcprop.program.linear_map import linear_body, linear_p
from funcprop.program.structural_key import StructuralKey, structural_key

# A rule that calls its own function is followed until it has repeated itself so often: then it always does.
_REPEATS = 2


class SelfContained(NamedTuple):
    """An open jaxpr whose leading inputs are the `constants`, and the keys of the custom derivatives in it.

    They are found by the identity of the parameter in which JAX holds the derivative. `refused` says of
    functions why they cannot be differentiated apart from their surroundings.
    """

    jaxpr: Any
    constants: list[Any]
    rules: dict[int, StructuralKey]
    refused: tuple[str, ...]


def self_contained(closed: Any) -> SelfContained:
    """Make a computation self-contained, with nothing hidden inside."""
    closer = _Closer()
    jaxpr, constants = closer.body(closed)
    return SelfContained(jaxpr, constants, closer.rules(), tuple(closer.refused))


class _Scope:
    """The equations of a new jaxpr, and the arrays that it needs as inputs."""

    def __init__(self) -> None:
        self.equations: list[Any] = []
        self._arrays: dict[int, tuple[Any, Any]] = {}  # by identity

    def inputs(self, arrays: Sequence[Any], like: Sequence[Any]) -> list[Any]:
        """The variables of some arrays, which have the types of the variables `like`."""
        pairs = zip(arrays, like, strict=True)
        return [self._arrays.setdefault(id(x), (_jax.Var(v.aval), x))[0] for x, v in pairs]

    def add(self, eqn: Any, operands: Sequence[Any], stack: Any) -> list[Any]:
        """An equation with other operands; its results."""
        results = [_jax.Var(v.aval) for v in eqn.outvars]
        self.equations.append(_jax.placed(eqn, operands, results, stack))
        return results

    def jaxpr(self, inputs: Sequence[Any], results: Sequence[Any], name: str) -> tuple[Any, list[Any]]:
        """The jaxpr, whose leading inputs are the arrays, and these."""
        found = list(self._arrays.values())
        return _jax.jaxpr_of(self.equations, [*(v for v, _ in found), *inputs], results, name), [
            x for _, x in found
        ]


@dataclass(eq=False)
class _RuleInTracing:
    """A rule that is being traced: its python function, what it looks like, and whether it calls itself."""

    python: Any
    look: tuple[Any, ...]
    rule: CustomRule
    again: bool = False


class _Closer:
    """One pass over a jaxpr. With `derivatives=False` custom ones are dropped: what is left is the value.

    `path` are the rules that are being traced.
    """

    def __init__(
        self,
        derivatives: bool = True,
        path: tuple[_RuleInTracing, ...] = (),
        known: dict[int, tuple[Any, StructuralKey]] | None = None,
        refused: list[str] | None = None,
    ) -> None:
        self._derivatives, self._path = derivatives, path
        # By identity; what has it is kept beside the answer, so that it is not that of another.
        self._known = {} if known is None else known
        self.refused: list[str] = [] if refused is None else refused
        self._bodies: dict[int, tuple[Any, Any, list[Any]]] = {}
        self._hiding: dict[int, tuple[Any, bool]] = {}
        self._made: dict[Any, tuple[Any, list[Any]]] = {}

    def rules(self) -> dict[int, StructuralKey]:
        """The keys of the custom derivatives that were made."""
        return {number: key for number, (_, key) in self._known.items()}

    def body(self, jaxpr: Any) -> tuple[Any, list[Any]]:
        """An open jaxpr whose leading inputs are the arrays that it held, and these."""
        if id(jaxpr) not in self._bodies:
            self._bodies[id(jaxpr)] = jaxpr, *self._body(jaxpr)
        return self._bodies[id(jaxpr)][1:]

    def _body(self, jaxpr: Any) -> tuple[Any, list[Any]]:
        if not self._hides(jaxpr):
            return _jax.with_constants_as_inputs(jaxpr)[0], _jax.array_constants(jaxpr)
        inner, scope = _jax.open_jaxpr(jaxpr), _Scope()
        inputs = [_jax.Var(v.aval) for v in inner.invars]
        results = self._inline(jaxpr, inputs, scope, None)
        return scope.jaxpr(inputs, results, _jax.jaxpr_name(inner))

    def _hides(self, jaxpr: Any) -> bool:
        """Whether there is anything inside but equations on the jaxpr's own variables."""
        if id(jaxpr) not in self._hiding:
            self._hiding[id(jaxpr)] = jaxpr, any(map(self._hides_in, _jax.open_jaxpr(jaxpr).eqns))
        return self._hiding[id(jaxpr)][1]

    def _hides_in(self, eqn: Any) -> bool:
        if eqn.primitive is linear_p or eqn.primitive.name == TANGENT or self._is_unknown(eqn):
            return True
        # Bodies of others stay as they are; inside of a `shard_map` are axes that are bound nowhere else.
        if eqn.primitive.name not in CONTROL_FLOW:
            return False
        return any(_jax.constants(body) or self._hides(body) for _, body in _jax.sub_jaxprs(eqn))

    def _is_unknown(self, eqn: Any) -> bool:
        is_custom = eqn.primitive.name in CUSTOM_RULES
        return is_custom and not any(id(value) in self._known for value in eqn.params.values())

    def _inline(self, jaxpr: Any, inputs: Sequence[Any], scope: _Scope, outer: Any) -> list[Any]:
        """Add the equations of a jaxpr to a scope; its results."""
        inner = _jax.open_jaxpr(jaxpr)
        arrays = scope.inputs(_jax.array_constants(jaxpr), inner.constvars)
        atoms = dict(zip([*inner.constvars, *inner.invars], [*arrays, *inputs], strict=True))

        def read(atom: Any) -> Any:
            return atom if isinstance(atom, _jax.Literal) else atoms[atom]

        for eqn in inner.eqns:
            stack = _jax.scopes_of(eqn, outer)
            results = self._equation(eqn, list(map(read, eqn.invars)), scope, stack)
            atoms.update(zip(eqn.outvars, results, strict=True))
        return list(map(read, inner.outvars))

    def _equation(self, eqn: Any, operands: list[Any], scope: _Scope, stack: Any) -> list[Any]:
        if not self._hides_in(eqn):
            return scope.add(eqn, operands, stack)
        if eqn.primitive is linear_p:
            return self._inline(linear_body(eqn), operands, scope, stack)
        if eqn.primitive.name == TANGENT:
            try:
                whole = tangent_map(eqn)
            except Exception:  # Then it cannot be evaluated, and JAX says so where it is.
                return scope.add(eqn, operands, stack)
            return self._inline(whole, operands, scope, stack)
        if self._is_unknown(eqn) and not self._derivatives:
            return self._inline(eqn.params["call_jaxpr"], operands, scope, stack)
        if self._is_unknown(eqn):
            call, arrays = self._custom(eqn)
            return scope.add(call, [*scope.inputs(arrays, call.invars[: len(arrays)]), *operands], stack)
        bodies = [self.body(body) for _, body in _jax.sub_jaxprs(eqn)]
        arrays = [x for _, held in bodies for x in held]
        if not arrays:
            opened = iter([body for body, _ in bodies])
            params = _jax.map_jaxprs(eqn.params, lambda body: _jax.closed_like(body, next(opened)))
            return scope.add(eqn.replace(params=params), operands, stack)
        whole = _with_inputs(eqn, [(body, len(held)) for body, held in bodies])
        if whole is None:
            return scope.add(eqn, operands, stack)
        taken = scope.inputs(arrays, _jax.open_jaxpr(whole).invars[: len(arrays)])
        return self._inline(whole, [*taken, *operands], scope, stack)

    def _custom(self, eqn: Any, follow: bool = True) -> tuple[Any, list[Any]]:
        """An equation that calls the same function with its derivative traced, and the arrays it takes first.

        With `follow` its rule may call the function again, which is the same one.
        """
        plain = _Closer(derivatives=False)
        call, arrays = plain.body(eqn.params["call_jaxpr"])
        own = structural_key(call)
        python = python_rule(eqn) if follow else None
        if python is not None and (python, own) in self._made:
            return self._made[python, own]
        for depth, step in enumerate(reversed(self._path)):
            if step.python is not None and (step.python, step.look[0]) == (python, own):
                step.again = True
                return self._called(step.rule, [], StructuralKey(b"again", (depth,)))
        inputs, outputs = ([v.aval for v in atoms] for atoms in (eqn.invars, eqn.outvars))
        rule = CustomRule(_jax.function_name(eqn), call, (len(arrays),), inputs, outputs)
        bodies: list[tuple[Any, list[Any]]] = []
        try:
            programs = traced_rule(eqn)
        except Exception as error:  # It is raised where the derivative is asked for.
            said = str(error).partition("\n")[0]
            rule.refusal = f"{rule.name} cannot be differentiated here: {type(error).__name__}: {said}"
            self.refused.append(rule.refusal)
        else:
            values = [plain.body(program) for program in programs]
            held = [x for _, found in values for x in found]
            look = own, *(structural_key(v) for v, _ in values), *map(id, [*arrays, *held])
            before = [step.rule for step in self._path if step.look == look]
            if len(before) <= _REPEATS:
                step = _RuleInTracing(python, look, rule)
                inside = _Closer(True, (*self._path, step), self._known, self.refused)
                bodies = [inside.body(program) for program in programs]
                if step.again and (arrays or held):
                    # What it closes over is known only now, too late for the call inside.
                    return self._custom(eqn, follow=False)
            elif not (arrays or held):
                return self._called(before[-1], [], StructuralKey(b"repeats", look))
            else:
                rule.refusal = (
                    f"{rule.name} closes over arrays, and is differentiated more than {_REPEATS} times."
                )
        rule.programs = [body for body, _ in bodies]
        rule.counts = (len(arrays), *(len(found) for _, found in bodies))
        arrays += [x for _, found in bodies for x in found]
        key = structural_key(call, rule.programs, rule.counts, rule.refusal, rules=self.rules())
        found = self._called(rule, arrays, key)
        if python is not None and not self._path:
            self._made[python, own] = found
        return found

    def _called(self, rule: CustomRule, arrays: list[Any], key: StructuralKey) -> tuple[Any, list[Any]]:
        eqn = rule.equation([jax.typeof(x) for x in arrays])
        for value in eqn.params.values():
            if callable(value) or hasattr(value, "call_wrapped"):
                self._known[id(value)] = value, key
        return eqn, arrays


def _with_inputs(eqn: Any, bodies: Sequence[tuple[Any, int]]) -> Any | None:
    """An equation as a jaxpr that takes the arrays of its bodies, before its operands.

    Each body comes with how many of its leading inputs are arrays. None if the equation cannot be given them.
    """
    kind = eqn.primitive.name
    if kind == _jax.JIT:
        return bodies[0][0]
    if kind in CHECKPOINTS:
        body, count = bodies[0]
        params = _jax.map_jaxprs(eqn.params, lambda _: body)
        invars = [*body.invars[:count], *eqn.invars]
        return _jax.one_equation_jaxpr(eqn.replace(params=params, invars=invars))
    if kind not in _ENTERED:
        return None
    total = sum(count for _, count in bodies)

    def entered(*values: Any) -> Any:
        arrays = iter(values[:total])
        closed: Functions = [
            partial(_evaluated, body, [next(arrays) for _ in range(count)]) for body, count in bodies
        ]
        return _ENTERED[kind](eqn.params, closed, list(values[total:]))

    held = [v.aval for body, count in bodies for v in body.invars[:count]]
    with _jax.context_of(eqn):
        return jax.make_jaxpr(entered)(*held, *(v.aval for v in eqn.invars))


def _evaluated(body: Any, arrays: list[Any], *operands: Any) -> list[Any]:
    return _jax.evaluate(body, (), [*arrays, *operands])


Functions = list[Callable[..., list[Any]]]


def _scan(params: Any, bodies: Functions, operands: list[Any]) -> list[Any]:
    first, carries = _jax.scan_counts(params)
    consts, init, xs = operands[:first], operands[first : first + carries], operands[first + carries :]

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        results = bodies[0](*consts, *carry, *x)
        return results[:carries], results[carries:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    final, stacked = jax.lax.scan(step, init, xs, **options)
    return [*final, *stacked]


def _while(params: Any, bodies: Functions, operands: list[Any]) -> list[Any]:
    going, step = bodies
    first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    return jax.lax.while_loop(
        lambda carry: going(*operands[:first], *carry)[0],
        lambda carry: step(*operands[first:last], *carry),
        operands[last:],
    )


def _cond(params: Any, bodies: Functions, operands: list[Any]) -> list[Any]:
    return jax.lax.switch(operands[0], bodies, *operands[1:])


_ENTERED = {"scan": _scan, "while": _while, "cond": _cond}
