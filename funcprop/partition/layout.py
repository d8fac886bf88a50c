"""Which axes of a model go over which axes of a mesh of devices.

Data parallelism splits the axis of the examples. Tensor parallelism splits a set of axes of parameters of
which no two occur in one array, chosen greedily by operations saved for each byte that is all-reduced; for a
transformer that is heads, hidden units and vocabulary. XLA partitions the program by these layouts of its
arguments and results alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from funcprop import _jax
from funcprop.partition.axis_program import AxisProgram
from funcprop.partition.links import Place, rank, shape
from funcprop.partition.logical_axes import Axes
from funcprop.program.sizes import nbytes

DATA, MODEL, STAGE = "data", "model", "stage"


@dataclass(frozen=True, eq=False)
class MeshLayout:
    """A mesh, by the sizes of its axes, and what is split over each of these."""

    program: AxisProgram
    sizes: Mapping[str, int]
    split: Mapping[Place, str]

    def over(self, v: Any) -> list[str | None]:
        """The axis of the mesh over which each axis of a variable is split; None for none."""
        return [
            self.split.get(self.program.find((v, d))) if size > 1 else None for d, size in enumerate(shape(v))
        ]

    def spec(self, v: Any) -> PartitionSpec:
        """The layout of a variable as JAX writes it."""
        return PartitionSpec(*self.over(v))

    def type_of(self, v: Any) -> Any:
        """The type of a variable on one device."""
        if isinstance(v, _jax.Literal) or not any(names := self.over(v)):
            return v.aval
        sizes = [1 if name is None else self.sizes[name] for name in names]
        return v.aval.update(shape=tuple(n // parts for n, parts in zip(shape(v), sizes, strict=True)))

    def bytes_of(self, v: Any) -> int:
        """Bytes of a variable on one device."""
        return nbytes(self.type_of(v))

    @cached_property
    def reduced(self) -> dict[Any, tuple[str, ...]]:
        """The variables that are all-reduced when they are made, with the axes of the mesh."""
        found = {}
        for total in self.program.totals:
            if axes := self.summed_over(total.summed):
                found[total.eqn.outvars[0]] = axes
        return found

    def reduced_on(self, platform: str) -> dict[Any, tuple[str, ...]]:
        """The same for the devices of a platform: a TPU's compiler adds up parts before they are reduced."""
        found, program = dict(self.reduced), self.program
        if platform != "tpu":
            return found
        bodies = [_jax.open_jaxpr(b) for eqn, _ in program.equations for _, b in _jax.sub_jaxprs(eqn)]
        read = [eqn.invars for eqn, _ in program.equations]
        read += [jaxpr.outvars for jaxpr in (program.jaxpr, *bodies)]
        uses = Counter(v for atoms in read for v in _jax.variables(atoms))
        for eqn, _ in program.equations:
            terms = _jax.variables(eqn.invars)
            over = {found.get(v) for v in terms}
            once = len(terms) == 2 and all(uses[v] == 1 for v in terms)
            if eqn.primitive.name in ("add", "add_any") and once and len(over) == 1 and None not in over:
                found[eqn.outvars[0]] = found.pop(terms[0])
                del found[terms[1]]
        return found

    def summed_over(self, places: Sequence[Place]) -> tuple[str, ...]:
        """The axes of the mesh over which some places are split."""
        roots = {self.program.find(place) for place in places if shape(place[0])[place[1]] > 1}
        return tuple(sorted({self.split[root] for root in roots if root in self.split}))

    def shardings(self, mesh: Mesh, variables: Sequence[Any]) -> list[NamedSharding]:
        """The layouts of some variables on a mesh."""
        return [NamedSharding(mesh, self.spec(v)) for v in variables]


def example_axis(axes: Axes, batch_variables: Sequence[Any]) -> Place | None:
    """The axis of the examples: of the batch alone, and able to be split; None where there is none."""
    program = axes.program
    own = [axis for axis in axes if axis.members and all(m.startswith("batch") for m in axis.members)]
    work = {axis.key: axis for axis in own if axis.why is None}
    places = [(v, d) for v in batch_variables for d in range(rank(v)) if shape(v)[d] > 1]
    found = [program.find(place) for place in places]
    candidates = [root for root in dict.fromkeys(found) if root in work]
    return max(candidates, key=lambda root: (work[root].flops, found.count(root)), default=None)


def batch_places(
    program: AxisProgram, root: Place | None, batch_variables: Sequence[Any]
) -> list[int | None]:
    """Along which of its axes each array of the batch holds the examples; None for one that does not."""
    return [
        next((d for d in range(rank(v)) if shape(v)[d] > 1 and program.find((v, d)) == root), None)
        for v in batch_variables
    ]


def tensor_axes(axes: Axes, parts: int, taken: Mapping[Place, str]) -> dict[Place, str]:
    """Choose axes of parameters to split over `parts` devices: no two of them in one array."""
    program = axes.program
    held = {
        axis.key: axis
        for axis in axes
        if any(m.startswith("params") for m in axis.members)
        and axis.why is None
        and axis.key not in taken
        and program.divides(axis.key, parts)
    }
    communicated: dict[Place, int] = dict.fromkeys(held, 0)
    for total in program.totals:
        roots = {program.find(place) for place in total.summed if shape(place[0])[place[1]] > 1}
        for root in roots & set(held):
            communicated[root] += nbytes(total.eqn.outvars[0]) * (1 if total.joins else total.trips)
    chosen: dict[Place, str] = {}
    for root in sorted(held, key=lambda root: -held[root].flops / (1 + communicated[root])):
        if not program.conflicts[root] & set(chosen):
            chosen[root] = MODEL
    return chosen


def layout_of(axes: Axes, sizes: Mapping[str, int], batch_variables: Sequence[Any]) -> MeshLayout:
    """Lay a program out over a mesh with the axes `data`, `model`, or both.

    Raises:
        ValueError: no axis of the batch, or of the parameters, can be split into so many parts.
    """
    split: dict[Place, str] = {}
    if sizes.get(DATA, 1) > 1:
        root = example_axis(axes, batch_variables)
        if root is None:
            mine = [
                (m, axis.why) for axis in axes for m in axis.members if m.startswith("batch") and axis.why
            ]
            # The examples are usually along the first axis.
            member, why = min(
                mine, key=lambda found: (not found[0].endswith("[0]"), found), default=("", None)
            )
            raise ValueError(
                "data parallelism: no axis of the batch can be split"
                + (f"; {member}: {why}" if why else "")
                + "; print(fp.partition.axes(loss)(params, batch)) lists them; if it is a loop of a rule, "
                "rules=fp.rules.autodiff has none."
            )
        if (undivided := axes.program.undivided(root, sizes[DATA])) is not None:
            raise ValueError(_not_divided(axes, root, sizes[DATA], *undivided))
        split[root] = DATA
    if sizes.get(MODEL, 1) > 1:
        chosen = tensor_axes(axes, sizes[MODEL], split)
        if not chosen:
            raise ValueError(
                f"model={sizes[MODEL]}: no axis of the parameters can be split into {sizes[MODEL]} parts; "
                "print(fp.partition.axes(loss)(params, batch)) says why, unless it is the optimizer that "
                "mixes their entries, as optax.lbfgs does."
            )
        split |= chosen
        _refuse_grouped(axes.program, split)
    return MeshLayout(axes.program, dict(sizes), split)


def _not_divided(axes: Axes, root: Place, parts: int, part: int, where: str) -> str:
    size = next(axis.size for axis in axes if axis.key == root)
    if size % parts:
        return (
            f"data={parts}: {size} examples cannot be divided among {parts} devices; use a batch of "
            f"{parts * max(1, size // parts)} or {parts * (size // parts + 1)}, or fewer devices for `data`."
        )
    return (
        f"data={parts}: of the {size} examples {part} are together in {where}, which cannot be divided among "
        f"{parts} devices; use fewer devices for `data`, or rules=fp.rules.autodiff if a rule makes it."
    )


def _refuse_grouped(program: AxisProgram, split: Mapping[Place, str]) -> None:
    """Raise where XLA adds up the cotangent of a kernel over too many devices.

    On a mesh of two axes XLA of jaxlib 0.10 sums a batch-grouped convolution, which the cotangent of a
    grouped one's kernel is, over both: the gradient is then wrong.
    """
    for eqn, _ in program.equations:
        if eqn.primitive.name == "conv_general_dilated" and eqn.params["batch_group_count"] > 1:
            place = eqn.invars[0], eqn.params["dimension_numbers"].lhs_spec[1]
            if split.get(program.find(place)) == DATA:
                raise ValueError(
                    "data × model: XLA computes the gradient of a grouped convolution's kernel wrongly where "
                    "a mesh has two axes; use data or model alone, or a pipeline × data."
                )


def mesh_of(devices: Sequence[Any], sizes: Mapping[str, int]) -> Mesh:
    """A mesh whose layouts XLA derives (Auto axes), over the first devices."""
    count = math.prod(sizes.values())
    array = np.empty(count, dtype=object)
    array[:] = list(devices)[:count]
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return Mesh(array.reshape(tuple(sizes.values())), tuple(sizes), axis_types=kinds)


def along(d: int | None) -> PartitionSpec:
    """The layout of an array whose axis `d` is split over `data`; None for one that each device has whole."""
    return PartitionSpec() if d is None else PartitionSpec(*[None] * d, DATA)


def placed_type(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """The type of an array that lies so."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
