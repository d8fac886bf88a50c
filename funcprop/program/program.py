"""A function as data: what it computes, apart from python.

A function is traced once, at the boundary, and what it read besides its arguments (globals, closures,
attributes) has its value of that moment: arrays are data, all else is written into the jaxpr. A program is a
pytree of these arrays. What `jit` compiles for it is found again by its structure, so that equal functions
share a compilation, whatever they read is never stale, and no python function is kept alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.program.call import traced
from funcprop.program.self_contained import SelfContained, self_contained
from funcprop.program.structural_key import StructuralKey, structural_key


class Structure:
    """A jaxpr whose leading inputs are constants, and the structures of arguments and results; hashable.

    `name` is that of the function that was traced first, for messages; `differentiable` says whether all
    custom derivatives in it could be traced apart from their surroundings.
    """

    __slots__ = ("differentiable", "inputs", "jaxpr", "key", "name", "outputs")

    def __init__(self, found: SelfContained, constants: int, inputs: Any, outputs: Any, name: str) -> None:
        self.jaxpr, self.inputs, self.outputs, self.name = found.jaxpr, inputs, outputs, name
        self.differentiable = not found.refused
        self.key: StructuralKey = structural_key(found.jaxpr, constants, inputs, outputs, rules=found.rules)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.key == other.key)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Program:
    """A traced function; called like it, with arguments of the same types.

    Attributes:
        constants: the arrays that the function read besides its arguments.
        structure: all else.
    """

    constants: tuple[Any, ...]
    structure: Structure = field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        fun: Callable[..., Any],
        *args: Any,
        called: Callable[..., Any] | None = None,
        which: str = "an array argument",
    ) -> Program:
        """Trace a function of pytrees of arrays, or of their types.

        For messages, `called` is the user's function, if `fun` calls it, and `which` says what the arguments
        are.

        Raises:
            jax.errors.ConcretizationTypeError: the function needs the value of an argument in python.
        """
        leaves, tree = jax.tree.flatten(args)
        outputs: list[Any] = []

        def flat(*values: Any) -> list[Any]:
            results, output = jax.tree.flatten(fun(*jax.tree.unflatten(tree, values)))
            outputs.append(output)
            return results

        named = fun if called is None else called
        label = getattr(named, "__name__", type(named).__name__)
        return cls.of_jaxpr(traced(flat, leaves, named, which), (), tree, outputs[-1], label)

    @classmethod
    def again(cls, fun: Callable[..., Any], *args: Any) -> Program:
        """As `of`; but as long as it passes through no `jit`, it can be traced again for other types."""
        program = cls.of(fun, *args)
        object.__setattr__(program, "_source", fun)
        return program

    def at(self, *args: Any) -> Program:
        """The program for some arguments or types: itself, or the same function traced for them.

        Raises:
            TypeError: it has passed through a `jit`, and was traced for others.
        """
        if self.takes(*args):
            return self
        source = vars(self).get("_source")
        if source is None:
            raise TypeError(
                f"{self.name} was traced for arguments of the types {self.arguments}, but is called with "
                f"{jax.tree.map(_typed, args)}; inside of `jit`, it is called with the former only."
            )
        return Program.again(source, *args)

    @classmethod
    def of_jaxpr(cls, jaxpr: Any, constants: Sequence[Any], inputs: Any, outputs: Any, name: str) -> Program:
        """The program of a jaxpr whose leading inputs are constants.

        `inputs` and `outputs` are the structures of the arguments and of the results.
        """
        found = self_contained(jaxpr)
        arrays = (*found.constants, *constants)
        return cls(arrays, Structure(found, len(arrays), inputs, outputs, name))

    def __call__(self, *args: Any) -> Any:
        """The results at some arguments.

        Raises:
            TypeError: they have another structure.
        """
        return self.by(lambda jaxpr, values: _jax.evaluate(jaxpr, (), values))(*args)

    def by(self, run: Callable[[Any, Sequence[Any]], Sequence[Any]]) -> Callable[..., Any]:
        """The function whose jaxpr is evaluated by `run(jaxpr, values)`."""

        def called(*args: Any) -> Any:
            leaves, tree = jax.tree.flatten(args)
            if tree != self.structure.inputs:
                raise TypeError(f"{self.name} was traced for {self.structure.inputs}, not for {tree}.")
            results = zip(run(self.jaxpr, [*self.constants, *leaves]), self.jaxpr.outvars, strict=True)
            return jax.tree.unflatten(self.structure.outputs, [_jax.as_array(x, v.aval) for x, v in results])

        return called

    def compiled(self, *args: Any) -> Any:
        """The results, by what `jit` has compiled for an equal program or compiles now."""
        return _compiled(self, *args)

    @property
    def jaxpr(self) -> Any:
        """The computation: an open jaxpr of the constants and the leaves of the arguments."""
        return self.structure.jaxpr

    @property
    def name(self) -> str:
        """The function's, for messages."""
        return self.structure.name

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The types of the arguments."""
        types = [_type(v.aval) for v in self.jaxpr.invars[len(self.constants) :]]
        return tuple(jax.tree.unflatten(self.structure.inputs, types))

    @property
    def results(self) -> Any:
        """The types of the results."""
        return jax.tree.unflatten(self.structure.outputs, [_type(v.aval) for v in self.jaxpr.outvars])

    def takes(self, *args: Any) -> bool:
        """Whether arguments have the types of those that the function was traced for."""
        return bool(jax.tree.map(_typed, args) == self.arguments)

    def __repr__(self) -> str:
        return f"Program({self.name}: {len(self.jaxpr.eqns)} equations, {len(self.constants)} constants)"


@jax.jit
def _compiled(program: Program, *args: Any) -> Any:
    return program(*args)


class CompiledByTypes:
    """A function that is traced once for all arguments of the same types, and compiled by its structure."""

    def __init__(self, fun: Callable[..., Any]) -> None:
        self._fun = fun
        self._programs: dict[Any, Program] = {}

    def __call__(self, *args: Any) -> Any:
        """Evaluate; what the function reads besides its arguments is as it was when it was traced."""
        leaves, tree = jax.tree.flatten(args)
        types = tree, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        if types not in self._programs:
            self._programs[types] = Program.of(self._fun, *args)
        return self._programs[types].compiled(*args)


def _type(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _typed(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value))
