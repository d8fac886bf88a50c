"""What is written into an operator's circle.

A layer brings its own symbol (`fp.layer(symbol=…)`); JAX's primitives have the usual notation, where there
is one, and else a short form of their name.
"""

from __future__ import annotations

from funcprop import _jax
from funcprop.graph.graph import Operator

PRIMITIVES = {
    "add": "+", "add_any": "+", "sub": "−", "mul": "⊙", "div": "÷", "neg": "−", "dot_general": "×",
    "conv_general_dilated": "∗", "reduce_sum": "Σ", "reduce_max": "max", "reduce_min": "min",
    "reduce_prod": "Π", "cumsum": "Σ", "cumprod": "Π", "one_minus_square": "1−x²",
    "square": "x²", "pow": "xʸ",
    "sqrt": "√", "rsqrt": "1/√", "transpose": "ᵀ", "exp": "exp", "log": "log", "logistic": "σ", "abs": "|·|",
    "eq": "=", "ne": "≠", "lt": "<", "le": "≤", "gt": ">", "ge": "≥", "and": "∧", "or": "∨", "not": "¬",
    "name": "=", "copy": "=", "stop_gradient": "stop", "select_n": "where",
    "convert_element_type": "cast", "broadcast_in_dim": "broadcast", "dynamic_slice": "slice",
    "dynamic_update_slice": "update",
    "concatenate": "concat", "reduce_window_max": "pool", "reduce_window_sum": "pool",
    "reduce_window": "pool", "select_and_scatter_add": "unpool", "select_and_gather_add": "pool",
    "scatter-add": "scatter", "scatter_add": "scatter", "random_bits": "random", "threefry2x32": "random",
    "iota": "0, 1, …", "shift_right_logical": "≫", "shift_left": "≪", "bitcast_convert_type": "bits",
}  # fmt: skip


def symbol(op: Operator) -> str:
    """Choose the text in an operator's circle; for a custom derivative, the name of its function."""
    if op.call is not None:
        return op.call.symbol()
    if op.op in ("custom_jvp_call", "custom_vjp_call") and op.equation is not None:
        return _jax.function_name(op.equation)
    if op.op == "integer_pow":
        return "x" + str(op.static["y"]).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    written = PRIMITIVES.get(op.op)
    return written if written is not None else op.op.replace("_", " ")
