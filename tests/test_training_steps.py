"""What a step of `fit` can do: parts of a batch, auxiliary numbers, state, stopping, logs, devices."""

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
from step_problem import BATCHES, KEY, PARAMS, Plan, X, Y, by_hand, close, last, loss, model, sharded

from funcprop import training

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


def test_a_plan_has_a_step_of_its_own() -> None:
    adam = optax.adam(1e-2)
    found = last(loss, PARAMS, BATCHES, adam, epochs=2, plan=Plan())
    close(found.params, by_hand(adam, jax.grad(loss)), 1e-9)
    assert found.params["out"].sharding.mesh.size == 8
    with pytest.raises(FloatingPointError, match="the plan's step has given the parameters before it away"):
        last(loss, PARAMS, [(X * jnp.nan, Y)], adam, plan=Plan())
