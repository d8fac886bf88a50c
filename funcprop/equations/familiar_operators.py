"""Several operators that a person knows as one: the slope of tanh, a solve, a triangle, a remainder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from funcprop import _jax
from funcprop.equations.constants import pattern
from funcprop.equations.flow import run
from funcprop.equations.plain_graph import of_one, of_some
from funcprop.graph.graph import Graph, Operator, Variable

# Of an operator with several results, the one that is often read alone, and what is computed then.
_RESULTS = {"eigh": (1, "eigenvalues"), "svd": (0, "singular_values")}
# Functions of JAX that are one operator, by their name there.
_FUNCTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "logaddexp": ("logaddexp", jnp.logaddexp),
    "_det": ("det", jnp.linalg.det),
    "_slogdet_lu": ("logdet", lambda a: jnp.linalg.slogdet(a)[1]),
}


def familiar(graph: Graph) -> Graph:
    """The graph with these operators in the place of those that JAX has for them."""
    return _Familiar(graph).graph()


class _Familiar:
    def __init__(self, graph: Graph) -> None:
        self.whole = graph
        self.maker = {v.name: op for op in graph.operators for v in op.outputs}
        self.read = {v.name for op in graph.operators for v in op.inputs} | {v.name for v in graph.outputs}

    def graph(self) -> Graph:
        operators = []
        for op in self.whole.operators:
            matrices = (self._trace, self._diagonal, self._triangle, self._solve)
            changes = (self._slope, self._remainder, *matrices, self._result, self._function)
            found = next((new for change in changes if op.call is None and (new := list(change(op)))), [op])
            operators += found
        return replace(self.whole, operators=tuple(operators))

    def _made_by(self, v: Variable, *kinds: str) -> Operator | None:
        """The operator that computes a variable which has no name, if it is of some kind."""
        op = self.maker.get(v.name) if v.kind == "intermediate" and not v.named else None
        return op if op is not None and op.op in kinds and op.call is None else None

    # --- the slope of tanh --------------------------------------------------------------------

    def _slope(self, op: Operator) -> Iterator[Operator]:
        """`g (1 − h²)` in place of `t + t h` with `t = g (1 − h)`, and of `(g + g h) (1 − h)`."""
        found = next(iter((*self._sum_first(op), *self._sum_last(op))), None)
        if found is None:
            return
        (g, h), (v,) = found, op.outputs
        square = replace(h, name=f"{v.name}:2", kind="intermediate", named=False)
        slope, full = (replace(square, name=f"{v.name}:{k}") for k in (1, 0))
        value = np.ones((), h.dtype)
        one = replace(h, name="1", kind="literal", shape=(), value=value, aval=jax.typeof(value))
        yield of_one(op, "integer_pow", lambda x: lax.integer_pow(x, 2), h, square)
        yield of_one(op, "broadcast_in_dim", lambda x: lax.broadcast(x, h.shape or ()), one, full)
        yield of_some(op, "sub", lax.sub, (full, square), slope)
        yield of_some(op, "mul", lax.mul, (g, slope), v)

    def _sum_last(self, op: Operator) -> Iterator[tuple[Variable, Variable]]:
        if op.op not in ("add", "add_any"):
            return
        for t, product in (op.inputs, op.inputs[::-1]):
            inner, outer = self._made_by(t, "mul"), self._made_by(product, "mul")
            if inner is None or outer is None or t.name not in {w.name for w in outer.inputs}:
                continue
            h = next((w for w in outer.inputs if w.name != t.name), t)
            if (g := self._beside_one_minus(inner, h)) is not None:
                yield g, h

    def _sum_first(self, op: Operator) -> Iterator[tuple[Variable, Variable]]:
        if op.op != "mul" or len(op.inputs) != 2:
            return
        for total, rest in (op.inputs, op.inputs[::-1]):
            added = self._made_by(total, "add", "add_any")
            for g, product in (added.inputs, added.inputs[::-1]) if added is not None else ():
                inner = self._made_by(product, "mul")
                if inner is None or g.name not in {w.name for w in inner.inputs}:
                    continue
                h = next((w for w in inner.inputs if w.name != g.name), g)
                if self._is_one_minus(rest, h):
                    yield g, h

    def _beside_one_minus(self, product: Operator, h: Variable) -> Variable | None:
        for g, rest in (product.inputs, product.inputs[::-1]):
            if self._is_one_minus(rest, h):
                return g
        return None

    def _is_one_minus(self, v: Variable, h: Variable) -> bool:
        op = self._made_by(v, "sub")
        tanh = self.maker.get(h.name)
        if op is None or tanh is None or tanh.op != "tanh" or op.inputs[1].name != h.name:
            return False
        one = op.inputs[0]
        if (spread := self._made_by(one, "broadcast_in_dim", "convert_element_type")) is not None:
            one = spread.inputs[0]
        return one.kind == "literal" and bool(np.all(one.value == 1))

    # --- the remainder of integers ------------------------------------------------------------

    def _remainder(self, op: Operator) -> Iterator[Operator]:
        """`mod(a, b)` in place of XLA's remainder, to which `b` is added where it has the other sign."""
        inner = self._made_by(op.inputs[1], "rem") if op.op == "select_n" and len(op.inputs) == 3 else None
        if inner is None or not jnp.issubdtype(op.outputs[0].dtype, jnp.integer):
            return
        a, b = inner.inputs
        not_zero = self._made_by(b, "select_n")
        value = self._known(b)
        if value is not None and value.ndim == 0:
            b = replace(b, name=str(value), kind="literal", value=value, aval=jax.typeof(value))
        elif not_zero is not None:
            b = not_zero.inputs[1]  # 1 is in its place where it is 0.
        random = np.random.default_rng(0)
        for _ in range(8):
            x, y = (
                v.value if v.kind == "literal" else random.integers(-9, 9, v.shape).astype(v.dtype)
                for v in (a, b)
            )
            found = self._known(op.outputs[0], (a, x), (b, y))
            if found is None or not np.array_equal(found, jnp.remainder(x, y)):
                return
        yield of_some(op, "mod", jax.jit(jnp.remainder), (a, b), op.outputs[0])

    # --- matrices -----------------------------------------------------------------------------

    def _trace(self, op: Operator) -> Iterator[Operator]:
        """The trace in place of the sum of what a mask leaves of a matrix."""
        chosen = self._made_by(op.inputs[0], "select_n") if op.op == "reduce_sum" else None
        if chosen is not None and op.outputs[0].shape == () and self._is_on_diagonal(chosen):
            yield of_one(op, "trace", jax.jit(jnp.trace), chosen.inputs[2], op.outputs[0])

    def _diagonal(self, op: Operator) -> Iterator[Operator]:
        """The matrix with a vector on its diagonal."""
        if op.op == "select_n" and self._is_on_diagonal(op):
            x = op.inputs[2]
            while (made := self._made_by(x, "broadcast_in_dim", "pad", "reshape")) is not None:
                x = made.inputs[0]
            if x.kind != "literal" and x.shape == (op.outputs[0].shape or ())[:1]:
                points = jnp.arange(1, x.shape[0] + 1, dtype=x.dtype)
                found = self._known(op.outputs[0], (x, points))
                if found is not None and np.array_equal(found, np.diag(points)):
                    yield of_one(op, "diag", jax.jit(jnp.diag), x, op.outputs[0])

    def _is_on_diagonal(self, op: Operator) -> bool:
        """Whether a choice leaves the diagonal of a square matrix."""
        shape = op.outputs[0].shape or ()
        if len(op.inputs) != 3 or len(shape) != 2 or not _jax.is_differentiable(op.outputs[0].aval):
            return False
        mask, otherwise, _ = op.inputs
        zero = self._known(otherwise)
        found = None if zero is None or np.any(zero) else self._known(mask)
        return found is not None and np.array_equal(found, np.eye(*shape, dtype=bool))

    def _triangle(self, op: Operator) -> Iterator[Operator]:
        """The lower triangle in place of a choice by a mask."""
        if op.op != "select_n" or len(op.inputs) != 3 or len(op.outputs[0].shape or ()) < 2:
            return
        if not _jax.is_differentiable(op.outputs[0].aval):
            return
        mask, otherwise, x = op.inputs
        zero = self._known(otherwise)
        found = None if zero is None or np.any(zero) else self._known(mask)
        if found is not None and pattern(found) == "causal mask":
            factored = self._made_by(x, "cholesky")
            if factored is None:
                yield of_one(op, "tril", jax.jit(jnp.tril), x, op.outputs[0])
            else:
                yield of_one(op, "chol", jax.jit(_cholesky), factored.inputs[0], op.outputs[0])

    def _known(self, v: Variable, *given: tuple[Variable, Any]) -> Any | None:
        """The value of a variable that is made of numbers, and of what is given, alone."""
        inputs, values = [w for w, _ in given], [value for _, value in given]
        names = {w.name for w in inputs}
        if v.kind == "literal":
            return v.value
        operators: dict[Operator, None] = {}
        stack = [v]
        while stack:
            w = stack.pop()
            if w.kind == "literal" or w.name in names:
                continue
            made = self.maker.get(w.name)
            if made is None or made.jaxpr.effects or len(operators) > 20:
                return None
            operators[made] = None
            stack.extend(made.inputs)
        ordered = [o for o in self.whole.operators if o in operators]
        return np.asarray(run(ordered, inputs, [v])(*values)[0])

    def _solve(self, op: Operator) -> Iterator[Operator]:
        """The solution of linear equations in place of a factorisation and what reads it."""
        if op.op != "custom_linear_solve" or len(op.outputs) != 1:
            return
        a, b = op.inputs[0], op.inputs[-1]
        axes = len(a.shape or ())
        is_batch = axes > 2 and len(b.shape or ()) == axes
        if not (is_batch or (axes == 2 and len(b.shape or ()) in (1, 2))) or "literal" in (a.kind, b.kind):
            return
        operators, stack = {op: None}, list(op.inputs)
        while stack:
            v = stack.pop()
            if v.kind == "literal" or v.name in (a.name, b.name):
                continue
            made = self.maker.get(v.name)
            if made is None:
                return
            operators[made] = None
            stack.extend(made.inputs)
        ordered = [o for o in self.whole.operators if o in operators]
        compute = run(ordered, (a, b), op.outputs)
        is_column = (b.shape or ())[axes - 2] == (a.shape or ())[-1]
        if is_column and _is_solve(lambda x, y: compute(x, y)[0], a, b):
            yield of_some(op, "solve", jax.jit(jnp.linalg.solve), (a, b), op.outputs[0])
        elif len(b.shape or ()) == axes and _is_solve(
            lambda x, y: _transposed(compute(x, _transposed(y))[0]), a, _turned(b)
        ):
            # One right-hand side in each row.
            (v,) = op.outputs
            columns, solution = (replace(_turned(w), name=f"{v.name}:{k}") for k, w in enumerate((b, v)))
            yield of_one(op, "transpose", _transposed, b, columns)
            yield of_some(op, "solve", jax.jit(jnp.linalg.solve), (a, columns), solution)
            yield of_one(op, "transpose", _transposed, solution, v)

    def _result(self, op: Operator) -> Iterator[Operator]:
        """One result of an operator, where the others are not read."""
        index, kind = _RESULTS.get(op.op, (-1, ""))
        read = [i for i, v in enumerate(op.outputs) if v.name in self.read]
        if read != [index] or len(op.inputs) != 1 or len(op.inputs[0].shape or ()) != 2:
            return
        one = jax.jit(lambda a: _jax.evaluate(op.jaxpr, (), [a])[index])
        yield of_one(op, kind, one, op.inputs[0], op.outputs[index])

    def _function(self, op: Operator) -> Iterator[Operator]:
        """A function of JAX by its name, if it is that function."""
        name = "" if op.equation is None else _jax.function_name(op.equation)
        kind, reference = _FUNCTIONS.get(name, ("", jnp.asarray))
        read = [i for i, v in enumerate(op.outputs) if v.name in self.read]
        if not kind or len(read) != 1 or not all(_jax.is_differentiable(v.aval) for v in op.inputs):
            return
        own = lambda *values: _jax.evaluate(op.jaxpr, (), values)[read[0]]  # noqa: E731
        random = np.random.default_rng(0)
        points = [jnp.asarray(random.normal(size=v.shape), v.dtype) for v in op.inputs]
        if _is_same(own, reference, points):
            yield of_some(op, kind, jax.jit(reference), op.inputs, op.outputs[read[0]])


def _is_same(function: Callable[..., Any], reference: Callable[..., Any], points: Sequence[Any]) -> bool:
    """Whether two functions have the same values and pullbacks at random points."""
    types = [jax.eval_shape(f, *points) for f in (function, reference)]
    if types[0].shape != types[1].shape or types[0].dtype != types[1].dtype:
        return False
    g = jnp.asarray(np.random.default_rng(1).normal(size=types[0].shape), types[0].dtype)

    def both(f: Callable[..., Any]) -> Any:
        y, pull = jax.vjp(f, *points)
        return y, *pull(g)

    tolerance = 1e4 * float(jnp.finfo(g.dtype).eps)
    pairs = zip(both(function), both(reference), strict=True)
    return all(np.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in pairs)


def _transposed(x: Any) -> Any:
    *others, rows, columns = range(x.ndim)
    return lax.transpose(x, (*others, columns, rows))


def _turned(v: Variable) -> Variable:
    """The type of a matrix, or of several, that is transposed."""
    aval = jax.eval_shape(_transposed, v.aval)
    return replace(v, kind="intermediate", shape=aval.shape, aval=aval, named=False)


def _cholesky(x: Any) -> Any:
    return lax.linalg.cholesky(x, symmetrize_input=False)


def _is_solve(function: Callable[[Any, Any], Any], a: Variable, b: Variable) -> bool:
    """Whether a function of a matrix and a right-hand side solves, with the cotangents of a solve."""
    random = np.random.default_rng(0)
    size = (a.shape or ())[-1]
    matrix = jnp.asarray(np.eye(size) * 3 + random.uniform(-1, 1, a.shape) / size, a.dtype)
    return _is_same(function, jnp.linalg.solve, [matrix, jnp.asarray(random.normal(size=b.shape), b.dtype)])
