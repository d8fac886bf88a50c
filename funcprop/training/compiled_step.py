"""A step compiled before it runs, for the shapes and places of its arguments; arrays put on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from funcprop._jax.compiled_programs import held_bytes, memory_fields
from funcprop.training.update_step import Carried, Outcome


class CompiledStep:
    """`step(params, carried, batch, key, number)`, jitted; the first two give their buffers away.

    Results lie where the arguments lay, so that every step is the same program. `nbytes` is what a device
    holds during a step, by the compiler's account; None before a step is compiled. It keeps the parameters
    before a step that is not finite.
    """

    keeps = True

    def __init__(
        self, step: Callable[..., Any], put: Callable[[Any], Any] | None = None, options: Any = None
    ) -> None:
        """`put` puts a batch where the step reads it, and `options` are the compiler's."""
        self._step, self._put, self._options = step, put, options
        self._jitted: Any = None
        self._lowered: tuple[Any, Any] | None = None
        self._compiled: dict[Any, Any] = {}
        self.nbytes: int | None = None

    def compile(self, *arguments: Any) -> Any:
        """Compile the step for arguments like these, and return the compiled program."""
        return self._program(self._placed(arguments))

    def _program(self, arguments: Any) -> Any:
        signature = _signature(arguments)
        if signature not in self._compiled:
            compiled = self._lower(arguments).compile()
            self._compiled[signature], self._lowered = compiled, None
            self.nbytes = max(self.nbytes or 0, held_bytes(memory_fields(compiled)))
        return self._compiled[signature]

    def whole(self, params: Any) -> Any:
        """The parameters as other programs take them."""
        return params

    def __call__(self, *arguments: Any) -> Any:
        """Take a step, compiled if it is the first for arguments like these."""
        placed = self._placed(arguments)
        return self._program(placed)(*placed)

    def text(self, *arguments: Any) -> str:
        """Return the step's program for arguments like these, before it is compiled."""
        return str(self.lowered(*arguments).as_text())

    def lowered(self, *arguments: Any) -> Any:
        """Lower the step for arguments like these, without compiling it."""
        return self._lower(self._placed(arguments))

    def _placed(self, arguments: Any) -> Any:
        if self._put is None:
            return arguments
        params, carried, batch, *rest = arguments
        return params, carried, self._put(batch), *rest

    def _lower(self, arguments: Any) -> Any:
        signature = _signature(arguments)
        if self._lowered is None or self._lowered[0] != signature:
            self._lowered = signature, self._jit(*arguments[:2]).lower(*arguments)
        return self._lowered[1]

    def _jit(self, params: Any, carried: Carried) -> Any:
        if self._jitted is None:
            mesh = mesh_of(params)
            places: Any = None
            if mesh is not None:
                places = jax.tree.map(lambda x: x.sharding, (params, carried))
                places = (*places, None)
            self._jitted = jax.jit(
                self._step, donate_argnums=(0, 1), out_shardings=places, compiler_options=self._options
            )
        return self._jitted


class PlannedStep:
    """The step of a plan, `step(params, state, batch, intact) -> (params, state, loss, intact)`, in our form.

    A plan of somebody's own decides what it gives away: nothing is kept of parameters before a bad step.
    """

    nbytes: int | None = None

    def __init__(
        self,
        step: Callable[..., Any],
        text: Callable[[Any], str],
        gather: Callable[[Any], Any] | None = None,
    ) -> None:
        """`text(batch)` says what runs; `gather` is for a pipeline, whose parameters no program takes
        together."""
        self._step, self._text, self._gather = step, text, gather
        self.keeps = gather is not None

    def whole(self, params: Any) -> Any:
        """The parameters as other programs take them."""
        return params if self._gather is None else self._gather(params)

    def compile(self, *arguments: Any) -> None:
        """Do nothing: a plan compiles its programs itself."""

    def text(self, params: Any, carried: Any, batch: Any, *_: Any) -> str:
        """Return what runs, equal in processes that run the same."""
        return self._text(batch)

    def __call__(self, params: Any, carried: Carried, batch: Any, key: Any, number: Any) -> Any:
        """Take a step as the plan does."""
        params, state, loss, intact = self._step(params, carried.optimizer, batch, carried.intact)
        return params, carried._replace(optimizer=state, intact=intact), Outcome(loss, {}, intact)


def mesh_of(tree: Any) -> Any:
    """Return the mesh of several devices on which arrays of the tree lie; None if there is none."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def placed_like(mesh: Any, tree: Any) -> Any:
    """Put the leaves that lie on one device on all devices of the mesh, whole."""
    if mesh is None:
        return tree

    def place(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return leaf
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(place, tree)


def copied(tree: Any) -> Any:
    """Copy the arrays, so that what is given away later is not what somebody else holds."""
    return jax.tree.map(jnp.array, tree)


def _signature(arguments: Any) -> Any:
    leaves, tree = jax.tree.flatten(arguments)
    places = [x.sharding if isinstance(x, jax.Array) else None for x in leaves]
    return tree, tuple(places), tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
