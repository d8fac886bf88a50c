"""Data parallelism over two real processes, which talk by gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
import jax.numpy as jnp, numpy as np, optax
import funcprop as fp

def loss(params, batch):
    return jnp.mean((jnp.tanh(batch[0] @ params["a"]) @ params["b"] - batch[1]) ** 2)

draw = np.random.default_rng(0).standard_normal
params = {"a": draw((6, 8)), "b": draw((8, 2))}
batch = draw((8, 6)), draw((8, 2))
optimizer = optax.adam(1e-2)
(plan,) = fp.partition.plan(loss, optimizer=optimizer, mesh={"data": 2})(params, batch)
assert len({d.process_index for d in jax.devices()}) == 2
placed, state = plan.place(params, optimizer.init(params))
step = plan.step(optimizer)
losses = []
for _ in range(5):
    placed, state, value = step(placed, state, batch)
    losses.append(float(value))
one, state = params, optimizer.init(params)
for i in range(5):
    value, gradient = jax.value_and_grad(loss)(one, batch)
    assert abs(float(value) - losses[i]) < 1e-12, (i, float(value), losses)
    changes, state = optimizer.update(gradient, state, one)
    one = optax.apply_updates(one, changes)
try:
    fp.partition.plan(loss, mesh={"stage": 2}, microbatches=2)(params, batch)[0].step(optimizer)
except ValueError as error:
    assert "devices of several processes is not supported" in str(error)
else:
    raise AssertionError("a pipeline over two processes was not refused")
print("losses", *losses)
"""


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "process.py"
    script.write_text(PROGRAM)
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(port), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        for rank in range(2)
    ]
    done = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], done
    printed = [[line for line in out.splitlines() if line.startswith("losses")] for out, _ in done]
    assert printed[0] == printed[1] != []


def _environment() -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
