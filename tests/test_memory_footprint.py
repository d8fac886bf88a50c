"""`fp.memory.footprint`: predicted against compiled bytes of real programs, purposes, traps, messages."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import ShapeDtypeStruct
from jax.experimental.compilation_cache import compilation_cache

import funcprop as fp
from funcprop._jax import held_bytes, memory_fields
from funcprop._jax.buffers import buffers
from funcprop._jax.topologies import tpu_devices


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


def f64(*dims: int) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(dims, "float64")


@pytest.mark.nightly
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


def test_products_of_16_bits_are_computed_in_32(compiled: dict[str, Any]) -> None:
    found = compiled["16 bits"]["training"]
    assert found["estimate"] == pytest.approx(found["compiled"], rel=0.1)


@pytest.mark.parametrize(
    ("model", "within"),
    [
        ("one inner step", 0.17),
        ("unrolled inner steps", 0.17),
        ("associative scan", 0.1),
        ("batch norm", 0.17),
    ],
)
def test_programs_that_the_compiler_changes_most(compiled: dict[str, Any], model: str, within: float) -> None:
    """Loops of one step and unrolled ones, pairs in a tree, a norm whose input is read three times."""
    found = compiled[model]["training"]
    assert sum(row["nbytes"] for row in found["rows"]) == found["compiled"]
    assert found["estimate"] == pytest.approx(found["compiled"], rel=within)


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
    chip = jax.sharding.SingleDeviceSharding(tpu_devices("v5e:2x2")[0])

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


def test_scopes_are_those_of_the_program_itself_where_compilations_are_kept_on_disk(tmp_path: Path) -> None:
    """JAX's cache leaves names out of its key: the second model had the scopes of the first."""

    def model(scope: str) -> Any:
        def loss(w: Any, x: Any) -> Any:
            with jax.named_scope(scope):
                h = jnp.tanh(x @ w)
            return jnp.sum(jnp.sin(h) ** 2)

        return loss

    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    shape = ShapeDtypeStruct((64, 64), jnp.float32)
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for scope in ("encoder", "decoder"):
            found = fp.memory.footprint(model(scope), programs=["training"])(shape, shape).training
            assert {row.scope for row in found.rows} == {"", scope}
        assert any(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
