"""Curvature of a data set that is visited in minibatches: the operator of all of it, and means over it.

`over(batches)(factory)(params)` is what `factory(params, *batch)` would be for one batch of all examples.
Only one minibatch is in memory at a time; whatever visits the data again notices if they are no longer the
same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from funcprop.curvature.accumulation import Accumulated, accumulated
from funcprop.curvature.minibatches import Batches, Loader, Minibatch, applied, check_deterministic
from funcprop.operators import products
from funcprop.operators.linear_operator import LinearOperator
from funcprop.operators.parameters import Parameters
from funcprop.operators.scipy_conversion import to_scipy
from funcprop.program.program import CompiledByTypes, Program

AXIS = "examples"  # of the mesh of devices
Progress = bool | Callable[[int, Accumulated], None]


class Total(NamedTuple):
    """A mean over all examples, and how many there are, or the sum of their weights."""

    mean: PyTree
    weight: Any


@dataclass(eq=False)
class DataSet:
    """Minibatches, and how they are visited; what `over` hands to a factory that knows what to do with it."""

    loader: Loader
    devices: tuple[Any, ...]
    progress: Progress
    state: Accumulated | None

    @functools.cached_property
    def first(self) -> Minibatch:
        """The first minibatch, whose types say what is made of all."""
        return next(iter(self.loader.visit("the first minibatch")))

    def mean(self, quantity: Callable[..., PyTree], *, key: Any = None) -> Total:
        """The mean of `quantity(*batch)`, by one pass; with `weights=` and `key=` if there are any."""
        tell = self.progress if callable(self.progress) else None
        evaluate = self.evaluated(lambda data, options: applied(quantity, data, **options), key)
        found = accumulated(evaluate, self.loader, self.state, tell)
        self.state = None  # It is of the first pass.
        return Total(found.mean, found.examples)

    def rows(self, quantity: Callable[..., PyTree], *, key: Any = None) -> PyTree:
        """What `quantity(*batch)` has for each example, of all examples, in their order."""
        return self.each(quantity, key=key)()

    def each(self, quantity: Callable[..., PyTree], *names: str, key: Any = None) -> Callable[..., PyTree]:
        """The function `(*more)` of what `quantity(*batch, name=more, …)` has for each example of all."""
        compiled = CompiledByTypes(lambda data, options: applied(quantity, data, **options))

        def of_all(*more: Any) -> PyTree:
            given = dict(zip(names, more, strict=True))
            found = [
                compiled(batch.data, _options(key, batch.number) | given)
                for batch in self.loader.visit("examples of minibatches")
            ]
            return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)

        return of_all

    def operator(self, factory: Callable[..., LinearOperator], *, key: Any = None) -> DataOperator:
        """The mean of the operators `factory(*batch, weights=…, key=…)`."""
        if self.state is not None:
            raise ValueError(
                "over: state= continues a mean over the data, but every product of an operator is a pass of "
                "its own; leave it out, and give solve() the last solution as start=."
            )
        made = self._types(factory, key)
        return DataOperator(OperatorOfMinibatch(self, factory, key), made.parameters)

    def of(self, factory: Callable[..., Any], params: PyTree, more: Any, options: dict[str, Any]) -> Any:
        """The operator of all data, if a factory makes operators; else the mean of what it returns."""
        key = options.pop("key", None)

        def at(*arguments: Any, **given: Any) -> Any:
            return factory(params, *arguments, *more, **options, **given)

        made = self._types(at, key)
        if isinstance(made, LinearOperator) and not made.has_mean:
            return self.operator(at, key=key)
        return self.mean(at, key=key).mean

    def _types(self, factory: Callable[..., Any], key: Any) -> Any:
        """The types of what a factory returns for the first minibatch.

        Raises:
            TypeError: there are weights, and it does not take them.
        """
        data = self.first.data
        try:
            return jax.eval_shape(lambda: applied(factory, data, **_options(key, 1)))
        except TypeError as error:
            if "weights" not in data or "unexpected keyword argument 'weights'" not in str(error):
                raise
            raise TypeError(
                "over: with weighted=True the factory is given weights=, and fp.hessian hands them on to "
                f"the loss, which does not take them ({error}); let it take weights=None and return the "
                "weighted mean."
            ) from error

    def evaluated(self, quantity: Callable[..., PyTree], key: Any) -> Callable[..., PyTree]:
        """`quantity(data, options, *more)` of one minibatch, compiled, on all devices."""
        compiled = CompiledByTypes(quantity)
        spread = Spread(quantity, self.devices) if len(self.devices) > 1 else None

        def evaluate(batch: Minibatch, *more: Any) -> PyTree:
            options = _options(key, batch.number)
            if spread is None:
                return compiled(batch.data, options, *more)
            return spread(batch, options, *more)

        return evaluate


def _options(key: Any, number: int) -> dict[str, Any]:
    """A key of its own for every minibatch."""
    return {} if key is None else {"key": jax.random.fold_in(key, number)}


# --- several devices ---------------------------------------------------------------------------


class Spread:
    """A quantity of a minibatch by several devices: each has its part of the examples; one reduction."""

    def __init__(self, quantity: Callable[..., PyTree], devices: Sequence[Any]) -> None:
        self.mesh = Mesh(np.asarray(devices), (AXIS,))
        self.quantity = quantity
        self.programs: dict[Any, Program] = {}

    def __call__(self, batch: Minibatch, options: Any, *more: Any) -> PyTree:
        """The quantity of the minibatch; what is left of an uneven one is computed by one device."""
        count = len(self.mesh.devices)
        whole, given = batch.size - batch.size % count, (options, *more)
        parts = []
        if whole:
            data = jax.tree.map(lambda a: a[:whole], batch.data)
            everywhere, split = (NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in ((), (AXIS,)))
            program, *rest = jax.device_put((self._program(data, whole // count, given), *given), everywhere)
            parts.append((_on_all(program, self.mesh, jax.device_put(data, split), *rest), data))
        if whole < batch.size:
            data = jax.tree.map(lambda a: a[whole:], batch.data)
            placed = (self._program(data, batch.size - whole, given), data, *given)
            program, *rest = jax.device_put(placed, self.mesh.devices.flat[0])
            parts.append((program.compiled(*rest), data))
        weights = [float(_weight(data)) for _, data in parts]
        total = sum(weights) or 1.0
        found = [jax.tree.map(jnp.asarray, jax.device_get(quantity)) for quantity, _ in parts]
        shares = [
            jax.tree.map(lambda x, w=weight: (w * x if w > 0 else jnp.zeros_like(x)) / total, quantity)
            for quantity, weight in zip(found, weights, strict=True)
        ]
        return functools.reduce(functools.partial(jax.tree.map, jnp.add), shares)

    def _program(self, data: Any, size: int, given: Any) -> Program:
        """The quantity of so many examples; what it reads besides its arguments is as it was first."""
        local = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((size, *jnp.shape(a)[1:]), jnp.result_type(a)), data
        )
        leaves, tree = jax.tree.flatten((local, given))
        types = tree, tuple((jnp.shape(a), jnp.result_type(a)) for a in leaves)
        if types not in self.programs:
            self.programs[types] = Program.of(self.quantity, local, *given)
        return self.programs[types]


@functools.partial(jax.jit, static_argnames="mesh")
def _on_all(program: Program, mesh: Mesh, data: Any, options: Any, *more: Any) -> PyTree:
    def part(program: Program, data: Any, options: Any, *more: Any) -> PyTree:
        if "key" in options:
            options = {"key": jax.random.fold_in(options["key"], jax.lax.axis_index(AXIS))}
        weight = _weight(data)
        found = program(data, options, *more)
        share = jax.tree.map(lambda x: jnp.where(weight > 0, weight * x, 0).astype(x.dtype), found)
        total = jax.lax.psum(weight, AXIS)
        mean = jax.tree.map(lambda x: x / jnp.where(total > 0, total, 1), jax.lax.psum(share, AXIS))
        return jax.tree.map(lambda x, q: x.astype(q.dtype), mean, found)

    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
    specs = (everywhere, split, everywhere, *[everywhere] * len(more))
    spread = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False)
    return spread(program, data, options, *more)


def _weight(data: dict[str, Any]) -> Any:
    """What the examples count: their number, or the sum of their weights."""
    if "weights" in data:
        return data["weights"].sum()
    return float(jax.tree.leaves(data)[0].shape[0])


def devices_of(devices: Any) -> tuple[Any, ...]:
    """Devices, given as a sequence, a mesh or a sharding.

    Raises:
        TypeError: it is none of these.
    """
    if devices is None:
        return ()
    if isinstance(devices, NamedSharding):
        devices = devices.mesh
    if isinstance(devices, Mesh):
        return tuple(devices.devices.flat)
    if isinstance(devices, list | tuple) and devices and all(hasattr(d, "platform") for d in devices):
        return tuple(devices)
    raise TypeError(
        f"over: devices={devices!r}; pass jax.devices(), a jax.sharding.Mesh or a NamedSharding on one."
    )


# --- the operator -----------------------------------------------------------------------------


@dataclass(eq=False)
class OperatorOfMinibatch:
    """How the operator of a minibatch is made, and what visits the data."""

    data: DataSet
    factory: Callable[..., LinearOperator]
    key: Any
    compiled: dict[Any, Any] = field(default_factory=dict)

    def mean(self, quantity: Callable[..., PyTree], *more: Any, shown: str) -> PyTree:
        """The mean of `quantity(operator, *more)`, whose numbers may be infinite or NaN."""

        def of_minibatch(data: Any, options: Any, *more: Any) -> PyTree:
            return quantity(applied(self.factory, data, **options), *more)

        if quantity not in self.compiled:
            self.compiled[quantity] = self.data.evaluated(of_minibatch, self.key)
        total, count = None, 0.0
        for batch in self.data.loader.visit(shown):
            found, weight = self.compiled[quantity](batch, *more), float(batch.total)
            weighted = jax.tree.map(lambda x, w=weight: w * x if w > 0 else jnp.zeros_like(x), found)
            total = weighted if total is None else jax.tree.map(jnp.add, total, weighted)
            count += weight
        return jax.tree.map(lambda x: x / (count or 1.0), total)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class DataOperator(LinearOperator):
    """The mean of an operator over a data set, weighted by the examples: every product is one pass over it.

    All queries of `LinearOperator` work; python makes their products, so none can be inside of `jit`. Columns
    go through the data together: the matrix, a trace, or ten random vectors are one pass.
    """

    source: OperatorOfMinibatch = field(metadata={"static": True})
    parameters: Parameters = field(metadata={"static": True})

    @property
    def on_host(self) -> bool:
        """Always."""
        return True

    def columns(self, matrix: Float[Array, "P m"]) -> Float[Array, "P m"]:
        """`A V`, by one pass over the data."""
        if isinstance(matrix, jax.core.Tracer):
            raise TypeError(
                "an operator over a data set cannot be used inside of jit, grad or vmap: its products are "
                "passes over the minibatches; call its methods outside, or use that of one batch inside."
            )
        return self.source.mean(_columns, matrix, shown="a product over minibatches")

    def linear_map(self) -> Callable[[PyTree], PyTree]:
        """The product, by a pass over the data."""
        names = self.parameters
        return lambda v: names.unravel(self.columns(names.ravel(v)[:, None])[:, 0])

    def exact_diagonal(self, at_once: int | None) -> PyTree:
        """The mean of the minibatches' diagonals, by one pass."""
        del at_once  # Of a minibatch, columns are chosen for their bytes.
        return self.source.mean(_diagonal, shown="a diagonal over minibatches")


def _columns(operator: LinearOperator, matrix: Array) -> Array:
    if matrix.shape[1] == 1:
        return products.flat_product(operator, matrix[:, 0])[:, None]
    return products.products(operator, matrix, None)


def _diagonal(operator: LinearOperator) -> PyTree:
    return operator.exact_diagonal(None)


def over(
    batches: Batches,
    *,
    weighted: bool = False,
    devices: Any = None,
    progress: Progress = False,
    state: Accumulated | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Curvature of a whole data set, from minibatches: `over(batches)(factory)(params, …)`.

    It is what `factory(params, x, y)` is for one batch of all examples, up to rounding, whatever the sizes of
    the minibatches:

    * `fp.hessian(loss)`, `fp.ggn(…)`, `fp.fisher(…)`, or any function `(params, *batch)` that returns a
      linear operator: an operator with all queries (`@`, `solve`, `eigsh`, `trace`, `spectrum`, …), each
      product of which is one pass over the data.
    * `fp.kfac(…)`: one pass. `fp.ekfac(…)`: two, because the eigenvalues are in the basis of all data.
    * `fp.curvature.laplace(…)`: the posterior of all data. `fp.curvature.influence(…)`: that of every
      example.
    * `fp.per_example(…)`, as `over(batches)(fp.per_example(model, loss))(params, {"norm", …})`.
    * any other function that returns arrays, such as `fp.curvature.hessian_diagonal(loss)`: the mean.

    A quantity of a minibatch has to be a mean over its examples, as all of these are for a mean loss.

    Args:
        batches: the minibatches, as a list or a function that returns an iterator; each a tuple of arguments
            (or one argument), whose arrays have the examples as their first axis.
        weighted: the last item of every minibatch is its examples' weights, numbers ≥ 0, 0 for padding, or
            those of their positions. They
            are given to the factory as `weights=`; a loss of a whole batch, as in `fp.hessian`, has to take
            them and to return the weighted mean.
        devices: those that share every minibatch, `jax.devices()` or a `jax.sharding.Mesh`; one by default.
        progress: True for a progress bar, or a function that is called as `progress(number, state)` after
            every minibatch of a mean; saving `state` there makes the pass resumable.
        state: where an interrupted pass had come to, to continue; of the first pass, for two.

    Raises:
        LoaderError: a later pass has other minibatches (a loader that shuffles or augments anew), or there
            are none.
        ValueError: a minibatch has no common first axis or wrong weights.
        FloatingPointError: a mean is not finite; it names the minibatch and the path.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp
        >>> batches = [(jnp.array([[1.0, 0.0]]),), (jnp.array([[0.0, 2.0]] * 3),)]
        >>> H = fp.curvature.over(batches)(fp.hessian(lambda w, x: jnp.mean((x @ w) ** 2)))(jnp.zeros(2))
        >>> print(H.dense())
        [[0.5 0. ]
         [0.  6. ]]
        >>> x = H.solve(jnp.array([1.5, 18.5]), damping=0.5)
        >>> print(f"{x[0]:.3f} {x[1]:.3f}")
        1.500 2.846
    """
    loader = Loader("over", batches, weighted, progress is True)

    def with_factory(factory: Callable[..., Any]) -> Callable[..., Any]:
        def at(params: PyTree, *more: Any, **options: Any) -> Any:
            data = DataSet(loader, devices_of(devices), progress, state)
            if hasattr(factory, "over_data"):
                return factory.over_data(data, params, *more, **options)
            return data.of(factory, params, more, options)

        return at

    return with_factory


def over_batches(
    operator: Callable[..., Any],
    params: PyTree,
    batches: Batches,
    *,
    check: bool = True,
    progress: bool = False,
) -> Any:
    """The mean of an operator over a data set, for SciPy's solvers: every product is one pass over the data.

    It is `fp.curvature.over(batches)(operator)(params).to_scipy()`; without SciPy, use that operator itself.

    Args:
        operator: `operator(params, *batch)`, a linear operator of a mean over the examples.
        params: the parameters.
        batches: the minibatches, as a list or a function that returns them.
        check: whether to go through the data twice first, and to compare (`check_deterministic`).
        progress: whether every product shows a progress bar on stderr (needs rich), if that is a terminal.

    Raises:
        LoaderError: as in `check_deterministic`, or there are no minibatches.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp, scipy.sparse.linalg
        >>> hessian = fp.hessian(lambda w, x: jnp.mean((x @ w) ** 2))
        >>> data = [(jnp.array([[1.0, 0.0]]),), (jnp.array([[0.0, 2.0], [0.0, 2.0]]),)]
        >>> A = fp.curvature.over_batches(hessian, jnp.zeros(2), data)
        >>> print(scipy.sparse.linalg.cg(A, [2.0, 16.0])[0].round(3))
        [3. 3.]
    """
    if check:
        check_deterministic(batches if callable(batches) else lambda: batches)
    names = Parameters.of(params)
    data = DataSet(Loader("over_batches", batches, False, progress), (), False, None)
    source = OperatorOfMinibatch(data, lambda *batch: operator(params, *batch), None)
    return to_scipy(DataOperator(source, names))
