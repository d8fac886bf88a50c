"""Every registered rule passes every check; a rule without an example is an error."""

from typing import Any

import pytest
import rule_examples
from rule_examples import LAYERS, PRIMITIVES, Example

import funcprop as fp
from funcprop.testing import check_rule


def layers_with_rules() -> dict[str, fp.Layer]:
    found = {name: getattr(fp.layers, name) for name in dir(fp.layers)}
    return {name: x for name, x in found.items() if isinstance(x, fp.Layer) and x.rule is not None}


def cases() -> list[Any]:
    """One test for each example, and one that fails for each operator without any."""
    found: list[tuple[str, Any, Example | None, dict[str, Any]]] = []
    for name in (key for key in fp.rules.handwritten if isinstance(key, str)):
        function, examples = PRIMITIVES.get(name, (None, []))
        operator = fp.rules.handwritten[name]
        options = {"function": function, "primitive": name}
        found += [(f"primitive {name}", operator, example, options) for example in examples or [None]]
    for name, layer in layers_with_rules().items():
        found += [(f"layer {name}", layer, example, {}) for example in LAYERS.get(name) or [None]]
    return [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(found)]


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("name", "operator", "example", "options"), cases())
def test_every_rule(name: str, operator: Any, example: Example | None, options: dict[str, Any]) -> None:
    assert example is not None, (
        f"{name} has a hand-written rule but no example arguments; add one to the table in "
        f"{rule_examples.__file__}"
    )
    report = check_rule(example.rule or operator, *example.args, **options, **example.options)
    assert len(report.rows) >= 15


@pytest.mark.parametrize("table", ["primitives", "layers"])
def test_every_rule_has_an_example_and_no_example_is_left_over(table: str) -> None:
    if table == "primitives":
        assert set(PRIMITIVES) == {key for key in fp.rules.handwritten if isinstance(key, str)}
    else:
        assert set(LAYERS) == set(layers_with_rules())
