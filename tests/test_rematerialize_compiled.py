"""What XLA allocates: in a process of its own, because the tests' flags turn off what users compile with."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json
import jax, jax.numpy as jnp
import funcprop as fp

LAYERS, BATCH, WIDTH = 16, 1024, 64
UNIT = 4 * BATCH * WIDTH
ws = [jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32")] * LAYERS
x = jax.ShapeDtypeStruct((BATCH, WIDTH), "float32")

def loss(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)

def looped(ws, x):
    def layer(x, w):
        return jnp.sin(jnp.tanh(x @ w)), None
    return jnp.sum(jax.lax.scan(layer, x, ws)[0])

def units(fun, options, ws=ws):
    compiled = jax.jit(jax.grad(fun), compiler_options=options).lower(ws, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes / UNIT

options = fp.memory.remat_plan(loss, chunks=4)(ws, x).compiler_options
chunks = {k: units(fp.memory.rematerialize(loss, chunks=k), options) for k in (1, 2, 4, 8, 16)}
proof = fp.memory.remat_plan(loss, 0.25)(ws, x).prove()
stacked = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), "float32")
in_loop = fp.memory.remat_plan(looped, LAYERS * UNIT)(stacked, x)
print(json.dumps({
    "options": options,
    "plain": units(loss, {}),
    "chunks": chunks,
    "proof": [c and (c.temp / UNIT, c.flops) for c in proof],
    "text": str(proof),
    "loop": [units(f, in_loop.compiler_options, stacked)
             for f in (looped, fp.memory.rematerialize(looped, LAYERS * UNIT))],
    "loop options": in_loop.compiler_options,
}))
"""


@pytest.fixture(scope="module")
def measured():
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_equal_layers_in_chunks(measured):
    temp = {int(k): units for k, units in measured["chunks"].items()}
    assert min(temp, key=temp.get) == 4
    for k, units in temp.items():
        assert k + 16 / k - 1 <= round(units, 1) <= k + 16 / k + 1
    assert temp[4] < 0.5 * measured["plain"]


def test_the_plan_is_proved_on_the_compiled_program(measured):
    (plain, plain_flops), (lean, lean_flops), without_options = measured["proof"]
    assert lean < 0.7 * plain
    assert plain_flops < lean_flops
    assert (without_options is None) == (measured["options"] == {})
    if measured["options"]:
        # Without them the program recomputes less than it says, and holds as much as before.
        undone, undone_flops = without_options
        assert undone > 0.9 * plain
        assert undone_flops < lean_flops
        assert "without its options" in measured["text"]


def test_a_loop_needs_no_option(measured):
    plain, lean = measured["loop"]
    assert lean < 0.6 * plain
    assert measured["loop options"] == {}
