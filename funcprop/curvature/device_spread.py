"""A quantity of a minibatch by several devices: each has its part of the examples; one reduction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from funcprop.curvature.minibatches import Minibatch
from funcprop.program.program import Program

AXIS = "examples"  # of the mesh of devices


class Spread:
    """A quantity of a minibatch by several devices: each has its part of the examples; one reduction."""

    def __init__(self, quantity: Callable[..., PyTree], devices: Sequence[Any]) -> None:
        self.mesh = Mesh(np.asarray(devices), (AXIS,))
        self.quantity = quantity
        self.programs: dict[Any, Program] = {}

    def __call__(self, batch: Minibatch, options: Any, *more: Any) -> PyTree:
        """The quantity of the minibatch; what is left of an uneven one is computed by one device."""
        count = len(self.mesh.devices)
        whole, given = batch.size - batch.size % count, (options, *more)
        parts = []
        if whole:
            data = jax.tree.map(lambda a: a[:whole], batch.data)
            everywhere, split = (NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in ((), (AXIS,)))
            program, *rest = jax.device_put((self._program(data, whole // count, given), *given), everywhere)
            parts.append((_on_all(program, self.mesh, jax.device_put(data, split), *rest), data))
        if whole < batch.size:
            data = jax.tree.map(lambda a: a[whole:], batch.data)
            placed = (self._program(data, batch.size - whole, given), data, *given)
            program, *rest = jax.device_put(placed, self.mesh.devices.flat[0])
            parts.append((program.compiled(*rest), data))
        weights = [float(_weight(data)) for _, data in parts]
        total = sum(weights) or 1.0
        found = [jax.tree.map(jnp.asarray, jax.device_get(quantity)) for quantity, _ in parts]
        shares = [
            jax.tree.map(lambda x, w=weight: (w * x if w > 0 else jnp.zeros_like(x)) / total, quantity)
            for quantity, weight in zip(found, weights, strict=True)
        ]
        return functools.reduce(functools.partial(jax.tree.map, jnp.add), shares)

    def _program(self, data: Any, size: int, given: Any) -> Program:
        """The quantity of so many examples; what it reads besides its arguments is as it was first."""
        local = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((size, *jnp.shape(a)[1:]), jnp.result_type(a)), data
        )
        leaves, tree = jax.tree.flatten((local, given))
        types = tree, tuple((jnp.shape(a), jnp.result_type(a)) for a in leaves)
        if types not in self.programs:
            self.programs[types] = Program.of(self.quantity, local, *given)
        return self.programs[types]


@functools.partial(jax.jit, static_argnames="mesh")
def _on_all(program: Program, mesh: Mesh, data: Any, options: Any, *more: Any) -> PyTree:
    def part(program: Program, data: Any, options: Any, *more: Any) -> PyTree:
        if "key" in options:
            options = {"key": jax.random.fold_in(options["key"], jax.lax.axis_index(AXIS))}
        weight = _weight(data)
        found = program(data, options, *more)
        share = jax.tree.map(lambda x: jnp.where(weight > 0, weight * x, 0).astype(x.dtype), found)
        total = jax.lax.psum(weight, AXIS)
        mean = jax.tree.map(lambda x: x / jnp.where(total > 0, total, 1), jax.lax.psum(share, AXIS))
        return jax.tree.map(lambda x, q: x.astype(q.dtype), mean, found)

    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
    specs = (everywhere, split, everywhere, *[everywhere] * len(more))
    spread = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False)
    return spread(program, data, options, *more)


def _weight(data: dict[str, Any]) -> Any:
    """What the examples count: their number, or the sum of their weights."""
    if "weights" in data:
        return data["weights"].sum()
    return float(jax.tree.leaves(data)[0].shape[0])


def devices_of(devices: Any) -> tuple[Any, ...]:
    """Devices, given as a sequence, a mesh or a sharding.

    Raises:
        TypeError: it is none of these.
    """
    if devices is None:
        return ()
    if isinstance(devices, NamedSharding):
        devices = devices.mesh
    if isinstance(devices, Mesh):
        return tuple(devices.devices.flat)
    if isinstance(devices, list | tuple) and devices and all(hasattr(d, "platform") for d in devices):
        return tuple(devices)
    raise TypeError(
        f"over: devices={devices!r}; pass jax.devices(), a jax.sharding.Mesh or a NamedSharding on one."
    )
