"""One rule for an operator out of several ways, one for each of the sizes at which it was measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from funcprop import _jax
from funcprop.program.facts import CONTROL_FLOW
from funcprop.rules.rule import Rule

AUTODIFF = "autodiff was measured to be as good at these sizes"


def geometry(operator: str, args: Any, static: Mapping[str, Any]) -> str:
    """The sizes of an operator as a short text: types of its arguments, and its static parameters.

    Of a loop's body only the types count: it comes with rules and without.
    """
    types: Any = [(tuple(x.shape), str(x.dtype)) for x in jax.tree.leaves(args)]
    if operator in CONTROL_FLOW:
        body = _jax.open_jaxpr(static["jaxpr"]) if "jaxpr" in static else None
        atoms = () if body is None else (*body.invars, *body.outvars)
        types = [str(v.aval) for v in atoms], static.get("length"), static.get("reverse")
        static = {}
    said = sorted((key, repr(value)) for key, value in static.items() if key != "machine")
    return hashlib.sha256(repr((operator, types, said)).encode()).hexdigest()[:16]


@partial(jax.tree_util.register_dataclass, data_fields=["residuals"], meta_fields=["way"])
@dataclass(frozen=True)
class ResidualsOfWay:
    """What one of the ways saves, and which it is."""

    residuals: Any
    way: str


@dataclass(frozen=True)
class RuleChoices:
    """The way of differentiating an operator for each of its geometries, and the rule of each way."""

    operator: str
    chosen: tuple[tuple[str, str], ...]
    rules: tuple[tuple[str, Rule], ...]

    def way(self, args: Any, static: Mapping[str, Any]) -> str | None:
        """The name of the way for arguments of these types; None for autodiff."""
        return dict(self.chosen).get(geometry(self.operator, args, static))

    def rule(self) -> Rule:
        """One rule that goes the way of the operator's geometry."""
        rules = [rule for _, rule in self.rules]
        parts: dict[str, Any] = {name: _Part(self, name) for name in ("value", "claims", "jvp")}
        if not all(rule.jvp is not None for rule in rules):
            del parts["jvp"]
        if not any(rule.claims is not None for rule in rules):
            del parts["claims"]
        return Rule(
            _Part(self, "forward"),
            _Part(self, "backward"),
            rules[0].equations,
            applies=_Part(self, "applies"),
            pure=all(rule.pure for rule in rules),
            sized=True,
            **parts,
        )


@dataclass(frozen=True)
class _Part:
    """One of the functions of a rule of several ways; equal to another that chooses alike."""

    choices: RuleChoices
    name: str

    def __call__(self, *args: Any, machine: Any, **static: Any) -> Any:
        rules = dict(self.choices.rules)
        if self.name in ("backward", "jvp"):
            saved, *rest = args
            rule = rules[saved.way]
            return getattr(rule, self.name)(saved.residuals, *rest, **_options(rule, machine, static))
        way = self.choices.way(args, static)
        if way is None:
            return AUTODIFF if self.name == "applies" else ()
        rule = rules[way]
        options = _options(rule, machine, static)
        if self.name == "forward":
            y, residuals = rule.forward(*args, **options)
            return y, ResidualsOfWay(residuals, way)
        if self.name == "value":
            return rule.forward(*args, **options)[0] if rule.value is None else rule.value(*args, **options)
        fun = getattr(rule, self.name)
        if fun is None:
            return True if self.name == "applies" else ()
        return fun(*args, **options)


def _options(rule: Rule, machine: Any, static: Mapping[str, Any]) -> dict[str, Any]:
    return {**static, "machine": machine} if rule.sized else dict(static)
