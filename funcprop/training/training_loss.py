"""The loss of a training step: how it is called, in which precision, and as a mean over parts of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcprop.program.batch_arguments import arguments
from funcprop.program.call import name_of, pair
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.transforms import value_and_grad
from funcprop.training.mixed_precision import MixedPrecision

ROUNDING = 1e3  # times the machine epsilon: how far the mean of two halves may be from the whole


@dataclass(frozen=True)
class TrainingLoss:
    """A user's loss with everything that `fit` may give it and take from it.

    `loss(params[, model state], *batch[, key=]) -> value`, with `stateful` or `has_aux` a pair whose second
    part is the new model state, the auxiliary numbers, or the pair of both.
    """

    loss: Callable[..., Any]
    has_aux: bool = False
    stateful: bool = False
    keyed: bool = False
    precision: MixedPrecision | None = None
    accumulate: int = 1
    weight: Callable[..., Any] | None = None

    def whole(self, params: Any, model: Any, batch: Any, key: Any) -> tuple[Any, tuple[Any, Any]]:
        """Compute `(value, (model state, aux))` of a batch at once."""
        cast = (lambda tree: tree) if self.precision is None else self.precision.cast
        options = {"key": key} if self.keyed else {}
        first = (cast(params), model) if self.stateful else (cast(params),)
        returned = self.loss(*first, *arguments(cast(batch), self.loss, *first, **options), **options)
        aux: Any = {}
        if self.stateful or self.has_aux:
            returned, extra = pair(returned, self.loss)
            if self.stateful and self.has_aux:
                model, aux = pair(extra, self.loss)
            else:
                model, aux = (extra, aux) if self.stateful else (model, extra)
        if self.precision is not None:
            returned = jnp.asarray(returned).astype(jnp.promote_types(returned.dtype, jnp.float32))
        return returned, (model, self._numbers(aux))

    def _numbers(self, aux: Any) -> Any:
        shapes = {name: jnp.shape(x) for name, x in aux.items()} if isinstance(aux, dict) else None
        if shapes is None or any(shapes.values()) or "loss" in shapes:
            raise TypeError(
                f"fit: {name_of(self.loss)} has the auxiliary data {shapes or type(aux).__name__}; with "
                "has_aux=True it is a dict of scalars with names other than 'loss', whose means over the "
                "epoch are metrics. Arrays that change from step to step are a model state (model_state=)."
            )
        return {name: jnp.asarray(x) for name, x in aux.items()}

    def value(self, params: Any, model: Any, batch: Any, key: Any) -> Any:
        """Compute the value alone: what line searches evaluate, and what a replay looks into."""
        if self.accumulate == 1:
            return self.whole(params, model, batch, key)[0]
        values, weights = [], []
        for i in range(self.accumulate):
            part = part_of(split(batch, self.accumulate), i)
            found, (model, _) = self.whole(params, model, part, jax.random.fold_in(key, i))
            values.append(found)
            weights.append(self._weight(part))
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    def differentiated(
        self, rules: RuleSet | None, params: Any, model: Any, batch: Any, key: Any, factor: Any
    ) -> tuple[Any, Any, tuple[Any, Any]]:
        """Compute `(value, gradient of factor · value, (model state, aux))`, part by part if it is split."""
        derivative = self._derivative(rules, factor)
        if self.accumulate == 1:
            (_, (value, rest)), gradient = derivative(params, model, batch, key)
            return value, gradient, rest

        parts = split(batch, self.accumulate)

        def body(sums: Any, i: Any) -> tuple[Any, Any]:
            total, (model, *summed) = sums
            part = part_of(parts, i)
            (_, (value, (model, aux))), gradient = derivative(params, model, part, jax.random.fold_in(key, i))
            weight = self._weight(part)
            found = [value, gradient, aux]
            summed = jax.tree.map(lambda s, x: s + (weight * x).astype(s.dtype), summed, found)
            return (total + weight, (model, *summed)), None

        (_, (value, (after, aux))), _ = jax.eval_shape(derivative, params, model, part_of(parts, 0), key)
        # A state may be of another dtype after the first part, such as float32 averages of float64.
        model = jax.tree.map(lambda x, new: x if x.dtype == new.dtype else x.astype(new.dtype), model, after)
        zeros = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), x.dtype), [value, params, aux])
        start = (jnp.zeros((), value.dtype), (model, *zeros))
        (total, (model, *summed)), _ = jax.lax.scan(body, start, jnp.arange(self.accumulate))
        value, gradient, aux = jax.tree.map(lambda x: x / total.astype(x.dtype), summed)
        return value, gradient, (model, aux)

    def _derivative(self, rules: RuleSet | None, factor: Any) -> Callable[..., Any]:
        """Make the function `((factor · value, (value, (model state, aux))), gradient)` of a part."""

        def scaled(params: Any, model: Any, batch: Any, key: Any) -> tuple[Any, Any]:
            value, rest = self.whole(params, model, batch, key)
            return (value, (value, rest)) if factor is None else (value * factor, (value, rest))

        scaled.__name__ = name_of(self.loss)
        return value_and_grad(scaled, has_aux=True, rules=rules)

    def _weight(self, part: Any) -> Any:
        return 1.0 if self.weight is None else self.weight(*arguments(part, self.weight))

    def require_mean(self, params: Any, batch: Any) -> None:
        """Compare the loss of two parts with the mean of their losses, where both should be equal.

        Raises:
            ValueError: the loss is not a mean over the examples, so that accumulation would train another.
        """
        if self.accumulate == 1 or self.stateful or self.keyed:
            return  # A batch norm or a dropout is another function of parts, as is well known.
        parts = split(batch, self.accumulate)
        both = jax.tree.map(lambda s, x: s[:2].reshape(-1, *s.shape[2:]) if jnp.ndim(x) else x, parts, batch)
        plain = TrainingLoss(self.loss, self.has_aux)
        evaluated = jax.jit(lambda params, batch: plain.whole(params, None, batch, None)[0])
        halves = [part_of(parts, i) for i in (0, 1)]
        weights = [float(self._weight(half)) for half in halves]
        losses = [evaluated(params, half) for half in halves]
        whole = evaluated(params, both)
        mean = float(np.dot(weights, losses) / sum(weights))
        error = abs(float(whole) - mean) / max(abs(float(x)) for x in (whole, *losses, 1e-30))
        if error > ROUNDING * jnp.finfo(whole.dtype).eps:  # A NaN is for the step to tell.
            raise ValueError(
                f"fit: accumulate={self.accumulate}, but {name_of(self.loss)} is not the mean of its parts: "
                f"{float(whole):.8g} of two parts together, {mean:.8g} as their mean. Pass weight=, a "
                "function of a batch: by how many examples or tokens its loss is divided."
            )


def examples(batch: Any) -> int:
    """Return how many examples a batch has: the length of its arrays along their first axis."""
    return next((int(jnp.shape(x)[0]) for x in jax.tree.leaves(batch) if jnp.ndim(x)), 0)


def split(batch: Any, parts: int) -> Any:
    """Return a batch in so many parts, along a new first axis: part i has the examples i, i + parts, …

    So each part has its share of every device's examples. Numbers are the same for all parts.

    Raises:
        ValueError: the number of examples is no multiple of the number of parts.
    """
    sizes = sorted({int(jnp.shape(x)[0]) for x in jax.tree.leaves(batch) if jnp.ndim(x)})
    if len(sizes) != 1 or sizes[0] % parts:
        raise ValueError(
            f"fit: accumulate={parts} does not divide a batch whose arrays have "
            f"{' and '.join(map(str, sizes)) or 'no'} examples; take a multiple of {parts} for all of them."
        )
    size = sizes[0] // parts
    return jax.tree.map(
        lambda x: jnp.swapaxes(jnp.reshape(x, (size, parts, *x.shape[1:])), 0, 1) if jnp.ndim(x) else x, batch
    )


def part_of(parts: Any, index: Any) -> Any:
    """Return one part of a batch that was split."""
    return jax.tree.map(lambda x: x[index] if jnp.ndim(x) else x, parts)
