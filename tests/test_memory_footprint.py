"""`fp.memory.footprint`: predicted against compiled bytes of real programs, purposes, traps, messages."""

from __future__ import annotations

import importlib.util
import itertools
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
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import ShapeDtypeStruct
from jax.experimental import topologies

import funcprop as fp
from funcprop._jax import held_bytes, memory_fields
from funcprop._jax.buffers import buffers


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
    assert found["estimate"] == pytest.approx(formula, rel=0.12)
    by = {row["category"] for row in found["rows"]}
    assert {"parameters", "optimizer state", "inputs", "saved", "cotangents"} <= by
    state = sum(row["nbytes"] for row in found["rows"] if row["category"] == "optimizer state")
    assert state == 4 * p


@pytest.mark.parametrize("program", ["inference", "training"])
@pytest.mark.parametrize("model", ["CNN", "LSTM", "dropout", "shard_map", "transformer"])
def test_predicted_is_near_compiled(compiled: dict[str, Any], model: str, program: str) -> None:
    found = compiled[model][program]
    assert found["compiled"] > 0
    assert found["estimate"] == pytest.approx(found["compiled"] + found["fields"]["hidden"], rel=0.16)


def test_several_devices_are_noted() -> None:
    """Two devices are not there, but can be described."""
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mean = jax.shard_map(
        lambda x: jax.lax.pmean(jnp.mean(x**2), "data"), mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P()
    )
    found = fp.memory.footprint(mean, measure=False)(ShapeDtypeStruct((8, 4), "float32"))
    (note,) = (text for text in found.warnings if "devices" in text and text.startswith("inference"))
    assert "2 devices: compiled bytes are what one of them holds, while the estimate counts" in note


def test_rows_add_up_and_saved_is_what_training_holds(compiled: dict[str, Any]) -> None:
    for model in ("chapter", "CNN", "LSTM", "transformer"):
        for program in ("inference", "training"):
            found = compiled[model][program]
            fields = found["fields"]
            assert sum(row["nbytes"] for row in found["rows"]) == found["compiled"]
            assert found["compiled"] == held_bytes(fields) + fields["constant"]
            gaps = sum(row["nbytes"] for row in found["rows"] if row["category"] == "unused")
            assert fields["live"] == found["compiled"] - gaps
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


def test_hidden_temporaries(compiled: dict[str, Any]) -> None:
    notes, hidden = compiled["CNN"]["warnings"], compiled["CNN"]["inference"]["fields"]["hidden"]
    said = [text for text in notes if "xla_cpu_experimental_ynn_fusion_type" in text]
    assert len(said) == (hidden > 0)
    assert all(f"memory is not reported: about {hidden:,} bytes are hidden" in text for text in said)
    assert not any("peak_memory_in_bytes" in text for text in notes)


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


def test_products_of_16_bits_are_computed_in_32(compiled: dict[str, Any]) -> None:
    found = compiled["16 bits"]["training"]
    assert found["estimate"] == pytest.approx(found["compiled"], rel=0.1)


@pytest.mark.parametrize(
    "model", ["one inner step", "unrolled inner steps", "associative scan", "batch norm"]
)
def test_programs_that_the_compiler_changes_most(compiled: dict[str, Any], model: str) -> None:
    """Loops of one step and unrolled ones, pairs in a tree, a norm whose input is read three times."""
    found = compiled[model]["training"]
    assert sum(row["nbytes"] for row in found["rows"]) == found["compiled"]
    assert found["estimate"] == pytest.approx(found["compiled"], rel=0.17)


def test_rows_of_drawn_programs_are_those_of_the_compiler() -> None:
    """The rows' sum is what `memory_analysis()` says of the program that `jax.jit` makes."""
    rng = np.random.default_rng(3)
    for _ in range(4):
        depth, width, batch = int(rng.integers(1, 5)), int(rng.integers(8, 40)), int(rng.integers(16, 300))
        kind = OPERATIONS[int(rng.integers(len(OPERATIONS)))]

        def loss(ws: Any, x: jax.Array, kind: Any = kind) -> jax.Array:
            for w in ws:
                x = kind(x @ w)
            return jnp.mean(x**2)

        args = [f64(width, width)] * depth, f64(batch, width)
        found = fp.memory.footprint(loss, rules=fp.rules.autodiff)(*args)
        programs = {"inference": loss, "training": jax.value_and_grad(loss)}
        for name, ledger in found.ledgers.items():
            stats = jax.jit(programs[name]).lower(*args).compile().memory_analysis()
            assert stats is not None
            held = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
            assert (
                sum(row.nbytes for row in ledger.rows) == ledger.compiled == held - stats.alias_size_in_bytes
            )


OPERATIONS = (jnp.tanh, jnp.sin, jax.nn.softmax, lambda x: x / (1 + x**2), lambda x: jnp.cumsum(x, 0))


def test_sharded_arguments_are_accounted_for_one_device() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = (jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("data",)))

    def on(sharding: Any, *dims: int) -> ShapeDtypeStruct:
        return ShapeDtypeStruct(dims, "float32", sharding=sharding)

    def loss(w: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    found = fp.memory.footprint(loss, optimizer=optax.adam(0.1))(on(whole, 16, 24), on(split, 64, 16))
    for ledger in found.ledgers.values():
        sizes = {row.name: (row.nbytes, row.shape) for row in ledger.rows if row.operator == "input"}
        assert sizes["x"] == (4 * 64 * 16 // 8, (8, 16))
        assert sizes["w"] == (4 * 16 * 24, (16, 24))
        assert sum(row.nbytes for row in ledger.rows) == ledger.compiled
    assert any("8 devices: compiled bytes are what one of them holds" in text for text in found.warnings)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_program_for_a_tpu() -> None:
    """Its compiler says the totals; XLA's buffers are not handed over, and the footprint says so."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    chip = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    args = [ShapeDtypeStruct(dims, "float32", sharding=chip) for dims in ((256, 256), (4096, 256))]
    found = fp.memory.footprint(loss, programs=["training"])(*args)
    ledger = found.training
    assert ledger is not None
    assert sum(row.nbytes for row in ledger.rows) == ledger.compiled == held_bytes(ledger.fields)
    assert {row.name for row in ledger.rows} >= {"w", "x"}
    assert "the compiler for 'tpu' does not say which buffers a program has" in found.warnings[0]


def test_buffers_lie_where_the_compiler_puts_them() -> None:
    """No two that are live at the peak overlap, and the last ends where the arena does."""

    def loss(ws: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0] ** 2)

    program = jax.jit(jax.grad(loss)).lower(f64(5, 16, 16), f64(64, 16)).compile()
    found = buffers(program)
    temporary = sorted((b for b in found.buffers if b.kind == "temporary"), key=lambda b: b.offset)
    assert all(a.offset + a.nbytes <= b.offset for a, b in itertools.pairwise(temporary))
    arena = memory_fields(program)["temporary"]
    assert sum(b.nbytes for b in temporary) + found.unused == arena
    assert temporary[-1].offset + temporary[-1].nbytes <= arena
    assert any("transpose(" in b.op_name for b in found.buffers)


def test_sums_by_what_rows_have() -> None:
    ledger = account(loss_of_params, WEIGHTS, f64(100, 8)).training
    assert ledger is not None
    for attribute in ("category", "scope", "path", "operator", "sweep"):
        assert sum(ledger.by(attribute).values()) == ledger.estimate
    assert set(ledger.by("sweep")) >= {"", "forward"}
    with pytest.raises(
        ValueError, match=r"by\('layer'\): rows have no such attribute; use one of name, scope"
    ):
        ledger.by("layer")
