"""`fp.memory.footprint`: predicted against compiled bytes of real programs, purposes, traps, messages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import ShapeDtypeStruct

import funcprop as fp


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Footprints of programs as users compile them: the flags of the tests change what is compiled."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    script = Path(__file__).with_name("footprint_programs.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- against the compiler ---------------------------------------------------------------------


def test_exercise_3_prediction_is_exact(compiled: dict[str, Any]) -> None:
    d, h, q, b = 784, 256, 10, 1024
    formula = 4 * (h * d + q * h + b * d + b * h + b * q)
    found = compiled["chapter"]["inference"]
    assert (found["estimate"], found["compiled"]) == (formula, formula)


def test_exercise_3_training_with_momentum(compiled: dict[str, Any]) -> None:
    d, h, q, b = 784, 256, 10, 1024
    p = h * d + q * h
    formula = 4 * (p + b * d + b + p + 2 * b * h + p)
    found = compiled["chapter"]["training"]
    assert found["compiled"] == pytest.approx(formula, rel=1e-4)
    assert found["estimate"] == pytest.approx(formula, rel=0.012)
    by = {row["category"] for row in found["rows"]}
    assert {"parameters", "optimizer state", "inputs", "saved", "cotangents"} <= by
    state = sum(row["nbytes"] for row in found["rows"] if row["category"] == "optimizer state")
    assert state == 4 * p


@pytest.mark.parametrize("program", ["inference", "training"])
@pytest.mark.parametrize("model", ["CNN", "LSTM", "dropout", "shard_map", "transformer"])
def test_predicted_is_near_compiled(compiled: dict[str, Any], model: str, program: str) -> None:
    found = compiled[model][program]
    assert found["compiled"] > 0
    assert found["estimate"] == pytest.approx(found["compiled"], rel=0.15)


def test_temporary_values_lie_in_the_memory_of_a_result_as_large(compiled: dict[str, Any]) -> None:
    found = compiled["attention"]["inference"]
    assert found["estimate"] == pytest.approx(found["compiled"], rel=0.05)


def test_several_devices_are_noted() -> None:
    """Two devices are not there, but can be described."""
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mean = jax.shard_map(
        lambda x: jax.lax.pmean(jnp.mean(x**2), "data"), mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P()
    )
    found = fp.memory.footprint(mean, measure=False)(ShapeDtypeStruct((8, 4), "float32"))
    (note,) = (text for text in found.warnings if "devices" in text and text.startswith("inference"))
    assert "2 devices: compiled bytes are what one of them holds, while the estimate counts" in note


def test_what_is_transposed_back_is_one_value(compiled: dict[str, Any]) -> None:
    """A convolution, a sum and a loop read what autodiff transposes twice: the compiler makes it once."""
    found = compiled["CNN, channels first"]["training"]
    assert found["estimate"] == pytest.approx(found["compiled"], rel=0.08)


def test_rows_add_up_and_saved_is_what_training_holds(compiled: dict[str, Any]) -> None:
    for model in ("chapter", "CNN", "LSTM", "transformer"):
        for program in ("inference", "training"):
            found = compiled[model][program]
            assert sum(row["nbytes"] for row in found["rows"]) == found["estimate"]
            saved = sum(row["nbytes"] for row in found["rows"] if row["category"] == "saved")
            assert (saved > 0) == (program == "training")


def test_scopes_are_those_of_the_layers(compiled: dict[str, Any]) -> None:
    rows = compiled["transformer"]["training"]["rows"]
    scope = {row["name"]: row["scope"] for row in rows if row["category"] == "parameters"}
    assert scope["params/Dense_0/kernel"] == "Transformer/Dense_0"
    assert all("jvp(" not in row["scope"] and "transpose(" not in row["scope"] for row in rows)


def test_recomputation_that_is_undone(compiled: dict[str, Any]) -> None:
    plain, kept = compiled["checkpointed"], compiled["checkpointed with barriers"]
    said = [text for text in plain["warnings"] if "jax.checkpoint" in text]
    options = compiled["barrier options"]
    if options == {}:  # This compiler keeps the recomputation anyway.
        assert not said
    else:
        assert said[0].startswith("training: what jax.checkpoint computes again is shared")
        assert "into a scan" in said[0]
    if options:
        assert str(options) in said[0]
        assert kept["training"]["compiled"] < 0.7 * plain["training"]["compiled"]
        assert not any("jax.checkpoint" in text for text in kept["warnings"])
    if options is not None:
        assert kept["training"]["estimate"] == pytest.approx(kept["training"]["compiled"], rel=0.05)


def test_hidden_temporaries_and_the_peak_field(compiled: dict[str, Any]) -> None:
    notes = compiled["CNN"]["warnings"]
    if any("xla_cpu_experimental_ynn_fusion_type" in text for text in notes):
        (said,) = [text for text in notes if "fused kernel" in text]
        assert said.startswith("inference: the forward pass compiles to a fused kernel")
    peak = compiled["CNN"]["training"]["fields"]["peak"]
    assert any(f"peak_memory_in_bytes says {peak:,}, without the temporaries" in text for text in notes)


def test_loops_are_counted_once_by_the_cost_analysis(compiled: dict[str, Any]) -> None:
    assert any("counts the body of a loop once" in text for text in compiled["LSTM"]["warnings"])
    assert not any("counts the body" in text for text in compiled["CNN"]["warnings"])


def test_a_users_own_step(compiled: dict[str, Any]) -> None:
    step, undonated = compiled["step"], compiled["step that donates nothing"]
    for found in (step, undonated):
        assert found["inference"] is None
        assert found["training"]["estimate"] == pytest.approx(found["training"]["compiled"], rel=0.05)
    purposes = {
        row["name"]: row["category"] for row in step["training"]["rows"] if row["operator"] == "input"
    }
    assert purposes["a"] == "parameters"
    assert purposes["state/0/mu/a"] == "optimizer state"
    assert purposes["x"] == "inputs"
    # Parameters, both moments and the count are held twice if they are not donated.
    twice = 3 * 4 * (64 * 128 + 128 * 10) + 4
    (said,) = [text for text in undonated["warnings"] if "donates nothing" in text]
    assert f"{twice:,} bytes" in said
    assert not any("donates nothing" in text for text in step["warnings"])


# --- without compiling ------------------------------------------------------------------------


def account(fun: Any, *args: Any, **options: Any) -> fp.memory.Footprint:
    return fp.memory.footprint(fun, measure=False, **options)(*args)


def f64(*dims: int) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(dims, "float64")


def loss_of_params(w: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.tanh(x @ w["a"]) @ w["b"])


WEIGHTS = {"a": f64(8, 6), "b": f64(6, 4)}


def test_a_gradient_returns_gradients_and_reads_parameters() -> None:
    found = account(loss_of_params, WEIGHTS, f64(100, 8))
    assert found.training is not None
    assert found.training.compiled is None
    assert found.training.ratio is None
    by = found.training.by("category")
    assert by["parameters"] == by["gradients"] == 8 * (8 * 6 + 6 * 4)
    assert by["inputs"] == 8 * 100 * 8
    pullback = jax.eval_shape(
        lambda w, x: jax.vjp(lambda w: loss_of_params(w, x), w)[1], WEIGHTS, f64(100, 8)
    )
    held = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == (100, 6)]
    # At least tanh(z), at most all that the pullback holds of this shape: the rest is cheap to make again.
    assert 8 * 100 * 6 <= by["saved"] <= sum(leaf.size * leaf.dtype.itemsize for leaf in held)


def test_a_prediction_is_pulled_back_from_given_cotangents() -> None:
    found = account(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], WEIGHTS, f64(100, 8))
    assert found.training is not None
    seeds = [row for row in found.training.rows if row.name == "∂J/∂result"]
    assert [(row.shape, row.category, row.dtype) for row in seeds] == [((100, 4), "inputs", "float64")]


def test_an_optimizer_adds_its_state_and_donation_takes_results_away() -> None:
    p = 8 * (8 * 6 + 6 * 4)
    plain = account(loss_of_params, WEIGHTS, f64(2000, 8), optimizer=optax.sgd(0.1)).training
    adam = account(loss_of_params, WEIGHTS, f64(2000, 8), optimizer=optax.adam(0.1)).training
    kept = account(loss_of_params, WEIGHTS, f64(2000, 8), optimizer=optax.adam(0.1), donate=False).training
    assert plain is not None
    assert adam is not None
    assert kept is not None
    assert adam.by("category")["optimizer state"] - 4 == 2 * p
    assert 2 * p <= adam.estimate - plain.estimate <= 2 * p + 256
    assert kept.estimate - adam.estimate == pytest.approx(3 * p, abs=600)
    moments = [row for row in adam.rows if row.name == "state/0/mu/a"]
    assert [row.nbytes for row in moments] == [8 * 8 * 6]


def test_rules_change_what_is_kept() -> None:
    x = ShapeDtypeStruct((4, 16, 16, 8), "float32")
    pooled = lambda x: jnp.sum(nn.max_pool(x, (2, 2), (2, 2)) ** 2)  # noqa: E731
    ours = account(pooled, x, rules=fp.rules.handwritten).training
    plain = account(pooled, x, rules=fp.rules.autodiff).training
    assert ours is not None
    assert plain is not None
    assert ours.estimate < 0.6 * plain.estimate


def test_loops_hold_the_stacked_results_of_all_steps() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean(jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=32)[0])

    found = account(loss, f64(8, 8), f64(64, 8))
    assert found.training is not None
    assert found.inference is not None
    stacked = [row for row in found.training.rows if row.shape == (32, 64, 8)]
    assert stacked
    assert {row.category for row in stacked} <= {"saved", "activations"}
    assert found.training.estimate > 32 * 64 * 8 * 8 > found.inference.estimate


def test_models_of_equinox_and_nnx() -> None:
    net = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    found = account(lambda net, x: jnp.sum(jax.vmap(net)(x) ** 2), net, f64(100, 4))
    assert found.training is not None
    assert "layers/0/weight" in {row.name for row in found.training.rows}

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.dense, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.silu(self.norm(self.dense(x)))

    model = Net(nnx.Rngs(0))
    before = model.norm.mean[...]
    of_nnx = account(lambda net, x: jnp.sum(net(x)), model, ShapeDtypeStruct((32, 4), "float32"))
    assert of_nnx.training is not None
    kernel = next(row for row in of_nnx.training.rows if row.name == "dense/kernel")
    assert (kernel.category, kernel.nbytes) == ("parameters", 48)
    assert jnp.array_equal(model.norm.mean[...], before)


def test_nothing_is_run() -> None:
    ran = []

    def loss(w: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: ran.append(1))
        return jnp.sum(w**2)

    account(loss, jnp.ones(3))
    assert not ran


def test_text_and_json() -> None:
    found = account(loss_of_params, WEIGHTS, f64(100, 8))
    assert found.training is not None
    text = str(found)
    assert text.startswith("loss_of_params: bytes held at the peak")
    assert f"{found.training.estimate:,}" in text
    assert "of the forward sweep, kept for the backward sweep" in text
    data = json.loads(found.json())
    assert data["training"]["estimate"] == found.training.estimate
    assert data["inference"]["compiled"] is None


def test_the_text_says_what_rows_it_leaves_out() -> None:
    """The bytes that are listed add up to the total."""
    found = account(lambda ws, x: sum(jnp.sum(x @ w) for w in ws), [f64(8, 8)] * 20, f64(16, 8))
    for name, ledger in found.ledgers.items():
        assert len(ledger.rows) > 20
        listed = str(found).split(f"largest in {name}")[1].split("\n\n")[0].splitlines()[2:]
        assert f"{len(ledger.rows) - 12} more" in listed[-1]
        numbers = [int(re.split("  +", line)[1].replace(",", "")) for line in listed]
        assert sum(numbers) == ledger.estimate


def test_errors() -> None:
    with pytest.raises(ValueError, match="kind='train' is not known; use one of loss, prediction, step"):
        fp.memory.footprint(jnp.sin, kind="train")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs the gradient of one real scalar; return the loss"):
        account(jnp.sin, f64(3), optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"argnums=2, but the function was called with 1"):
        account(jnp.sin, f64(3), argnums=2)
    with pytest.raises(TypeError, match="has no derivative"):
        account(jnp.abs, ShapeDtypeStruct((3,), "int32"))
    with pytest.raises(TypeError, match="has_aux=True, but sin returns"):
        account(jnp.sin, f64(3), has_aux=True)


def test_arrays_that_are_closed_over_are_constants() -> None:
    """A megabyte, outside of a loop and inside of one, in the prediction and in the executable."""
    data = jnp.arange(2.0**17).reshape(512, 256)
    steps = lambda w: jax.lax.map(lambda row: jnp.sum(jnp.tanh(data @ w) * row), data[:, 0])  # noqa: E731
    for fun in (lambda w: jnp.mean(jnp.tanh(data @ w) ** 2), lambda w: jnp.mean(steps(w))):
        found = fp.memory.footprint(fun, programs=["inference"])(f64(256, 8))
        ledger = found.inference
        assert ledger is not None
        assert ledger.by("category")["constants"] >= 2**20
        assert [r.name for r in ledger.rows if (r.category, r.shape) == ("constants", (512, 256))] == [
            "constant"
        ]
        assert ledger.fields["constant"] == pytest.approx(2**20, rel=0.02)
        assert ledger.estimate == pytest.approx(ledger.compiled, rel=0.1)
        assert "bytes are constants, arrays that the function closes over" in found.warnings[0]
    both = account(lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2), f64(64, 64), f64(64, 64))
    assert not both.warnings
    assert not any(row.category == "constants" for row in (both.inference or both.training).rows)


def test_what_is_no_array_cannot_be_accounted() -> None:
    with pytest.raises(TypeError, match="returns 'hi' of type str"):
        account(lambda w: "hi", f64(3))


def test_programs_that_there_are_not() -> None:
    with pytest.raises(ValueError, match=r"programs=\['foo'\]: \['foo'\] are not known; use 'inference'"):
        account(lambda w: jnp.sum(w), f64(3), programs=["foo"])


def test_products_that_are_widened_are_named() -> None:
    half, single = (jax.ShapeDtypeStruct((8, 8), dtype) for dtype in ("bfloat16", "float32"))

    def loss(w: Any, x: Any) -> Any:
        return jnp.mean(jax.lax.map(lambda row: jnp.tanh(row @ w), x).astype("float32"))

    said = account(loss, half, half).warnings
    assert [text.split(" are ")[0] for text in said] == [
        f"{purpose}: products of 16-bit numbers" for purpose in ("inference", "training")
    ]
    assert not account(loss, single, single).warnings
