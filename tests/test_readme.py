"""Every README runs: its programs print what it shows, its commands too, and the table lists the rules.

`python tests/test_readme.py` writes the outputs and the table into them, with `--table` the table alone.
"""

import contextlib
import io
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import funcprop as fp
from funcprop.cli.app import app

ROOT = Path(__file__).parents[1]
README, RULES_README = ROOT / "README.md", ROOT / "funcprop" / "rules" / "README.md"
READMES = [README, *sorted((ROOT / "funcprop").glob("*/README.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RULES = re.compile(r"(<!-- rules.*?-->\n)(.*?)(<!-- end of rules -->)", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?|-?\d+e[+-]?\d+|\d+(?= kB)")


class Block(NamedTuple):
    kind: str
    body: str
    span: tuple[int, int]


def blocks(text: str) -> list[Block]:
    return [Block(found[1], found[2], found.span(2)) for found in BLOCK.finditer(text)]


# --- running ----------------------------------------------------------------------------------


def outputs(text: str) -> Iterator[tuple[Block, str]]:
    """Every block that shows an output, with the output that it has now.

    Python blocks share their names, as in a notebook; `# file.py` on the first line makes one a file.
    """
    names: dict[str, Any] = {"__name__": "readme"}
    printed = ""
    with tempfile.TemporaryDirectory() as directory:
        for block in blocks(text):
            file = re.match(r"# (\w+\.py)\n", block.body)
            if block.kind == "python" and file:
                Path(directory, file[1]).write_text(block.body)
            elif block.kind == "python":
                printed = execute(block.body, names)
            elif block.kind == "text":
                yield block, printed
            elif block.kind == "console":
                yield block, run_command(block.body.splitlines()[0], directory)


def execute(source: str, names: dict[str, Any]) -> str:
    # Readers have JAX's default precision, the tests double precision.
    with contextlib.redirect_stdout(io.StringIO()) as printed, jax.enable_x64(False):
        exec(compile(source, "README.md", "exec"), names)
    return printed.getvalue()


def run_command(line: str, directory: str) -> str:
    assert line.startswith("$ funcprop "), line
    with contextlib.chdir(directory), jax.enable_x64(False):
        result = CliRunner().invoke(app, shlex.split(line)[2:], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return f"{line}\n{result.stdout}"


def rules_table() -> str:
    """Every registered rule, and the platforms on which `fp.rules.default` has it."""
    rows = ["| operator | | in `fp.rules.default` on |", "|---|---|---|"]
    found = {name: getattr(fp.layers, name) for name in dir(fp.layers)}
    layers = {n: x for n, x in found.items() if isinstance(x, fp.Layer) and x.rule is not None}
    rules = {f"`{name}`": ("primitive", rule) for name, rule in fp.rules.handwritten.items()}
    rules |= {f"`fp.layers.{name}`": ("layer", layer.rule) for name, layer in sorted(layers.items())}
    for name, (kind, rule) in rules.items():
        platforms = None if rule.platforms is None else ", ".join(sorted(rule.platforms))
        rows.append(f"| {name} | {kind} | {'all platforms' if platforms is None else platforms or '–'} |")
    return "\n".join(rows) + "\n"


# --- comparing --------------------------------------------------------------------------------


def agrees(shown: str, actual: str) -> bool:
    """Whether an output is the one that is shown, with `…` for lines left out; numbers to 2 %.

    The last digits depend on the processor and on the version of XLA. Deviations of the size of rounding
    errors depend on them entirely.
    """
    pattern = "".join(
        r"(?:.*\n)*" if line.strip() == "…" else template(line) + r"\n" for line in shown.splitlines()
    )
    found = re.fullmatch(pattern, normal(actual))
    return found is not None and all(
        np.isclose(float(a), float(b), rtol=0.02, atol=2e-6)
        for a, b in zip(NUMBER.findall(shown), found.groups(), strict=True)
    )


def normal(text: str) -> str:
    """Without what varies with the width of numbers: runs of spaces, rules under a table's head."""
    return "".join(re.sub(r"-{3,}", "---", " ".join(line.split())) + "\n" for line in text.splitlines())


def template(line: str) -> str:
    pieces = NUMBER.split(normal(line).rstrip("\n"))
    return f"({NUMBER.pattern})".join(map(re.escape, pieces))


# --- tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("readme", READMES, ids=[str(path.parent.name) for path in READMES])
def test_outputs_are_those_shown(readme: Path) -> None:
    for block, actual in outputs(readme.read_text()):
        assert agrees(block.body, actual), f"{readme} shows\n{block.body}\nbut now it is\n{actual}"


def test_table_of_rules() -> None:
    found = RULES.search(RULES_README.read_text())
    assert found is not None
    assert found[2] == rules_table(), "run `python tests/test_readme.py --table` to write the table"


RECIPES = ("fp.grad(loss)", "nnx.value_and_grad(fp.with_rules", "eqx.filter_value_and_grad", "TrainState")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_equal_the_frameworks_own_gradients(recipe: str) -> None:
    sources = [block.body for block in blocks(RULES_README.read_text()) if block.kind == "python"]
    first, (chosen,) = sources[0], [source for source in sources if recipe in source]

    def results(**changes: str) -> list[Any]:
        names: dict[str, Any] = {"__name__": "readme"}
        for source in dict.fromkeys([first, chosen]):
            changed = source
            for old, new in changes.items():
                changed = changed.replace(PATTERNS[old], new)
            execute(changed, names)
        found = {k: names.get(k) for k in ("value", "gradient")}
        return [
            x for x in jax.tree.leaves((found, getattr(names.get("state"), "params", None))) if x is not None
        ]

    plain = results(grad="jax.grad(loss)", value_and_grad="jax.value_and_grad(loss)", with_rules="loss")
    every_rule = "rules=fp.rules.handwritten)"
    ruled = results(
        grad=f"fp.grad(loss, {every_rule}",
        value_and_grad=f"fp.value_and_grad(loss, {every_rule}",
        with_rules=f"fp.with_rules(loss, {every_rule}",
    )
    as_it_stands = results()
    assert len(plain) == len(ruled) == len(as_it_stands) >= 2
    for a, b, c in zip(plain, ruled, as_it_stands, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(c, a, rtol=1e-5, atol=1e-7)


PATTERNS = {
    "grad": "fp.grad(loss)",
    "value_and_grad": "fp.value_and_grad(loss)",
    "with_rules": "fp.with_rules(loss)",
}


def test_first_example_is_short() -> None:
    first = next(block for block in blocks(README.read_text()) if block.kind == "python")
    assert len([line for line in first.body.splitlines() if line.strip()]) <= 15


def test_every_block_is_tested() -> None:
    kinds = [block.kind for path in READMES for block in blocks(path.read_text())]
    assert set(kinds) == {"python", "text", "console", "sh"}
    assert kinds.count("sh") == 2, "the set-up commands; .ci/run executes both"


def test_the_tour_is_short_and_its_links_lead_somewhere() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 250
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


# --- writing ----------------------------------------------------------------------------------


def write(table_alone: bool = False) -> None:
    """Put the present outputs and the table into the READMEs; outputs with `…` are only checked."""
    for path in READMES:
        text = path.read_text()
        for block, actual in [] if table_alone else reversed(list(outputs(text))):
            if "\n…\n" in block.body:
                assert agrees(block.body, actual), f"shown:\n{block.body}\nnow:\n{actual}"
            elif not agrees(block.body, actual):
                start, end = block.span
                text = text[:start] + actual + text[end:]
        path.write_text(RULES.sub(lambda found: found[1] + rules_table() + found[3], text))


if __name__ == "__main__":
    write(table_alone="--table" in sys.argv)
