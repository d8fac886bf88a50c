"""Functions of several operators, recognised while they run: by what made the values of the last operator.

A rule for `relu` before a max-pool, or for softmax written out, belongs to several operators. When the last
of them arrives, what came before is looked at as equations, and the patterns that are used inside of bodies
(`patterns`) decide. What was computed on the way is then read by nobody, and XLA drops it. Who
read it before, or will, still gets it: its own derivative stays beside the rule's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from funcprop import _jax
from funcprop.rules.patterns.recognition import Pattern, Replacement, call_of

# The longest pattern, log-softmax, is of ten operators; a function that is mapped or cast has a few more.
LENGTH = 32


class Applied(NamedTuple):
    """An operator that was applied; its values live as long as it is remembered."""

    primitive: Any
    operands: tuple[Any, ...]
    params: Mapping[str, Any]
    results: tuple[Any, ...]


class Found(NamedTuple):
    """A function of several operators: equations that compute it, the last of them by its rule.

    `values` are those that the equations read, `replaced` those that were computed on the way before.
    """

    equations: list[Any]
    values: Mapping[Any, Any]
    replaced: tuple[Any, ...]


class Past:
    """The operators applied last, and the functions that they end: `patterns`, by their last operator."""

    def __init__(self, patterns: Mapping[str, Sequence[Pattern]]) -> None:
        self.patterns = patterns
        self._steps: deque[Applied] = deque()
        self._maker: dict[int, Applied] = {}
        self._seen: dict[str, int] = {}  # by the name of a primitive, the number of the last one
        self._names: dict[int, tuple[Any, tuple[str, ...]]] = {}
        self._count = 0

    def add(self, primitive: Any, operands: Sequence[Any], params: Mapping[str, Any], results: Any) -> None:
        """Remember an operator."""
        if not self.patterns:
            return
        made = tuple(results) if primitive.multiple_results else (results,)
        step = Applied(primitive, tuple(operands), params, made)
        self._steps.append(step)
        given = set(map(id, operands))
        self._maker.update((id(x), step) for x in made if id(x) not in given)
        self._count += 1
        for name in self._inside(primitive, params):
            self._seen[name] = self._count
        if len(self._steps) > LENGTH:
            oldest = self._steps.popleft()
            for x in oldest.results:
                if self._maker.get(id(x)) is oldest:
                    del self._maker[id(x)]

    def forget(self) -> None:
        """Forget all operators, with their values."""
        self._steps.clear()
        self._maker.clear()
        self._seen.clear()

    def find(
        self,
        primitive: Any,
        operands: Sequence[Any],
        params: Mapping[str, Any],
        accept: Callable[[Replacement], bool],
    ) -> Found | None:
        """The function that an operator ends, if there is one that `accept` takes."""
        names = self._inside(primitive, params)
        last = names[-1] if names else primitive.name
        candidates = [p for p in self.patterns.get(last, ()) if names and self._may_hold(p, names)]
        if not candidates or not _ends_with_its_results(primitive, params):
            return None
        view = _View(self._maker)
        equations = view.expanded(Applied(primitive, tuple(operands), params, ()))
        for pattern in candidates:
            found = pattern.find(equations[-1], view.producer)
            if found is None or any(eqn.effects for eqn in found.old) or not accept(found):
                continue
            needed = view.leading_to(found.new)
            if needed is not None:
                replaced = [view.values[v] for e in found.old for v in e.outvars if v in view.values]
                return Found([*needed, *found.new], view.values, tuple(replaced))
        return None

    def _may_hold(self, pattern: Pattern, names: Sequence[str]) -> bool:
        oldest = self._count - LENGTH
        return all(name in names or self._seen.get(name, -LENGTH) > oldest for name in pattern.operators)

    def _inside(self, primitive: Any, params: Mapping[str, Any]) -> tuple[str, ...]:
        """The operators that a primitive stands for: those of its body, if it is a jit that is inlined."""
        if not _jax.is_inlined(primitive, params):
            return (primitive.name,)
        body = params["jaxpr"]
        if id(body) not in self._names:
            names = tuple(n for e in _jax.open_jaxpr(body).eqns for n in self._inside(e.primitive, e.params))
            self._names[id(body)] = body, names
        return self._names[id(body)][1]


class _View:
    """Steps as equations: made when they are asked for."""

    def __init__(self, maker: Mapping[int, Applied]) -> None:
        self._steps = maker
        self._atoms: dict[int, Any] = {}
        self._equations: dict[Any, Any] = {}
        self._done: set[int] = set()
        self.values: dict[Any, Any] = {}

    def producer(self, atom: Any) -> Any:
        """The equation that an atom is from, or None."""
        if isinstance(atom, _jax.Literal):
            return None
        if atom not in self._equations and atom in self.values:
            step = self._steps.get(id(self.values[atom]))
            if step is not None and id(step) not in self._done:
                self._done.add(id(step))
                self.expanded(step)
        return self._equations.get(atom)

    def leading_to(self, equations: Sequence[Any]) -> list[Any] | None:
        """The equations that make what `equations` read from values; None if they cannot be run again.

        A value inside of an inlined jit was never handed out.
        """
        missing = [v for v in _jax.free_variables(equations) if v not in self.values]
        if not missing:
            return []
        makers = [self._equations.get(v) for v in missing]
        if any(eqn is None or eqn.effects for eqn in makers):
            return None
        before = self.leading_to(list({id(eqn): eqn for eqn in makers}.values()))
        return None if before is None else [*before, *{id(eqn): eqn for eqn in makers}.values()]

    def expanded(self, step: Applied) -> list[Any]:
        """The equations of a step, with the bodies of jits that are inlined in their place."""
        invars = [self._atom(x) for x in step.operands]
        if step.primitive.name == "custom_jvp_call":
            eqn = call_of(step.params["function"], invars)
        else:
            eqn = _jax.equation_of(step.primitive, invars, step.params)
        if step.results:
            atoms = [self._atom(x) for x in step.results]
            pairs = zip(atoms, eqn.outvars, strict=True)
            eqn = eqn.replace(outvars=[v if isinstance(a, _jax.Literal) else a for a, v in pairs])
        equations = _inlined(eqn) if _jax.is_inlined(step.primitive, step.params) else [eqn]
        self._equations.update((v, e) for e in equations for v in e.outvars)
        return equations

    def _atom(self, value: Any) -> Any:
        if id(value) not in self._atoms:
            aval, is_number = jax.typeof(value), _is_number(value)
            atom = _jax.Literal(np.asarray(value, aval.dtype), aval) if is_number else _jax.Var(aval)
            self._atoms[id(value)] = atom
            if not is_number:
                self.values[atom] = value
        return self._atoms[id(value)]


def _is_number(value: Any) -> bool:
    """Whether a value is one number that can be read here and now."""
    if isinstance(value, jax.Array):
        if _jax.is_traced(value) or value.is_deleted() or not value.is_fully_addressable:
            return False
    elif not isinstance(value, bool | int | float | complex | np.generic | np.ndarray):
        return False  # A reference, or an object of the user's.
    aval = jax.typeof(value)
    return getattr(aval, "shape", None) == () and isinstance(getattr(aval, "dtype", None), np.dtype)


def _ends_with_its_results(primitive: Any, params: Mapping[str, Any]) -> bool:
    """Whether the last equation makes just what the operator returns, also if it is a jit that is inlined."""
    if not _jax.is_inlined(primitive, params):
        return True
    body = _jax.open_jaxpr(params["jaxpr"])
    last = body.eqns[-1]
    return list(body.outvars) == list(last.outvars) and _ends_with_its_results(last.primitive, last.params)


def _inlined(eqn: Any) -> list[Any]:
    """The equations of a jit's body, on its operands and with its results; casts of numbers are numbers."""
    body = _jax.open_jaxpr(eqn.params["jaxpr"])
    atoms: dict[Any, Any] = dict(zip(body.invars, eqn.invars, strict=True))
    atoms.update((v, _jax.Var(v.aval)) for v in body.constvars)
    results = {
        r: v for r, v in zip(body.outvars, eqn.outvars, strict=True) if not isinstance(r, _jax.Literal)
    }
    equations: list[Any] = []
    for inner in body.eqns:
        invars = [v if isinstance(v, _jax.Literal) else atoms[v] for v in inner.invars]
        first = inner.outvars[0]
        if inner.primitive.name == "convert_element_type" and isinstance(invars[0], _jax.Literal):
            atoms[first] = _jax.Literal(np.asarray(invars[0].val).astype(first.aval.dtype), first.aval)
            continue
        outvars = [results[v] if v in results else _jax.Var(v.aval) for v in inner.outvars]
        atoms.update(zip(inner.outvars, outvars, strict=True))
        changed = inner.replace(invars=invars, outvars=outvars)
        inlined = _jax.is_inlined(inner.primitive, inner.params)
        equations += _inlined(changed) if inlined else [changed]
    return equations
