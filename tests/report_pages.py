"""Reports in the browser: of the chapter, of names that would be markup, of a loop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from chapter_report import chapter_report
from chromium import launched, saved
from flax import linen as nn
from playwright.sync_api import Browser

import funcprop as fp

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from launched()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + nn.Dense(3, param_dtype=float)(nn.tanh(nn.LayerNorm(param_dtype=float)(x)))


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(3):
            x = Block()(x)
        return x


@cache
def hostile_report() -> fp.Report:
    """Three equal Flax blocks, a loop, and names that would be markup."""
    model, x = Blocks(), jnp.ones((2, 3))
    params = model.init(jax.random.key(0), x)

    def loss(weights: Any, x: Any) -> Any:
        hidden = model.apply(weights["model"], x) @ weights[HOSTILE]
        with jax.named_scope("<b>scope</b>"):
            total = fp.name(jnp.tanh(hidden), "<i>&amp;</i>")
        return fp.name(jax.lax.scan(lambda c, h: (c + jnp.sum(h**2), None), 0.0, total)[0], "J")

    return fp.report(loss, title=HOSTILE)({"model": params, HOSTILE: jnp.ones((3, 2))}, x)


@cache
def loop_report() -> fp.Report:
    """A scan whose values are known: `c = w c + x`."""

    def looped(w: Any, x: Any) -> Any:
        c, _ = jax.lax.scan(lambda c, x: (fp.name(w * c + x, "c"), None), jnp.zeros(2), x)
        return fp.name(jnp.sum(c), "J")

    x = jnp.tile(jnp.arange(1.0, 5.0)[:, None], 2)
    return fp.report(looped)(jnp.array(0.5), x)


@pytest.fixture(scope="module")
def chapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[fp.Report, Path]:
    return chapter_report(), saved(chapter_report(), tmp_path_factory)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[fp.Report, Path]:
    return hostile_report(), saved(hostile_report(), tmp_path_factory)


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> tuple[fp.Report, Path]:
    return loop_report(), saved(loop_report(), tmp_path_factory)
