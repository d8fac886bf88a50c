"""Kill a training run at random moments, writes included, and compare what comes out with a run that lives.

    python experiments/kill_and_resume.py --kills 20

Each run is a process of its own on 8 host devices, with parameters split over them, a running average, a
dropout and shuffles, that saves every second step; it is killed by SIGKILL at a random moment after its first
step. The last run is left alone. Printed, and checked:

* every step whose saving had been reported is still there after the kill, and the next run goes on from it or
  from a later one;
* losses of every step, metrics of every epoch and all arrays at the end are bitwise those of the run that was
  never interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCHES, WIDTH = 20, 128


def train(directory: Path, epochs: int) -> None:
    """One run, until it ends or is killed; its log and its outcome lie beside the checkpoints."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from funcprop import training

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    keys = jax.random.split(jax.random.key(1), 4)
    x = np.asarray(jax.random.normal(keys[0], (16 * BATCHES, 32)))
    y = np.sin(x.sum(1))
    split = NamedSharding(mesh, PartitionSpec(None, "model"))
    params = {
        "up": jax.device_put(jax.random.normal(keys[1], (32, WIDTH)) / 6, split),
        "across": jax.device_put(jax.random.normal(keys[2], (WIDTH, WIDTH)) / 11, split),
        "down": jax.random.normal(keys[3], (WIDTH,)) / 11,
    }

    def loss(params: Any, average: Any, x: Any, y: Any, *, key: Any) -> Any:
        h = jnp.tanh(x @ params["up"])
        average = 0.9 * average + 0.1 * h.mean(0)
        h = jnp.where(jax.random.bernoulli(key, 0.9, h.shape), h - average, 0)
        return jnp.mean((jnp.tanh(h @ params["across"]) @ params["down"] - y) ** 2), average

    def batches(key: Any) -> Iterator[Any]:
        made = training.minibatches((x, y), 16, key)
        return (jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data"))) for batch in made)

    *_, last = training.fit(
        loss,
        params,
        batches,
        optax.adam(1e-2),
        epochs=epochs,
        model_state=jnp.zeros(WIDTH),
        keyed=True,
        checkpoints=training.Checkpoints(directory / "steps", every=2),
        log=directory / "log.jsonl",
    )
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves((last.params, last.state))]
    np.savez(directory / "outcome.npz", *arrays)


def start(directory: Path, epochs: int) -> subprocess.Popen[bytes]:
    """Start a run in a process of its own."""
    directory.mkdir(exist_ok=True)
    flags = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, __file__, "--train", str(directory), "--epochs", str(epochs)]
    return subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": flags})


def records(directory: Path, first: int = 0) -> list[dict[str, Any]]:
    """What the runs have written down; the line that a kill cut off is left out."""
    path = directory / "log.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found = []
    for line in lines[first:]:
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append({"event": "cut off"})
    return found


def saved_steps(directory: Path) -> list[int]:
    """The finished steps, by the manifests in the directory."""
    found = [path.parent.name for path in (directory / "steps").glob("*/manifest.json")]
    return sorted(int(name) for name in found if name.isdecimal())


def kill(directory: Path, epochs: int, rng: np.random.Generator) -> dict[str, Any]:
    """Start a run, kill it at a random moment after it took a step, and say what it left."""
    before = len(records(directory))
    process = start(directory, epochs)
    wanted = int(rng.integers(1, 20))  # lines of the log, so that a slow machine is killed at work as well
    while len(records(directory, before)) < wanted:
        if process.poll() is not None:
            return {"ended": process.returncode}
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.2))
    process.kill()
    code = process.wait()
    mine = records(directory, before)
    reported = [r["step"] for r in mine if r["event"] == "saved"]
    resumed = [r["step"] for r in mine if r["event"] == "resumed"]
    steps = directory / "steps"
    names = [path.name for path in steps.iterdir()] if steps.exists() else []
    finished = saved_steps(directory)
    writing = [n for n in names if "tmp" in n or "removed" in n or (n.isdecimal() and int(n) not in finished)]
    return {
        "ended": code,
        "resumed": resumed[0] if resumed else 0,
        "last step": max((r["step"] for r in mine if r["event"] == "step"), default=0),
        "last saved": max(reported, default=0),
        "finished": finished[-1] if finished else 0,
        "in writing": writing,
    }


def compare(directory: Path, kills: int, seed: int, epochs: int) -> int:
    """Run both, and print what differs; the exit code."""
    rng = np.random.default_rng(seed)
    whole, broken = directory / "whole", directory / "broken"
    uninterrupted = start(whole, epochs)  # At the same time, on another core.
    lost = done = known = 0
    for _ in range(kills):
        found = kill(broken, epochs, rng)
        print(found, flush=True)
        if found["ended"] != -9:
            break
        done += 1
        lost += found["resumed"] < known
        known = max(known, found["last saved"])
        lost += found["finished"] < known
        known = max(known, found["finished"])
    failed = start(broken, epochs).wait()
    if uninterrupted.wait() or failed:
        return 1
    expected = {r["step"]: r["loss"] for r in records(whole) if r["event"] == "step"}
    steps = [r for r in records(broken) if r["event"] == "step"]
    other = sum(r["loss"] != expected[r["step"]] for r in steps)
    losses = [{r["epoch"]: r["loss"] for r in records(d) if r["event"] == "epoch"} for d in (whole, broken)]
    a, b = (np.load(d / "outcome.npz") for d in (whole, broken))
    arrays = sum(not np.array_equal(a[name], b[name]) for name in a.files)
    result = {
        "kills": done,
        "steps taken": len(steps),
        "steps of the uninterrupted run": len(expected),
        "finished steps lost": lost,
        "losses that differ": other,
        "epochs that differ": sum(losses[0][n] != losses[1].get(n) for n in losses[0]),
        "arrays that differ": arrays,
        "arrays": len(a.files),
    }
    print(json.dumps(result))
    return int(bool(lost or other or arrays or losses[0] != losses[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one kill alone")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--train", type=Path, help="what each process does")
    options = parser.parse_args()
    if options.train is not None:
        train(options.train, options.epochs)
        return
    with tempfile.TemporaryDirectory() as directory:
        kills, epochs = (1, 2) if options.smoke else (options.kills, options.epochs)
        sys.exit(compare(Path(directory), kills, options.seed, epochs))


if __name__ == "__main__":
    main()
