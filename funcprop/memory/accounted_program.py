"""A program whose memory is accounted, from flat arrays to flat arrays, and what its arguments are for."""

from __future__ import annotations

import functools
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop._jax.xla_options import for_buffers
from funcprop.memory.ledger import Category


@dataclass(frozen=True, eq=False)
class AccountedProgram:
    """A program: its jaxpr, and for each argument its name, purpose and sharding, None if it has none.

    `results` are names and purposes of results; those that it does not list are `results`. `donated` are
    positions of arguments.
    """

    jaxpr: Any
    names: Sequence[str]
    categories: Sequence[Category]
    shardings: Sequence[Any]
    results: Sequence[tuple[str, Category]] = ()
    donated: frozenset[int] = frozenset()

    @property
    def aliases(self) -> dict[int, int]:
        """Which argument is overwritten by which result, as JAX matches them: the next of equal type."""
        jaxpr = _jax.open_jaxpr(self.jaxpr)
        free: dict[Any, deque[int]] = defaultdict(deque)
        for i in sorted(self.donated):
            free[_type(jaxpr.invars[i].aval)].append(i)
        pairs = {}
        for j, v in enumerate(jaxpr.outvars):
            if queue := free[_type(v.aval)]:
                pairs[queue.popleft()] = j
        return pairs

    @functools.cached_property
    def read(self) -> list[int]:
        """The positions of the arguments that are read: the compiled program has no others."""
        jaxpr, _ = _jax.with_constants_as_inputs(self.jaxpr)
        kept = _jax.without_unread_inputs(jaxpr, [False] * len(jaxpr.invars))[1]
        constants = len(jaxpr.invars) - len(self.names)
        return [i for i, is_read in enumerate(kept[constants:]) if is_read]

    def result(self, j: int) -> tuple[str, Category]:
        """The name and the purpose of a result."""
        return self.results[j] if j < len(self.results) else (f"result {j}", "results")

    def compiled(self, options: Mapping[str, Any]) -> Any:
        """The program compiled for the devices of its arguments, by default for this machine's first."""
        inner, consts = _jax.open_jaxpr(self.jaxpr), _jax.constants(self.jaxpr)
        position = {i: k for k, i in enumerate(self.read)}

        def of_read(*values: Any) -> list[Any]:
            unread = (v.aval for v in inner.invars)
            every = [values[position[i]] if i in position else _zeros(a) for i, a in enumerate(unread)]
            return _jax.evaluate(inner, consts, every)

        types = [
            jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=self.shardings[i])
            for i, v in enumerate(inner.invars)
            if i in position
        ]
        program = jax.jit(
            of_read,
            keep_unused=True,
            donate_argnums=tuple(position[i] for i in sorted(self.donated) if i in position),
            compiler_options={**for_buffers(self.platform), **options} or None,
        )
        return _jax.compiled_by_its_names(program.lower(*types))

    def donating(self, positions: Sequence[int]) -> AccountedProgram:
        """The same with other donated arguments."""
        return replace(self, donated=frozenset(positions))

    @property
    def platform(self) -> str:
        """The platform that it is compiled for."""
        placed = [s for s in self.shardings if s is not None]
        return next(iter(placed[0].device_set)).platform if placed else jax.default_backend()


def _zeros(aval: Any) -> Any:
    return jnp.zeros(aval.shape, aval.dtype)


def _type(aval: Any) -> tuple[Any, ...]:
    return tuple(aval.shape), str(aval.dtype)


def purposes_in_step(jaxpr: Any) -> list[Category]:
    """What the arguments of a train step are: carried ones are parameters if the forward sweep reads them."""
    inner = _jax.open_jaxpr(jaxpr)
    returned: dict[Any, int] = defaultdict(int)
    for v in inner.outvars:
        returned[_type(v.aval)] += 1
    forward = _read_forward(jaxpr)
    found: list[Category] = []
    for v, reads in zip(inner.invars, forward, strict=True):
        carried = returned[_type(v.aval)] > 0 and _jax.is_differentiable(v.aval)
        returned[_type(v.aval)] -= carried
        if carried:
            found.append("parameters" if reads else "optimizer state")
        else:
            small = math.prod(v.aval.shape) == 1 and returned[_type(v.aval)] > 0
            found.append("optimizer state" if small else "inputs")
    return found


def _read_forward(jaxpr: Any, prefix: str = "") -> list[bool]:
    """For each argument, whether an equation of a forward sweep under differentiation reads it."""
    inner = _jax.open_jaxpr(jaxpr)
    read = set()
    for eqn in inner.eqns:
        scope = f"{prefix}/{_jax.scope(eqn)}"
        operands = _jax.variables(eqn.invars)
        bodies = [body for _, body in _jax.sub_jaxprs(eqn)]
        if "jvp(" in scope and "transpose(" not in scope:
            read.update(operands)
        elif len(bodies) == 1 and len(_jax.open_jaxpr(bodies[0]).invars) == len(eqn.invars):
            inside = _read_forward(bodies[0], scope)
            read.update(
                v
                for v, reads in zip(eqn.invars, inside, strict=True)
                if reads and not isinstance(v, _jax.Literal)
            )
    return [v in read for v in inner.invars]
