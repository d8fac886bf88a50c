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
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOOPS = ("rules_in_loops", "loops")
ATTACHING = ("attach", "transforms", "rewrite", "primitives", "drop_in_export", "program")
ALGEBRA = ("equations::test_equations_of_primitives_hold",)
TESTS = {
    "rules/primitives/arithmetic.py": ALGEBRA,
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
}
SWAPS = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)]
SWAPS += [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.FloorDiv, ast.Mult), (ast.Mod, ast.FloorDiv)]
SWAPS += [(ast.And, ast.Or)]
OTHER = {a: b for pair in SWAPS for a, b in (pair, pair[::-1])} | {ast.FloorDiv: ast.Mult, ast.Mult: ast.Div}
# What is said of code, not what it does.
WORDS = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)


class Fault(NamedTuple):
    """One changed place, and the whole file with it."""

    file: str
    line: int
    before: str
    after: str
    text: str


def changed(node: ast.AST) -> ast.AST | None:
    """The node with a fault, or None where there is none to be made."""
    new = copy.deepcopy(node)
    match new:
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
        case ast.IfExp() | ast.If():
            new.test = ast.UnaryOp(ast.Not(), new.test)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="jnp" | "lax" | "jax")), args=[first, *_]):
            return first
        case _:
            return None
    return new


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every field that holds a node which is code: the node around it, the field, the position in a list."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "ctx") or getattr(node, "arg", "") == "strict":
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not isinstance(child, WORDS):
                yield node, name, i
                yield from places(child)


def faults(file: str) -> Iterator[Fault]:
    """All faults of a file."""
    tree = ast.parse((ROOT / "funcprop" / file).read_text())
    for around, name, i in places(tree):
        field = getattr(around, name)
        node = field if i is None else field[i]
        new = changed(node)
        if new is None:
            continue
        new = ast.copy_location(new, node)

        def put(child: ast.AST, around: ast.AST = around, name: str = name, i: int | None = i) -> None:
            if i is None:
                setattr(around, name, child)
            else:
                getattr(around, name)[i] = child

        put(new)
        text = ast.unparse(ast.fix_missing_locations(tree))
        before, after = (ast.unparse(n.test if isinstance(n, ast.If) else n) for n in (node, new))
        put(node)
        yield Fault(file, getattr(node, "lineno", 0), before, after, text)


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
        if run.returncode > 2:
            raise RuntimeError(f"pytest ended with {run.returncode}:\n{run.stdout}{run.stderr}")
        return run.returncode, re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", run.stdout, re.MULTILINE)

    def fate(self, fault: Fault, limit: float) -> str:
        """How the tests noticed a fault; empty if they did not."""
        names = [name.partition("::") for name in TESTS[fault.file]]
        files = [f"tests/test_{file}.py{colons}{test}" for file, colons, test in names]
        path = self.root / "funcprop" / fault.file
        original = path.read_text()
        while True:
            path.write_text(fault.text)
            try:
                code, failed = self.test(limit, *files, *(f"--deselect={test}" for test in self.failing))
            finally:
                path.write_text(original)
            if code is None:
                return f"more than {limit:.0f} s"
            if code == 0:
                return ""
            if code != 1 or not failed:
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
    everything = [fault for file in TESTS if options.only in file for fault in faults(file)]
    chosen = random.Random(options.seed).sample(everything, min(options.sample, len(everything)))
    chosen.sort(key=lambda fault: (fault.file, fault.line))
    print(f"{len(chosen)} of {len(everything)} faults, --seed {options.seed}", flush=True)
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Copy(Path(folder))
        for number, fault in enumerate(chosen, 1):
            start = time.perf_counter()
            fate = tree.fate(fault, options.limit)
            if not fate:
                survivors.append(fault)
            print(
                f"{number:3} {time.perf_counter() - start:4.0f} s  {fault.file}:{fault.line}  "
                f"{fault.before}  →  {fault.after}  |  {fate or 'SURVIVED'}",
                flush=True,
            )
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults were noticed; survivors:")
    for fault in survivors:
        print(f"  {fault.file}:{fault.line}  {fault.before}  →  {fault.after}")
    if options.smoke and survivors:
        sys.exit("the fault of the smoke run was not noticed")


if __name__ == "__main__":
    main()
