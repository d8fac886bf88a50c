"""Functions that several equations make, recognised in a jaxpr and replaced by one operator with a rule.

A rule belongs to one operator. Some rules are for a function that JAX writes as several equations: gelu, or a
relu that a max-pool follows. A *pattern* finds such equations and says which layer (`fp.layer`) they are; the
rewrite then treats the layer's call as any other operator.

Names decide nothing. A function is recognised by its structure: the equations are compared, one by one, with
those of the reference traced at the same types. For a function with a derivative of its own
(`jax.custom_jvp`) the tangent maps are compared too, so that a user's own derivative of the same function is
never replaced. Equations with effects, and results that are read elsewhere, are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from funcprop import _jax
from funcprop.rules.layer import Layer

Producer = Callable[[Any], Any]


class Replacement(NamedTuple):
    """Equations that are one operator: those that go, and those that stand in their place.

    `old` ends with the equation whose results remain, `new` with the layer's call. Each equation of
    `requires` must have a rule by itself; a rule set that leaves it to autodiff also keeps it whole.
    """

    old: Sequence[Any]
    new: Sequence[Any]
    requires: Sequence[Any] = ()


class Pattern(Protocol):
    """Equations to look for, by the last of them."""

    @property
    def last(self) -> str:
        """The primitive of the last equation."""

    @property
    def layer(self) -> Layer:
        """The layer that replaces the equations; without a rule for it the pattern has no use."""

    @property
    def operators(self) -> Collection[str]:
        """Primitives that are always among the equations."""

    def find(self, eqn: Any, producer: Producer) -> Replacement | None:
        """The equations that end with `eqn`; `producer` maps an atom to the equation it is from, or None."""


def recognised(jaxpr: Any, patterns: Sequence[Pattern], has_rule: Callable[[Any], bool]) -> list[Any]:
    """The equations of a jaxpr, with the replacements whose operator has a rule, first pattern first."""
    candidates = [(p, eqn) for p in patterns for eqn in jaxpr.eqns if eqn.primitive.name == p.last]
    if not candidates:
        return list(jaxpr.eqns)
    producer = _producer(jaxpr)
    readers: dict[Any, list[int]] = {}
    for eqn in jaxpr.eqns:
        for v in eqn.invars:
            if not isinstance(v, _jax.Literal):
                readers.setdefault(v, []).append(id(eqn))
    results = {v for v in jaxpr.outvars if not isinstance(v, _jax.Literal)}

    def hidden(old: Sequence[Any]) -> bool:
        inside = {id(eqn) for eqn in old}
        between = [v for eqn in old[:-1] for v in eqn.outvars]
        return not any(v in results or not inside.issuperset(readers.get(v, ())) for v in between)

    replaced: dict[int, Sequence[Any]] = {}
    for pattern, eqn in candidates:
        found = None if id(eqn) in replaced else pattern.find(eqn, producer)
        if found is None or any(e.effects or id(e) in replaced for e in found.old):
            continue
        if hidden(found.old) and has_rule(found.new[-1]) and all(map(has_rule, found.requires)):
            replaced.update((id(e), ()) for e in found.old)
            replaced[id(eqn)] = found.new
    return [new for eqn in jaxpr.eqns for new in replaced.get(id(eqn), (eqn,))]


def _producer(jaxpr: Any) -> Producer:
    maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    return lambda atom: None if isinstance(atom, _jax.Literal) else maker.get(atom)


def layer_equation(layer: Layer, static: Mapping[str, Any], invars: Sequence[Any], like: Any) -> Any:
    """The call of a layer as an equation with the results, scope and source line of the equation `like`."""
    with jax.disable_jit(False):  # A layer's call is a jit.
        traced = _called.trace(layer, tuple(static.items()), *[v.aval for v in invars]).jaxpr
    (call,) = _jax.open_jaxpr(traced).eqns
    return _jax.in_place_of(like, call, invars)


@partial(jax.jit, static_argnums=(0, 1))
def _called(layer: Layer, static: tuple[tuple[str, Any], ...], *args: Any) -> Any:
    return layer(*args, **dict(static))


# --- known functions --------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """The pattern of an elementwise function of one array, which `layer(x, **static)` computes too."""

    function: Callable[[Any], Any]
    layer: Layer
    static: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def _of_a_number(self) -> Any:
        return _reference(self.function, _SCALAR)

    @cached_property
    def operators(self) -> Collection[str]:
        """The primitives of the function's equations."""
        return [eqn.primitive.name for eqn in self._of_a_number.eqns]

    @property
    def last(self) -> str:
        """The primitive of the function's last equation."""
        return list(self.operators)[-1]

    def find(self, eqn: Any, producer: Producer) -> Replacement | None:
        """The function's equations, if they end with `eqn`."""
        reference = self._of_a_number  # Much cheaper than to trace it at the type of the result.
        if not _looks_like(reference.eqns[-1], eqn, _producer(reference), producer):
            return None
        found = equal_to(self.function, eqn, producer)
        if found is None:
            return None
        x, old = found
        return Replacement(old, [layer_equation(self.layer, dict(self.static), [x], eqn)])


_SCALAR = jax.ShapeDtypeStruct((), np.dtype("float32"))


def equal_to(
    function: Callable[[Any], Any],
    eqn: Any,
    producer: Producer = lambda _: None,
    argument: Any | None = None,
) -> tuple[Any, list[Any]] | None:
    """The argument of `function` and its equations, if `eqn` and what leads to it compute just `function(x)`.

    The argument has the type of the result, or `argument`.
    """
    if len(eqn.outvars) != 1 or not _ordinary(eqn.outvars[0].aval):
        return None
    (result,) = eqn.outvars
    reference = _reference(function, result.aval if argument is None else argument)
    comparison = _Comparison()

    def maker(atom: Any) -> Any:
        return eqn if atom is result else producer(atom)

    if not comparison.atoms(reference.outvars[0], result, _producer(reference), maker):
        return None
    x = comparison.same.get(reference.invars[0])
    # In the order of the reference; the last one is `eqn`.
    old = [comparison.eqns[id(e)] for e in reference.eqns if id(e) in comparison.eqns]
    if x is None or _type(x.aval) != _type(reference.invars[0].aval) or old[-1] is not eqn:
        return None
    return x, old


def call_of(function: Callable[[Any], Any], invars: Sequence[Any]) -> Any:
    """The call of a function with a derivative of its own: the reference's equation, where there is one."""
    (aval,) = (v.aval for v in invars)
    traced = (
        _reference(function, aval) if _ordinary(aval) else _jax.open_jaxpr(jax.make_jaxpr(function)(aval))
    )
    eqn = traced.eqns[0]
    return eqn.replace(invars=list(invars), outvars=[_jax.Var(v.aval) for v in eqn.outvars])


def _reference(function: Callable[[Any], Any], aval: Any) -> Any:
    return _jax.open_jaxpr(_applied.trace(function, aval).jaxpr)


# By jit, which remembers the jaxprs of these few functions.
@partial(jax.jit, static_argnums=0)
def _applied(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _looks_like(reference: Any, here: Any, reference_maker: Producer, maker: Producer) -> bool:
    """Whether an equation and those that lead to it apply the reference's operators, constants aside."""
    if reference.primitive is not here.primitive or len(reference.invars) != len(here.invars):
        return False
    for r, h in zip(reference.invars, here.invars, strict=True):
        before = None if _filled_with(r, reference_maker) is not None else reference_maker(r)
        made = None if before is None else maker(h)
        if before is not None and (made is None or not _looks_like(before, made, reference_maker, maker)):
            return False
    return True


def _ordinary(aval: Any) -> bool:
    """Whether a type is shape and dtype alone; references cannot be traced at others from outside."""
    return _jax.is_differentiable(aval) and not _jax.varying_axes(aval)


def _type(aval: Any) -> tuple[Any, ...]:
    return getattr(aval, "shape", None), getattr(aval, "dtype", None), getattr(aval, "weak_type", False)


class _Comparison:
    """Whether two programs are the same: which variable of the reference is which variable here."""

    def __init__(self, depth: int = 0) -> None:
        self.same: dict[Any, Any] = {}
        self.eqns: dict[int, Any] = {}
        self.depth = depth

    def atoms(self, reference: Any, here: Any, reference_maker: Producer, maker: Producer) -> bool:
        """Whether an atom is the reference's, with everything that leads to it."""
        constant = _filled_with(reference, reference_maker)
        if constant is not None:
            same_type = _type(reference.aval) == _type(here.aval)
            return same_type and _equal(constant, _filled_with(here, maker))
        if isinstance(here, _jax.Literal):
            return False
        if reference in self.same:
            return self.same[reference] is here
        made = reference_maker(reference)
        if made is None:  # The reference's argument may be anything of its type.
            self.same[reference] = here
            return _type(reference.aval) == _type(here.aval)
        eqn = maker(here)
        if eqn is None or len(made.outvars) != len(eqn.outvars) or len(made.invars) != len(eqn.invars):
            return False
        if list(made.outvars).index(reference) != list(eqn.outvars).index(here):
            return False
        if not self.operators(made, eqn):
            return False
        self.eqns[id(made)] = eqn
        self.same.update(zip(made.outvars, eqn.outvars, strict=True))
        pairs = zip(made.invars, eqn.invars, strict=True)
        return all(self.atoms(r, h, reference_maker, maker) for r, h in pairs)

    def operators(self, reference: Any, here: Any) -> bool:
        """Whether two equations apply the same operator."""
        if reference.primitive is not here.primitive or reference.params.keys() != here.params.keys():
            return False
        if any(_type(r.aval) != _type(h.aval) for r, h in zip(reference.outvars, here.outvars, strict=True)):
            return False
        derivative = (
            {"jvp_jaxpr_fun", "jvp_jaxpr_thunk"} if reference.primitive.name == "custom_jvp_call" else ()
        )
        for key, value in reference.params.items():
            if key not in derivative and key != "name" and not self._parameters(value, here.params[key]):
                return False
        return not derivative or self._derivatives(reference, here)

    def _parameters(self, reference: Any, here: Any) -> bool:
        if _jax.is_jaxpr(reference):
            return _jax.is_jaxpr(here) and self.jaxprs(reference, here)
        return type(reference) is type(here) and _equal(reference, here)

    def jaxprs(self, reference: Any, here: Any) -> bool:
        """Whether two programs compute the same from their arguments, in whatever order."""
        if reference is here:
            return True
        r, h = _jax.open_jaxpr(reference), _jax.open_jaxpr(here)
        if [len(r.invars), len(r.outvars)] != [len(h.invars), len(h.outvars)] or r.constvars or h.constvars:
            return False
        inner = _Comparison(self.depth)
        inner.same.update(zip(r.invars, h.invars, strict=True))
        if any(_type(a.aval) != _type(b.aval) for a, b in zip(r.invars, h.invars, strict=True)):
            return False
        makers = _producer(r), _producer(h)
        return all(inner.atoms(a, b, *makers) for a, b in zip(r.outvars, h.outvars, strict=True))

    def _derivatives(self, reference: Any, here: Any) -> bool:
        """Whether two functions with derivatives of their own have the same tangent map.

        The tangent map may call the function again; there its values are compared alone.
        """
        if self.depth or all(reference.params[key] is here.params[key] for key in reference.params):
            return True
        maps = [_tangent_map(eqn) for eqn in (reference, here)]
        return None not in maps and _Comparison(self.depth + 1).jaxprs(*maps)


def _tangent_map(eqn: Any) -> Any:
    """The tangents of an equation's results as a program of its operands and their tangents.

    None where that program holds constants, which are not compared.
    """
    call = _jax.one_equation(eqn)
    avals = [v.aval for v in eqn.invars]
    smooth = [i for i, aval in enumerate(avals) if _jax.is_differentiable(aval)]

    def tangents(primals: Any, perturbations: Any) -> Any:
        return jax.jvp(call, primals, _jax.with_zero_tangents(perturbations, avals))[1]

    closed = jax.make_jaxpr(lambda p, t: tangents(list(p), list(t)))(avals, [avals[i] for i in smooth])
    if _jax.constants(closed):
        return None
    opened = _jax.open_jaxpr(closed)
    return _jax.without_unread_inputs(opened, [True] * len(opened.invars))[0]


def _filled_with(atom: Any, maker: Producer) -> Any:
    """The number with which an atom is filled; None if it is no such constant.

    `vmap` broadcasts a constant in another way, so the way is not compared.
    """
    while not isinstance(atom, _jax.Literal):
        eqn = maker(atom)
        if eqn is None or eqn.primitive.name != "broadcast_in_dim" or len(eqn.invars) != 1:
            return None
        (atom,) = eqn.invars
    return atom.val


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray | np.generic | jax.Array) or isinstance(
        b, np.ndarray | np.generic | jax.Array
    ):
        return np.shape(a) == np.shape(b) and bool(np.all(np.asarray(a) == np.asarray(b)))
    return bool(a == b)
