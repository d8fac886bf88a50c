"""Would the tests notice a fault? Small faults in the rules and the sweeps, one at a time.

A fault is one place of one file changed: `<` for `≤`, `+` for `−`, `and` for `or`, the successor of a number,
the opposite of a condition, a function's argument in place of its result. A copy of the repository gets the
fault and runs the tests that belong to the file. A fault that no test notices has survived: it changes
nothing that matters, or a test is missing. A test that fails without the fault, too, is left out.

    python experiments/mutation_run.py [--sample N] [--seed N] [--only PART_OF_A_PATH] [--smoke]
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

ROOT = Path(__file__).resolve().parent.parent
LOOPS = ("rules_in_loops", "loops")
ATTACHING = ("attach", "transforms", "rewrite", "primitives", "drop_in_export", "program")
ALGEBRA = ("equations::test_equations_of_primitives_hold",)
READING = (
    *("known_functions", "constant_names", "equations", "equations_inside", "readable_equations"),
    *("verification", "verification_rounding"),
)
EQUATIONS = (
    *("chain_rule", "condense", "constants", "derivation", "elementwise", "flow", "known_functions"),
    *(
        "line_choice",
        "line_parts",
        "line_writer",
        "losses",
        "named_function",
        "norms",
        "recognition",
        "rounding",
    ),
)
BYTES = ("memory_estimate", "memory_footprint", "batch_limit")
TESTS = {
    "rules/primitives/arithmetic.py": (*ALGEBRA, "equations", "readable_equations"),
    "rules/primitives/average_pooling.py": ("average_pooling", "rules"),
    "rules/primitives/convolution.py": ("convolution",),
    "rules/primitives/cumulative.py": ("primitives",),
    "rules/primitives/elementwise.py": ("elementwise_accuracy", *ALGEBRA, "rules"),
    "rules/primitives/indexing.py": ("primitives",),
    "rules/primitives/loop_bodies.py": LOOPS,
    "rules/primitives/loop_plans.py": LOOPS,
    "rules/primitives/loop_steps.py": LOOPS,
    "rules/primitives/loops.py": LOOPS,
    "rules/primitives/patches.py": ("convolution",),
    "rules/primitives/pooling.py": ("pooling",),
    "rules/primitives/product.py": ("primitives",),
    "rules/primitives/reductions.py": ("primitives",),
    "rules/primitives/row_products.py": LOOPS,
    "rules/primitives/stacking.py": LOOPS,
    "sweeps/sweeps.py": ("backprop", "references"),
    "curvature/example_gradients/contractions.py": ("contractions",),
    "rules/attach.py": ATTACHING,
    "rules/derivative.py": ATTACHING,
    "rules/staged.py": ATTACHING,
    "program/linear_map.py": ATTACHING,
    "program/equal_equations.py": LOOPS,
    "rules/machine.py": ("target", "measured_rules", "attention", "linear_cross_entropy"),
    "rules/measuring/choices.py": ("measured_rules",),
    "rules/measuring/measured_rules.py": ("measured_rules",),
    "rules/measuring/measurements_file.py": ("measured_rules",),
    "rules/measuring/ruled_programs.py": ("measured_rules",),
    "memory/estimate.py": BYTES,
    "memory/fusion.py": BYTES,
    "memory/steps_of.py": BYTES,
    "memory/liveness.py": BYTES,
    "partition/traffic.py": ("partition_plans",),
    "partition/device_bytes.py": ("partition_plans",),
    "partition/task_order.py": ("partition_pipeline",),
    "curvature/data_operator.py": ("data_sets",),
    "curvature/data_set.py": ("data_sets", "position_weights"),
    "curvature/device_spread.py": ("data_sets",),
    "curvature/whole_data.py": ("data_sets",),
    "curvature/influence_effects.py": ("influence",),
    "curvature/kronecker.py": ("kronecker", "joint_layers", "position_weights"),
    "curvature/laplace_posterior.py": ("laplace", "laplace_edges", "position_weights", "curvature_plots"),
    "curvature/predictive.py": ("laplace", "laplace_edges", "curvature_plots"),
    "curvature/gaussian_prior.py": ("laplace", "laplace_edges"),
    "curvature/minibatches.py": ("data_sets",),
    "curvature/precision.py": ("laplace", "laplace_edges", "accumulated_curvature"),
    "operators/solvers.py": ("curvature_krylov", "curvature_estimates", "data_sets"),
    "operators/stochastic_estimates.py": ("curvature_estimates", "data_sets", "curvature_plots"),
    **{f"equations/{file}.py": READING for file in EQUATIONS},
}
SWAPS: list[tuple[Any, Any]] = [
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn),
    (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.FloorDiv, ast.Mult), (ast.Mod, ast.FloorDiv),
    (ast.And, ast.Or),
]  # fmt: skip
OTHER = {b: a for a, b in SWAPS} | dict(SWAPS)
# What is said of code, not what it does.
WORDS = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)


class Fault(NamedTuple):
    """One place of a file, the bytes from `start` to `stop`, and what stands there instead."""

    file: str
    line: int
    start: int
    stop: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.before}  →  {self.after}"

    def put_into(self, source: bytes) -> bytes:
        """The file with the fault."""
        return source[: self.start] + f"({self.after})".encode() + source[self.stop :]


def changed(node: Any) -> Any:
    """The node with a fault, or None where there is none to be made."""
    new = copy.copy(node)
    match node:
        case ast.Compare(ops=[op]) if type(op) in OTHER:
            new.ops = [OTHER[type(op)]()]
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OTHER:
            new.op = OTHER[type(op)]()
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            return operand
        case ast.Constant(value=bool(value)):
            new.value = not value
        case ast.Constant(value=int(value)):
            new.value = value + 1
        case ast.Call(func=ast.Attribute(value=ast.Name(id="jnp" | "lax" | "jax")), args=[first, *_]) if (
            not isinstance(first, ast.Starred)
        ):
            return first
        case _:
            return None
    return new


def pairs(node: ast.AST) -> Iterator[tuple[Any, Any]]:
    """Every node that is code, in which a fault can be made, and the node with the fault."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or getattr(node, "arg", "") == "strict":
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, WORDS):
                continue
            if name == "test":
                yield child, ast.UnaryOp(ast.Not(), cast("ast.expr", child))
            if (new := changed(child)) is not None:
                yield child, new
            yield from pairs(child)


def faults(file: str) -> Iterator[Fault]:
    """All faults of a file."""
    source = (ROOT / "funcprop" / file).read_bytes()
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    for node, new in pairs(ast.parse(source)):
        start, stop = (
            starts[node.lineno - 1] + node.col_offset,
            starts[node.end_lineno - 1] + node.end_col_offset,
        )
        yield Fault(file, node.lineno, start, stop, ast.unparse(node), ast.unparse(new))


class Copy:
    """A copy of the repository, in which tests are run."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        for name in ("funcprop", "tests", "experiments"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, self.root)
        # Programs that a fault does not change are compiled once for all.
        cache = {"DIR": str(folder / "cache"), "MIN_COMPILE_TIME_SECS": "0", "MIN_ENTRY_SIZE_BYTES": "-1"}
        self.environment = os.environ | {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        self.environment |= {"FUNCPROP_NIGHTLY": "1"}  # A sample of the cases would let faults pass.
        self.environment |= {"JAX_COMPILATION_CACHE_DIR": cache.pop("DIR")}
        self.environment |= {f"JAX_PERSISTENT_CACHE_{key}": value for key, value in cache.items()}
        self.passing: set[str] = set()
        self.failing: set[str] = set()

    def test(self, limit: float, *what: str) -> tuple[int | None, list[str]]:
        """The exit code of pytest, None where it took too long, and the tests that failed."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *what]
        try:
            run = subprocess.run(
                command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return None, []
        return run.returncode, re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", run.stdout, re.MULTILINE)

    def fate(self, fault: Fault, limit: float) -> str:
        """How the tests noticed a fault; empty if they did not."""
        names = [name.partition("::") for name in TESTS[fault.file]]
        files = [f"tests/test_{file}.py{colons}{test}" for file, colons, test in names]
        path = self.root / "funcprop" / fault.file
        original = path.read_bytes()
        while True:
            path.write_bytes(fault.put_into(original))
            try:
                code, failed = self.test(limit, *files, *(f"--deselect={test}" for test in self.failing))
            finally:
                path.write_bytes(original)
            if code is None:
                return f"more than {limit:.0f} s"
            if code == 0:
                return ""
            if code != 1 or not failed:
                if self.test(limit, "--collect-only", *files)[0]:
                    raise RuntimeError(f"without a fault, too, pytest cannot run {' '.join(files)}")
                return "no test can be run"
            # Does it fail without the fault, too?
            if failed[0] in self.passing or not self.test(limit, failed[0])[0]:
                self.passing.add(failed[0])
                return failed[0]
            self.failing.add(failed[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=60, help="how many faults")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--only", default="", help="part of the path of the files to change")
    parser.add_argument("--limit", type=float, default=200, help="seconds for the tests of one fault")
    parser.add_argument("--smoke", action="store_true", help="one fault, in seconds")
    options = parser.parse_args()
    if options.smoke:
        options.sample, options.seed, options.only = 1, 0, "contractions"
    named = {f"tests/test_{test.partition('::')[0]}.py" for tests in TESTS.values() for test in tests}
    if missing := [
        name for name in named | {f"funcprop/{file}" for file in TESTS} if not (ROOT / name).exists()
    ]:
        sys.exit(f"the table TESTS names {', '.join(sorted(missing))}, which do not exist.")
    everything = [fault for file in TESTS if options.only in file for fault in faults(file)]
    chosen = random.Random(options.seed).sample(everything, min(options.sample, len(everything)))
    print(f"{len(chosen)} of {len(everything)} faults, --seed {options.seed}", flush=True)
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Copy(Path(folder))
        for number, fault in enumerate(chosen, 1):
            start = time.perf_counter()
            fate = tree.fate(fault, options.limit)
            if not fate:
                survivors.append(fault)
            seconds = time.perf_counter() - start
            print(f"{number:3} {seconds:4.0f} s  {fault}  |  {fate or 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults were noticed; survivors:")
    print(*survivors, sep="\n")
    if options.smoke and survivors:
        sys.exit("the fault of the smoke run was not noticed")


if __name__ == "__main__":
    main()
