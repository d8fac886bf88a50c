"""`fit` under plans: every way to train gives what it gives on one device, or is refused by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcprop as fp
from funcprop import training

X = np.asarray(jax.random.normal(jax.random.key(0), (64, 6)))
Y = np.sin(X.sum(1))
KEYS = jax.random.split(jax.random.key(1), 3)
PARAMS = {
    "up": jax.random.normal(KEYS[0], (6, 16)) / 2,
    "across": jax.random.normal(KEYS[1], (16, 16)) / 4,
    "down": jax.random.normal(KEYS[2], (16,)) / 4,
}
ADAM = optax.adam(1e-2)

PLANS: dict[str, dict[str, Any]] = {
    "data": {"mesh": {"data": 8}},
    "tensor": {"mesh": {"model": 4}},
    "data and tensor": {"mesh": {"data": 2, "model": 4}},
    "accumulation": {"mesh": {"data": 2}, "microbatches": 2},
    "zero": {"mesh": {"data": 4}, "shard_parameters": True},
    "pipeline": {"mesh": {"stage": 2}, "microbatches": 2},
    "pipeline and data": {"mesh": {"stage": 2, "data": 2}, "microbatches": 2},
}
SCALED = training.MixedPrecision("float64", 2.0**15, growth=3)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 2},
    "scaled": {"precision": SCALED},
    "scaled and accumulated": {"precision": SCALED, "accumulate": 2},
    "aux": {"has_aux": True},
    "state, keys and all": {
        "has_aux": True,
        "keyed": True,
        "model_state": jnp.zeros(16),
        "precision": SCALED,
        "accumulate": 2,
    },
}


def hidden(params: Any, x: Any) -> Any:
    return jnp.tanh(jnp.tanh(x @ params["up"]) @ params["across"])


def plain(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean((hidden(params, x) @ params["down"] - y) ** 2)


def with_aux(params: Any, x: Any, y: Any) -> Any:
    return plain(params, x, y), {"largest": jnp.max(hidden(params, x))}


def with_all(params: Any, average: Any, x: Any, y: Any, *, key: Any) -> Any:
    h = hidden(params, x)
    average = 0.9 * average + 0.1 * h.mean(0)
    h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h - average, 0)
    return jnp.mean((h @ params["down"] - y) ** 2), (average, {"largest": jnp.max(h)})


def plan(kind: str, optimizer: Any = ADAM) -> Any:
    batch = X[:16], Y[:16]
    return fp.partition.plan(lambda w, b: plain(w, *b), optimizer=optimizer, **PLANS[kind])(PARAMS, batch)[0]


def trained(way: dict[str, Any], **more: Any) -> list[Any]:
    loss = with_all if "keyed" in way else with_aux if "has_aux" in way else plain
    batches = lambda key: training.minibatches((X, Y), 16, key)  # noqa: E731
    return list(training.fit(loss, PARAMS, batches, ADAM, epochs=2, **way, **more))


def is_refused(kind: str, way: str) -> bool:
    return (kind == "zero" or "pipeline" in kind) and "has_aux" in WAYS[way]


def no_scale(kind: str, way: str) -> bool:
    return "pipeline" in kind and "precision" in WAYS[way]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", PLANS)
def test_every_way_to_train_is_that_of_one_device(kind: str, way: str) -> None:
    if is_refused(kind, way):
        with pytest.raises(TypeError, match=r"has_aux.*computes losses of parts of a batch.*; use a plan of"):
            trained(WAYS[way], plan=plan(kind))
        return
    if no_scale(kind, way):
        with pytest.raises(TypeError, match=r"precision='float64': the plan 'pipeline.*an overflow on one"):
            trained(WAYS[way], plan=plan(kind))
        return
    options = dict(WAYS[way])
    if kind == "accumulation":  # The plan's two parts are parts of a batch for its state and keys as well.
        options["accumulate"] = 2 * options.get("accumulate", 1)
    for found, expected in zip(trained(WAYS[way], plan=plan(kind)), trained(options), strict=True):
        assert found.metrics.keys() == expected.metrics.keys()
        for name, value in expected.metrics.items():
            np.testing.assert_allclose(found.metrics[name], value, rtol=1e-12, err_msg=name)
        for (path, a), b in zip(
            jax.tree.leaves_with_path((found.params, found.state.model, found.state.scale)),
            jax.tree.leaves((expected.params, expected.state.model, expected.state.scale)),
            strict=True,
        ):
            np.testing.assert_allclose(jax.device_get(a), b, rtol=1e-11, atol=1e-13, err_msg=str(path))


ASKING = {
    "value": optax.polyak_sgd(0.1),
    "value_fn": optax.lbfgs(),
    "inside of another": optax.MultiSteps(optax.polyak_sgd(0.1), every_k_schedule=2),
}


@pytest.mark.parametrize(("asks", "kind"), [(a, "zero") for a in ASKING] + [("value", "data and tensor")])
def test_an_optimizer_may_ask_for_the_loss(asks: str, kind: str) -> None:
    """As `optax.polyak_sgd` and line searches do; here beside a loop in plain Optax."""
    optimizer, params = ASKING[asks], PARAMS
    # MultiSteps hands extra arguments on, but its type does not say so.
    plainly = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    asking = plainly if isinstance(optimizer, optax.MultiSteps) else optimizer
    update, state = optax.with_extra_args_support(asking).update, optimizer.init(PARAMS)
    batches = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]
    for batch in batches:
        value, grad = jax.value_and_grad(plain)(params, *batch)
        of_params = lambda params, batch=batch: plain(params, *batch)  # noqa: E731
        changes, state = update(grad, state, params, value=value, grad=grad, value_fn=of_params)
        params = optax.apply_updates(params, changes)
    for way in ({}, {"plan": plan(kind)}):
        (epoch,) = training.fit(plain, PARAMS, batches, optimizer, epochs=1, **way)
        for a, b in zip(jax.tree.leaves(epoch.params), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(jax.device_get(a), b, rtol=1e-9, atol=1e-9)


def test_no_stage_of_a_pipeline_knows_the_loss() -> None:
    with pytest.raises(
        ValueError, match=r"asks for more than gradients .*'value'.*use a plan without a pipe"
    ):
        list(training.fit(plain, PARAMS, [(X, Y)], optax.polyak_sgd(0.1), plan=plan("pipeline")))


def of_one_batch(params: Any, batch: Any) -> Any:
    return plain(params, *batch)


@pytest.mark.parametrize("kind", ["data", "zero", "pipeline"])
def test_a_loss_is_planned_and_trained_as_it_is(kind: str) -> None:
    """Whether it takes a batch as one argument, or each of its arrays."""
    found = []
    for loss in (plain, of_one_batch):
        assert fp.partition.axes(loss)(PARAMS, (X, Y)).as_dict()["axes"]
        made = fp.partition.plan(loss, optimizer=ADAM, **PLANS[kind])(PARAMS, (X[:16], Y[:16]))[0]
        for given in ({"plan": made}, {}):
            (epoch,) = training.fit(loss, PARAMS, [(X[:16], Y[:16])], ADAM, epochs=1, **given)
            found.append(jax.device_get(epoch.params))
    step = training.make_step(of_one_batch, ADAM)
    found.append(step(jax.tree.map(jnp.copy, PARAMS), ADAM.init(PARAMS), (X[:16], Y[:16]))[0])
    for other in found[1:]:
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(found[0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["data", "data and tensor", "zero"])
def test_an_overflow_leaves_out_the_update_of_all(kind: str) -> None:
    scaled = training.MixedPrecision("float16", 2.0**22, growth=2)
    batch = X[:16], Y[:16]
    first, second = (
        list(training.fit(plain, PARAMS, [batch], ADAM, epochs=12, precision=scaled, **more))
        for more in ({"plan": plan(kind)}, {})
    )
    moved = [
        [not np.array_equal(epoch.params["up"], PARAMS["up"]) for epoch in run] for run in (first, second)
    ]
    assert not moved[0][0]  # Nowhere is the first update made: it overflows.
    assert moved[0][-1]
    scales = [[float(epoch.state.scale.factor) for epoch in run] for run in (first, second)]
    assert scales[0][0] == 2.0**21
    if kind != "zero":  # There a device's loss is of its own examples, and a smaller one overflows later.
        assert (moved[0], scales[0]) == (moved[1], scales[1])
        for a, b in zip(jax.tree.leaves(first[-1].params), jax.tree.leaves(second[-1].params), strict=True):
            np.testing.assert_allclose(jax.device_get(a), b, atol=0.02)


@pytest.mark.parametrize("kind", ["data and tensor", "zero", "pipeline"])
def test_half_precision_under_a_plan(kind: str) -> None:
    found, expected, full = (
        [epoch.metrics["loss"] for epoch in trained(way, **more)]
        for way, more in (
            ({"precision": "bfloat16"}, {"plan": plan(kind)}),
            ({"precision": "bfloat16"}, {}),
            ({}, {}),
        )
    )
    assert found != full
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_a_rematerialised_loss_is_trained_as_it_was_planned() -> None:
    batch = X[:16], Y[:16]
    plans = fp.partition.plan(lambda w, b: plain(w, *b), optimizer=ADAM)(PARAMS, batch, devices=1)
    found = trained({}, plan=plans.named("rematerialisation"))[-1]
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(trained({})[-1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    with pytest.raises(ValueError, match=r"plan 'minibatch of \d' makes \d updates of each batch; pass sm"):
        trained({}, plan=plans.named("minibatch"))


def _require_first_step(loss: Any, batches: Any, params: Any) -> None:
    first = next(training.fit(loss, PARAMS, batches[:1], ADAM))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(first.params), strict=True):
        np.testing.assert_allclose(jax.device_get(a), b, rtol=1e-12)


@pytest.mark.parametrize("kind", ["data and tensor", "zero", "pipeline", "pipeline and data"])
def test_the_parameters_before_a_bad_step_are_kept(kind: str) -> None:
    """Also when good steps follow before the host hears of it; a replay names what was the first."""
    batches = [(X[:16], Y[:16]), (X[:16], Y[:16] * 1e200), *[(X[16:32], Y[16:32])] * 3]
    kept = "step 2 .* are those before it. The first is: forward sweep: value of integer_pow is not finite"
    with pytest.raises(training.NonFiniteStepError, match=kept) as error:
        list(training.fit(plain, PARAMS, batches, ADAM, plan=plan(kind)))
    _require_first_step(plain, batches, error.value.params)


@pytest.mark.parametrize("kind", ["zero", "pipeline", "pipeline and data"])
def test_an_update_that_is_not_finite_changes_no_stage(kind: str) -> None:
    """The loss is finite, and the cotangent of one root is not."""

    def rooted(params: Any, x: Any, y: Any) -> Any:
        return jnp.mean(jnp.sqrt(jnp.square(y * (hidden(params, x) @ params["down"]))))

    batches = [(X[:16], Y[:16]), (X[:16], Y[:16] * 0.0)]
    kept = "update of step 2 .* are those before it. The first is: backward sweep: cotangent .* operator sqrt"
    with pytest.raises(training.NonFiniteStepError, match=kept) as error:
        list(training.fit(rooted, PARAMS, batches, ADAM, plan=plan(kind)))
    _require_first_step(rooted, batches, error.value.params)


@pytest.mark.parametrize(("kind", "parts"), [("data", 8), ("pipeline and data", 4)])
def test_a_ragged_batch_of_a_run_is_refused(kind: str, parts: int) -> None:
    batches = [(X[:16], Y[:16]), (X[:14], Y[:14])]
    with pytest.raises(ValueError, match=f"shape .14, 6. cannot be cut into the {parts} equal parts"):
        list(training.fit(plain, PARAMS, batches, ADAM, plan=plan(kind)))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kinds", [("data and tensor", "zero"), ("zero", "tensor"), ("data", "pipeline")])
def test_a_run_goes_on_under_another_plan(kinds: tuple[str, str], tmp_path: Any) -> None:
    batches = lambda key: training.minibatches((X, Y), 16, key)  # noqa: E731
    for epochs, kind in enumerate(kinds, 1):
        *_, last = training.fit(
            plain, PARAMS, batches, ADAM, epochs=epochs, plan=plan(kind), checkpoints=tmp_path
        )
    assert last.number == 2
    for a, b in zip(jax.tree.leaves(last.params), jax.tree.leaves(trained({})[-1].params), strict=True):
        np.testing.assert_allclose(jax.device_get(a), b, rtol=1e-11)


def test_a_plan_without_an_optimizer_takes_that_of_the_run() -> None:
    found = trained({}, plan=plan("zero", None))[-1]
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(trained({})[-1].params), strict=True):
        np.testing.assert_allclose(jax.device_get(a), b, rtol=1e-12)
    with pytest.raises(TypeError, match="was made without an optimizer; pass optimizer= with its state"):
        plan("data", None).place(PARAMS, ADAM.init(PARAMS))


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_parameters_come_together_for_evaluation(kind: str) -> None:
    planned = plan(kind)
    evaluate = lambda params: {"then": plain(params, X, Y)}  # noqa: E731
    epochs = trained({}, plan=planned, evaluate=evaluate)
    for epoch, expected in zip(epochs, trained({}, evaluate=evaluate), strict=True):
        assert abs(epoch.metrics["then"] - expected.metrics["then"]) <= 1e-12
        together = planned.gather(epoch.params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), together, expected.params)
