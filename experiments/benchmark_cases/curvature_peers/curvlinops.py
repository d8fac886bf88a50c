"""curvlinops: linear operators for PyTorch. Its matrices are those of the mean loss, as ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import curvlinops

from benchmark_cases.curvature import Problem
from benchmark_cases.curvature_peers import Way
from benchmark_cases.curvature_peers.torch_twin import twin

LIBRARY, OWN = "curvlinops", "torch"


def _product(operator: Any) -> Callable[[str, Problem], Way]:
    def build(name: str, p: Problem) -> Way:
        t = twin(name, p)
        A = operator(t.model, t.loss, t.params, [(t.x, t.y)], check_deterministic=False)
        v = t.from_jax(p.direction)
        return Way(lambda: A @ v, lambda: t.as_jax(A @ v))

    return build


WAYS: dict[str, Callable[[str, Problem], Way]] = {
    "Hessian-vector product": _product(curvlinops.HessianLinearOperator),
    "Gauss-Newton product": _product(curvlinops.GGNLinearOperator),
}
