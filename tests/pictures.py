"""What the tests of pictures draw, and how they read what was drawn."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import funcprop as fp
from funcprop.cli.target import chapter_example

ENGINES = [
    pytest.param(
        "dot",
        marks=pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's dot is not installed"),
    ),
    "graphviz-pure",
]
SVG = "{http://www.w3.org/2000/svg}"


def chapter() -> fp.Graph:
    return fp.trace(fp.models.chapter)(*chapter_example())


def elements(svg: str, kind: str) -> dict[str, Any]:
    """The groups of one kind by the name of what they draw."""
    root = ElementTree.fromstring(svg)
    return {g.get("data-name"): g for g in root.iter(f"{SVG}g") if g.get("class") == f"funcprop-{kind}"}


class Block(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + nn.Dense(x.shape[-1], name="outer")(nn.tanh(nn.Dense(self.width, name="inner")(x)))


class Stack(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for width in self.widths:
            x = Block(width)(x)
        return nn.Dense(2, name="head")(x)


@cache
def stack(*widths: int) -> fp.Graph:
    model, x = Stack(widths), jax.ShapeDtypeStruct((2, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    return fp.trace(lambda params, x: model.apply(params, x))(params, x)


# A name of what is markup in one format or another.
NASTY = "<b>&\"'</script>\\N{x}\u2028"


def nasty() -> fp.Graph:
    return fp.trace(lambda p: fp.name(jnp.sinh(p[NASTY]), NASTY + "2"))({NASTY: jnp.ones(2)})


def printable(label: str) -> str:
    return "".join(c if c.isprintable() else "�" for c in label)
