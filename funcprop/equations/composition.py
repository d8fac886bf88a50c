"""Equations of several operators as one: what is between them is written where it is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.equations.elementwise import elementwise, is_elementwise, slope
from funcprop.equations.flow import Region, is_trivial
from funcprop.equations.named_function import Write
from funcprop.equations.new_axes import kept_axes, with_told_axes
from funcprop.equations.shape_changes import of_shape
from funcprop.graph.graph import Operator, Variable
from funcprop.program.facts import facts_of
from funcprop.program.layer_calls import LayerCall
from funcprop.rules import primitives
from funcprop.rules.equations import Equations, OperatorSymbols, apply, opaque, written
from funcprop.rules.expressions import Expression, number, spread_over
from funcprop.rules.notation import latex_name, literally
from funcprop.rules.rule import RuleError


@dataclass(frozen=True, eq=False)
class LinePart:
    """What computes one variable inside a line: an operator, or a region that is written as one function.

    A function that was recognised has its `name` and its `kind`.
    """

    output: Variable
    inputs: tuple[Variable, ...]
    operator: Operator | None = None
    region: Region | None = None
    write: Write | None = None
    name: str | None = None
    kind: str | None = None

    def equations(self, args: Sequence[Expression], output: Any, cotangent: Expression) -> Equations:
        """Write the part; an operand whose cotangent is not known has None."""
        if self.write is not None and self.region is not None:
            return self.write(self.region, args, cotangent, output)
        assert self.operator is not None
        if is_trivial(self.operator):
            return of_shape(self.operator, args[0], cotangent)
        is_entrywise = self.operator.equation is not None and facts_of(self.operator.equation).elementwise
        args = with_told_axes(args) if is_entrywise else args
        found = own_equations(self.operator, args, output, cotangent)
        if found is None and self.activation is not None:
            region = Region((self.operator,), self.inputs, self.output)
            found = elementwise(self.activation)(region, args, cotangent, output)
        if found is None:
            found = derived_equations(self.operator, args, cotangent)
        # Numbers that were read in place of arrays of them.
        forward = spread_over(found.forward, self.output.shape or ())
        return found._replace(forward=replace(forward, new_axes=kept_axes(args)) if is_entrywise else forward)

    @property
    def activation(self) -> str | None:
        """The symbol of a layer that is one function of every entry, and brings no equations."""
        op = self.operator
        if op is None or op.call is None or len(op.inputs) != 1 or len(op.outputs) != 1:
            return None
        if not is_elementwise(Region((op,), op.inputs, op.outputs[0])):
            return None
        symbol, name = op.call.layer.symbol, op.call.layer.name
        return symbol if isinstance(symbol, str) else name if name.isidentifier() else "φ"


def own_equations(
    op: Operator, args: Sequence[Expression], output: Any, cotangent: Expression
) -> Equations | None:
    """The equations that an operator's rule or primitive brings, with a cotangent for every operand."""
    if len(op.outputs) != 1 or op.equation is None:
        return None
    if op.call is None:
        write: Any = primitives.EQUATIONS.get(op.op)
        given: tuple[Any, ...] = tuple(args)
    else:
        rule = op.call.layer.rule
        write = None if rule is None or op.call.axes else rule.equations
        given = op.call.unflatten(list(args))
    name = called(op)
    try:
        found = None if write is None else write(OperatorSymbols(name, given, output, cotangent, op.static))
    except Exception as error:
        error.add_note(
            f"raised by the equations of the rule for {op.op}: symbols know + − * / @ and numbers; "
            "apply other functions with `apply(name, function, *symbols)`"
        )
        raise
    if found is None or op.call is None:
        return found
    return _one_for_each_array(op.call, found)


def _one_for_each_array(call: LayerCall, equations: Any) -> Equations:
    """A layer's equations, with the cotangents flat."""
    where, names = f"rule for {call.layer.name}: the equations", call.argument_names()
    if not isinstance(equations, Equations):
        raise RuleError(f"{where} are a {type(equations).__name__}; return `Equations(forward, backward)`.")
    try:
        backward = tuple(call.tree.flatten_up_to(tuple(equations.backward)))
    except ValueError:
        raise RuleError(
            f"{where} have cotangents whose structure is not that of the arguments; return a tuple with one "
            f"cotangent for every array of {names}, and None for an argument that is None."
        ) from None
    return Equations(equations.forward, backward)


# What primitives are called by those who do not write compilers.
_CALLED = {
    "logistic": "σ", "conv_general_dilated": "conv", "reduce_max": "max", "reduce_min": "min",
    "reduce_window_max": "maxpool", "reduce_window_sum": "sumpool", "concatenate": "concat",
    "dynamic_slice": "slice", "dynamic_update_slice": "update", "reduce_window": "pool", "cond": "cases",
}  # fmt: skip


def called(op: Operator) -> str:
    """What an operator is called: a layer as it is named, a primitive as people call it."""
    if op.call is not None:
        return op.op
    name = op.op if op.equation is None else _jax.function_name(op.equation)
    return _CALLED.get(name, name.strip("_"))


# A loop that reads more than this is written with what was computed before it alone.
_MOST_OPERANDS = 5


def by_name(
    op: Operator, name: str, function: Callable[..., Any], args: Sequence[Expression], type_: Any
) -> Expression:
    """An operator as a function by its name; the lines of a loop of many operands say what it reads."""
    if len(args) <= _MOST_OPERANDS or op.op not in ("scan", "while"):
        return apply(name, function, *args, type_=type_)
    shown = [i for i, v in enumerate(op.inputs) if v.kind == "intermediate"] or [0]
    words = "".join(f"{{{i}}}, " for i in shown[:_MOST_OPERANDS])
    latex = f"{literally(latex_name(name))}\\!\\left({words}\\ldots\\right)"
    return written(function, args, f"{name}({words}…)", latex, type_)


def derived_equations(op: Operator, args: Sequence[Expression], cotangent: Expression) -> Equations:
    """The equations of a primitive by what is known of it: `f′` of an entrywise one, `fᵀ` of a linear one."""
    name = called(op)
    (output,) = op.outputs

    def function(*values: Any) -> Any:
        return _jax.evaluate(op.jaxpr, (), values)[0]

    forward = by_name(op, name, function, args, type_of(output))
    cotangents: list[Expression | None] = [None] * len(args)
    if op.equation is None or op.call is not None or op.bodies or not _jax.is_differentiable(output.aval):
        return Equations(forward, tuple(cotangents))
    facts = facts_of(op.equation)
    is_real = not any(jnp.issubdtype(x.type.dtype, jnp.complexfloating) for x in (*args, forward))
    smooth = [i for i, v in enumerate(op.inputs) if v.kind != "literal" and _jax.is_differentiable(v.aval)]
    for i in smooth:
        if facts.elementwise and is_real and args[i].shape == forward.shape:
            mark = "′" if len(smooth) == 1 else f"′{'₁₂₃₄'[i]}"
            cotangents[i] = cotangent * apply(f"{name}{mark}", slope(function, i), *args, type_=args[i].type)
        elif any(i in group for group in facts.linear_in):
            others = [x for k, x in enumerate(args) if k != i]
            back = apply(f"{name}ᵀ", _transposed(function, i, args[i].type), cotangent, *others)
            cotangents[i] = back
    return Equations(forward, tuple(cotangents))


def _transposed(function: Callable[..., Any], i: int, like: Any) -> Callable[..., Any]:
    """The transpose of a function that is linear in its operand `i`, at the other operands."""

    def transposed(g: Any, *others: Any) -> Any:
        zero = jnp.zeros(like.shape, like.dtype)
        return jax.vjp(lambda v: function(*others[:i], v, *others[i:]), zero)[1](g)[0]

    return transposed


def literal(variable: Variable) -> Expression:
    """The number that a literal is."""
    value = jnp.asarray(variable.value)
    text, latex = variable.name, variable.name
    if variable.name in ("inf", "-inf"):
        text, latex = text.replace("-", "−").replace("inf", "∞"), text.replace("inf", "\\infty")
    elif value.ndim == 0 and _is_real_number(value):
        return number(float(value), value.dtype)
    return opaque(lambda: value, (), text, latex, jax.typeof(value))


def _is_real_number(value: Any) -> bool:
    """Whether a scalar is a number that a decimal one can be."""
    is_real = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer))
    return is_real and bool(jnp.isfinite(value)) and float(value) == value and abs(float(value)) < 2**53


def type_of(variable: Variable) -> jax.ShapeDtypeStruct:
    """The type of a variable's value."""
    return jax.ShapeDtypeStruct(variable.shape or (), variable.dtype)


class Composition:
    """The parts between the inputs of a line and its left-hand side, the last of which computes that.

    Only `active` variables have cotangents.
    """

    def __init__(
        self, parts: Sequence[LinePart], inputs: Sequence[Variable], active: Collection[str]
    ) -> None:
        self.parts, self.inputs, self.active = parts, inputs, active

    def write(self, args: Sequence[Expression], cotangent: Expression, output: Expression) -> Equations:
        """The equations of all parts together; `output` is the symbol of the line."""
        known: dict[str, Expression] = {v.name: x for v, x in zip(self.inputs, args, strict=True)}
        given: list[list[Expression]] = []
        for part in self.parts:
            operands = [literal(v) if v.kind == "literal" else known[v.name] for v in part.inputs]
            given.append(operands)
            type_ = type_of(part.output)
            unknown = opaque(lambda t=type_: jnp.zeros(t.shape, t.dtype), (), "?", "?", type_)
            known[part.output.name] = part.equations(operands, unknown, unknown).forward
        last = self.parts[-1].output.name
        cotangents: dict[str, Expression | None] = {last: cotangent}
        for part, operands in zip(reversed(self.parts), reversed(given), strict=True):
            name = part.output.name
            if name not in cotangents:
                continue
            g = cotangents[name]
            backward: Sequence[Any] = [None] * len(operands)
            if g is not None:
                backward = part.equations(operands, output if name == last else known[name], g).backward
            for v, term in zip(part.inputs, backward, strict=True):
                if v.kind != "literal" and v.name in self.active:
                    _add(cotangents, v.name, term)
        for v in self.inputs:
            # It is compared with, or rounded.
            if v.name in self.active and v.name not in cotangents:
                cotangents[v.name] = spread_over(number(0.0, v.dtype), v.shape or ())
        return Equations(known[last], tuple(cotangents.get(v.name) for v in self.inputs))


def _add(into: dict[str, Expression | None], name: str, term: Expression | None) -> None:
    """Add a term to a cotangent, which is unknown as soon as one of its terms is."""
    before = into.get(name, term)
    if name not in into:
        into[name] = term
    else:
        into[name] = None if before is None or term is None else before + term
