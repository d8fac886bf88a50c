"""Attention by the kernels of the field: cuDNN's and Pallas' through JAX, and tokamax's.

A kernel brings its own first derivative. It has no second: where it is differentiated twice, the derivative
of its backward is that of the blocks of XLA (`attention_blocks`), which compute the same function. So the
gradient runs by kernels alone, and Hessian-vector products are exact.

Source of the idea of a list of implementations, ours last: tokamax.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcprop import _jax
from funcprop.program.linear_map import LinearMap, linear_p
from funcprop.rules.machine import Machine

IMPLEMENTATIONS = ("cudnn", "pallas", "tokamax", "xla")
_PREFERRED = {"gpu": ("cudnn", "tokamax"), "tpu": ("pallas", "tokamax"), "cpu": ()}

Attend = Callable[[Any, Any, Any], Any]


class KernelCall(NamedTuple):
    """The arguments of attention that decide whether a kernel takes it."""

    q: Any
    k: Any
    v: Any
    bias: Any
    mask: Any
    causal: bool
    window: Any
    offset: int
    scale: float


def chosen(implementation: str | None, call: KernelCall, blocks: Any, machine: Machine) -> str:
    """The implementation: what is asked for, or the machine's first that takes the arguments."""
    if implementation is not None:
        return implementation
    if blocks is None:
        for name in _PREFERRED[machine.platform]:
            if _is_here(name) and why_not(name, call) is None:
                return name
    return "xla"


def _is_here(name: str) -> bool:
    if name == "cudnn":  # JAX looks for the library, and for a device of this process.
        return jax.default_backend() == "gpu"
    return name != "tokamax" or importlib.util.find_spec("tokamax") is not None


def why_not(name: str, call: KernelCall) -> str | None:
    """Why a kernel does not take these arguments; None if it does."""
    q, k, v = call.q, call.k, call.v
    if call.bias is not None or call.mask is not None or call.window is not None or call.offset:
        return "it is called without bias, mask, window and offset"
    if not q.dtype == k.dtype == v.dtype or v.shape[-1] != q.shape[-1]:
        return "queries, keys and values need one dtype and one width"
    queries, keys, width = q.shape[-3], k.shape[-3], q.shape[-1]
    if call.causal and queries != keys:
        return "causal attention needs as many keys as queries"
    if name == "pallas":
        if q.dtype not in (jnp.bfloat16, jnp.float32):
            return f"its operands are bfloat16 or float32, not {q.dtype}"
        if queries % _LANES or keys % _LANES or width % _LANES:
            return f"lengths and width must be multiples of {_LANES}, not {queries}, {keys} and {width}"
    if name == "cudnn":
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"its operands have 16 bits, not {q.dtype}"
        if width % 8 or width > 128:
            return f"the width must be a multiple of 8 up to 128, not {width}"
    return None


def kernel(name: str, call: KernelCall) -> Attend:
    """The kernel as a function of queries, keys and values, with its own first derivative.

    Raises:
        ValueError: it does not take these arguments.
        ModuleNotFoundError: it is not installed.
    """
    if (reason := why_not(name, call)) is not None:
        raise ValueError(f"attention: implementation={name!r}: {reason}; pass implementation='xla', or None.")
    if name == "tokamax" and not _is_here(name):
        raise ModuleNotFoundError(
            "attention: implementation='tokamax': tokamax is not installed; pip install 'funcprop[kernels]'."
        )
    by: Callable[..., Any] = {"cudnn": _cudnn, "pallas": _pallas, "tokamax": _tokamax}[name]
    causal, scale = call.causal, call.scale

    def attend(q: Any, k: Any, v: Any) -> Any:
        batch = q.shape[:-3]
        one = [x.reshape(math.prod(batch), *x.shape[-3:]) for x in (q, k, v)]
        return by(*one, causal=causal, scale=scale).reshape(*batch, *q.shape[-3:])

    return attend


_LANES = 128


def _pallas(q: Any, k: Any, v: Any, *, causal: bool, scale: float) -> Any:
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    def block(length: int) -> int:
        return next(n for n in (512, 256, _LANES) if length % n == 0)

    rows, cols, group = block(q.shape[1]), block(k.shape[1]), q.shape[2] // k.shape[2]
    sizes = BlockSizes(
        block_q=rows, block_k_major=cols, block_k=cols, block_b=1, block_q_major_dkv=rows,
        block_k_major_dkv=cols, block_k_dkv=cols, block_q_dkv=rows, block_k_major_dq=cols, block_k_dq=cols,
        block_q_dq=rows,
    )  # fmt: skip
    by_head = [jnp.moveaxis(x, 2, 1) for x in (q, jnp.repeat(k, group, 2), jnp.repeat(v, group, 2))]
    # Its masks are of 32 bits, whatever JAX's default is.
    with jax.enable_x64(False):
        out = flash_attention(*by_head, causal=causal, sm_scale=scale, block_sizes=sizes)
    return jnp.moveaxis(out, 1, 2)


def _cudnn(q: Any, k: Any, v: Any, *, causal: bool, scale: float) -> Any:
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=causal, implementation="cudnn")


def _tokamax(q: Any, k: Any, v: Any, *, causal: bool, scale: float) -> Any:
    import tokamax

    return tokamax.dot_product_attention(q, k, v, scale=scale, is_causal=causal)


# --- a rule of kernels ------------------------------------------------------------------------


class KernelResiduals(NamedTuple):
    """The operands, and the arrays of the kernel's own pullback."""

    q: Any
    k: Any
    v: Any
    pull: Any


def forward(attend: Attend, same: Attend, q: Any, k: Any, v: Any) -> tuple[Any, KernelResiduals]:
    """The kernel's value and what its backward reads; differentiated, the value is that of `same`."""
    trees: list[Any] = []

    @jax.custom_jvp
    def run(q: Any, k: Any, v: Any) -> Any:
        y, pull = jax.vjp(attend, q, k, v)
        leaves, tree = jax.tree.flatten(pull)
        trees.append(tree)
        return y, leaves

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        y, leaves = run(*primals)
        y_dot = jax.jvp(same, primals, tangents)[1].astype(y.dtype)
        # The backward's derivative is made of the operands: of its own arrays nothing is read.
        return (y, leaves), (y_dot, [_jax.instantiate_zeros(_zero(x)) for x in leaves])

    y, leaves = run(q, k, v)
    return y, KernelResiduals(q, k, v, jax.tree.unflatten(trees[-1], leaves))


def _zero(x: Any) -> Any:
    return _jax.Zero(jax.typeof(x).to_tangent_aval())


def backward(same: Attend, residuals: KernelResiduals, g: Any) -> tuple[Any, Any, Any]:
    """The kernel's backward, a linear map of `g`; its transpose and its derivatives are those of `same`."""
    leaves, tree = jax.tree.flatten(residuals.pull)
    operands = residuals[:3]

    @jax.custom_jvp
    def run(q: Any, k: Any, v: Any, g: Any, leaves: Any) -> Any:
        return tuple(jax.tree.unflatten(tree, leaves)(g))

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        def by_same(q: Any, k: Any, v: Any, g: Any) -> Any:
            return tuple(jax.vjp(same, q, k, v)[1](g))

        return run(*primals), jax.jvp(by_same, primals[:4], tangents[:4])[1]

    def pulled(saved: list[Any], cotangents: list[Any]) -> list[Any]:
        return list(run(*saved[:3], cotangents[0], saved[3:]))

    def pushed(saved: list[Any], tangents: list[Any]) -> list[Any]:
        return [jax.jvp(same, tuple(saved[:3]), tuple(tangents))[1]]

    types = tuple(jax.typeof(x).to_tangent_aval() for x in operands)
    linear = LinearMap(pushed, pulled, types)
    saved = [*operands, *leaves]
    q_bar, k_bar, v_bar = linear_p.bind(*saved, g, linear=linear, residuals=len(saved))
    return q_bar, k_bar, v_bar
