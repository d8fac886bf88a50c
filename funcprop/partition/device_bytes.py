"""Bytes that one device holds at the peak of a flat program, estimated from its jaxpr.

The liveness analysis knows four things of the compiler: a view has no buffer; an elementwise operator is fused
into what reads it, unless it is expensive and read twice or a kernel reads it; a result may take the place of
an operand that nothing reads any more; and independent all-reduces are one, whose operands and results live
together. Sizes are those of one device.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from funcprop import _jax
from funcprop.partition.flat import flattened, simplified
from funcprop.program.facts import facts_of
from funcprop.program.sizes import nbytes

SizeOf = Callable[[Any], int]

PURPOSES = ("parameters", "optimizer state", "batch", "saved", "gathered", "collectives", "temporaries", "results")


@dataclass(frozen=True)
class DeviceBytes:
    """Bytes of one device at the peak, by purpose.

    "saved" was made in the forward sweep and is still needed; "gathered" are whole copies of split parameters;
    "collectives" are operands and results of all-reduces; "results" are new arrays that are handed back.
    """

    by_purpose: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.by_purpose.values())


@dataclass(eq=False)
class _Node:
    """A kernel, a fusion, or a group of all-reduces: what it reads and makes, in buffers."""

    place: int
    reads: set[Any]
    makes: list[Any]
    extra: int = 0
    in_place: set[Any] = field(default_factory=set)
    collective: bool = False


def peak_of(
    jaxpr: Any,
    purposes: Sequence[str],
    size_of: SizeOf = nbytes,
    reduced: Mapping[Any, tuple[str, ...]] | None = None,
    donated: Sequence[bool] = (),
    forward_until: Any = None,
    handed_on: bool = False,
) -> DeviceBytes:
    """Estimate the peak of a flat program.

    Args:
        jaxpr: flat, without dead code.
        purposes: of each input, one of `PURPOSES`.
        size_of: the bytes of a variable on one device.
        reduced: the variables that are all-reduced when they are made, with the axes of the mesh.
        donated: which inputs may be overwritten by results of their size.
        forward_until: the variable with which the forward sweep ends.
        handed_on: whether the results are read by more of the same program, and not handed back.
    """
    lowered = Lowered(jaxpr, size_of, reduced or {})
    jaxpr, size_of = lowered.jaxpr, lowered.bytes_of
    buffers = _Buffers(jaxpr, size_of, lowered.reduced)
    order = _ordered(buffers.nodes())
    donated = donated or [False] * len(jaxpr.invars)
    return _sweep(jaxpr, buffers, order, purposes, donated, forward_until, handed_on)


class Lowered:
    """The program as the compiler runs it, with copies and broadcasts that its equations do not show.

    A product is one of matrices, after batch axes; an operand that is not in this order is transposed, once for
    all products that need the same order. The transpose of a product is the product of the other two. Operands
    that an elementwise operator repeats are repeated before.
    """

    def __init__(self, jaxpr: Any, size_of: SizeOf, reduced: Mapping[Any, tuple[str, ...]]) -> None:
        self._size_of, self.reduced = size_of, dict(reduced)
        self._like: dict[Any, Any] = {}
        self._copies: dict[Any, Any] = {}
        self._equations: list[Any] = []
        for eqn in self._turned(jaxpr):
            if eqn.primitive.name == "dot_general":
                orders = zip(eqn.invars, _orders(eqn), strict=True)
                eqn = eqn.replace(invars=[v if o is None else self._transposed(v, o) for v, o in orders])
            elif eqn.primitive.name == "conv_general_dilated":
                self._convolution(eqn)
                continue
            elif facts_of(eqn).elementwise and len(eqn.outvars) == 1:
                eqn = eqn.replace(invars=[self._repeated(v, eqn.outvars[0]) for v in eqn.invars])
            self._equations.append(eqn)
        self.jaxpr = _jax.jaxpr_of(self._equations, jaxpr.invars, jaxpr.outvars, "flat")

    def bytes_of(self, v: Any) -> int:
        """Bytes of a variable on one device; those of copies are their originals'."""
        like = self._like.get(v)
        if like is None:
            return self._size_of(v)
        return self._size_of(like) // like.aval.dtype.itemsize * int(v.aval.dtype.itemsize)

    def _add(self, key: Any, like: Any, fun: Callable[[Any], Any]) -> Any:
        """One more equation, the only one of `fun`; there is one for each `key`, whose first part it reads."""
        if key not in self._copies:
            (eqn,) = _jax.open_jaxpr(jax.make_jaxpr(fun)(_plain_type(key[0]))).eqns
            self._copies[key] = eqn.outvars[0]
            self._like[eqn.outvars[0]] = like
            self._equations.append(eqn.replace(invars=[key[0]]))
        return self._copies[key]

    def _transposed(self, v: Any, order: tuple[int, ...]) -> Any:
        if isinstance(v, _jax.Literal):
            return v
        return self._add((v, order), self._like.get(v, v), lambda x: jax.lax.transpose(x, order))

    def _convolution(self, eqn: Any) -> None:
        """A convolution of images with features last; others are transposed before and after."""
        numbers, result = eqn.params["dimension_numbers"], eqn.outvars[0]
        image, kernel, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
        orders = (image[0], *image[2:], image[1]), (*kernel[2:], kernel[1], kernel[0])
        operands = [
            v if list(order) == sorted(order) else self._transposed(v, order)
            for v, order in zip(eqn.invars, orders, strict=True)
        ]
        after = (out[0], *out[2:], out[1])
        if list(after) == sorted(after):
            self._equations.append(eqn.replace(invars=operands))
            return
        own = _jax.Var(result.aval)
        self._like[own] = result
        if result in self.reduced:
            self.reduced[own] = self.reduced.pop(result)
        self._equations.append(eqn.replace(invars=operands, outvars=[own]))
        back = tuple(sorted(range(len(after)), key=lambda d: after[d]))
        closed = jax.make_jaxpr(lambda x: jax.lax.transpose(x, back))(_plain_type(result))
        self._equations.append(_jax.open_jaxpr(closed).eqns[0].replace(invars=[own], outvars=[result]))

    def _repeated(self, v: Any, result: Any) -> Any:
        sizes = result.aval.shape
        if isinstance(v, _jax.Literal) or v.aval.shape in ((), sizes) or len(v.aval.shape) != len(sizes):
            return v
        axes = tuple(range(len(sizes)))
        return self._add((v, sizes), result, lambda x: jax.lax.broadcast_in_dim(x, sizes, axes))

    def _turned(self, jaxpr: Any) -> list[Any]:
        """The equations, in which the transpose of a product of two matrices is the product of the other two."""
        readers: dict[Any, list[Any]] = defaultdict(list)
        for eqn in jaxpr.eqns:
            for v in _jax.variables(eqn.invars):
                readers[v].append(eqn)
        results = set(_jax.variables(jaxpr.outvars))
        gone: set[int] = set()
        found = []
        for eqn in jaxpr.eqns:
            if id(eqn) in gone:
                continue
            after = readers[eqn.outvars[0]] if eqn.primitive.name == "dot_general" else []
            if (
                len(after) == 1
                and after[0].primitive.name == "transpose"
                and eqn.outvars[0] not in results
                and all(len(v.aval.shape) == 2 for v in [*eqn.invars, *eqn.outvars])
            ):
                (left, right), _ = eqn.params["dimension_numbers"]
                params = {**eqn.params, "dimension_numbers": ((right, left), ((), ()))}
                if eqn.outvars[0] in self.reduced:
                    self.reduced[after[0].outvars[0]] = self.reduced.pop(eqn.outvars[0])
                eqn = eqn.replace(invars=eqn.invars[::-1], outvars=after[0].outvars, params=params)
                gone.add(id(after[0]))
            found.append(eqn)
        return found


def _plain_type(v: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


def _orders(eqn: Any) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """The order of axes in which a product needs its two operands; None for one that it reads as it is."""
    (left_summed, right_summed), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    found: list[tuple[int, ...] | None] = []
    plain = len(left_summed) == 1
    for v, summed, batch in zip(eqn.invars, (left_summed, right_summed), (left_batch, right_batch), strict=True):
        rank = len(v.aval.shape)
        plain = plain and tuple(batch) == tuple(range(len(batch))) and rank - len(batch) - len(summed) <= 1
    for side, (v, summed, batch) in enumerate(
        zip(eqn.invars, (left_summed, right_summed), (left_batch, right_batch), strict=True)
    ):
        sizes = v.aval.shape
        free = [d for d in range(len(sizes)) if d not in summed and d not in batch]
        order = (*batch, *free, *summed) if side == 0 else (*batch, *summed, *free)
        moved = [d for d in order if sizes[d] > 1]
        found.append(None if plain or len(sizes) < 3 or moved == sorted(moved) else tuple(order))
    return found[0], found[1]


class _Buffers:
    """Which variables have a buffer, and the nodes between these."""

    def __init__(self, jaxpr: Any, size_of: SizeOf, reduced: Mapping[Any, tuple[str, ...]]) -> None:
        self.jaxpr, self.size_of, self.reduced = jaxpr, size_of, reduced
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
                for v, result in zip(eqn.invars[consts : consts + carries], eqn.outvars[:carries], strict=True):
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

    def nodes(self) -> list[_Node]:
        """The nodes in the order of the jaxpr; what is fused is a part of those that read it."""
        found: list[_Node] = []
        fused: dict[Any, tuple[frozenset[Any], frozenset[Any]]] = {}  # what it reads; what of this entry by entry
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
            node = _Node(place, reads, makes, _scratch(eqn, self.size_of, self.reduced), exact | _overwritten(eqn))
            if any(v in self.reduced for v in makes):
                partial = {v: _Partial(v) for v in makes if v in self.reduced}
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


class _Partial:
    """The sum of one device's part, before it is all-reduced into `whole`."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole
        self.aval = whole.aval


class _Groups:
    """All-reduces that do not depend on each other, over the same axes of the mesh, are done as one."""

    def __init__(self, buffers: _Buffers) -> None:
        self.nodes: list[_Node] = []
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

    def add(self, place: int, partial: Mapping[Any, _Partial], reads: set[Any]) -> None:
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
                self.nodes.append(_Node(place, set(), [], collective=True))
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


def _ordered(nodes: list[_Node]) -> list[_Node]:
    """The nodes breadth first, as the compiler for CPUs runs them: each as soon as what it reads is there."""
    maker = {v: node for node in nodes for v in node.makes}
    before = {id(node): {id(maker[v]) for v in node.reads if v in maker} for node in nodes}
    readers: dict[int, list[_Node]] = defaultdict(list)
    for node in nodes:
        for source in before[id(node)]:
            readers[source].append(node)
    waiting = {key: len(sources) for key, sources in before.items()}
    ready = deque(node for node in nodes if not waiting[id(node)])
    found: list[_Node] = []
    while ready:
        node = ready.popleft()
        found.append(node)
        for reader in readers[id(node)]:
            waiting[id(reader)] -= 1
            if not waiting[id(reader)]:
                ready.append(reader)
    return found


def _sweep(
    jaxpr: Any,
    buffers: _Buffers,
    order: list[_Node],
    purposes: Sequence[str],
    donated: Sequence[bool],
    forward_until: Any,
    handed_on: bool,
) -> DeviceBytes:
    """Walk through the nodes, and keep the largest number of bytes with its purposes."""
    size = lambda v: buffers.bytes_of(v.whole if isinstance(v, _Partial) else v)  # noqa: E731
    last: dict[Any, int] = {}
    for t, node in enumerate(order):
        for v in node.reads:
            last[v] = t
    results = buffers.results
    if handed_on:
        last.update(dict.fromkeys(results, len(order)))
        results = set()
    given: dict[str, int] = dict.fromkeys(PURPOSES, 0)
    inputs = set(jaxpr.invars)
    for v, purpose in zip(jaxpr.invars, purposes, strict=True):
        given[purpose] += size(v)
    # A donated input's place is taken by a result of its size: that result is not counted again.
    free = sorted(size(v) for v, d in zip(jaxpr.invars, donated, strict=True) if d)
    covered = set()
    for v in results:
        if v not in inputs and size(v) in free:
            free.remove(size(v))
            covered.add(v)
    forward_end = next((t for t, node in enumerate(order) if forward_until in node.makes), -1)
    own = sorted((size(v) for v in results if v not in covered and v not in inputs), reverse=True)
    live: dict[Any, str] = {}
    most, peak = 0, dict.fromkeys(PURPOSES, 0)
    for t, node in enumerate(order):
        dying = [v for v in node.reads if v in live and last[v] == t]
        reused: set[Any] = set()
        for v in node.makes:
            if v in results:
                continue
            room = next((d for d in dying if d in node.in_place and d not in reused and size(d) == size(v)), None)
            if room is not None:
                reused.add(room)
                live.pop(room)
            collective = node.collective or isinstance(v, _Partial)
            live[v] = "collectives" if collective else "saved" if t <= forward_end else "temporaries"
        made = [v for v in order[t].makes if v in results and v not in covered]
        for v in made:
            own.remove(size(v))
        total = node.extra + sum(map(size, live))
        if total > most:
            placed = _placed(sorted(((size(v), i) for i, v in enumerate(live)), reverse=True), own)
            total -= sum(n for n, _ in placed)
        if total > most:
            most, inside = total, {i for _, i in placed}
            peak = dict.fromkeys(PURPOSES, 0) | {"temporaries": node.extra}
            for i, (v, purpose) in enumerate(live.items()):
                if i not in inside:
                    read_later = purpose != "saved" or last.get(v, -1) > forward_end
                    peak[purpose if read_later else "temporaries"] += size(v)
        for v in [*node.reads, *node.makes]:
            if v in live and last.get(v, t) <= t:
                live.pop(v)
    new = sum(size(v) for v in results if v not in covered)
    total = {name: given[name] + peak[name] + (new if name == "results" else 0) for name in PURPOSES}
    return DeviceBytes({name: n for name, n in total.items() if n})


def _placed(values: list[tuple[int, int]], free: list[int]) -> list[tuple[int, int]]:
    """The values that find a place in results that are not made yet; both with the largest first."""
    places = sorted(free, reverse=True)
    found = []
    for n, i in values:
        if places and places[0] >= n:
            places.pop(0)
            found.append((n, i))
    return found


# --- what is known of the compiler ------------------------------------------------------------

_FUSED = frozenset(
    "broadcast_in_dim iota transpose slice pad select_n concatenate rev dynamic_slice gather convert_element_type "
    "reshape squeeze expand_dims split".split()
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
    return facts.elementwise and not facts.cheap or eqn.primitive.name == "gather"


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


def _scratch(eqn: Any, size_of: SizeOf, reduced: Mapping[Any, tuple[str, ...]]) -> int:
    """Bytes that a loop or a branch needs inside, besides its operands and results.

    A loop writes its carries in place, and has a copy of what it reads of the arrays that it runs along.
    """
    bodies = [_jax.open_jaxpr(body) for _, body in _jax.sub_jaxprs(eqn)]
    if not bodies or facts_of(eqn).combines:
        return 0
    if eqn.primitive.name != "scan":
        return max(_inside(body, size_of, reduced, range(0), len(body.invars)) for body in bodies)
    consts, carries = _jax.scan_counts(eqn.params)
    return _inside(bodies[0], size_of, reduced, range(consts, consts + carries), consts + carries)


def _inside(
    body: Any, size_of: SizeOf, reduced: Mapping[Any, tuple[str, ...]], carried: range, outside: int
) -> int:
    jaxpr = _jax.without_unread_inputs(body, [True] * len(body.invars))[0]
    count = len(jaxpr.invars)
    donated = [i in carried for i in range(count)]
    found = peak_of(jaxpr, ["batch"] * count, size_of, reduced, donated)
    return found.total - sum(size_of(v) for v in jaxpr.invars[:outside])


def flat_jaxpr(closed: Any) -> Any:
    """The flat program of a jaxpr without dead code, for an estimate; its constants are leading inputs."""
    return simplified(flattened(closed)[0])
