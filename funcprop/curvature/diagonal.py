"""The exact diagonal of a Hessian, for any function.

P separate Hessian-vector products give it, each at the price of a few gradients. Here the gradient is
linearised once, and the products are made in blocks under `vmap`; and they are fewer, because a weight of a
product acts only through that product's result (`funcprop.curvature.nodes`): where examples do not mix, a
dense layer of `O` outputs needs `O` products, not `I × O`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _compat
from funcprop.calls import Call, is_array, traced
from funcprop.curvature.columns import Columns, choose, diagonal_of, hessian_of
from funcprop.curvature.nodes import Node, find_nodes
from funcprop.curvature.piecewise import why_curved
from funcprop.graph import aligned
from funcprop.registry import RuleSet

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PlanRow:
    """How the diagonal of some leaves is computed.

    `form` is `"zero"` (the loss is piecewise affine in them), `"units"` or `"directions"`
    (`funcprop.curvature.columns`); `products` are the products with the Hessian at `node`, `block` how many are
    made at once, `flops` those of all of them, and `nbytes` what one block holds.
    """

    leaves: tuple[str, ...]
    form: str
    node: str
    products: int
    block: int
    flops: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """What an exact diagonal will cost. `print` shows a table."""

    rows: tuple[PlanRow, ...]
    parameters: int
    gradient_flops: int

    @property
    def products(self) -> int:
        """Products with Hessians of parts of the loss, each cheaper than a Hessian-vector product of it all."""
        return sum(row.products for row in self.rows)

    @property
    def flops(self) -> int:
        """Floating-point operations, those of the gradient included."""
        return self.gradient_flops + sum(row.flops for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the largest block of columns."""
        return max((row.nbytes for row in self.rows), default=0)

    def __str__(self) -> str:
        table = [("leaves", "form", "at", "products", "block", "flops", "bytes")]
        table += [
            (
                ", ".join(row.leaves), row.form, row.node, f"{row.products:,}", f"{row.block}",
                f"{row.flops:,}", f"{row.nbytes:,}",
            )
            for row in self.rows
        ]  # fmt: skip
        title = f"diagonal of {self.parameters:,} parameters by {self.products:,} products: {self.flops:,} flops"
        return title + "\n" + aligned(table, right={3, 4, 5, 6}, widest=60)


@dataclass(frozen=True, eq=False)
class HessianDiagonal:
    """What `hessian_diagonal` returns: `(params, *args) -> diagonal`, and `plan(params, *args)`."""

    loss: Callable[..., Any]
    rules: RuleSet | None
    block_size: int | None
    byte_limit: int
    progress: Progress | None

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The diagonal, a pytree like `params`."""
        problem = _Problem.of(self.loss, params, args, kwargs)
        leaves = jax.jit(lambda values: self._leaves(problem, values))(problem.call.values)
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    def plan(self, params: Any, *args: Any, **kwargs: Any) -> Plan:
        """What it will cost; nothing is computed, and `jax.ShapeDtypeStruct`s are enough."""
        problem = _Problem.of(self.loss, params, args, kwargs)
        found: list[Columns] = []

        def planned(values: Any) -> int:
            found.extend(columns for columns, *_ in self._columns(problem, values))
            return 0

        shapes = [jax.ShapeDtypeStruct(jnp.shape(v), jnp.result_type(v)) for v in problem.call.values]
        jax.eval_shape(planned, shapes)
        rows = [PlanRow(tuple(problem.paths[i] for i in problem.zero), "zero", "", 0, 0, 0, 0)]
        rows = rows if problem.zero else []
        for c in found:
            shape = "×".join(map(str, c.node.variable.aval.shape))
            where = f"itself [{shape}]" if c.node.activations is None else f"its product [{shape}]"
            names = tuple(problem.paths[i] for i in c.node.leaves)
            rows.append(PlanRow(names, c.form, where, c.count, c.block, c.count * c.flops, c.block * c.nbytes))
        return Plan(tuple(rows), problem.parameters, problem.gradient_flops(self.rules))

    def _columns(self, problem: _Problem, values: Any) -> Any:
        """For every node, how it is computed and what is needed to."""
        wanted = list(
            dict.fromkeys(
                v
                for node in problem.nodes
                for v in (node.variable, node.data, *node.free)
                if v is not None and not isinstance(v, _compat.Literal)
            )
        )
        head = _compat.with_results(problem.jaxpr, wanted)
        known = dict(zip(wanted, _compat.evaluate(head, (), [*problem.constants, *values]), strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, _compat.Literal) else known[atom]

        for node in problem.nodes:
            value = node.from_variable(known[node.variable])
            product = hessian_of(node, [known[v] for v in node.free], value, self.rules)
            columns = choose(node, product, value, self.byte_limit, self.block_size)
            data = None if node.data is None else read(node.data)
            yield columns, product, data, value.dtype

    def _leaves(self, problem: _Problem, values: Any) -> list[Any]:
        given = {i: values[k] for k, i in enumerate(problem.call.variables)}
        found = {i: jnp.zeros_like(given[i]) for i in problem.leaves}
        planned = list(self._columns(problem, values))
        total = sum(columns.count for columns, *_ in planned)
        before = 0
        for columns, product, data, dtype in planned:
            a = columns.node.canonical_activations(data)
            done = None if self.progress is None else _reporter(self.progress, columns, before, total)
            diagonal = diagonal_of(columns, product, a, dtype, done)
            for leaf, entries in columns.node.split(diagonal).items():
                index = problem.call.variables[leaf - len(problem.constants)]
                found[index] = entries.astype(found[index].dtype)
            before += columns.count
        return [found[i] for i in problem.leaves]


def _reporter(progress: Progress, columns: Columns, before: int, total: int) -> Callable[[Any], None]:
    def report(number: Any) -> None:
        progress(before + round(columns.count * (int(number) + 1) / columns.blocks), total)

    return functools.partial(jax.debug.callback, report)


@dataclass(frozen=True, eq=False)
class _Problem:
    """The loss as a jaxpr, and its nodes. `leaves` are the leaves of the call that are parameters."""

    call: Call
    leaves: tuple[int, ...]
    paths: dict[int, str]
    jaxpr: Any
    constants: list[Any]
    nodes: list[Node]
    zero: tuple[int, ...]

    @classmethod
    def of(cls, loss: Callable[..., Any], params: Any, args: Any, kwargs: Any) -> _Problem:
        call = Call.of((params, *args), kwargs, is_array)
        named = jax.tree.leaves_with_path(params)
        for path, leaf in named:
            dtype = getattr(leaf, "dtype", None)
            if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(
                    f"hessian_diagonal: params{jax.tree_util.keystr(path)} is {leaf!r}, which has no real "
                    "derivatives; pass floating-point arrays, and other values as further arguments."
                )

        def flat(*values: Any) -> list[Any]:
            call_args, call_kwargs = call.arguments(call.filled(values))
            return [loss(*call_args, **call_kwargs)]

        closed = traced(flat, call.values, loss)
        jaxpr, constants = _compat.with_constants_as_inputs(_compat.inlined(closed))
        result = jaxpr.outvars[0].aval
        if result.shape != () or not jnp.issubdtype(result.dtype, jnp.floating):
            raise TypeError(
                f"hessian_diagonal: the loss returns {result.str_short()}, but a Hessian is that of one real "
                "scalar; return the mean or the sum over the examples."
            )
        inputs = [len(constants) + call.variables.index(i) for i in range(len(named))]
        affine = [i for i in inputs if why_curved(jaxpr, i) is None]
        nodes = find_nodes(jaxpr, [i for i in inputs if i not in affine])
        paths = {i: jax.tree_util.keystr(p) for i, (p, _) in zip(inputs, named, strict=True)}
        return cls(call, tuple(range(len(named))), paths, jaxpr, constants, nodes, tuple(affine))

    @property
    def parameters(self) -> int:
        return sum(self.call.leaves[i].size for i in self.leaves)

    def gradient_flops(self, rules: RuleSet | None) -> int:
        """Floating-point operations of the gradient, which is linearised."""
        from funcprop.flops import of_jaxpr

        inputs = [v.aval for v in self.jaxpr.invars]
        first = len(self.constants)
        positions = tuple(first + self.call.variables.index(i) for i in self.leaves)
        gradient = jax.grad(lambda *a: _compat.evaluate(self.jaxpr, (), a)[0], positions)
        return of_jaxpr(jax.make_jaxpr(gradient)(*inputs))


def hessian_diagonal(
    loss: Callable[..., Any],
    *,
    rules: RuleSet | None = None,
    block_size: int | None = None,
    byte_limit: int = 256 << 20,
    progress: Progress | None = None,
) -> HessianDiagonal:
    """The exact diagonal of the Hessian: `hessian_diagonal(loss)(params, *args)`, a pytree like `params`.

    `d_p = ∂²L/∂θ_p²`, with no factor of its own: of a mean over examples it is the diagonal of the mean
    Hessian. Exact for any graph (residual connections, attention, tied weights, loops).

    A leaf in which the loss is piecewise affine has the diagonal zero. A weight of one product, and the bias
    added to it, are reached through the product's result `Z`, of which the loss's Hessian gives

        d[i, q] = Σ_{s, m, m'} a[s, m, i] a[s, m', i] ∂²L/∂Z[s, m, q]∂Z[s, m', q],

    `s` the examples that the loss keeps apart (found from its equations), `m` the positions that it mixes: by
    one product with that Hessian for every `(m, q)` or every `(i, q)`, whichever takes fewer operations. Any
    other leaf takes one product for each entry. `hessian_diagonal(loss).plan(params, *args)` says all this in
    numbers before anything is computed.

    The result can be jitted, and should be if it is called repeatedly.

    Args:
        loss: `loss(params, *args)`, one real scalar, twice differentiable by JAX.
        rules: a rule set; `fp.rules.default` if None.
        block_size: how many products are made at once; chosen by bytes if None.
        byte_limit: the most bytes that the tangents and cotangents of a block may take.
        progress: called as `progress(done, total)` with numbers of products, from within the computation.

    Raises:
        TypeError: the loss is not one real scalar, or a leaf of `params` is not a floating-point array.
        ValueError: `block_size` or `byte_limit` is not positive.

    Reference: Dangel, Tatzel and Hennig, "ViViT", TMLR 2022, and Dangel, Kunstner and Hennig, "BackPACK", ICLR
    2020, section 3, for sequential networks; Powell and Toint, SIAM J. Numer. Anal. 16, 1979, for sharing
    products between independent parts.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
        >>> diagonal = fp.curvature.hessian_diagonal(loss)
        >>> print(diagonal(jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 0.0]])))
        [10.  4.]
        >>> print(diagonal.plan(jnp.zeros(2), jnp.ones((2, 2))).products)
        1
    """
    for name, value in (("block_size", block_size), ("byte_limit", byte_limit)):
        if value is not None and value <= 0:
            raise ValueError(f"hessian_diagonal: {name}={value}; pass a positive number, or leave it out.")
    return HessianDiagonal(loss, rules, block_size, byte_limit, progress)
