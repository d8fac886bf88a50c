"""`fit` of models as they are: modules of Equinox, nnx models with batch statistics and dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import funcprop as fp

RNG = np.random.default_rng(0)
BATCHES = [(RNG.normal(size=(8, 6)), RNG.integers(0, 4, 8)) for _ in range(3)]


def cross_entropy(logits: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def close(found: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        kind = jnp.result_type(a, jnp.float32)
        tolerance = 1e3 * float(jnp.finfo(kind).eps)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def last(*args: Any, **options: Any) -> Any:
    return list(fp.training.fit(*args, **options))[-1]


# --- Equinox -----------------------------------------------------------------------------------


class Gated(eqx.Module):
    """A module whose leaves are arrays, a function, a flag, python floats and integers."""

    net: eqx.nn.MLP
    dropout: eqx.nn.Dropout
    steps: jax.Array
    strength: float = 0.5

    def __call__(self, x: Any) -> Any:
        return self.strength * self.dropout(self.net(x)) * self.steps


MODULE = Gated(
    eqx.nn.MLP(6, 4, 10, 2, key=jax.random.key(0)), eqx.nn.Dropout(0.3, inference=True), jnp.array(2)
)


def module_loss(module: Any, x: Any, y: Any) -> Any:
    return cross_entropy(jax.vmap(module)(x), y)


def filtered(optimizer: Any, count: int) -> Any:
    """Train by Equinox's own transformations."""
    module = MODULE
    state = optimizer.init(eqx.filter(module, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(module: Any, state: Any, batch: Any) -> Any:
        _, gradient = eqx.filter_value_and_grad(module_loss)(module, *batch)
        updates, state = optimizer.update(gradient, state, eqx.filter(module, eqx.is_inexact_array))
        return eqx.apply_updates(module, updates), state

    for batch in BATCHES * count:
        module, state = step(module, state, batch)
    return module


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-2), optax.chain(optax.sgd(0.1), optax.ema(0.9))])
def test_a_module_of_equinox_as_it_is(optimizer: Any, tmp_path: Path) -> None:
    last(module_loss, MODULE, BATCHES, optimizer, epochs=1, checkpoints=tmp_path)
    evaluated = []
    found = last(
        module_loss,
        MODULE,
        BATCHES,
        optimizer,
        epochs=2,
        checkpoints=tmp_path,
        evaluate=lambda module: evaluated.append(module) or {},  # type: ignore[func-returns-value]
    )
    wanted = filtered(optimizer, 2)
    assert found.params.strength == 0.5
    assert found.params.net.activation is MODULE.net.activation
    for module in (found.params, evaluated[-1]):
        assert isinstance(module, Gated)
        close(*(eqx.filter(m, eqx.is_array) for m in (module, wanted)))


def test_a_plan_of_a_module_as_it_is() -> None:
    adam = optax.adam(1e-2)
    plans = fp.partition.plan(lambda m, batch: module_loss(m, *batch), optimizer=adam, budget="1MB")(
        MODULE, BATCHES[0], devices=4
    )
    plan = plans.named("data 4")
    arrays = eqx.filter(MODULE, eqx.is_inexact_array)
    placed, state = plan.place(MODULE, adam.init(arrays))
    placed, _, value = plan.step(adam)(placed, state, BATCHES[0])
    np.testing.assert_allclose(value, module_loss(MODULE, *BATCHES[0]), rtol=1e-12)
    close(plan.gradient(MODULE, BATCHES[0])[1], eqx.filter_grad(module_loss)(MODULE, *BATCHES[0]))
    # `fit` trains the same module under it; the plan's loss takes the batch as one argument.
    of_one = [{"batch": batch} for batch in BATCHES]
    loss = lambda m, batch: module_loss(m, *batch["batch"])  # noqa: E731
    plan = fp.partition.plan(loss, optimizer=adam, budget="1MB")(MODULE, of_one[0], devices=4).named("data 4")
    close(
        *(
            eqx.filter(m, eqx.is_array)
            for m in (last(loss, MODULE, of_one, adam, epochs=1, plan=plan).params, filtered(adam, 1))
        )
    )


# --- Flax nnx ----------------------------------------------------------------------------------


class Normalized(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def nnx_loss(model: Any, x: Any, y: Any) -> Any:
    return cross_entropy(model(x.astype(jnp.float32)), y)


def by_nnx(model: Any, optimizer: Any, count: int) -> Any:
    """Train by nnx's own optimizer, which changes the model."""
    trained = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    for batch in BATCHES * count:
        trained.update(model, nnx.grad(nnx_loss)(model, *batch))
    return model


def test_an_nnx_model_with_statistics_and_dropout(tmp_path: Path) -> None:
    """Weight decay would shrink running averages, were they parameters."""
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1))
    given = Normalized(nnx.Rngs(0))
    last(nnx_loss, given, BATCHES, optimizer, epochs=1, checkpoints=tmp_path)
    counts = []

    def evaluate(model: Any) -> dict[str, float]:
        model.eval()
        counts.append(int(model.dropout.rngs.count[...]))
        return {"test_loss": float(nnx_loss(model, *BATCHES[0]))}

    found = last(nnx_loss, given, BATCHES, optimizer, epochs=2, checkpoints=tmp_path, evaluate=evaluate)
    wanted = by_nnx(Normalized(nnx.Rngs(0)), optimizer, 2)
    for kind in (nnx.Param, nnx.BatchStat):
        close(nnx.state(found.params, kind), nnx.state(wanted, kind))
    assert counts == [6]
    assert int(found.params.dropout.rngs.count[...]) == 6
    assert int(given.dropout.rngs.count[...]) == 0  # What was given is as it was.
    again = last(nnx_loss, found.params, BATCHES, optimizer, epochs=1, state=found.state)
    whole = last(nnx_loss, given, BATCHES, optimizer, epochs=3)
    close(nnx.state(again.params, nnx.Param), nnx.state(whole.params, nnx.Param))


def test_auxiliary_numbers_of_an_nnx_model() -> None:
    def loss(model: Any, x: Any, y: Any) -> Any:
        logits = model(x.astype(jnp.float32))
        return cross_entropy(logits, y), {"accuracy": (logits.argmax(-1) == y).mean()}

    found = last(loss, Normalized(nnx.Rngs(0)), BATCHES, optax.sgd(0.1), epochs=1, has_aux=True)
    assert 0 <= found.metrics["accuracy"] <= 1
    close(
        nnx.state(found.params, nnx.Param),
        nnx.state(by_nnx(Normalized(nnx.Rngs(0)), optax.sgd(0.1), 1), nnx.Param),
    )


class Growing(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        self.seen = nnx.Variable(x.sum())
        return self.linear(self.dropout(x))


def test_refused() -> None:
    sgd = optax.sgd(0.1)
    for n, kind in ((3, "int"), (jnp.array(3), "int64")):
        with pytest.raises(TypeError, match=f"the parameter 'a/n' is {kind}, which has no derivative; close"):
            last(lambda p, x, y: x.sum() * p["w"], {"w": 1.0, "a": {"n": n}}, BATCHES, sgd)
    with pytest.raises(ValueError, match=r"the parameters are of type bool, int; give a tree of floating"):
        last(lambda p, x, y: x.sum() * p["n"], {"n": 3, "is_on": True}, BATCHES, sgd)
    with pytest.raises(ValueError, match="an nnx model holds its state itself; leave model_state out"):
        last(nnx_loss, Normalized(nnx.Rngs(0)), BATCHES, sgd, model_state={})
    with pytest.raises(TypeError, match=r"changes which variables its nnx model has.*nnx\.pop"):
        last(nnx_loss, Growing(), BATCHES, sgd)
    with pytest.raises(
        TypeError, match=r"nnx model with BatchStat, RngCount, RngKey besides nnx.Param; split"
    ):
        fp.partition.axes(lambda m, b: nnx_loss(m, *b))(Normalized(nnx.Rngs(0)), BATCHES[0])


def test_a_step_that_is_not_finite_holds_the_module() -> None:
    bad = [*BATCHES, (np.full((8, 6), np.nan), BATCHES[0][1])]
    with pytest.raises(fp.training.NonFiniteStepError) as failed:
        last(module_loss, MODULE, bad, optax.sgd(0.1), epochs=1)
    close(*(eqx.filter(m, eqx.is_array) for m in (failed.value.params, filtered(optax.sgd(0.1), 1))))


def test_a_model_state_that_changes_its_type_goes_on(tmp_path: Path) -> None:
    """Running averages begin in float32 and are float64 after a step of float64."""

    def loss(w: Any, mean: Any, x: Any, y: Any) -> Any:
        return jnp.mean((x @ w - y) ** 2), 0.9 * mean + 0.1 * x.mean(0)

    given: tuple[Any, ...] = (loss, jnp.zeros(6), BATCHES, optax.sgd(0.1))
    mean = jnp.zeros(6, jnp.float32)
    last(*given, epochs=1, model_state=mean, checkpoints=tmp_path)
    found = last(*given, epochs=2, model_state=mean, checkpoints=tmp_path)
    wanted = last(*given, epochs=2, model_state=mean)
    parts = last(*given, epochs=1, model_state=mean, accumulate=2)  # A scan would refuse that.
    assert parts.state.model.dtype == jnp.float64
    np.testing.assert_array_equal(found.state.model, wanted.state.model)
    np.testing.assert_array_equal(found.params, wanted.params)
