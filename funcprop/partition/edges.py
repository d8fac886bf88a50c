"""Arrays handed from the devices of one stage to those of another, which may belong to another process.

Every process runs the same tasks in the same order. A program whose devices are all of other processes
computes nothing here, and its results are arrays without a part in this process. A transfer is a collective
of the two stages' devices alone, which the other processes pass by.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from funcprop._jax import processes

_numbers = count(1)  # All processes do the same, so that they count the same.


def placed(x: Any, sharding: Any) -> Any:
    """Return a value of all processes, or of a stage, laid out over devices, also of other processes."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        if not _reaches_all(x):
            return moved(x, sharding.mesh)
        x = on_the_host(x)
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        bits = placed(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))
    value = np.asarray(x)
    return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i], dtype=value.dtype)


def moved(x: Any, mesh: Mesh) -> Any:
    """Return an array on the devices of another stage, laid out as it is on those of its own."""
    spec = getattr(x.sharding, "spec", PartitionSpec())
    target = NamedSharding(mesh, spec)
    if x.sharding.is_fully_addressable and target.is_fully_addressable:
        return jax.device_put(x, target)
    source = x.sharding.mesh
    if source == mesh:
        return x
    assert not set(source.devices.flat) & set(mesh.devices.flat), (source, mesh)
    if not (is_here(source) or is_here(mesh)):
        return jax.make_array_from_single_device_arrays(x.shape, target, [], dtype=x.dtype)
    ends = Mesh(np.stack([source.devices, mesh.devices]), ("end", *mesh.axis_names), axis_types=_AUTO * 2)
    both = NamedSharding(ends, PartitionSpec("end", *spec))
    empty = 1, *target.shard_shape(x.shape)
    parts = [part.data[None] for part in x.addressable_shards]
    parts += [jnp.zeros(empty, x.dtype, device=d) for d in mesh.local_devices]
    pair = jax.make_array_from_single_device_arrays((2, *x.shape), both, parts, dtype=x.dtype)
    # A program starts when its operands are there: not waited for, a later transfer could overtake this one.
    passed = jax.block_until_ready(_passed_on(pair, both))
    arrived = [part for part in passed.addressable_shards if part.device in mesh.devices]
    found = [part.data[0] for part in arrived]
    return jax.make_array_from_single_device_arrays(x.shape, target, found, dtype=x.dtype)


_AUTO = (AxisType.Auto,)


@partial(jax.jit, static_argnums=1)
def _passed_on(pair: Any, sharding: Any) -> Any:
    def pass_on(part: Any) -> Any:
        return jax.lax.ppermute(part, "end", [(0, 1)])

    return jax.shard_map(pass_on, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec)(pair)


def is_here(mesh: Mesh) -> bool:
    """Return whether some devices of a mesh belong to this process."""
    return any(d.process_index == jax.process_index() for d in mesh.devices.flat)


def told(x: Any) -> Any:
    """Return a value of one stage's devices where every process can read it."""
    return _on_each_process(x, PartitionSpec())


def on_the_host(x: Any) -> Any:
    """Return the whole value of an array, wherever it lies, in every process."""
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if not _reaches_all(x):
        x = told(x)
    elif not (x.is_fully_addressable or x.is_fully_replicated):
        x = _whole(x)
    return np.asarray(x)


def shared_out(x: Any) -> Any:
    """Return an array of one stage's devices over all processes, each with a part where it can be cut so.

    An array that reaches all processes is returned as it is.
    """
    if _reaches_all(x):
        return x
    cut = next((d for d, size in enumerate(x.shape) if size and size % jax.process_count() == 0), None)
    return _on_each_process(x, PartitionSpec() if cut is None else PartitionSpec(*[None] * cut, "process"))


def taken_back(x: Any, like: Any) -> Any:
    """Return what `shared_out` made, or an array laid out as that, on the devices of `like`."""
    if _reaches_all(like):
        return x
    return placed(_whole(x).addressable_shards[0].data, like.sharding)


def _whole(x: Any) -> Any:
    """An array that is cut over devices, whole on each of them."""
    return jax.block_until_ready(_laid_out(x, NamedSharding(x.sharding.mesh, PartitionSpec())))


def _reaches_all(x: Any) -> bool:
    """Whether an array is no stage's: every process has a part of it, or one of its own."""
    if jax.process_count() == 1 or not isinstance(getattr(x, "sharding", None), NamedSharding):
        return True
    return len({d.process_index for d in x.sharding.device_set}) == jax.process_count()


def _on_each_process(x: Any, spec: PartitionSpec) -> Any:
    """An array that is whole on each device of a stage, laid out over one device of each process."""
    stage = list(x.sharding.mesh.devices.flat)
    first: dict[int, Any] = {}
    for device in [*stage, *jax.devices()]:
        first.setdefault(device.process_index, device)
    mesh = Mesh(np.array([first[i] for i in sorted(first)]), ("process",), axis_types=_AUTO)
    own = first[jax.process_index()]
    parts = [part.data[None] for part in x.addressable_shards if part.device == stage[0]]
    parts = parts or [jnp.zeros((1, *x.shape), x.dtype, device=own)]
    each = NamedSharding(mesh, PartitionSpec("process"))
    stacked = jax.make_array_from_single_device_arrays((len(first), *x.shape), each, parts, dtype=x.dtype)
    return jax.block_until_ready(_summed(stacked, NamedSharding(mesh, spec)))


@partial(jax.jit, static_argnums=1)
def _summed(stacked: Any, sharding: Any) -> Any:
    return jax.lax.with_sharding_constraint(_sum_of_one(stacked), sharding)


def _sum_of_one(stacked: Any) -> Any:
    """The sum of parts of which all but one are zero; of bits, since a negative zero would lose its sign."""
    if jnp.issubdtype(stacked.dtype, jnp.complexfloating):
        return jax.lax.complex(_sum_of_one(stacked.real), _sum_of_one(stacked.imag))
    if stacked.dtype == bool:
        return jnp.any(stacked, axis=0)
    if not jnp.issubdtype(stacked.dtype, jnp.floating):
        return jnp.sum(stacked, axis=0, dtype=stacked.dtype)
    bits = jax.lax.bitcast_convert_type(stacked, jnp.dtype(f"uint{8 * stacked.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(jnp.sum(bits, axis=0, dtype=bits.dtype), stacked.dtype)


@partial(jax.jit, static_argnums=1)
def _laid_out(x: Any, sharding: Any) -> Any:
    return jax.lax.with_sharding_constraint(x, sharding)


def opened(pairs: Iterable[tuple[Mesh, Mesh]]) -> None:
    """Connect stages that hand each other arrays, once all processes have compiled their programs.

    Two processes connect when they first use an edge, and one gives up if the other is still compiling.
    """
    processes.wait_for_all(f"funcprop/pipeline/{next(_numbers)}", processes.ARRIVAL)
    for source, mesh in dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]):
        number = jnp.zeros((), device=NamedSharding(source, PartitionSpec()))
        moved(number, mesh)
