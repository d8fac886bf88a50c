"""What an array that depends on nothing is called in an equation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from funcprop.equations.constants import pattern

LOWER = np.tri(3, dtype=bool)
NAMES: list[tuple[Any, str]] = [
    (LOWER, "causal mask"),
    (np.broadcast_to(LOWER, (2, 4, 3, 3)), "causal mask"),
    (np.tri(2, 5, dtype=bool), "causal mask"),
    (LOWER.T, "mask"),
    (np.array([True, False]), "mask"),
    (np.eye(3), "I"),
    (np.eye(3)[:, ::-1], "constant"),
    (2 * np.eye(3), "2 I"),
    (np.arange(4), "positions"),
    (np.arange(4.0), "positions"),
    (np.broadcast_to(np.arange(4), (3, 4)), "positions"),
    (np.broadcast_to(np.arange(4)[:, None], (4, 3)), "constant"),
    (np.arange(4) + 1, "[1, 2, 3, 4]"),
    (np.array([3, 1]), "[3, 1]"),
    (np.array([3.0, 1.0]), "constant"),
    (np.arange(100) + 1, "constant"),
    (np.array(2.5), "constant"),
    (np.zeros((0, 0)), "constant"),
    (np.zeros((3, 3)), "constant"),
]


@pytest.mark.parametrize(("array", "name"), NAMES, ids=lambda value: value if isinstance(value, str) else "")
def test_an_array_is_called_by_what_it_is(array: Any, name: str) -> None:
    assert pattern(array) == name
