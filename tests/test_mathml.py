"""Formulas in the report: MathML that says what the LaTeX says, and nothing that is markup."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import funcprop as fp
from funcprop.cli.target import chapter_example
from funcprop.reporting.mathml import MathError, mathml
from funcprop.rules.notation import latex_name, number_text


def test_mathml_of_the_chapters_last_line() -> None:
    line = fp.derive(fp.models.chapter)(*chapter_example()).backward[-1]
    bold = '<msub><mi mathvariant="normal" class="bold">W</mi><mn>1</mn></msub>'
    assert mathml(line.left_latex, line.left) == (
        '<math alttext="∂J/∂W1"><mfrac><mrow><mo>∂</mo><mi>J</mi></mrow>'
        f"<mrow><mo>∂</mo>{bold}</mrow></mfrac></math>"
    )
    assert mathml(line.forms[-1].latex(), "").endswith(
        f'<mo>+</mo><mi>λ</mi><mspace width="0.17em"/>{bold}</math>'
    )


@pytest.mark.parametrize("name", ["</b>&amp;", "a_b{c}\\d^e~ f", "\\frac", "日本 1e-5", "φ′", "{}"])
def test_names_stay_as_they_are_in_formulas(name: str) -> None:
    formula = ElementTree.fromstring(mathml(latex_name(name), name))
    assert {element.tag for element in formula.iter()} <= {"math", "mi", "mo", "mrow"}
    assert "".join(formula.itertext()) == name


@pytest.mark.parametrize(
    "latex", ["\\oint{x}", "\\frac{a", "x}", "\\left(x", "\\mathrm x", "\\mathrm{\\alpha}"]
)
def test_what_is_no_formula_is_an_error(latex: str) -> None:
    with pytest.raises(MathError, match="the formula"):
        mathml(latex, "")


def test_every_command_that_equations_write_is_known():
    """Read from the strings of the rooms that write equations."""
    written = set[str]()
    for room in ("rules", "equations", "layers"):
        for path in (Path(fp.__file__).parent / room).rglob("*.py"):
            strings = (n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant))
            for text in strings:
                if isinstance(text, str) and "\\" in text and not text.endswith("."):
                    written |= set(re.findall(r"\\([A-Za-z]{2,}|[ ,;:!])", text))
    arguments = {"frac": "{x}{y}", "left": "(x\\right)", "begin": None, "end": None, "right": None}
    names = {"backslash", "sim"}
    assert len(written) > 20
    for command in written - names:
        argument = arguments.get(command, "{x}")
        if argument is not None:
            mathml(f"\\{command}{argument}", "formula")


def test_a_large_integer_is_a_number():
    """Keys that are folded in by modules are integers that no float has exactly."""
    assert number_text(float(2370627832), np.dtype("uint32"))[0] == "2370627832"
