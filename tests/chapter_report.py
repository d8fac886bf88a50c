"""The report of the chapter with a short training run, made once in a process."""

from __future__ import annotations

from functools import cache

import jax.numpy as jnp
import optax

import funcprop as fp
from funcprop.cli.target import chapter_example


@cache
def chapter_report() -> fp.Report:
    setup = fp.training.Setup(
        lambda w, x: jnp.mean((w - x) ** 2), jnp.array(0.0), [(jnp.ones(3),)], optax.sgd(0.1)
    )
    return fp.report(fp.models.chapter, setup=setup, epochs=3)(*chapter_example())
