"""What users run is optimised and in float32: neither is so in the other tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "float32_programs.py"
TOLERANCE = 1e-5  # of the largest entry; rounding leaves up to 4e-6, an error of 0.1 % would be 1e-3


@pytest.fixture(scope="module")
def rows():
    """Every derivative's error, found by a process without flags for XLA and without `conftest.py`."""
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and not k.startswith("JAX_")}
    run = subprocess.run(
        [sys.executable, PROGRAMS], env=kept, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def table(rows):
    lines = [f"{r['case']:32} {r['rules']:12} {r['error']:.1e} {r['seconds']:5.1f} s" for r in rows]
    return "\n".join(lines)


def test_optimised_programs_in_float32_are_exact(rows):
    wrong = [row for row in rows if not row["error"] < TOLERANCE]  # NaN is wrong, too
    assert not wrong, f"wrong:\n{table(wrong)}\nof all:\n{table(rows)}"


def test_every_case_is_derived_by_its_rule(rows):
    assert [row["case"] for row in rows if not row["fires"]] == []
    assert {row["rules"] for row in rows} == {"default", "handwritten"}
