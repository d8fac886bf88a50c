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
from jax import lax
from rule_examples import positive

import funcprop as fp
from funcprop.rules.primitives.elementwise import elementwise_rule
from funcprop.testing import check_rule

GUIDE = (Path(fp.__file__).parent / "rules" / "WRITING_RULES.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def layer():
    (text,) = (block for block in BLOCKS if "@layer(" in block)
    module = ModuleType("scale_layer", text)
    sys.modules["scale_layer"] = module
    exec(compile(text, "WRITING_RULES.md", "exec"), vars(module))
    yield vars(module)["scale"]
    del sys.modules["scale_layer"]


def test_the_rule_of_a_primitive():
    (line,) = (block for block in BLOCKS if block.lstrip().startswith('"log1p": elementwise_rule'))
    table = eval("{" + line + "}", {"elementwise_rule": elementwise_rule, "lax": lax})
    check_rule(table["log1p"], positive(3, 4), function=lax.log1p, primitive="log1p")
    rules = fp.rules.autodiff.replace(table)
    found = fp.grad(lambda x: jnp.sum(jnp.log1p(x)), rules=rules)(positive(3))
    np.testing.assert_allclose(found, 1 / (1 + positive(3)))


def test_the_rule_of_a_layer(layer):
    x, factor = positive(3, 4), positive(4, seed=1)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        check_rule(layer, x, factor)
    derivation = fp.derive(lambda x, factor: jnp.sum(layer(x, factor)), argnums=(0, 1))(x, factor)
    derivation.verify()
