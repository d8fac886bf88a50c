"""What the compiled programs of curvature hold, as users compile them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, jax, jax.numpy as jnp, optax, funcprop as fp

def model(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

def shape(*s):
    return jax.ShapeDtypeStruct(s, jnp.float32)

params = {"a": shape(256, 512), "b": shape(512, 256), "c": shape(256, 10)}
x, y = shape(64, 256), jax.ShapeDtypeStruct((64,), jnp.int32)

def memory(fun, *args):
    return jax.jit(fun).lower(*args).compile().memory_analysis()

def quantity(name, bound):
    quantities = fp.per_example(model, optax.softmax_cross_entropy_with_integer_labels, budget=bound)
    return memory(lambda p, x, y: quantities(p, x, y, [name]), params, x, y)

sizes = {}
nightly = ("norm", "gradients") if os.environ.get("FUNCPROP_NIGHTLY") else ()
for name in ("diag_ggn", "variance", *nightly):
    m = quantity(name, 2**26)
    sizes[name] = m.temp_size_in_bytes + m.output_size_in_bytes
    if name == "diag_ggn":
        sizes[f"temporary, {2**26}"] = m.temp_size_in_bytes
sizes[f"temporary, {CHUNKED}"] = quantity("diag_ggn", CHUNKED).temp_size_in_bytes

def loss(p, x):
    return jnp.mean(jnp.sum(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]), 1) ** 4)

few = {"a": shape(16, 64), "b": shape(64, 64)}, shape(512, 16)
for bound in (2**30, COLUMNS):
    diagonal = fp.curvature.hessian_diagonal(loss, budget=bound)
    found = [diagonal.plan(*few).nbytes, memory(diagonal, *few).temp_size_in_bytes]
    sizes[f"columns, {bound}"] = found
print(json.dumps(sizes))
"""
# Of stacked cotangents, and of columns of a Hessian.
CHUNKED, COLUMNS = 2**17, 3 * 2**19


@pytest.fixture(scope="module")
def held():
    environment = {**os.environ, "XLA_FLAGS": ""}
    program = PROGRAM.replace("CHUNKED", str(CHUNKED)).replace("COLUMNS", str(COLUMNS))
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


PARAMETERS = 4 * (256 * 512 + 512 * 256 + 256 * 10)


@pytest.mark.nightly
def test_norms_hold_no_gradients(held):
    """Batch × parameters would be 64 times the parameters; activations and cotangents are less than one."""
    assert held["gradients"] >= 64 * PARAMETERS
    assert held["norm"] < PARAMETERS


def test_moments_hold_no_gradients(held):
    assert held["variance"] < 4 * PARAMETERS
    assert held["diag_ggn"] < 8 * PARAMETERS


def test_stacked_cotangents_keep_the_bound(held):
    """Nine columns of 64 examples are more than ten times the bound; besides them there are activations."""
    assert 10 * CHUNKED <= 9 * 64 * 4 * (512 + 256 + 10)
    assert held[f"temporary, {2**26}"] >= 10 * CHUNKED
    assert held[f"temporary, {CHUNKED}"] <= 6 * CHUNKED


def test_columns_of_a_hessian_keep_the_bound(held):
    """So do blocks of columns that would take ten times the bound; besides them there are residuals."""
    (free, of_free), (bounded, of_bounded) = held[f"columns, {2**30}"], held[f"columns, {COLUMNS}"]
    assert free >= 10 * COLUMNS >= 10 * bounded
    assert of_free >= 3 * COLUMNS
    assert of_bounded <= 2 * COLUMNS
