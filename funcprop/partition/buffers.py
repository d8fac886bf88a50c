"""Which values of a lowered program have a buffer, and the kernels between them, in the order of the
compiler.

A view has no buffer; an elementwise operator is fused into what reads it, unless it is expensive and read
twice or a kernel reads it; independent all-reduces over the same devices are one, whose operands and
results live together.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from funcprop import _jax
from funcprop.partition.lowered import SizeOf
from funcprop.program.facts import facts_of


@dataclass(eq=False)
class BufferNode:
    """A kernel, a fusion, or a group of all-reduces: what it reads and makes, in buffers."""

    place: int
    reads: set[Any]
    makes: list[Any]
    extra: int = 0
    in_place: set[Any] = field(default_factory=set)
    collective: bool = False


class Buffers:
    """Which variables have a buffer, and the nodes between these."""

    def __init__(
        self, jaxpr: Any, size_of: SizeOf, reduced: Mapping[Any, tuple[str, ...]], scratch: SizeOf
    ) -> None:
        self.jaxpr, self.size_of, self.reduced, self._scratch = jaxpr, size_of, reduced, scratch
        self._for_products = _read_by_products(jaxpr)
        self.alias: dict[Any, Any] = {}
        self.made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self.readers: dict[Any, list[Any]] = defaultdict(list)
        for eqn in jaxpr.eqns:
            if self._is_view(eqn):
                self.alias[eqn.outvars[0]] = self.root(eqn.invars[0])
            else:
                for v in {self.root(v): None for v in _jax.variables(eqn.invars)}:
                    self.readers[v].append(eqn)
        self.behind = {
            result: v
            for eqn in jaxpr.eqns
            if eqn.primitive.name == "optimization_barrier"
            for v, result in zip(eqn.invars, eqn.outvars, strict=True)
        }
        self.read_whole = self._read_whole()
        self.results = {self._origin(v) for v in _jax.variables(jaxpr.outvars)}
        self.sources: dict[Any, frozenset[Any]] = {}

        self._within = self._initial_values_of_results()

    def _initial_values_of_results(self) -> set[Any]:
        """What a loop starts from and hands back as a result: it is kept where the result will be."""
        found = set()
        for eqn in self.jaxpr.eqns:
            if eqn.primitive.name == "scan":
                consts, carries = _jax.scan_counts(eqn.params)
                for v, result in zip(
                    eqn.invars[consts : consts + carries], eqn.outvars[:carries], strict=True
                ):
                    if not isinstance(v, _jax.Literal) and self.root(result) in self.results:
                        found |= {v} if v in self.made and len(self.readers[self.root(v)]) == 1 else set()
        return found

    def _origin(self, v: Any) -> Any:
        """The variable whose buffer a result is, before views and barriers."""
        v = self.root(v)
        while v in self.behind and not isinstance(self.behind[v], _jax.Literal):
            v = self.root(self.behind[v])
        return v

    def root(self, v: Any) -> Any:
        """The variable whose buffer a view looks at."""
        return self.alias.get(v, v)

    def bytes_of(self, v: Any) -> int:
        """Bytes of a variable's own buffer."""
        return 0 if v in self._within or v in self.behind else self.size_of(v)

    def _is_view(self, eqn: Any) -> bool:
        name = eqn.primitive.name
        if isinstance(eqn.invars[0] if eqn.invars else None, _jax.Literal) or len(eqn.invars) != 1:
            return False
        operand, result = eqn.invars[0], eqn.outvars[0]
        if result in self.reduced:
            return False
        if name in ("reshape", "squeeze", "expand_dims", "stop_gradient", "copy", "name", "pvary"):
            return True
        if name in ("convert_element_type", "reduce_precision", "sharding_constraint"):
            return operand.aval.dtype == result.aval.dtype
        if name == "broadcast_in_dim":
            return operand.aval.size == result.aval.size
        if name == "transpose":
            sizes, order = operand.aval.shape, eqn.params["permutation"]
            moved = [d for d in order if sizes[d] > 1]
            return moved == sorted(moved) or (len(sizes) == 2 and result in self._for_products)
        return False

    def is_kept(self, v: Any) -> bool:
        """Whether a variable that is made by an equation has a buffer of its own."""
        eqn = self.made[v]
        if v in self.reduced or v in self.results or v in self.read_whole or not _is_fused(eqn):
            return True
        readers = self.readers[v]
        if any(_needs_buffer(reader) for reader in readers):
            return True
        if not _is_expensive(eqn):
            return False
        return len(readers) > 1 or any(_repeats(reader) for reader in readers)

    def _read_whole(self) -> set[Any]:
        """What sums read from memory: their operand, or the factors of which it is only the product."""
        found: set[Any] = set()
        for eqn in self.jaxpr.eqns:
            if facts_of(eqn).reduces:
                waiting = [self.root(v) for v in _jax.variables(eqn.invars)]
                while waiting:
                    v = waiting.pop()
                    source = self.made.get(v)
                    if source is not None and _is_simple(source) and len(self.readers[v]) == 1:
                        waiting += [self.root(w) for w in _jax.variables(source.invars)]
                    elif v.aval.size >= eqn.invars[0].aval.size:
                        found.add(v)
        return found

    def _looked_at(self, eqn: Any) -> list[Any]:
        """The variables that an equation reads; what is behind a barrier is where it was before, too."""
        found: list[Any] = []
        for v in map(self.root, _jax.variables(eqn.invars)):
            found.append(v)
            while v in self.behind and not isinstance(self.behind[v], _jax.Literal):
                v = self.root(self.behind[v])
                found.append(v)
        return found

    def nodes(self) -> list[BufferNode]:
        """The nodes in the order of the jaxpr; what is fused is a part of those that read it."""
        found: list[BufferNode] = []
        fused: dict[
            Any, tuple[frozenset[Any], frozenset[Any]]
        ] = {}  # what it reads; what of this entry by entry
        groups = _Groups(self)
        for place, eqn in enumerate(self.jaxpr.eqns):
            if eqn.outvars and eqn.outvars[0] in self.alias:
                continue
            reads: set[Any] = set()
            exact: set[Any] = set()
            for v in self._looked_at(eqn):
                if v in fused:
                    reads |= fused[v][0]
                    exact |= fused[v][1] if facts_of(eqn).elementwise else set()
                else:
                    reads.add(v)
                    if facts_of(eqn).elementwise:
                        exact.add(v)
            if len(eqn.outvars) == 1 and not self.is_kept(eqn.outvars[0]):
                fused[eqn.outvars[0]] = frozenset(reads), frozenset(exact)
                continue
            makes = list(eqn.outvars)
            node = BufferNode(place, reads, makes, self._scratch(eqn), exact | _overwritten(eqn))
            if any(v in self.reduced for v in makes):
                partial = {v: PartialSum(v) for v in makes if v in self.reduced}
                node.makes = [partial.get(v, v) for v in makes]
                found.append(node)
                groups.add(place, partial, reads)
            else:
                found.append(node)
                groups.note(reads, makes)
        return [*found, *groups.nodes]


def _read_by_products(jaxpr: Any) -> set[Any]:
    """The variables that products read and nothing else: a product reads a matrix in either order."""
    products: set[Any] = set()
    others = set(_jax.variables(jaxpr.outvars))
    for eqn in jaxpr.eqns:
        (products if eqn.primitive.name == "dot_general" else others).update(_jax.variables(eqn.invars))
    return products - others


class PartialSum:
    """The sum of one device's part, before it is all-reduced into `whole`."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole
        self.aval = whole.aval


class _Groups:
    """All-reduces that do not depend on each other, over the same axes of the mesh, are done as one."""

    def __init__(self, buffers: Buffers) -> None:
        self.nodes: list[BufferNode] = []
        self._of = buffers
        self._axes: list[Any] = []
        self._upstream: dict[int, int] = defaultdict(int)
        self._before: dict[Any, int] = defaultdict(int)  # a bit for every group that a variable depends on

    def note(self, reads: set[Any], makes: Sequence[Any]) -> int:
        """Remember which groups some results depend on."""
        bits = 0
        for v in reads:
            bits |= self._before[v]
        for v in makes:
            self._before[v] = bits
        return bits

    def add(self, place: int, partial: Mapping[Any, PartialSum], reads: set[Any]) -> None:
        """All-reduce some partial sums, with an earlier group if none depends on it."""
        bits = self.note(reads, [])
        for whole, part in partial.items():
            key = (self._of.reduced[whole], whole.aval.dtype)
            chosen = next(
                (
                    i
                    for i in range(len(self.nodes) - 1, -1, -1)
                    if self._axes[i] == key and not bits >> i & 1 and self._independent(i, bits)
                ),
                None,
            )
            if chosen is None:
                chosen = len(self.nodes)
                self.nodes.append(BufferNode(place, set(), [], collective=True))
                self._axes.append(key)
            node = self.nodes[chosen]
            node.place = max(node.place, place)
            node.reads.add(part)
            node.makes.append(whole)
            self._before[whole] = bits | 1 << chosen
            self._upstream[chosen] |= bits

    def _independent(self, i: int, bits: int) -> bool:
        """Whether none of the groups that are needed here comes after group i."""
        return all(not self._upstream[j] >> i & 1 for j in range(len(self.nodes)) if bits >> j & 1)


def breadth_first(nodes: list[BufferNode]) -> list[BufferNode]:
    """The nodes breadth first, as the compiler for CPUs runs them: each as soon as what it reads is there."""
    maker = {v: node for node in nodes for v in node.makes}
    before = {id(node): {id(maker[v]) for v in node.reads if v in maker} for node in nodes}
    readers: dict[int, list[BufferNode]] = defaultdict(list)
    for node in nodes:
        for source in before[id(node)]:
            readers[source].append(node)
    waiting = {key: len(sources) for key, sources in before.items()}
    ready = deque(node for node in nodes if not waiting[id(node)])
    found: list[BufferNode] = []
    while ready:
        node = ready.popleft()
        found.append(node)
        for reader in readers[id(node)]:
            waiting[id(reader)] -= 1
            if not waiting[id(reader)]:
                ready.append(reader)
    return found


# --- what is known of the compiler ------------------------------------------------------------

_FUSED = frozenset(
    [
        "broadcast_in_dim",
        "iota",
        "transpose",
        "slice",
        "pad",
        "select_n",
        "concatenate",
        "rev",
        "dynamic_slice",
        "gather",
        "convert_element_type",
        "reshape",
        "squeeze",
        "expand_dims",
        "split",
    ]
)


def _is_fused(eqn: Any) -> bool:
    """Whether an equation's result can be computed where it is read."""
    if len(eqn.outvars) != 1:
        return False
    facts = facts_of(eqn)
    return facts.elementwise or eqn.primitive.name in _FUSED


def _is_expensive(eqn: Any) -> bool:
    """Whether the compiler computes it once rather than twice."""
    facts = facts_of(eqn)
    return (facts.elementwise and not facts.cheap) or eqn.primitive.name == "gather"


def _needs_buffer(eqn: Any) -> bool:
    """Whether an equation reads its operands from memory."""
    facts = facts_of(eqn)
    return not (_is_fused(eqn) or facts.reduces)


def _is_simple(eqn: Any) -> bool:
    """Whether a sum over the result computes it on the way."""
    return eqn.primitive.name in ("mul", "square", "add", "add_any", "sub", "neg", "integer_pow")


def _repeats(eqn: Any) -> bool:
    """Whether an equation reads an entry several times."""
    return eqn.primitive.name == "broadcast_in_dim"


def _overwritten(eqn: Any) -> set[Any]:
    """The operands in whose place an equation writes its result."""
    if eqn.primitive.name.startswith(("scatter", "dynamic_update_slice")):
        return set(_jax.variables(eqn.invars[:1]))
    if eqn.primitive.name in ("scan", "while"):
        return set(_jax.variables(eqn.invars))
    return set()
