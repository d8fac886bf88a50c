"""What the compilers for TPU and GPU say of the benchmark's models: compiled on this machine, not run.

Every model is compiled for each target by autodiff, by `fp.rules.default.on(target)` and by
`fp.rules.handwritten.on(target)`. For a TPU the figures are temporary bytes in HBM and the cycles that XLA
estimates for every fusion, times the lengths of loops; for a GPU temporary bytes and what kernels read and
write, times the lengths of loops. No overlap, no autotuning; kernels of Pallas or cuDNN count for what they
read and write. So a figure is a reason to measure, and no measurement. `--curve` shows instead what chunks of
tokens and blocks of logits cost and save, where bytes are bought with time.

Every case is compiled in a process of its own, with a time limit. Needs `pip install
'funcprop[accelerators]'`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from compiled_programs import TARGETS, device_of, environment, figures, missing, versions

SETS = ("autodiff", "default", "handwritten")
TIME_LIMIT = 600.0


def compiled(target: str, name: str, smoke: bool, sets: list[str]) -> dict[str, Any]:
    """The figures of one model, by rule set, or of a curve's points; runs in a process of its own."""
    from benchmark_cases import CURVES, ROWS

    import funcprop as fp

    device = device_of(target)
    if name in CURVES:
        points = {at: make() for at, make in CURVES[name].items()}
        first = next(iter(points.values()))
        default = fp.rules.default.on(device)
        found = {"autodiff": of_program(first.by_jax, first.args, device)}
        return found | {at: of_program(c.ruled(default), c.args, device) for at, c in points.items()}
    row = ROWS[name]
    case = (row.small if smoke else row.full)()
    programs = {
        which: case.by_jax if which == "autodiff" else case.ruled(getattr(fp.rules, which).on(device))
        for which in sets
    }
    return {which: of_program(program, case.args, device) for which, program in programs.items()}


def of_program(program: Any, args: Any, device: Any) -> dict[str, Any]:
    """The figures of one program."""
    import jax

    sharding = jax.sharding.SingleDeviceSharding(device)
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    executable: Any = jax.jit(program).lower(*types).compile()
    of_text = figures(executable.as_text())
    return {
        "temporary bytes": executable.memory_analysis().temp_size_in_bytes,
        "cycles": of_text.cycles, "traffic": of_text.traffic, "memory traffic": of_text.memory_traffic,
        "kernels": of_text.kernels, "collectives": dict(of_text.collectives),
        "loops of unknown length": of_text.unknown_loops,
    }  # fmt: skip


def in_process(target: str, name: str, smoke: bool, sets: list[str], limit: float) -> dict[str, Any] | str:
    """The figures of one model, or in a line why there are none."""
    order = json.dumps([target, name, smoke, sets])
    command = [sys.executable, __file__, "--case", order]
    try:
        done = subprocess.run(
            command, env={**os.environ, **environment(target)}, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return f"not compiled within {limit:.0f} s"
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:200]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def ratios(target: str, found: dict[str, Any], which: str) -> str:
    """Time (cycles, or traffic), temporary bytes and kernels, divided by autodiff's."""
    what = "traffic" if target == "h100" else "cycles"
    plain, ours = found["autodiff"], found[which]
    keys = (what, "temporary bytes", "kernels")
    return "".join(f"{ours[key] / plain[key] if plain[key] else float('nan'):8.2f}" for key in keys)


def line(name: str, target: str, found: dict[str, Any]) -> str:
    """One line of the table: autodiff's figures, and the sets' divided by them."""
    what, scale, unit = ("traffic", 1e9, "GB") if target == "h100" else ("cycles", 1e3, "k")
    plain = found["autodiff"]
    cells = [f"{name:46}{plain[what] / scale:12,.2f} {unit:2}{plain['temporary bytes'] / 2**20:9.1f} MiB"]
    return "".join([*cells, *(ratios(target, found, which) for which in found if which != "autodiff")])


def main() -> None:
    """Compile, print, and write `results/accelerator_figures.json`."""
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(compiled(*json.loads(sys.argv[2]))))
        return
    from benchmark_cases import CURVES, ROWS
    from running import command_line, folder

    parser = command_line(__doc__, smoke="small shapes")
    parser.add_argument("--target", nargs="*", default=["v5e:2x2", "h100"], choices=TARGETS)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name contains one of these")
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=SETS)
    parser.add_argument(
        "--curve", action="store_true", help="chunks and blocks against time and bytes, instead"
    )
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds for one case")
    options = parser.parse_args()
    path = folder(options.smoke) / "accelerator_figures.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for target in options.target:
        if (reason := missing(target)) is not None:
            print(reason)
            continue
        print(f"compiled for {target} by {versions(target)}, not run")
        if not options.curve:
            heads = "".join(
                f"{s[:11]:>12}: {'time':>3} bytes kernels" for s in options.sets if s != "autodiff"
            )
            print(f"{'model':46}{'autodiff':>27}{heads}")
        for name in CURVES if options.curve else ROWS:
            if options.only and not any(part in name for part in options.only):
                continue
            found = in_process(target, name, options.smoke, options.sets, options.limit)
            if isinstance(found, str):
                print(f"{name:46}{found}", flush=True)
            elif options.curve:
                print(name, *(f"  {at:12}{ratios(target, found, at)}" for at in found), sep="\n", flush=True)
            else:
                print(line(name, target, found), flush=True)
            content.setdefault(target, {}).setdefault(name, {})
            if isinstance(found, str):
                content[target][name]["failed"] = found
            else:
                content[target][name] = {**content[target][name], **found}
                content[target][name].pop("failed", None)
            content[target][name]["compiler"] = f"{versions(target)}; compiled, not run"
            path.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
