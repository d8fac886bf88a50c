"""Curvature of a data set in minibatches, from what makes it of one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from funcprop.curvature.accumulation import Accumulated
from funcprop.curvature.data_operator import mean_operator
from funcprop.curvature.data_set import DataSet, Progress
from funcprop.curvature.device_spread import devices_of
from funcprop.curvature.minibatches import Batches, Loader, check_deterministic
from funcprop.operators.linear_operator import LinearOperator
from funcprop.operators.scipy_conversion import to_scipy


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
            those of their positions. They are given to the factory as `weights=`; a loss of a whole batch, as
            in `fp.hessian`, has to take them and to return the weighted mean.
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
            return _of(data, factory, params, more, options)

        return at

    return with_factory


def _of(
    data: DataSet, factory: Callable[..., Any], params: PyTree, more: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """The operator of all data, if a factory makes operators; else the mean of what it returns."""
    key = options.pop("key", None)

    def at(*arguments: Any, **given: Any) -> Any:
        return factory(params, *arguments, *more, **options, **given)

    made = data.types(at, key)
    if isinstance(made, LinearOperator) and not made.has_mean:
        return mean_operator(data, at, key=key)
    return data.mean(at, key=key).mean


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
    return to_scipy(over(batches, progress=progress)(operator)(params))
