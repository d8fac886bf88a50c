"""The notebook is the tour of the README, executed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_notebook_is_the_tour_of_the_readme() -> None:
    """Its programs are those of the README, and what it shows is there."""
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        spec = importlib.util.spec_from_file_location("tour", ROOT / "experiments" / "tour.py")
        assert spec is not None
        assert spec.loader is not None
        tour = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tour)
    finally:
        sys.path.pop(0)
    made = tour.notebook((ROOT / "README.md").read_text("utf-8"))
    kept = json.loads(tour.NOTEBOOK.read_text("utf-8"))
    sources = ["".join(cell["source"]) for cell in kept["cells"]]
    assert sources == [cell["source"] for cell in made["cells"]], "run python experiments/tour.py"
    data = [o.get("data", {}) for cell in kept["cells"] for o in cell.get("outputs", ())]
    assert any("text/latex" in shown for shown in data)
    assert any("image/svg+xml" in shown for shown in data)
    assert not any(o["output_type"] == "error" for cell in kept["cells"] for o in cell.get("outputs", ()))
