"""A rule set: which rule belongs to which operator.

It is immutable, hashable, and an argument of every transformation, so that no hidden state can make a cached
program stale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

from funcprop import _jax
from funcprop.rules.layer import Layer
from funcprop.rules.machine import CompileTarget, Machine
from funcprop.rules.rule import Rule, RuleError

OperatorKey: TypeAlias = "str | Layer"


class RuleSet(Mapping[OperatorKey, Rule]):
    """An immutable, hashable table from operators to rules.

    Keys are names of JAX primitives (`"tanh"`, `"dot_general"`) and layers. `own` says whether a layer's
    own rule is used where the table has no entry for it; `measured` restricts the table, and the own
    rules, to those that win on the platform that is compiled for. A rule put in by `replace` is always used.

    `target` is the machine that `on` has resolved it for. Without one, the platform is that of the devices of
    the arguments, or of JAX's default device. In a program that is traced before it is known what it will be
    compiled for (inside of `jax.jit`, `jax.export`), a rule that does not win everywhere gives way to
    autodiff where it is lowered for another platform; rules of that other platform's own need `on`.
    """

    name: str
    _rules: dict[OperatorKey, Rule]
    _own: bool
    _measured: bool
    _chosen: dict[OperatorKey, Rule | None]
    target: Machine | None
    notes: tuple[str, ...]
    _identity: tuple[Any, ...]

    def __init__(
        self,
        name: str,
        rules: Mapping[OperatorKey, Rule] | None = None,
        *,
        own: bool = False,
        measured: bool = False,
        chosen: Mapping[OperatorKey, Rule | None] | None = None,
        target: Machine | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        for key, rule in [*(rules or {}).items(), *(chosen or {}).items()]:
            _check_entry(key, rule)
        fields: dict[str, Any] = {
            "name": name, "_rules": dict(rules or {}), "_chosen": dict(chosen or {}),
            "_own": own, "_measured": measured, "target": target,
            "notes": tuple(notes),
        }  # fmt: skip
        identity = (
            name,
            own,
            measured,
            target,
            *(frozenset(fields[key].items()) for key in ("_rules", "_chosen")),
        )
        vars(self).update(fields, _identity=identity)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"rule set {self.name!r} is immutable; `replace` makes another one.")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"rule set {self.name!r} is immutable; `replace` makes another one.")

    def find(self, operator: OperatorKey, platform: str) -> Rule | None:
        """The rule for an operator on a platform, or None where autodiff does it."""
        if operator in self._chosen:
            return self._chosen[operator]
        rule = self._rules.get(operator)
        if rule is None and self._own and isinstance(operator, Layer):
            rule = operator.rule
        if rule is not None and self._measured and not rule.wins_on(platform):
            return None
        return rule

    def is_replaced(self, operator: OperatorKey) -> bool:
        """Whether `replace` decided what rule the operator has."""
        return operator in self._chosen

    def replace(self, changes: Mapping[OperatorKey, Rule | None]) -> RuleSet:
        """A new set with other rules for some operators; `None` leaves the operator to autodiff.

        Raises:
            RuleError: an operator is unknown, or a value is not a rule.
        """
        return self._with(chosen={**self._chosen, **changes})

    def on(self, target: Any) -> RuleSet:
        """Resolve the set for a machine: the same set, whatever the program is traced or lowered for.

        `target` is `"cpu"`, `"gpu"` (also `"cuda"`, `"rocm"`), `"tpu"`, a device, a topology, or an
        `fp.Machine`, from which rules then take the sizes of their chunks and blocks.

        Raises:
            RuleError: there is no such platform.

        Example:
            >>> import funcprop as fp
            >>> "reduce_window_max" in fp.rules.default.on("tpu")
            False
        """
        return self._with(target=Machine.of(target))

    def for_arguments(self, values: Sequence[Any]) -> RuleSet:
        """Resolve the set for the devices of arguments, or their shardings, unless it is resolved."""
        return self if self.target is not None else self._with(target=CompileTarget.of(None, values).machine)

    def platforms_of(self, operator: OperatorKey) -> frozenset[str] | None:
        """The platforms on which the rule of an operator is used; None for all."""
        if operator in self._chosen or not self._measured:
            return None
        rule = self._rules.get(operator) or (operator.rule if isinstance(operator, Layer) else None)
        return None if rule is None else rule.platforms

    def _with(self, **changes: Any) -> RuleSet:
        fields = {"name": self.name, "chosen": self._chosen, "target": self.target, "notes": self.notes}
        return RuleSet(rules=self._rules, own=self._own, measured=self._measured, **{**fields, **changes})

    def noted(self, name: str, notes: Sequence[str]) -> RuleSet:
        """The same set under another name, with lines that `print` shows: why it is as it is."""
        return self._with(name=name, notes=notes)

    @property
    def platform(self) -> str:
        """The platform it is resolved for, or that of JAX's default device."""
        return _jax.default_platform() if self.target is None else self.target.platform

    def __getitem__(self, operator: OperatorKey) -> Rule:
        rule = self.find(operator, self.platform)
        if rule is None:
            raise KeyError(operator)
        return rule

    def __iter__(self) -> Iterator[OperatorKey]:
        platform = self.platform
        return (key for key in {**self._rules, **self._chosen} if self.find(key, platform) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, RuleSet) and self._identity == other._identity)

    def __hash__(self) -> int:
        # Not of all that is compared: it is asked at every eager call.
        return hash((self.name, self._own, self._measured, self.target, len(self._rules), len(self._chosen)))

    def __repr__(self) -> str:
        resolved = (
            "" if self.target is None else f" ({self.target.name})" if self.target.name else " (resolved)"
        )
        rows = [f"RuleSet {self.name!r} on {self.platform}{resolved}: {len(self)} rules"]
        if self._own:
            rows[0] += ", and each layer's own"
        for key, rule in {**self._rules, **self._chosen}.items():
            label = key if isinstance(key, str) else f"layer {key.name}"
            active = self.find(key, self.platform)
            where = "any" if rule is None or rule.platforms is None else ",".join(sorted(rule.platforms))
            rows.append(f"  {label:32} {'active' if active else 'autodiff':9} wins on: {where or '-'}")
        return "\n".join([*rows, *(f"  # {note}" for note in self.notes)])


def _check_entry(key: Any, rule: Any) -> None:
    if isinstance(key, str):
        if key not in _jax.known_primitives():
            raise RuleError(
                f"rule set: unknown operator {key!r}; use the name of a JAX primitive as "
                "`jax.make_jaxpr` prints it, or the layer itself (an object made by `fp.layer`)."
            )
    elif not isinstance(key, Layer):
        raise RuleError(
            f"rule set: operator {key!r} is neither the name of a JAX primitive nor a layer; "
            "decorate the function with `fp.layer`."
        )
    if rule is not None and not isinstance(rule, Rule):
        raise RuleError(f"rule set: {key!r} maps to {rule!r}; give an `fp.Rule`, or None for autodiff.")
