"""What a jaxpr computes, as a key: equal for equal programs, whoever traced them and whenever.

Two jaxprs have the same key if they differ in nothing but the names of variables, source lines, scopes and
the names of nested functions. What is not plain data among the parameters of equations (a mesh, a primitive,
a python callback) takes part by its own equality, which for a function is its identity.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import jax
import numpy as np

from funcprop import _jax

# Parameters that say nothing about what is computed.
_UNSAID = frozenset({(_jax.JIT, "name")})
_PLAIN = (bool, int, str, bytes, type(None))
_JAX_DIRECTORY = os.path.dirname(jax.__file__) + os.sep


class StructuralKey:
    """A digest of all that is data, and the objects that it refers to by number; hashed once."""

    __slots__ = ("_hash", "digest", "objects")

    def __init__(self, digest: bytes, objects: tuple[Any, ...]) -> None:
        self.digest, self.objects = digest, objects
        self._hash = hash(digest)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, StructuralKey) and self.digest == other.digest and self.objects == other.objects
        )

    def __repr__(self) -> str:
        return f"StructuralKey({self.digest.hex()[:12]})"


class SameObject:
    """A wrapper that is equal only if it holds the same object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameObject) and self.value is other.value


def structural_key(
    jaxpr: Any, *others: Any, rules: Mapping[int, StructuralKey] | None = None
) -> StructuralKey:
    """The key of a jaxpr and of other values that belong to it.

    `rules` are the keys of custom derivatives, by the identity of the parameter that holds their function.
    """
    writer = _KeyWriter(rules or {})
    parts = (writer.jaxpr(jaxpr), *(writer.value(other) for other in others))
    text = repr((parts, list(writer.written)))
    return StructuralKey(hashlib.blake2b(text.encode()).digest(), tuple(key[1] for key in writer.objects))


class _KeyWriter:
    """Numbers jaxprs and objects in the order in which they are met; what is written refers to numbers."""

    def __init__(self, rules: Mapping[int, StructuralKey]) -> None:
        self.rules = rules
        self.objects: dict[Any, int] = {}
        self.written: dict[Any, int] = {}
        self._numbers: dict[int, int] = {}

    def object(self, value: Any) -> int:
        """The number of an object, by its equality."""
        try:
            return self.objects.setdefault((type(value), value), len(self.objects))
        except TypeError:
            return self.objects.setdefault((SameObject, SameObject(value)), len(self.objects))

    def jaxpr(self, jaxpr: Any) -> int:
        """The number of a jaxpr; equal ones have the same."""
        if id(jaxpr) not in self._numbers:
            text = self._jaxpr(_jax.open_jaxpr(jaxpr), _jax.constants(jaxpr))
            self._numbers[id(jaxpr)] = self.written.setdefault(text, len(self.written))
        return self._numbers[id(jaxpr)]

    def _jaxpr(self, jaxpr: Any, constants: Any) -> Any:
        places: dict[Any, int] = {}

        def define(variables: Any) -> tuple[int, ...]:
            for v in variables:
                places[v] = len(places)
            return tuple(self.object(v.aval) for v in variables)

        def read(atom: Any) -> Any:
            return self._literal(atom) if isinstance(atom, _jax.Literal) else places[atom]

        inputs = define([*jaxpr.constvars, *jaxpr.invars])
        equations = tuple(
            (self._operator(e), tuple(map(read, e.invars)), define(e.outvars)) for e in jaxpr.eqns
        )
        held = tuple(self.object(SameObject(c)) for c in constants)
        return inputs, equations, tuple(map(read, jaxpr.outvars)), held

    def _literal(self, literal: Any) -> Any:
        value = np.asarray(literal.val)
        return "literal", self.object(literal.aval), value.dtype.str, value.shape, value.tobytes()

    def _operator(self, eqn: Any) -> Any:
        name = eqn.primitive.name
        kind = self.object(eqn.primitive), self.object(_jax.context(eqn))
        rule = next((self.rules[id(v)] for v in eqn.params.values() if id(v) in self.rules), None)
        if rule is not None:
            return (*kind, self.key(rule))
        said = sorted((k, v) for k, v in eqn.params.items() if (name, k) not in _UNSAID)
        return (*kind, *((k, self.value(v)) for k, v in said))

    def key(self, key: StructuralKey) -> Any:
        """Write another key."""
        return key.digest, tuple(map(self.object, key.objects))

    def value(self, value: Any) -> Any:
        """Write a parameter of an equation."""
        if _jax.is_jaxpr(value):
            return "jaxpr", self.jaxpr(value)
        kind = type(value)
        if kind in _PLAIN:
            return kind.__name__, value
        if kind is float:
            return "float", value.hex()
        if isinstance(value, np.ndarray):
            return "array", value.dtype.str, value.shape, value.tobytes()
        if isinstance(value, tuple | list):
            return self.object(kind), *map(self.value, value)
        if isinstance(value, set | frozenset):
            return "set", *map(self.value, sorted(value, key=repr))
        if kind is dict:
            return "dict", *((self.value(k), self.value(value[k])) for k in sorted(value, key=repr))
        if isinstance(value, functools.partial):
            return "partial", self.value(value.func), self.value(value.args), self.value(value.keywords)
        if is_dataclass(value) and not isinstance(value, type):
            return self.object(kind), *((f.name, self.value(getattr(value, f.name))) for f in fields(value))
        closed_over = _closed_over(value)
        if closed_over is not None:
            # A policy for what is saved: of equal contents it is another object whenever it is made.
            return self.object(value.__code__), *map(self.value, closed_over)
        return "object", self.object(value)


def _closed_over(function: Any) -> list[Any] | None:
    """List what a function written in JAX itself closes over, which is all it reads; None for others."""
    code = getattr(function, "__code__", None)
    if code is None or not code.co_filename.startswith(_JAX_DIRECTORY):
        return None
    return [cell.cell_contents for cell in function.__closure__ or ()]
