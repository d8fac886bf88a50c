"""Compiling for tests: most of their time goes into XLA, and unoptimised code is quicker to make."""

import functools

import jax

compiled = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
