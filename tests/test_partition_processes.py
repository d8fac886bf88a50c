"""Every kind of plan over two real processes, which talk by gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")
import numpy as np, jax.numpy as jnp, optax
import funcprop as fp
fp.training.join_processes(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))

def loss(params, batch):
    h = jnp.tanh(batch[0] @ params["a"])
    h = jnp.tanh(h @ params["b"]) @ params["a"].T
    return jnp.mean((h - batch[1]) ** 2)

draw = np.random.default_rng(0).standard_normal
params = {"a": draw((4, 8)), "b": draw((8, 8))}
batch = draw((8, 4)), draw((8, 4))
optimizer = optax.adam(1e-2)
assert jax.device_count() == 4 and len(jax.local_devices()) == 2

@jax.jit
def step_of_one(params, state):
    value, gradient = jax.value_and_grad(loss)(params, batch)
    changes, state = optimizer.update(gradient, state, params)
    return value, (optax.apply_updates(params, changes), state)

expected, one = [], (params, jax.jit(optimizer.init)(params))
for _ in range(6):
    value, one = step_of_one(*one)
    expected.append(float(value))

KINDS = {
    "data": {"mesh": {"data": 4}},
    "both": {"mesh": {"data": 2, "model": 2}},
    "zero": {"mesh": {"data": 4}, "shard_parameters": True},
    "pipeline": {"mesh": {"stage": 4}, "microbatches": 4},
    "pipeline and data": {"mesh": {"stage": 2, "data": 2}, "microbatches": 2, "schedule": "gpipe"},
}
for kind, how in KINDS.items():
    (plan,) = fp.partition.plan(loss, optimizer=optimizer, **how)(params, batch)
    proof = plan.compile()
    assert proof.gradient_error < 1e-12 and proof.loss_error < 1e-12, (kind, proof)
    placed, state = plan.place(params, optimizer.init(params))
    step = plan.step(optimizer)
    for value in expected:
        placed, state, found = step(placed, state, batch)
        assert abs(float(found) - value) < 1e-12, (kind, float(found), value)

def trained(epochs, directory=None, **options):
    kept = None if directory is None else fp.training.Checkpoints(directory)
    run = fp.training.fit(
        loss, params, [batch], optimizer, epochs=epochs, plan=plan, checkpoints=kept, **options
    )
    return [epoch.metrics["loss"] for epoch in run]

whole = trained(6)
for epoch in fp.training.fit(
    loss, params, [batch], optimizer, epochs=2, plan=plan, evaluate=lambda p: {"then": float(loss(p, batch))}
):
    assert abs(epoch.metrics["then"] - expected[epoch.number]) < 1e-12
    together = plan.gather(epoch.params)
    assert abs(float(loss(together, batch)) - expected[epoch.number]) < 1e-12
assert np.abs(np.subtract(whole, expected)).max() < 1e-12, (whole, expected)
assert trained(3, sys.argv[3]) + trained(6, sys.argv[3]) == whole
assert np.abs(np.subtract(trained(2, accumulate=2), expected[:2])).max() < 1e-12

def refused(loss, plan, optimizer, *batches):
    try:
        list(fp.training.fit(loss, params, batches, optimizer, epochs=1, plan=plan))
    except (ValueError, FloatingPointError) as error:
        return str(error)

(data,) = fp.partition.plan(loss, optimizer=optimizer, **KINDS["data"])(params, batch)
assert "they differ in plan: " in refused(loss, (plan, data)[int(sys.argv[2])], optimizer, batch)
# A learning rate is in no operator of the loss.
different = 1e-6 * int(sys.argv[2])
assert "they differ in code" in refused(loss, plan, optax.adam(1e-2 + different), batch)
assert "they differ in data" in refused(loss, plan, optimizer, (batch[0] + different, batch[1]))

# What is not finite is named in each process, also where each has a part of the parameters.
def logarithmic(params, batch):
    return loss(params, batch[:2]) + jnp.mean(jnp.log(batch[2]))

good, bad = np.ones(8), np.where(np.arange(8) == 5, -1.0, 1.0)
(zero,) = fp.partition.plan(logarithmic, optimizer=optimizer, **KINDS["zero"])(params, (*batch, good))
said = refused(logarithmic, zero, optimizer, (*batch, good), (*batch, bad))
assert "step 2 " in said and "value of log is not finite in 1 place, at [5]" in said, said

# What already lies on the devices of all processes is laid out anew.
spread = data.place(params)[0]
value, _ = plan.gradient(spread, data.put(batch))
assert abs(float(value) - expected[0]) < 1e-12

(plan,) = fp.partition.plan(loss, mesh={"stage": 2}, microbatches=2)(params, batch)
try:
    plan.gradient(params, batch)
except ValueError as error:
    assert sys.argv[2] == "1" and str(error) == (
        "plan 'pipeline 2 (1f1b)' is for 2 devices, all of process 0, and this is process 1; plan for more "
        "devices, or run it in that process alone."
    )
else:
    assert sys.argv[2] == "0"
print("losses", *whole)
"""


OTHERWISE = """
(plan,) = fp.partition.plan(loss, optimizer=optimizer, **KINDS["pipeline"])(params, batch)
def batches(key):
    for number in range(4):
        yield batch[0] + (number == 2 and int(sys.argv[2])), batch[1]
list(fp.training.fit(loss, params, batches, optimizer, epochs=1, plan=plan))
"""


@pytest.mark.nightly
def test_batches_that_differ_later_are_noticed(tmp_path: Path) -> None:
    program = PROGRAM[: PROGRAM.index("for kind, how")] + OTHERWISE
    (first, _, told), (second, _, raised) = outcome(tmp_path, program)
    assert first == 75
    assert second not in (0, 75)
    assert "ValueError: fit: processes 0 and 1 are not one run, they differ in data" in raised
    assert "process 1 of 2 is gone (it left: ValueError: fit: processes 0 and 1 are not one run" in told


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    done = outcome(tmp_path, PROGRAM)
    assert [code for code, _, _ in done] == [0, 0], done
    printed = [[line for line in out.splitlines() if line.startswith("losses")] for _, out, _ in done]
    assert printed[0] == printed[1] != []


def outcome(tmp_path: Path, program: str) -> list[tuple[int, str, str]]:
    """How both processes of a program end: code, what it printed, and errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "process.py"
    script.write_text(program)
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(port), str(rank), str(tmp_path / "run")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        for rank in range(2)
    ]
    try:
        done = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *said) for process, said in zip(running, done, strict=True)]


def _environment() -> dict[str, str]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"  # The last one counts.
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
