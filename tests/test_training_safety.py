"""Steps of `fit` in low precision, with values that are not finite, and with bad input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_problem import BATCHES, PARAMS, Plan, by_hand, close, last, loss

import funcprop as fp
from funcprop import training

# --- precision --------------------------------------------------------------------------------


def test_bfloat16_computes_in_it_and_keeps_parameters() -> None:
    seen = []

    def noted(params: Any, x: Any, y: Any) -> Any:
        seen.append((params["out"].dtype, x.dtype))
        return loss(params, x, y)

    found = last(noted, PARAMS, BATCHES, optax.adam(1e-2), epochs=3, precision="bfloat16")
    assert set(seen) == {(jnp.dtype("bfloat16"),) * 2}
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype("float64")}
    close(found.params, by_hand(optax.adam(1e-2), jax.grad(loss), 3), 0.02)


def test_float16_leaves_out_overflowing_updates_and_finds_a_scale() -> None:
    records: list[Any] = []
    precision = training.MixedPrecision("float16", 2.0**24, growth=4)
    found = last(loss, PARAMS, BATCHES, optax.sgd(0.01), epochs=8, precision=precision, log=records.append)
    scale = found.state.scale
    assert scale is not None
    assert 1 < scale.factor < 2.0**24
    losses = [record["loss"] for record in records if record["event"] == "step"]
    assert losses[0] == losses[3]  # The first updates overflow and change nothing.
    assert losses[-1] < losses[0]


def test_gradients_that_float16_loses_are_kept_by_the_scale() -> None:
    def tiny(w: Any, x: Any) -> Any:
        return jnp.sum(w * 1e-4 * x * 1e-4)

    batches = [(jnp.ones(3),)]
    plain = training.MixedPrecision("float16")
    lost = last(tiny, jnp.ones(3), batches, optax.sgd(1e6), epochs=1, precision=plain)
    kept = last(tiny, jnp.ones(3), batches, optax.sgd(1e6), epochs=1, precision="float16")
    np.testing.assert_array_equal(lost.params, 1.0)
    np.testing.assert_allclose(kept.params, 1 - 1e-2, rtol=1e-4)


def test_a_loss_that_no_scale_helps_stops() -> None:
    with pytest.raises(training.NonFiniteStepError, match="is not finite"):
        last(lambda w, x: jnp.sum(w) / (0 * x), jnp.ones(3), [(1.0,)], optax.sgd(0.1), precision="float16")


# --- what is not finite -----------------------------------------------------------------------


def unstable(params: Any, x: Any) -> Any:
    return jnp.sum(fp.name(jnp.log(params["w"] - x), "logarithm"))


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_parameters_before_the_bad_step_are_kept_and_the_operator_is_named(at: int) -> None:
    batches = [{"x": jnp.zeros(2)}] * (at - 1) + [{"x": jnp.array([0.0, 9.0])}] + [{"x": jnp.zeros(2)}] * 4
    sgd = optax.sgd(0.1, momentum=0.9)
    start = {"w": jnp.array([1.0, 1.0])}

    def of_dict(params: Any, batch: Any) -> Any:
        return unstable(params, batch["x"])

    with pytest.raises(training.NonFiniteStepError) as caught:
        last(of_dict, start, batches, sgd)
    error = caught.value
    assert f"the loss (nan) of step {at} (epoch 1, batch {at}) is not finite" in str(error)
    assert "value of logarithm" in str(error)
    assert "test_training_safety.py" in str(error)
    assert error.first.name == "logarithm"
    expected = last(of_dict, start, batches[: at - 1], sgd, epochs=1) if at > 1 else None
    close(error.params, start if expected is None else expected.params)
    assert error.state.position.step == at - 1


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    with pytest.raises(training.NonFiniteStepError, match=r"the update of step 1 .*backward sweep: cot"):
        last(lambda w: jnp.sum(jnp.sqrt(w)), jnp.zeros(2), [()], optax.sgd(0.1))


def test_the_replay_of_a_step_with_parts_and_precision() -> None:
    def squared(params: Any, x: Any) -> Any:
        return jnp.mean(jnp.exp(x @ params["w"] * 100))

    batches = [(jnp.ones((4, 2)),)]
    with pytest.raises(training.NonFiniteStepError, match="value of exp"):
        last(squared, {"w": jnp.ones(2)}, batches, optax.sgd(0.1), accumulate=2, precision="float16")


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"accumulate": 0}, ValueError, "accumulate=0; pass the number of parts of a batch, 1 or more"),
        ({"accumulate": 3}, ValueError, "accumulate=3 does not divide a batch whose arrays have 8 examples"),
        ({"weight": len}, ValueError, "pass accumulate= as well"),
        ({"precision": "quarter"}, ValueError, "precision='quarter'; pass 'bfloat16', 'float16'"),
        ({"precision": "int32"}, ValueError, "precision='int32'; pass 'bfloat16'"),
        (
            {"state": optax.EmptyState()},
            TypeError,
            "state is of type EmptyState; pass the `state`",
        ),
        (
            {"state": training.TrainingState(None, {}), "model_state": {}},
            ValueError,
            "state has a model state, and model_state is given as well",
        ),
        ({"has_aux": True}, TypeError, r"has_aux=True, but loss returns .*return the pair"),
        ({"has_aux": True, "plan": Plan()}, TypeError, "has_aux: a plan of one.s own has a step of its own"),
        ({"log": 3}, TypeError, "log=3; pass a path, a function of a record, or a list"),
        ({"stop": training.early_stop("test_los")}, KeyError, "no metric 'test_los'; there are loss"),
        ({"stop": "loss"}, TypeError, r"stop='loss'; pass a function .* fp.training.early_stop\('loss'\)"),
        ({"epochs": 2.5}, ValueError, "epochs=2.5; pass the number of epochs, 0 or more"),
        ({"batches": {"x": PARAMS}}, TypeError, "batches is of type dict; pass the minibatches of an epoch"),
        ({"batches": None}, TypeError, "batches is of type NoneType; pass the minibatches"),
        ({"key": 0}, TypeError, r"key=0; pass a PRNG key, such as jax.random.key\(0\)"),
        ({"plan": "data"}, TypeError, r"plan='data'; pass one of fp.partition.plan\(loss\)\(params, batch\)"),
        ({"evaluate": lambda _: 0.5}, TypeError, "evaluate returned a float; return numbers by name"),
        ({"evaluate": lambda _: {"a": jnp.ones(2)}}, TypeError, r"returned {'a': 'shape \(2,\)'}; return"),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"batches": BATCHES, "optimizer": optax.sgd(0.1)} | options
    with pytest.raises(error, match=message):
        last(loss, PARAMS, **given)


@pytest.mark.parametrize("aux", [jnp.ones(3), {"a": jnp.ones(3)}, {"loss": 1.0}])
def test_auxiliary_data_that_is_no_dict_of_numbers(aux: Any) -> None:
    with pytest.raises(TypeError, match="with has_aux=True it is a dict of scalars with names"):
        last(lambda w, x, y: (loss(w, x, y), aux), PARAMS, BATCHES, optax.sgd(0.1), has_aux=True)


def test_early_stop_needs_patience() -> None:
    with pytest.raises(ValueError, match="early_stop: patience=0; pass a number of epochs, 1 or more"):
        training.early_stop("loss", patience=0)


def test_what_is_no_optimizer_is_refused_with_the_order_of_the_arguments() -> None:
    with pytest.raises(TypeError, match=r"fit\(loss, params, batches, optimizer\): optimizer is of ty"):
        training.fit(loss, PARAMS, optax.sgd(0.1), BATCHES)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer is 'adam'; pass an optax optimizer, such as optax.adam"):
        training.make_step(loss, "adam")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="footprint: optimizer is 'adam'"):
        fp.memory.footprint(loss, optimizer="adam")(PARAMS, *BATCHES[0])  # type: ignore[arg-type]
