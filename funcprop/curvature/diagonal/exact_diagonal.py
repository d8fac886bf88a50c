"""The exact diagonal of a Hessian, for any function.

P separate Hessian-vector products give it, each at the price of a few gradients. Here the gradient is
linearised once, and the products are made in blocks under `vmap`; and they are fewer, because a weight of a
product acts only through that product's result (`nodes`): where examples do not mix, a
dense layer of `O` outputs needs `O` products, not `I × O`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.curvature.diagonal.column_loops import diagonals_of
from funcprop.curvature.diagonal.column_programs import programs
from funcprop.curvature.diagonal.columns import OUTPUTS, ColumnForm, ColumnLoop
from funcprop.curvature.diagonal.entries import find_nodes
from funcprop.curvature.diagonal.loss_terms import terms
from funcprop.curvature.diagonal.nodes import LossNode
from funcprop.curvature.diagonal.piecewise import why_curved
from funcprop.graph.graph import aligned
from funcprop.operators.parameters import Where, shown, single_at_least
from funcprop.operators.subset import restricted
from funcprop.program.call import Call, is_array, require_values, without_aux
from funcprop.program.flops import of_jaxpr
from funcprop.program.layer_calls import without_marks
from funcprop.program.program import Program
from funcprop.program.sizes import budget_bytes
from funcprop.rules.rule_set import RuleSet

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PlanRow:
    """How the diagonal of some leaves is computed.

    `form` is `"zero"` (the loss is piecewise affine in them), `"units"`, `"directions"` or `"outputs"`
    (`columns`); `products` are the products with the Hessian at `node`, or the sweeps
    backwards from outputs up to which the loss is piecewise affine; `block` is how many are made at once,
    `flops` those of all of them, and `nbytes` what one block holds. Rows with the same `program` share what
    is compiled; of zero there is none.
    """

    leaves: tuple[str, ...]
    form: str
    node: str
    products: int
    block: int
    flops: int
    nbytes: int
    program: int | None


@dataclass(frozen=True)
class Plan:
    """The predicted cost of an exact diagonal. `print` shows a table."""

    rows: tuple[PlanRow, ...]
    parameters: int
    gradient_flops: int

    @property
    def products(self) -> int:
        """Products with Hessians of parts of the loss; each costs less than one of all of it."""
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
        table = [("leaves", "form", "at", "products", "block", "flops", "bytes", "program")]
        table += [
            (
                ", ".join(row.leaves), row.form, row.node, f"{row.products:,}", f"{row.block}",
                f"{row.flops:,}", f"{row.nbytes:,}", "" if row.program is None else f"{row.program}",
            )
            for row in self.rows
        ]  # fmt: skip
        title = (
            f"diagonal of {self.parameters:,} parameters by {self.products:,} products: {self.flops:,} flops"
        )
        return title + "\n" + aligned(table, right={3, 4, 5, 6, 7}, widest=60)


@dataclass(frozen=True)
class ProductOptions:
    """How the products are made; hashable."""

    rules: RuleSet | None
    block_size: int | None
    byte_limit: int
    progress: Progress | None

    def programs(self, problem: Problem, values: Any) -> tuple[list[ColumnLoop], Callable[[Any], Any]]:
        """All programs, and what gives the values of the variables that they read."""
        wanted = [v for n in problem.nodes for v in (n.variable, n.data, *n.free) if v is not None]
        wanted = list(dict.fromkeys(_jax.variables(wanted)))
        head = _jax.with_results(problem.jaxpr, wanted)
        known = dict(zip(wanted, _jax.evaluate(head, (), [*problem.constants, *values]), strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, _jax.Literal) else known[atom]

        return programs(problem.nodes, read, self.rules, self.byte_limit, self.block_size), read

    def leaves(self, problem: Problem, values: Any) -> list[Any]:
        """The diagonal, leaf by leaf."""
        first = len(problem.constants)
        found = [jnp.zeros(v.aval.shape, single_at_least(v.aval.dtype)) for v in problem.parameters]
        planned, read = self.programs(problem, values)
        counter = None
        if self.progress is not None and planned:
            counter = _Counter(self.progress, sum(program.products for program in planned))
        for program in planned:
            done = None if counter is None else counter.of(program)
            data = [None if m.node.data is None else read(m.node.data) for m in program.members]
            for columns, diagonal in zip(program.members, diagonals_of(program, data, done), strict=True):
                for position, entries in columns.node.split(diagonal).items():
                    found[position - first] += entries.astype(found[position - first].dtype)
        return found


@dataclass(frozen=True, eq=False)
class HessianDiagonal:
    """What `hessian_diagonal` returns: `(params, *args) -> diagonal`, and `plan(params, *args)`."""

    loss: Callable[..., Any]
    options: ProductOptions
    where: Where | None = None

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The diagonal, a pytree like `params`."""
        given = {"params": params, **{f"argument {i + 1}": value for i, value in enumerate(args)}, **kwargs}
        require_values("hessian_diagonal", given, "hessian_diagonal(loss).plan(…)")
        loss, params = restricted(self.loss, params, self.where)
        paths, traced, values = _traced(loss, params, args, kwargs)
        # What is compiled would keep the function alive that is told of the progress.
        compiled = _diagonal if self.options.progress is None else jax.jit(_leaves, static_argnums=(2, 3))
        leaves = compiled(traced, values, len(paths), self.options)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            broken = [p for p, leaf in zip(paths, leaves, strict=True) if not jnp.isfinite(leaf).all()]
            if broken:
                raise FloatingPointError(
                    f"hessian_diagonal: the diagonal is not finite at {shown(*broken)}; "
                    "fp.backprop(loss)(...).first_nonfinite() says where that begins."
                )
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    def plan(self, params: Any, *args: Any, **kwargs: Any) -> Plan:
        """Predict the cost; nothing is computed, and `jax.ShapeDtypeStruct`s are enough."""
        paths, traced, values = _traced(*restricted(self.loss, params, self.where), args, kwargs)
        problem = Problem.of(traced, len(paths))
        found: list[ColumnLoop] = []

        def planned(values: Any) -> int:
            found.extend(self.options.programs(problem, values)[0])
            return 0

        def path(position: int) -> str:
            return paths[position - len(problem.constants)]

        jax.eval_shape(planned, [jax.ShapeDtypeStruct(jnp.shape(v), _dtype(v)) for v in values])
        rows = [PlanRow(tuple(map(path, problem.zero)), "zero", "", 0, 0, 0, 0, None)]
        rows = rows if problem.zero else []
        for number, program in enumerate(found):
            B, size, members = program.block, program.block * program.nbytes, program.members
            for of_row in [members] if program.form == OUTPUTS else [(m,) for m in members]:
                first = of_row[0]
                names = tuple(path(leaf) for m in of_row for leaf in m.node.leaves)
                each = program.flops + (0 if program.form == OUTPUTS else first.own_flops())
                count = first.count
                rows.append(PlanRow(names, first.form, _where(first), count, B, count * each, size, number))
        size = sum(math.prod(v.aval.shape) for v in problem.parameters)
        return Plan(tuple(rows), size, problem.gradient_flops())


def _leaves(traced: Program, values: Any, count: int, options: ProductOptions) -> list[Any]:
    return options.leaves(Problem.of(traced, count), values)


_diagonal = jax.jit(_leaves, static_argnums=(2, 3))


def _where(columns: ColumnForm) -> str:
    """The variable that columns are of."""

    def shown(v: Any) -> str:
        return f"[{'×'.join(map(str, v.aval.shape))}]"

    if columns.cut is not None:
        return f"outputs {shown(columns.cut.outputs)}"
    own = columns.node.activations is None
    return f"{'itself' if own else 'its product'} {shown(columns.node.variable)}"


def _dtype(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else jnp.result_type(value)


class _Counter:
    """Products that are done, in whatever order the blocks end, and from the first for every run."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0
        self.lock = threading.Lock()

    def of(self, program: ColumnLoop) -> Callable[[Any], None]:
        """Make the callback that counts an iteration of this program when it has been computed."""
        products = program.products_of_steps()

        def count(number: Any) -> None:
            with self.lock:
                done = self.done + products[int(number)]
                self.done = done % self.total
                self.progress(done, self.total)

        return functools.partial(jax.debug.callback, count)


def _traced(
    loss: Callable[..., Any], params: Any, args: Any, kwargs: Any
) -> tuple[tuple[str, ...], Program, list[Any]]:
    """The paths of the parameters, the loss as a function of all arrays, and these, parameters first."""
    named = jax.tree.leaves_with_path(params)
    paths = tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named)
    for path, (_, leaf) in zip(paths, named, strict=True):
        if not is_array(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"hessian_diagonal: the parameter {shown(path)} is {leaf!r}, which has no real "
                "derivative; pass floating-point arrays, leave it out by where=, or give it as a further "
                "argument."
            )
    call = Call.of((params, *args), kwargs, is_array)

    def flat(*values: Any) -> list[Any]:
        call_args, call_kwargs = call.arguments(call.filled(values))
        return jax.tree.leaves(loss(*call_args, **call_kwargs))

    traced = Program.of(flat, *call.values, called=loss)
    results = traced.results
    if [r.shape for r in results] != [()] or not jnp.issubdtype(results[0].dtype, jnp.floating):
        types = ", ".join(jax.typeof(r).str_short() for r in results)
        raise TypeError(
            f"hessian_diagonal: the loss returns ({types}), but a Hessian is that of one real scalar; "
            "return the mean or the sum over the examples, alone."
        )
    return paths, traced, call.values


@dataclass(frozen=True, eq=False)
class Problem:
    """The loss as a jaxpr of its constants, the parameters, and all other arrays; and its nodes.

    `zero` are the positions of the parameters in which the loss is piecewise affine.
    """

    jaxpr: Any
    constants: Sequence[Any]
    count: int
    nodes: list[LossNode]
    zero: tuple[int, ...]

    @classmethod
    def of(cls, traced: Program, count: int) -> Problem:
        """Take a loss apart whose leading `count` arguments are the parameters."""
        jaxpr = without_marks(_jax.open_jaxpr(_jax.inlined(traced.jaxpr)))
        # Positional arguments come before keyword ones, so that the parameters are the first variables.
        positions = range(len(traced.constants), len(traced.constants) + count)
        zero = tuple(i for i in positions if why_curved(jaxpr, i) is None)
        curved = [i for i in positions if i not in zero]
        nodes = [node for term in terms(jaxpr, curved) for node in find_nodes(term, curved)]
        return cls(jaxpr, traced.constants, count, nodes, zero)

    @property
    def parameters(self) -> list[Any]:
        """Their variables."""
        return self.jaxpr.invars[len(self.constants) : len(self.constants) + self.count]

    def gradient_flops(self) -> int:
        """Floating-point operations of the gradient, which is linearised."""
        positions = tuple(range(len(self.constants), len(self.constants) + self.count))
        gradient = jax.grad(lambda *a: _jax.evaluate(self.jaxpr, (), a)[0], positions)
        return of_jaxpr(_jax.retrace(gradient, self.jaxpr))


def hessian_diagonal(
    loss: Callable[..., Any],
    *,
    where: Where | None = None,
    has_aux: bool = False,
    rules: RuleSet | None = None,
    at_once: int | None = None,
    budget: int | str = 256 << 20,
    progress: Progress | None = None,
) -> HessianDiagonal:
    """The exact diagonal of the Hessian: `hessian_diagonal(loss)(params, *args)`, a pytree like `params`.

    `d_p = ∂²L/∂θ_p²`, with no factor of its own: of a mean over examples it is the diagonal of the mean
    Hessian. Exact for any graph (residual connections, attention, tied weights, loops).

    A leaf in which the loss is piecewise affine has the diagonal zero. A weight of one product, and the bias
    added to it, are reached through the product's result `Z`, of which the loss's Hessian gives

        d[i, q] = Σ_{s, m, m'} a[s, m, i] a[s, m', i] ∂²L/∂Z[s, m, q]∂Z[s, m', q],

    `s` the examples that the loss keeps apart (found from its equations), `m` the positions that it mixes: by
    one product with that Hessian for every `(m, q)`, or for every `(i, q)`; or, where the loss is piecewise
    affine from `Z` up to some outputs (in relu networks, and in the last layer of any), by one sweep
    backwards for every output of an example, because the Gauss-Newton matrix is the Hessian there. Whichever
    takes the fewest operations is taken. Any other leaf takes one product for each entry, and a penalty that
    is a sum over entries (weight decay) one for all. `hessian_diagonal(loss).plan(params, *args)` says all
    this in numbers before anything is computed.

    Every call traces the loss, and so reads anew what it reads besides its arguments; what was compiled for
    an equal one is found again. Under `jit` nothing is traced again.

    Args:
        loss: `loss(params, *args)`, one real scalar, twice differentiable by JAX.
        where: a subset of the parameters, as in `fp.hessian`; the others are constants, None in the result.
        has_aux: `loss` returns the scalar and auxiliary data, which are left out.
        rules: a rule set; `fp.rules.default` if None.
        at_once: how many products are made at once; chosen by bytes if None.
        budget: the most bytes that the tangents and cotangents of a block may take.
        progress: called as `progress(done, total)` with numbers of products, from within the computation;
            `done` grows up to `total`.

    Raises:
        TypeError: the loss is not one real scalar, or a leaf of `params` is not a floating-point array.
        ValueError: `at_once` or `budget` is not positive.
        FloatingPointError: the diagonal is not finite, and not traced; the message has the parameters' paths.

    Reference: Dangel, Kunstner and Hennig, "BackPACK", ICLR 2020, for sequential networks; Powell and Toint,
    SIAM J. Numer. Anal. 16, 1979, for sharing products between independent parts.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
        >>> diagonal = fp.curvature.hessian_diagonal(loss)
        >>> print(diagonal(jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 0.0]])))
        [10.  4.]
        >>> print(diagonal.plan(jnp.zeros(2), jnp.ones((2, 2))).products)
        1
    """
    if at_once is not None and at_once <= 0:
        raise ValueError(f"hessian_diagonal: at_once={at_once}; pass a positive number, or leave it out.")
    options = ProductOptions(rules, at_once, budget_bytes(budget, "hessian_diagonal: budget"), progress)
    return HessianDiagonal(without_aux(loss) if has_aux else loss, options, where)
