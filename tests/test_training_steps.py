"""What a step of `fit` can do: precision, parts of a batch, auxiliary numbers, state, stopping, logs."""

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import funcprop as fp
from funcprop import training

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (24, 5))
Y = jnp.sin(X @ jnp.arange(5.0))
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16)]
PARAMS = {"hidden": jax.random.normal(jax.random.key(1), (5, 4)), "out": jnp.ones(4)}


def model(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def loss(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(params, x) - y) ** 2)


def last(*args: Any, **options: Any) -> training.Epoch:
    *_, epoch = training.fit(*args, **options)
    return epoch


def by_hand(optimizer: Any, gradient: Any, epochs: int = 2) -> Any:
    """The loop that everyone writes."""
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(epochs):
        for batch in BATCHES:
            updates, state = optimizer.update(gradient(params, *batch), state, params)
            params = optax.apply_updates(params, updates)
    return params


def close(found: Any, expected: Any, rtol: float = 1e-12) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


# --- the update -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-2),
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9)),
        optax.MultiSteps(optax.adam(1e-2), 2),
    ],
    ids=["adamw", "clipped", "multi_steps"],
)
def test_any_optimizer_against_a_plain_loop(optimizer: Any) -> None:
    found = last(loss, PARAMS, BATCHES, optimizer, epochs=2)
    close(found.params, by_hand(optimizer, jax.grad(loss)))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_is_the_same_update(parts: int) -> None:
    adam = optax.adam(1e-2)
    found = last(loss, PARAMS, BATCHES, adam, epochs=2, accumulate=parts)
    close(found.params, by_hand(adam, jax.grad(loss)), 1e-9)


def test_accumulation_of_a_mean_over_tokens_needs_their_number() -> None:
    mask = jnp.arange(24) % 4 > 0
    batches = [(x, y, mask[8 * i : 8 * i + 8]) for i, (x, y) in enumerate(BATCHES)]

    def masked(params: Any, x: Any, y: Any, mask: Any) -> Any:
        return jnp.sum(mask * (model(params, x) - y) ** 2) / jnp.sum(mask)

    sgd = optax.sgd(0.1)
    expected = last(masked, PARAMS, batches, sgd, epochs=2)
    with pytest.raises(ValueError, match=r"accumulate=2, but masked is not the mean of its parts: .*weight="):
        last(masked, PARAMS, batches, sgd, accumulate=2)
    found = last(
        masked, PARAMS, batches, sgd, epochs=2, accumulate=2, weight=lambda x, y, mask: jnp.sum(mask)
    )
    close((found.params, found.metrics), (expected.params, expected.metrics))


def test_numbers_in_a_batch_are_for_all_parts() -> None:
    def decayed(params: Any, x: Any, y: Any, decay: Any) -> Any:
        return loss(params, x, y) + decay * jnp.sum(params["out"] ** 2)

    batches = [(x, y, np.float64(0.1)) for x, y in BATCHES]
    found = [last(decayed, PARAMS, batches, optax.sgd(0.1), epochs=1, accumulate=k).params for k in (1, 4)]
    close(*found)


def test_auxiliary_numbers_are_metrics() -> None:
    def measured(params: Any, x: Any, y: Any) -> Any:
        error = model(params, x) - y
        return jnp.mean(error**2), {"largest": jnp.max(error), "mean": jnp.mean(error)}

    frozen = optax.sgd(0.0)
    expected = np.mean([jax.tree.leaves(measured(PARAMS, *batch)[1]) for batch in BATCHES], axis=0)
    for options in ({}, {"accumulate": 1, "log": lambda record: None}):
        metrics = last(measured, PARAMS, BATCHES, frozen, epochs=1, has_aux=True, **options).metrics
        np.testing.assert_allclose([metrics["largest"], metrics["mean"]], expected, rtol=1e-12)
    parts = last(measured, PARAMS, BATCHES, frozen, epochs=1, has_aux=True, accumulate=2).metrics
    np.testing.assert_allclose(parts["mean"], expected[1], rtol=1e-12)


class Normalised(nn.Module):
    """A model with batch statistics and a dropout."""

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = nn.Dense(4, param_dtype=float)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, param_dtype=float)(x)
        x = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(1, param_dtype=float)(x)[:, 0]


NET = Normalised()
VARIABLES = NET.init(KEY, X, train=False)


def net_loss(params: Any, statistics: Any, x: Any, y: Any, *, key: Any) -> Any:
    variables = {"params": params, "batch_stats": statistics}
    out, changed = NET.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})
    return jnp.mean((out - y) ** 2), changed["batch_stats"]


def test_batch_statistics_and_dropout_keys_against_a_plain_loop() -> None:
    adam = optax.adam(1e-2)
    params, statistics = VARIABLES["params"], VARIABLES["batch_stats"]
    state, step = adam.init(params), 0
    for _ in range(2):
        for batch in BATCHES:
            key = jax.random.fold_in(jax.random.fold_in(KEY, 0), step)
            gradient, statistics = jax.grad(net_loss, has_aux=True)(params, statistics, *batch, key=key)
            updates, state = adam.update(gradient, state, params)
            params, step = optax.apply_updates(params, updates), step + 1

    def evaluate(params: Any, statistics: Any) -> Any:
        out = NET.apply({"params": params, "batch_stats": statistics}, X, train=False)
        return {"test_loss": jnp.mean((out - Y) ** 2)}

    found = last(
        net_loss,
        VARIABLES["params"],
        BATCHES,
        adam,
        epochs=2,
        model_state=VARIABLES["batch_stats"],
        keyed=True,
        evaluate=evaluate,
    )
    close((found.params, found.state.model), (params, statistics), 1e-9)
    np.testing.assert_allclose(found.metrics["test_loss"], evaluate(params, statistics)["test_loss"])


def test_a_run_goes_on_with_its_shuffles_its_statistics_and_its_numbers() -> None:
    keys = []

    def batches(key: Any) -> Any:
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return training.minibatches((X, Y), 8, key)

    adam = optax.adam(1e-2)
    options = {"keyed": True, "model_state": VARIABLES["batch_stats"]}
    whole = list(training.fit(net_loss, VARIABLES["params"], batches, adam, epochs=4, **options))
    seen, keys[:] = list(keys), []
    half = last(net_loss, VARIABLES["params"], batches, adam, epochs=2, **options)
    rest = list(training.fit(net_loss, half.params, batches, adam, epochs=2, state=half.state, keyed=True))
    assert keys == seen
    assert len(set(keys)) == 4
    assert [epoch.number for epoch in rest] == [3, 4]
    for a, b in zip(jax.tree.leaves(whole[-1]), jax.tree.leaves(rest[-1]), strict=True):
        np.testing.assert_array_equal(a, b)


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
    assert "test_training_steps.py" in str(error)
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


# --- epochs -----------------------------------------------------------------------------------


def test_early_stop() -> None:
    values = iter([3.0, 2.0, 2.5, math.nan, 1.0])
    stop = training.early_stop("test_loss", patience=2)
    epochs = list(
        training.fit(
            loss, PARAMS, BATCHES, optax.sgd(0.1), evaluate=lambda w: {"test_loss": next(values)}, stop=stop
        )
    )
    assert [epoch.number for epoch in epochs] == [1, 2, 3, 4]
    rising = training.early_stop("accuracy", patience=1, largest=True, least=0.1)
    assert [rising([{"accuracy": a} for a in run]) for run in ([0.1, 0.3], [0.1, 0.15])] == [False, True]


def test_progress_shows_the_loss_and_the_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    records: list[Any] = []
    last(loss, PARAMS, BATCHES, optax.adam(0.1), epochs=2, log=records.append, progress=True)
    steps = [record for record in records if record["event"] == "step"]
    assert [(r["step"], r["epoch"], r["batch"]) for r in steps] == [
        (i + 1, i // 3 + 1, i % 3 + 1) for i in range(6)
    ]
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    assert all(record["bytes"] >= 3 * params for record in steps)
    assert all(record["examples_per_second"] > 0 for record in steps)


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"event": "step", "st')  # what a run that was killed has left
    last(
        loss,
        PARAMS,
        BATCHES,
        optax.sgd(0.1),
        epochs=2,
        log=[path, training.json_lines(tmp_path / "few", every=3)],
    )
    _, *lines = path.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["event"] for record in records] == [*["step"] * 3, "epoch"] * 2
    assert records[3]["loss"] == pytest.approx(np.mean([record["loss"] for record in records[:3]]))
    few = [json.loads(line) for line in (tmp_path / "few").read_text().splitlines()]
    assert [(record["event"], record["step"]) for record in few] == [
        *(("step", 3), ("epoch", 3)),
        *(("step", 6), ("epoch", 6)),
    ]
    training.json_lines(path)({"event": "note", "value": math.inf})
    assert json.loads(path.read_text().splitlines()[-1])["value"] == "Infinity"


def test_tensorboard_gets_numbers_or_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match="'tensorboardX' is not installed; pip install"):
        training.tensorboard("runs")
    written: list[Any] = []

    class SummaryWriter:
        def __init__(self, directory: str) -> None:
            assert directory == "runs"

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step, value))

        def flush(self) -> None: ...

    module = types.ModuleType("tensorboardX")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    epoch = last(loss, PARAMS, BATCHES, optax.sgd(0.1), epochs=1, log=training.tensorboard("runs", every=2))
    names = [(name, step) for name, step, _ in written]
    assert ("step/loss", 2) in names
    assert ("step/loss", 3) not in names
    assert written[-1] == ("epoch/loss", 3, epoch.metrics["loss"])


# --- devices ----------------------------------------------------------------------------------


def sharded(*axes: str | None) -> Any:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, PartitionSpec(*axes))


def test_parameters_and_batches_on_a_mesh() -> None:
    adam = optax.adam(1e-2)
    placed = {
        "hidden": jax.device_put(PARAMS["hidden"], sharded(None, "model")),
        "out": jax.device_put(PARAMS["out"], sharded("model")),
    }
    batches = [jax.device_put(batch, sharded("data")) for batch in BATCHES]
    found = last(loss, placed, batches, adam, epochs=2, accumulate=2)
    close(found.params, by_hand(adam, jax.grad(loss)), 1e-9)
    assert found.params["hidden"].sharding == placed["hidden"].sharding
    assert found.state.optimizer[0].mu["hidden"].sharding == placed["hidden"].sharding


class Plan:
    """What a partition gives: a place for parameters, and a step of its own."""

    mesh = None

    def place(self, params: Any, state: Any) -> Any:
        return jax.device_put((params, state), sharded())

    def step(self, optimizer: Any) -> Any:
        step = training.make_step(loss, optimizer)
        return lambda params, state, batch: step(params, state, jax.device_put(batch, sharded("data")))


def test_a_plan_has_a_step_of_its_own() -> None:
    adam = optax.adam(1e-2)
    found = last(loss, PARAMS, BATCHES, adam, epochs=2, plan=Plan())
    close(found.params, by_hand(adam, jax.grad(loss)), 1e-9)
    assert found.params["out"].sharding.mesh.size == 8
    with pytest.raises(FloatingPointError, match="the plan's step has given the parameters before it away"):
        last(loss, PARAMS, [(X * jnp.nan, Y)], adam, plan=Plan())


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
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        last(loss, PARAMS, BATCHES, optax.sgd(0.1), **options)


@pytest.mark.parametrize("aux", [jnp.ones(3), {"a": jnp.ones(3)}, {"loss": 1.0}])
def test_auxiliary_data_that_is_no_dict_of_numbers(aux: Any) -> None:
    with pytest.raises(TypeError, match="with has_aux=True it is a dict of scalars with names"):
        last(lambda w, x, y: (loss(w, x, y), aux), PARAMS, BATCHES, optax.sgd(0.1), has_aux=True)


def test_early_stop_needs_patience() -> None:
    with pytest.raises(ValueError, match="early_stop: patience=0; pass a number of epochs, 1 or more"):
        training.early_stop("loss", patience=0)
