"""Which parts of indices say no more than their own place, as `jnp.arange(n)` in `x[jnp.arange(n), i]`.

Along such an axis an operator picks or writes for each example in the example's own place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from funcprop import _jax
from funcprop.partition.links import shape

_SAME = frozenset({"convert_element_type", "copy", "stop_gradient", "optimization_barrier"})


def own_places(
    indices: Any, dims: Sequence[int], sizes: Sequence[int], made: Mapping[Any, Any]
) -> dict[int, int]:
    """For axes `dims` of an operand of these sizes, along which axis of the indices each is read in place.

    The last axis of the indices has an entry for each of `dims`; `made` has the makers of variables.
    """
    found: dict[int, int] = {}
    for k, part in enumerate(_components(indices, len(dims), made)):
        axis = None if part is None else _counted(part, made)
        if axis is not None and axis < len(shape(indices)) - 1 and shape(indices)[axis] == sizes[dims[k]]:
            found[dims[k]] = axis
    return found


def _components(indices: Any, count: int, made: Mapping[Any, Any]) -> Sequence[Any]:
    """The arrays that hold an entry of the index vectors each; None for what is not known."""
    eqn = _maker(indices, made)
    if count == 1:
        return [indices]
    if (
        eqn is None
        or eqn.primitive.name != "concatenate"
        or eqn.params["dimension"] != len(shape(indices)) - 1
    ):
        return [None] * count
    return eqn.invars if len(eqn.invars) == count else [None] * count


def _counted(v: Any, made: Mapping[Any, Any]) -> int | None:
    """Along which axis the entries of an array are 0, 1, 2, …; None for another array."""
    eqn = _maker(v, made)
    if eqn is None:
        return None
    name = eqn.primitive.name
    if name == "iota":
        return int(eqn.params["dimension"])
    if name in _SAME and len(eqn.outvars) == 1:
        return _counted(eqn.invars[0], made)
    if name == "select_n" and len(eqn.invars) == 3:
        return _counted(eqn.invars[1], made) if _is_negative(eqn.invars[0], made) else None
    axis = _counted(eqn.invars[0], made) if name in ("broadcast_in_dim", "reshape", "squeeze") else None
    if axis is None:
        return None
    before, after = shape(eqn.invars[0]), shape(v)
    if name == "broadcast_in_dim":
        place = int(eqn.params["broadcast_dimensions"][axis])
        return place if after[place] == before[axis] else None
    if [n for n in before if n > 1] != [n for n in after if n > 1] or before[axis] < 2:
        return None
    wide = [d for d, n in enumerate(after) if n > 1]
    return wide[sum(n > 1 for n in before[:axis])]


def _is_negative(v: Any, made: Mapping[Any, Any]) -> bool:
    """Whether it asks of places if they are below zero: negative indices count from the end."""
    test = _maker(v, made)
    if test is None or test.primitive.name != "lt" or _counted(test.invars[0], made) is None:
        return False
    return isinstance(test.invars[1], _jax.Literal) and test.invars[1].val == 0


def _maker(v: Any, made: Mapping[Any, Any]) -> Any:
    return None if isinstance(v, _jax.Literal) else made.get(v)
