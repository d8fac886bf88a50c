"""Bytes of values: as NumPy counts them, keys as their words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcprop.program.sizes import nbytes


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int8", "bool", "complex64"])
def test_arrays_their_types_and_atoms_count_alike(dtype: str) -> None:
    x = jnp.zeros((3, 0, 2) if dtype == "int8" else (3, 2), dtype)
    jaxpr = jax.make_jaxpr(lambda x: x)(x).jaxpr
    assert nbytes(x) == nbytes(jax.typeof(x)) == nbytes(jaxpr.invars[0]) == np.asarray(x).nbytes


def test_a_key_counts_as_its_words() -> None:
    for impl in ("threefry2x32", "rbg"):
        key = jax.random.split(jax.random.key(0, impl=impl), 3)
        assert nbytes(key) == jax.random.key_data(key).nbytes


def test_what_has_no_size_counts_nothing() -> None:
    jaxpr = jax.make_jaxpr(lambda x: jax.new_ref(x)[...])(1.0).jaxpr
    assert nbytes(jaxpr.eqns[0].outvars[0]) == 0
    assert nbytes(jax.ShapeDtypeStruct((2,), jax.dtypes.float0)) == 0
    assert nbytes(jax.typeof(jax.lax.create_token())) == 0
