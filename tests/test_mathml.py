"""Formulas in the report: MathML that says what the LaTeX says, and nothing that is markup."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

import funcprop as fp
from funcprop.cli.target import chapter_example
from funcprop.reporting.mathml import MathError, mathml
from funcprop.rules.notation import latex_name


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
