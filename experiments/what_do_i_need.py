"""What do I need for a model of a billion parameters? The table of plans, from shapes alone.

Nothing of the model exists: parameters and batch are `jax.ShapeDtypeStruct`s, and so are the devices. With
`--compile` the best plan of a kind is compiled for them, in a process of its own with a time limit, and its
bytes are compared (`pip install 'funcprop[accelerators]'`; compiled, not run).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from running.language_model import LanguageModel

import funcprop as fp

RESULTS = Path(__file__).parent / "results"
LIMIT = 600  # seconds for a compilation

# Width, layers, heads, vocabulary, length, examples.
SIZES = {
    "billion": (2048, 18, 16, 32768, 1024, 512),
    "quarter": (1024, 18, 16, 32768, 1024, 512),
    "smoke": (64, 2, 4, 128, 16, 32),
}


def problem(size: str) -> tuple[Any, Any, Any]:
    """The loss, and the shapes of its parameters and of a batch."""
    width, layers, heads, vocabulary, length, examples = SIZES[size]
    model = LanguageModel(width, layers, length, heads, vocabulary)
    tokens = jax.ShapeDtypeStruct((examples, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(params: Any, batch: Any) -> Any:
        logits = model.apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return loss, params, (tokens, tokens)


def compiled(size: str, on: str, mesh: dict[str, int], zero: bool) -> dict[str, Any]:
    """A plan compiled for its devices."""
    loss, params, batch = problem(size)
    make = fp.partition.plan(loss, optimizer=optax.adam(1e-3), mesh=mesh, shard_parameters=zero)
    (plan,) = make(params, batch, on=on)
    start = time.perf_counter()
    proof = plan.compile()
    return {**proof.as_dict(), "seconds": time.perf_counter() - start, "report": str(proof)}


def in_process(*order: Any) -> dict[str, Any] | str:
    """The same in a process of its own, or in a line why not."""
    command = [sys.executable, __file__, "--order", json.dumps(order)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"not compiled within {LIMIT} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:300]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print the table with the time it took, and compile what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on four devices")
    parser.add_argument("--on", default="v5e:16x16", help="devices that are not here")
    parser.add_argument("--size", default="billion", choices=SIZES)
    parser.add_argument(
        "--compile", metavar="PLAN", help="the first plan whose name begins so; '' is the best"
    )
    parser.add_argument("--order", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.order is not None:
        print(json.dumps(compiled(*json.loads(chosen.order))))
        return
    size, on = ("smoke", "v5e:2x2") if chosen.smoke else (chosen.size, chosen.on)
    loss, params, batch = problem(size)
    count = sum(x.size for x in jax.tree.leaves(params))
    start = time.perf_counter()
    plans = fp.partition.plan(loss, optimizer=optax.adam(1e-3))(params, batch, on=on)
    table = str(plans)
    seconds = time.perf_counter() - start
    print(f"{count:,} parameters, batch {batch[0].shape}, {on}: planned in {seconds:.1f} s\n\n{table}")
    found: dict[str, Any] = {"parameters": count, "on": on, "seconds": seconds, "table": plans.as_dict()}
    if chosen.compile is not None:
        plan = plans.named(chosen.compile)
        print(f"\ncompiling {plan.name} …", flush=True)
        proof = in_process(size, on, dict(plan.mesh), plan.name.startswith("zero"))
        print(proof if isinstance(proof, str) else f"{proof['report']}\n  in {proof['seconds']:.0f} s")
        found["compiled"] = proof
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"what_do_i_need_{size}_{on.replace(':', '_')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
