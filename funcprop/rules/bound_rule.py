"""A rule at one operator: what it returns is checked against the types of the operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from funcprop import _jax
from funcprop.program.layer_calls import LayerCall
from funcprop.program.linear_map import Arrays
from funcprop.rules.machine import Machine, host
from funcprop.rules.rule import Rule, RuleError

Type = tuple[tuple[int, ...], str]  # shape and dtype


@dataclass(frozen=True)
class BoundRule:
    """A rule at one operator: its static parameters, the structure of its arguments, its results' types.

    `machine` is the one that is compiled for. Where that is not certain, `elsewhere` is the operator itself,
    from arrays to arrays, which takes the rule's place on platforms that are not the rule's. `beside` is what
    the rule is told of its neighbour.
    """

    rule: Rule
    operator: str
    static: dict[str, Any]
    tree: Any
    argument_names: tuple[str, ...]
    results: tuple[Type, ...] | None = None
    machine: Machine | None = None
    beside: Any = None
    elsewhere: Callable[..., Arrays] | None = field(default=None, compare=False)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the rule's functions: static parameters, and what else it asks for."""
        sized = {"machine": self.machine or host()} if self.rule.sized else {}
        return {**self.static, **sized, **({"beside": self.beside} if self.rule.neighbourly else {})}

    @property
    def is_pure(self) -> bool:
        """Whether its functions read nothing but their arguments, and all of these can be keys."""
        if not self.rule.pure:
            return False
        try:
            hash(self)
        except TypeError:  # A static parameter that is no key.
            return False
        return True

    def claims(self) -> Collection[Any]:
        """The equations in the operator's body that the rule differentiates itself."""
        return () if self.rule.claims is None else self.rule.claims(**self.options)

    @classmethod
    def of_layer(cls, rule: Rule, call: LayerCall, eqn: Any) -> BoundRule:
        """The rule at a layer call, without the call's batching."""
        shapes = [list(v.aval.shape) for v in eqn.outvars]
        for axis in reversed(call.axes):
            for shape, dim in zip(shapes, axis.out_axes, strict=True):
                if dim is not None:
                    del shape[dim]
        results = tuple((tuple(s), str(v.aval.dtype)) for s, v in zip(shapes, eqn.outvars, strict=True))
        return cls(rule, call.layer.name, dict(call.static), call.tree, call.argument_names(), results)

    @classmethod
    def of_primitive(cls, rule: Rule, eqn: Any) -> BoundRule:
        """The rule at an equation, whose parameters become keyword arguments."""
        operands = tuple(range(len(eqn.invars)))
        names = tuple(f"operand {i}" for i in operands)
        results = tuple((tuple(v.aval.shape), str(v.aval.dtype)) for v in eqn.outvars)
        return cls(rule, eqn.primitive.name, dict(eqn.params), jax.tree.structure(operands), names, results)

    def returned(self, leaves: Sequence[Any]) -> Any:
        """What the rule's forward returns."""
        with self._named():
            return self.rule.forward(*jax.tree.unflatten(self.tree, leaves), **self.options)

    def forward(self, leaves: Sequence[Any]) -> tuple[Arrays, Any, Arrays, Any]:
        """Results and residuals, flat, each followed by its structure."""
        returned = self.returned(leaves)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise RuleError(
                f"rule for {self.operator}: forward returned {_kind(returned)}; return the pair "
                "(results, residuals)."
            )
        results, result_tree = jax.tree.flatten(returned[0])
        types = tuple((tuple(np.shape(y)), str(jax.numpy.result_type(y))) for y in results)
        if self.results is not None and types != self.results:
            raise RuleError(
                f"rule for {self.operator}: forward returned {_types(types)} where the operator returns "
                f"{_types(self.results)}; the forward must compute the operator's own results."
            )
        residuals, residual_tree = jax.tree.flatten(returned[1])
        for path, residual in jax.tree.leaves_with_path(returned[1]):
            if not isinstance(residual, jax.Array | np.ndarray | np.generic | float | int | complex):
                raise RuleError(
                    f"rule for {self.operator}: residual {_path(path)}={residual!r} is not an array; save "
                    "arrays only and pass static values as keyword arguments."
                )
        return results, result_tree, residuals, residual_tree

    def value(self, leaves: Sequence[Any]) -> Arrays:
        """Results, flat, where nothing is differentiated."""
        if self.rule.value is None:
            return self.forward(leaves)[0]
        with self._named():
            return jax.tree.leaves(self.rule.value(*jax.tree.unflatten(self.tree, leaves), **self.options))

    def backward(
        self, residuals: Any, cotangents: Any, needs: Sequence[bool], arguments: Sequence[Any]
    ) -> Arrays:
        """The wanted cotangents, flat and checked against the types of the arguments."""
        wanted = jax.tree.unflatten(self.tree, needs)
        with self._named():
            returned = self.rule.backward(residuals, cotangents, wanted, **self.options)
        where = f"rule for {self.operator}: backward returned"
        count = len(wanted)
        if not (isinstance(returned, tuple | list) and len(returned) == count):
            raise RuleError(
                f"{where} {_kind(returned)} for {count} arguments {self.argument_names}; return a tuple "
                "with one cotangent for each argument (None where it is not needed)."
            )
        try:
            leaves = self.tree.flatten_up_to(tuple(returned))
        except ValueError as error:
            raise RuleError(
                f"{where} cotangents whose structure is not that of the arguments {self.argument_names}: "
                f"{error}. Return one array for every array of the argument."
            ) from None
        return [
            self._checked(leaf, aval, name)
            for leaf, aval, name, need in zip(leaves, arguments, self.argument_names, needs, strict=True)
            if need
        ]

    def _checked(self, cotangent: Any, aval: Any, name: str) -> Any:
        expected = f"{aval.dtype}{list(aval.shape)}"
        where = f"rule for {self.operator}: the cotangent of argument {name!r}"
        if cotangent is None:
            return _jax.zeros_like_aval(aval.to_tangent_aval())
        if not hasattr(cotangent, "dtype"):
            raise RuleError(f"{where} is {_kind(cotangent)}; return an array of type {expected}.")
        actual = jax.typeof(cotangent)
        if tuple(actual.shape) != tuple(aval.shape):
            raise RuleError(
                f"{where} has shape {tuple(actual.shape)} but the argument has {tuple(aval.shape)}; sum it "
                "over the axes along which the argument was broadcast."
            )
        if actual.dtype != aval.dtype:
            raise RuleError(
                f"{where} has dtype {actual.dtype} but the argument has {aval.dtype}; end the rule with "
                f"`.astype(jnp.{aval.dtype})`."
            )
        return _jax.with_weak_type(cotangent, bool(getattr(aval, "weak_type", False)))

    def pushforward(self, residuals: Any, tangents: Sequence[Any]) -> Arrays:
        """The rule's own forward mode on flat tangents, None where an argument is not perturbed."""
        assert self.rule.jvp is not None
        with self._named():
            return jax.tree.leaves(
                self.rule.jvp(residuals, jax.tree.unflatten(self.tree, tangents), **self.options)
            )

    def applies(self, arguments: Sequence[Any]) -> bool | str:
        """True if the rule applies to arguments of these types, or why the operator is left to autodiff."""
        if self.rule.applies is None:
            return True
        with self._named():
            answer = self.rule.applies(*jax.tree.unflatten(self.tree, arguments), **self.options)
        if answer is True or isinstance(answer, str):
            return answer
        raise RuleError(
            f"rule for {self.operator}: applies returned {answer!r}; return True, or a string that says "
            "why the operator is left to autodiff."
        )

    def __hash__(self) -> int:
        # Static parameters are a dictionary. TypeError if one of them cannot be a key.
        return hash((self.rule, self.operator, self.tree, self.machine, frozenset(self.static.items())))

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Say of an exception of the rule's own whose rule it is."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, RuleError):
                error.add_note(f"raised by the rule for {self.operator}")
            raise


def _kind(value: Any) -> str:
    return (
        f"a {type(value).__name__} of length {len(value)}" if isinstance(value, tuple | list) else repr(value)
    )


def _types(types: Sequence[Type]) -> str:
    return "(" + ", ".join(f"{dtype}{list(shape)}" for shape, dtype in types) + ")"


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path).lstrip(".") or "(the whole)"
