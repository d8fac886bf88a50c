"""The nodes of a picture: operators, squares of variables, and scopes that are collapsed."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import jax.numpy as jnp

from funcprop.drawing.labels import operator_tooltip
from funcprop.drawing.picture import Node, value_text
from funcprop.drawing.representatives import Representatives, innermost_common
from funcprop.drawing.scopes import Scope, scope_path
from funcprop.drawing.symbols import symbol
from funcprop.graph.graph import Operator, Variable, bytes_text


class Nodes:
    """The nodes of a picture by their keys, made as they are asked for."""

    def __init__(self, known: Representatives) -> None:
        self.known = known
        self.shown = known.shown
        self.made: dict[str, Node] = {}

    def operator_node(self, op: Operator) -> str:
        """The key of the node that an operator is, or is inside of."""
        op = self.known.folding.of(op)
        scope = self.known.scope_of[op.name]
        around = self.known.collapsed(scope)
        if around is not None:
            return self.scope_node(around)
        key = f"o:{op.name}"
        if key not in self.made:
            times = f"× {op.static['length']}" if op.op == "scan" else ""
            self.made[key] = Node(
                key,
                "operator",
                symbol(op),
                times,
                times,
                operator_tooltip(op),
                op.name,
                self.known.box_key(scope),
                self.shown.roles.get(op.name, ""),
            )
        return key

    def scope_node(self, scope: Scope) -> str:
        """The key of the node of a collapsed scope."""
        key = self.known.keys[id(scope)]
        if key not in self.made:
            ops = self.known.inside(scope)
            brief = self._interface(ops) + "\nsizes differ" * scope.sizes_differ
            tooltip = "/".join(scope.path) + f"\n{len(ops)} operator{'s' * (len(ops) != 1)}: "
            tooltip += ", ".join(op.op for op in ops[:12]) + ", …" * (len(ops) > 12)
            path = next(s.path for s in scope.ancestors() if s.path or s.parent is None)
            roles = Counter(self.shown.roles.get(op.name, "") for op in ops)
            self.made[key] = Node(
                key,
                "scope",
                self.known.title(scope),
                brief,
                brief,
                tooltip,
                "/".join(path),
                None if scope.parent is None else self.known.box_key(scope.parent),
                roles.most_common(1)[0][0],
                scope.count,
                inside=tuple(op.name for op in ops),
            )
        return key

    def _interface(self, ops: Sequence[Operator]) -> str:
        """What comes into these operators and what leaves them, and the parameters that they alone read."""
        names = {op.name for op in ops}
        drawn = {self.known.folding.of(op).name for op in ops}
        own = {v.name for op in ops for v in op.outputs}
        read = {v.name: v for op in ops for v in op.inputs if v.kind != "literal" and v.name not in own}
        given = {
            v.name: v
            for v in read.values()
            if v.name not in self.known.producer
            and v.name not in self.known.place_of
            and not self.known.has_square(self.known.drawn(v))
            and all(self.known.folding.of(reader).name in drawn for reader in self.known.consumers[v.name])
        }
        coming = [v for v in read.values() if v.name not in given]
        leaving = [
            v
            for op in ops
            for v in op.outputs
            if v.name in self.known.results
            or v.name in self.known.onward
            or any(c.name not in names for c in self.known.consumers[v.name])
        ]
        text = f"{_shapes(coming)} → {_shapes(leaving)}"
        # Where parameters are arguments, what the function holds is data.
        are_arguments = any("/" in v.name for v in self.known.graph.inputs)
        given = {
            name: v
            for name, v in given.items()
            if jnp.issubdtype(v.dtype, jnp.inexact) and not (are_arguments and v.kind == "constant")
        }
        numbers = sum(math.prod(v.shape or ()) for v in given.values())
        if numbers:
            text += f"\n{numbers:,} parameters, {bytes_text(sum(v.nbytes or 0 for v in given.values()))}"
        return text

    def variable_node(self, variable: Variable) -> str:
        """The key of a variable's square."""
        key = f"v:{variable.name}"
        if key not in self.made:
            box = self.known.box_of_variable(variable)
            made = self.known.producer.get(variable.name)
            role = self.shown.roles.get(made[0].name, "") if made else ""
            role = self.shown.variable_roles.get(variable.name, role)
            self.made[key] = self._square(key, variable, box, role)
        return key

    def saved_node(self, residual: Variable) -> str | None:
        """The square of a value that is saved for the other section; None inside of a collapsed scope."""
        box = innermost_common(self.known.readers(residual, saved=True))
        if box is not None and self.known.collapsed(box) is not None:
            return None
        key = f"r:{residual.name}"
        if key not in self.made:
            role = "saved"
            square = self._square(key, residual, box, role)
            self.made[key] = replace(square, tooltip=square.tooltip + f"\nsaved for {self.shown.saved_for}")
        return key

    def _square(self, key: str, variable: Variable, box: Scope | None, role: str) -> Node:
        label = variable.name
        if variable.name in self.known.producer or variable.name in self.known.place_of:
            # Where it stands says what scope it is in.
            label = label.removeprefix(variable.scope + "/")
        elif box is not None and box.path and not box.section:
            own = [part for part in scope_path(label) if part not in (*box.path, "params", "~")]
            # A number alone says nothing.
            label = label if all(map(str.isdigit, own)) else "/".join(own)
        if variable.kind == "input" and not variable.named:
            # What comes into a scope that is drawn by itself.
            label = "/".join(label.split("/")[-2:])
        # A square that nobody named shows its shape alone: its name would be that of its operator.
        if not variable.named and variable.kind == "intermediate":
            label = ""
        shape = " × ".join(map(str, variable.shape or ())) or ("" if label else "scalar")
        type_ = value_text(variable.shape, str(variable.dtype), variable.nbytes)
        return Node(
            key,
            "variable",
            label,
            shape,
            type_,
            f"{variable.name}: {type_}\n{variable.kind}",
            variable.name,
            None if box is None else self.known.box_key(box),
            role,
        )

    def with_members(self) -> Iterator[Node]:
        """The nodes, each with the names that it stands for; where sizes differ, a square has them all."""
        names: dict[str, list[str]] = defaultdict(list)
        for op in self.known.graph.operators:
            names[self.operator_node(op)].append(op.name)
        for drawn, alike in self.known.alike.items():
            for key in (f"v:{drawn}", f"r:{drawn}"):
                names[key] += alike
        for key, node in self.made.items():
            members = tuple(names[key])
            shapes = [self.known.variables[name].shape or () for name in members if node.kind == "variable"]
            if any(shape != shapes[0] for shape in shapes):
                text = _shapes_of_all(shapes)
                tooltip = f"{node.tooltip}\nsizes differ: {text}"
                node = replace(node, brief=text, details=text, tooltip=tooltip)
            yield replace(node, members=members)


def _shapes(values: Iterable[Variable], most: int = 1) -> str:
    """The shapes of what comes into a scope, or leaves it."""
    texts = list(dict.fromkeys(_shape(v.shape) for v in sorted(values, key=lambda v: not v.shape)))
    return ", ".join(texts[:most]) + ", …" * (len(texts) > most) or "nothing"


def _shape(shape: tuple[int, ...] | None) -> str:
    return " × ".join(map(str, shape or ())) or "scalar"


def _shapes_of_all(shapes: Sequence[tuple[int, ...]]) -> str:
    """`3 × 3 × 8…32 × 16…64`: the least and the largest length of every axis."""
    if len({len(shape) for shape in shapes}) > 1:
        return " or ".join(dict.fromkeys(map(_shape, shapes)))
    axes = [(min(axis), max(axis)) for axis in zip(*shapes, strict=True)]
    return " × ".join(str(low) if low == high else f"{low}…{high}" for low, high in axes)
