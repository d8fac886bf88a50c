"""One of two processes of a run; what happens to it is said on its command line."""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from funcprop import training

RANK, PORT, DIRECTORY = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
WHAT, VICTIM, AT = sys.argv[4], int(sys.argv[5]), int(sys.argv[6])


def me() -> bool:
    return RANK == VICTIM


training.join_processes(f"127.0.0.1:{PORT}", 2, RANK)
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
split = NamedSharding(mesh, PartitionSpec(None, "data"))


def act(step: int) -> None:
    """What happens to the victim before it takes a step."""
    if not me() or step != AT:
        return
    print(json.dumps({"at": time.time()}), flush=True)
    if WHAT == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if WHAT == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if WHAT == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if WHAT == "fail":
        raise KeyError("a fault of this process alone")


def run(fault: str, epochs: int, directory: Path) -> Any:
    """The last epoch; `fault` is in what this process is unlike the other one, if it is the victim."""
    rng = np.random.default_rng(1 if fault == "data" and me() else 0)
    x = rng.normal(size=(32, 6)).astype("float32")
    y = np.sin(x.sum(1))
    up = np.linspace(-1, 1, 48, dtype="float32").reshape(6, 8)
    params: Any = {"up": up, "down": np.ones(8, "float32") / 8}
    if fault == "parameters" and me():
        params["down"][3] += 1e-6
    if fault != "local":
        down = jax.make_array_from_callback((8,), whole, lambda _: params["down"])
        params = {"up": jax.device_put(params["up"], split), "down": down}

    def loss(params: Any, x: Any, y: Any) -> Any:
        h = jnp.tanh(x @ params["up"])
        if fault == "code" and me():
            h = h * 1.0000001
        return jnp.mean((h @ params["down"] - y) ** 2)

    made = itertools.count()

    def batches(key: Any) -> Any:
        for batch in training.minibatches((x, y), 8, key):
            number = next(made)
            act(number)
            yield tuple(part if fault in ("data", "local") else jax.device_put(part, rows) for part in batch)
            # JAX tells of SIGTERM up to a second later; the run that it ends is to be short of three epochs.
            time.sleep(0.5 if WHAT == "term" and number >= AT else 0.05)

    *_, last = training.fit(
        loss,
        params,
        batches,
        optax.adam(1e-2),
        epochs=epochs,
        checkpoints=training.Checkpoints(directory, every=2),
        log=directory.parent / "log.jsonl",
    )
    return last


if WHAT == "differ":
    refusals = {}
    for fault in ("code", "data", "parameters", "local"):
        try:
            run(fault, 1, DIRECTORY / fault)
        except ValueError as error:
            refusals[fault] = str(error)
    print(json.dumps(refusals))
else:
    last = run("", 3 if WHAT in ("plain", "resume") else 100, DIRECTORY)
    up = jax.jit(lambda tree: tree["up"], out_shardings=whole)(last.params)
    found = {"epoch": last.number, "loss": last.metrics["loss"], "sum": float(np.asarray(up).sum())}
    print(json.dumps(found))
