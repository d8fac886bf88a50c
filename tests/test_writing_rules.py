"""The guide to writing rules: what it shows is right, by the checks that it names."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule_examples
from jax import lax
from rule_examples import positive

import funcprop as fp
from funcprop.rules.primitives.elementwise import elementwise_rule
from funcprop.testing import check_rule

GUIDE = (Path(fp.__file__).parent / "rules" / "WRITING_RULES.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)


def entry(start: str, names: dict[str, object]) -> object:
    """The value of the one line of a table that the guide shows and that begins so."""
    (line,) = (block for block in BLOCKS if block.lstrip().startswith(start))
    (value,) = eval("{" + line + "}", names).values()
    return value


@pytest.fixture
def layer():
    (text,) = (block for block in BLOCKS if "@layer(" in block)
    module = ModuleType("scale_layer", text)
    sys.modules["scale_layer"] = module
    exec(compile(text, "WRITING_RULES.md", "exec"), vars(module))
    yield vars(module)["scale"]
    del sys.modules["scale_layer"]


@pytest.fixture
def rule():
    return entry('"log1p": elementwise_rule', {"elementwise_rule": elementwise_rule, "lax": lax})


def test_the_rule_of_a_primitive(rule):
    function, examples = entry('"log1p": (lax.log1p', vars(rule_examples))
    for example in examples:
        check_rule(rule, *example.args, function=function, primitive="log1p")
    rules = fp.rules.autodiff.replace({"log1p": rule})
    found = fp.grad(lambda x: jnp.sum(jnp.log1p(x)), rules=rules)(positive(3))
    np.testing.assert_allclose(found, 1 / (1 + positive(3)))


def test_the_rule_of_a_layer(layer):
    for example in entry('"scale": [', vars(rule_examples)):
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            check_rule(layer, *example.args)


def test_the_checks_by_hand(rule, layer, monkeypatch, capsys):
    monkeypatch.setattr(fp.layers, "scale", layer, raising=False)
    monkeypatch.setattr(fp.rules, "handwritten", fp.rules.handwritten.replace({"log1p": rule}))
    names = {"fp": fp, "jax": jax, "jnp": jnp}
    for block in BLOCKS:
        if "check_rule(" in block or ".verify()" in block:
            exec(compile(block, "WRITING_RULES.md", "exec"), names)
    assert capsys.readouterr().out.count("residual bytes") == 2
