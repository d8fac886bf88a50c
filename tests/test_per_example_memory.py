"""What the compiled programs of per-example quantities hold, as users compile them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, jax, jax.numpy as jnp, optax, funcprop as fp

def model(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

def shape(*s):
    return jax.ShapeDtypeStruct(s, jnp.float32)

params = {"a": shape(256, 512), "b": shape(512, 256), "c": shape(256, 10)}
x, y = shape(64, 256), jax.ShapeDtypeStruct((64,), jnp.int32)
quantities = fp.per_example(model, optax.softmax_cross_entropy_with_integer_labels, max_bytes=BOUND)
sizes = {}
for name in ("norm", "gradients", "diag_ggn", "variance"):
    program = jax.jit(lambda p, x, y: quantities(p, x, y, [name])).lower(params, x, y).compile()
    m = program.memory_analysis()
    sizes[name] = m.temp_size_in_bytes + m.output_size_in_bytes
print(json.dumps(sizes))
"""


def sizes(bound):
    environment = {**os.environ, "XLA_FLAGS": ""}
    program = PROGRAM.replace("BOUND", str(bound))
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def held():
    return sizes(2**26)


PARAMETERS = 4 * (256 * 512 + 512 * 256 + 256 * 10)


def test_norms_hold_no_gradients(held):
    """Batch × parameters would be 64 times the parameters; activations and cotangents are less than one."""
    assert held["gradients"] >= 64 * PARAMETERS
    assert held["norm"] < PARAMETERS


def test_moments_hold_no_gradients(held):
    assert held["variance"] < 4 * PARAMETERS
    assert held["diag_ggn"] < 8 * PARAMETERS


def test_stacked_cotangents_keep_the_bound(held):
    """Nine columns of 64 examples are 1.8 MB; in parts of a quarter they are less."""
    assert sizes(2**18)["diag_ggn"] < held["diag_ggn"] - 10**6
