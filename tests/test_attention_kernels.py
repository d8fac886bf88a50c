"""Attention by a kernel: chosen for the target, the kernel's first derivative, ours for the second."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcprop as fp
from funcprop.layers import attention_kernels
from funcprop.layers.attention_kernels import KernelCall, chosen, why_not
from funcprop.rules.machine import Machine

attention = fp.layers.attention
CALLS = {"value": 0, "pulled": 0}


def a_kernel(q, k, v, *, causal, scale):
    """As a kernel is: with a first derivative of its own, and an error where it is differentiated twice."""

    def plain(q, k, v):
        return attention.function(q, k, v, causal=causal, scale=scale)

    @jax.custom_vjp
    def run(q, k, v):
        CALLS["value"] += 1
        return opaque(plain)(q, k, v)

    def backward(saved, g):
        CALLS["pulled"] += 1
        return opaque(lambda q, k, v, g: jax.vjp(plain, q, k, v)[1](g))(*saved, g)

    run.defvjp(lambda *x: (run(*x), x), backward)
    return run(q, k, v)


def opaque(fun):
    call = jax.custom_jvp(fun)

    @call.defjvp
    def _(primals, tangents):
        raise NotImplementedError("a kernel has no derivative")

    return call


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(attention_kernels, "_cudnn", a_kernel)
    monkeypatch.setattr(attention_kernels, "why_not", lambda name, call: None)
    jax.clear_caches()
    CALLS.update(value=0, pulled=0)


def operands(length=6, heads=2, kv=1, d=4):
    shapes = (2, length, heads, d), (2, length, kv, d), (2, length, kv, d)
    return [jnp.sin(jnp.arange(float(np.prod(s))) + i).reshape(s) for i, s in enumerate(shapes)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("rules", [fp.rules.default, fp.rules.autodiff], ids=["by its rule", "without rules"])
@pytest.mark.parametrize("jit", [True, False])
def test_a_kernel_is_differentiated_by_its_own_backward_and_twice_by_ours(kernel, rules, jit):
    args, directions = operands(), operands()[::-1]
    directions = [
        x.reshape(y.shape) if x.size == y.size else jnp.cos(y) for x, y in zip(directions, args, strict=True)
    ]
    loss = lambda *x, **options: jnp.sum(attention(*x, causal=True, **options) ** 3)  # noqa: E731
    by_kernel, plain = partial(loss, implementation="cudnn"), partial(loss, implementation="xla")
    wrap = jax.jit if jit else lambda f: f
    ours, theirs = fp.grad(by_kernel, (0, 1, 2), rules=rules), jax.grad(plain, (0, 1, 2))
    close(wrap(ours)(*args), jax.jit(theirs)(*args))
    assert CALLS["value"] > 0
    assert CALLS["pulled"] > 0
    forward = lambda grad, wrap: wrap(lambda *x: jax.jvp(grad, x, tuple(directions))[1])(*args)  # noqa: E731
    close(forward(ours, wrap), forward(theirs, jax.jit))

    def reverse(grad, wrap):
        along = lambda *x: sum(jnp.vdot(a, b) for a, b in zip(grad(*x), directions, strict=True))  # noqa: E731
        return wrap(jax.grad(along, (0, 1, 2)))(*args)

    close(reverse(ours, wrap), reverse(theirs, jax.jit))
    tangent = lambda f: jax.jvp(lambda *x: f(*x), tuple(args), tuple(directions))[1]  # noqa: E731
    close(tangent(fp.with_rules(by_kernel, rules)), tangent(jax.jit(plain)))
    stacked = [jnp.stack([x, 2 * x]) for x in args]
    close(wrap(jax.vmap(ours))(*stacked), jax.jit(jax.vmap(theirs))(*stacked))


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


def call(dtype="bfloat16", length=256, width=128, **options):
    q = jax.ShapeDtypeStruct((2, length, 2, width), dtype)
    given = {"bias": None, "mask": None, "causal": True, "window": None, "offset": 0, "scale": 1.0, **options}
    return KernelCall(q, q, q, **given)


def test_the_default_follows_the_target():
    tpu, cpu, gpu = (Machine(platform) for platform in ("tpu", "cpu", "gpu"))
    assert chosen(None, call(), None, tpu) == "pallas"
    assert chosen(None, call(length=200), None, tpu) == "xla"
    assert chosen(None, call(), (128, 128), tpu) == "xla", "blocks are those of XLA"
    assert chosen(None, call(), None, cpu) == "xla"
    assert chosen(None, call(), None, gpu) == "xla", "this process has no GPU"
    assert chosen("cudnn", call(), None, cpu) == "cudnn"


REASONS = {
    "a bias": (call(bias=1.0), "pallas", "without bias, mask, window and offset"),
    "a length": (call(length=200), "pallas", "must be multiples of 128, not 200, 200 and 128"),
    "a dtype": (call("float32"), "cudnn", "16 bits, not float32"),
    "a width": (call(width=136), "cudnn", "a multiple of 8 up to 128, not 136"),
    "halves": (call("float16"), "pallas", "bfloat16 or float32, not float16"),
}


@pytest.mark.parametrize(("given", "name", "reason"), REASONS.values(), ids=REASONS)
def test_what_a_kernel_does_not_take(given, name, reason):
    assert reason in why_not(name, given)
    x = jnp.zeros(given.q.shape, given.q.dtype)
    bias = None if given.bias is None else jnp.zeros((256, 256))
    with pytest.raises(ValueError, match=rf"implementation='{name}': .*pass implementation='xla', or None"):
        attention(x, x, x, bias, causal=True, implementation=name)


def test_messages():
    x = operands()
    with pytest.raises(
        ValueError, match=r"implementation='flash'; pass 'cudnn', 'pallas', 'tokamax', 'xla', or None"
    ):
        attention(*x, implementation="flash")
    if importlib.util.find_spec("tokamax") is None:
        with pytest.raises(
            ModuleNotFoundError, match=r"tokamax is not installed; pip install 'funcprop\[kernels\]'"
        ):
            attention(*x, implementation="tokamax")


COMPILED = """
import jax, jax.numpy as jnp, funcprop as fp
from funcprop._jax.topologies import tpu_devices
device = tpu_devices("v5e:2x2")[0]
x = jax.ShapeDtypeStruct((1, 512, 2, 128), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
loss = lambda q, k, v: jnp.sum(fp.layers.attention(q, k, v, causal=True).astype(jnp.float32) ** 2)
rules = fp.rules.default.on(device)
text = jax.jit(fp.grad(loss, (0, 1, 2), rules=rules)).lower(x, x, x).compile().as_text()
print(text.count("tpu_custom_call"), repr(rules).splitlines()[0])
"""
TPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_gradient_by_pallas_is_compiled_for_a_tpu():
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILED)],
        env={**os.environ, **TPU}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    count, _, rules = run.stdout.strip().splitlines()[-1].partition(" ")
    assert int(count) >= 3, "one kernel forwards, two backwards"
    assert rules.startswith("RuleSet 'default' on tpu (TPU v5 lite)")
