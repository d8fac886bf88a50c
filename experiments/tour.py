"""The tour of the README as a notebook: its text, its programs, and what each of them prints, run now.

Where the README prints equations, the notebook shows them as formulas, and the picture beside them. Written
to `experiments/tour.ipynb`; with `--smoke` to `results/smoke`, which only says that everything runs.

    python experiments/tour.py [--smoke]
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from running import command_line, folder

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "experiments" / "tour.ipynb"
SECTIONS = ("Change one line", "See it", "Make it fit", "Curvature", "Several devices")
TITLE = (
    "# A tour of funcprop\n\nWhat the [README](../README.md) shows, run by `experiments/tour.py`. Set-up: "
    "`pip install '.[cli,draw,experiments,frameworks]'`."
)
# What a notebook shows besides, after the program that has this in it.
SHOWN = {
    "derivation.verify()": (
        (
            "The same as formulas:",
            "from IPython.display import Latex\n\nLatex(derivation.latex())",
        ),
        ("The picture; a box is a module, or a function that has a name:", "fp.trace(loss)(params, x, y)"),
        (
            "Both sweeps in the open, every value and gradient by name:",
            "sweeps = fp.backprop(loss)(params, x, y)\n"
            "for name, gradient in sweeps.gradients.items():\n"
            '    print(f"∂J/∂{name}: {gradient.shape}, length {jnp.linalg.norm(gradient):.4f}")',
        ),
    )
}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)(?:experiments/(?=pictures))?([^)]*)\)")


def _text(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def _program(source: str) -> dict[str, Any]:
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": source}


def cells(readme: str) -> Iterator[dict[str, Any]]:
    """The cells of the tour: text, programs, and what is shown besides."""
    yield _text(TITLE)
    for title, text in re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL):
        if title in SECTIONS:
            yield from _section(f"## {title}\n{text}")


def _section(text: str) -> Iterator[dict[str, Any]]:
    end, prose = 0, ""
    for block in _BLOCK.finditer(text):
        prose += text[end : block.start()]
        end = block.end()
        if block[1] == "python":
            yield from _markdown(prose)
            prose = ""
            yield _program(block[2].rstrip())
            for marker, further in SHOWN.items():
                if marker in block[2]:
                    for said, program in further:
                        yield _text(said)
                        yield _program(program)
        elif block[1] != "text":  # What a program prints is what it prints here.
            prose += block[0]
    yield from _markdown(prose + text[end:])


def _markdown(prose: str) -> Iterator[dict[str, Any]]:
    if prose.strip():
        yield _text(_LINK.sub(_from_here, prose.strip()))


def _from_here(link: re.Match[str]) -> str:
    """A link of the README, seen from the folder of the notebook."""
    return f"]({link[1]})" if link[1].startswith("pictures/") else f"](../{link[1]})"


def notebook(readme: str) -> dict[str, Any]:
    """The notebook without outputs; cells are numbered, so that it changes with the README alone."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    numbered = [{"id": f"cell-{i}", **cell} for i, cell in enumerate(cells(readme))]
    return {"cells": numbered, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    """Build the notebook, run it, and write it."""
    import nbformat  # Who only reads the notebook needs neither.
    from nbclient import NotebookClient

    options = command_line(__doc__, smoke="write it to results/smoke").parse_args()
    found = nbformat.from_dict(notebook((ROOT / "README.md").read_text("utf-8")))
    with tempfile.TemporaryDirectory() as directory:
        where = {"metadata": {"path": directory}}
        NotebookClient(
            found, timeout=600, resources=where, record_timing=False, coalesce_streams=True
        ).execute()
    found.metadata.pop("language_info", None)
    path = folder(True) / NOTEBOOK.name if options.smoke else NOTEBOOK
    nbformat.write(found, path)
    print(f"{path}: {len(found.cells)} cells")


if __name__ == "__main__":
    main()
