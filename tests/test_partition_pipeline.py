"""Schedules of pipelines, what their stages hold, and where a loss is cut."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from partition_models import MODELS

import funcprop as fp
from funcprop.partition.pipeline import PipelinedProgram
from funcprop.partition.problem import TrainingProblem
from funcprop.partition.running_pipeline import RunningPipeline
from funcprop.partition.task_order import ORDERS, Order, timeline


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stages", [1, 2, 4, 6])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 12])
def test_every_task_is_done_once_after_what_it_needs(order: Order, stages: int, microbatches: int) -> None:
    devices = (
        stages // 2 if order == "interleaved" and stages > 1 and microbatches % (stages // 2) == 0 else None
    )
    found = timeline(order, stages, microbatches, devices)
    done: dict[tuple[str, int, int], int] = {}
    for tick, sweep, s, m in found.tasks:
        before = [("F", s, m), ("B", s + 1, m)] if sweep == "B" else [("F", s - 1, m)]
        assert all(done[need] < tick for need in before if 0 <= need[1] < stages)
        assert (sweep, s, m) not in done
        done[sweep, s, m] = tick
    assert len(done) == 2 * stages * microbatches
    busy = [(tick, found.devices[s]) for tick, _, s, _ in found.tasks]
    assert len(busy) == len(set(busy))


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 4), (4, 16), (8, 32)])
def test_bubbles_and_microbatches_in_flight_are_the_textbook_ones(stages: int, microbatches: int) -> None:
    for order in ("gpipe", "1f1b"):
        found = timeline(order, stages, microbatches)
        assert found.ticks == 2 * (microbatches + stages - 1)
        assert found.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
    assert timeline("gpipe", stages, microbatches).in_flight == (microbatches,) * stages
    assert timeline("1f1b", stages, microbatches).in_flight == tuple(
        min(microbatches, stages - s) for s in range(stages)
    )
    assert timeline("interleaved", 2 * stages, microbatches, stages).ticks == 4 * microbatches + 2 * (
        stages - 1
    )


def test_a_timeline_is_drawn() -> None:
    found = timeline("1f1b", 2, 2)
    assert str(found) == "device 0: F0 F1 .  B0 .  B1\ndevice 1: .  F0 B0 F1 B1 ."
    assert found.svg().count("<rect") == len(found.tasks) == 8


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("order", "grows"), [("1f1b", False), ("gpipe", True)])
def test_live_bytes_are_flat_or_grow(order: Order, grows: bool) -> None:
    """What is alive on each device after each task, for 4, 8 and 16 microbatches of one size."""
    most = []
    for microbatches in (4, 8, 16):
        loss, params, batch = MODELS["mlp"](8 * microbatches)
        program = PipelinedProgram(TrainingProblem(loss, params, batch), 2, microbatches, order)
        devices = jax.devices()[4:6]
        running = RunningPipeline(program, devices)
        placed, _ = running.place(params)
        peak = dict.fromkeys(devices, 0)

        def watch(task: Any, peak: dict[Any, int] = peak) -> None:
            for device, held in live_bytes(peak).items():
                peak[device] = max(peak[device], held)

        running.gradient(placed, batch, watch)
        most.append(max(peak.values()))
        del placed
    if grows:
        assert all(b > 1.25 * a for a, b in itertools.pairwise(most)), most
    else:
        assert max(most) <= 1.02 * min(most), most


def live_bytes(devices: Any) -> dict[Any, int]:
    held = dict.fromkeys(devices, 0)
    seen = set()
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            if shard.device in held:
                key = shard.device, shard.data.unsafe_buffer_pointer()
                if key not in seen:
                    seen.add(key)
                    held[shard.device] += shard.data.nbytes
    return held


def test_bytes_of_a_pipeline_are_predicted() -> None:
    loss, params, batch = MODELS["mlp"](64)
    (plan,) = fp.partition.plan(loss, mesh={"stage": 2}, microbatches=4)(params, batch)
    proof = plan.compile()
    assert 0.95 <= proof.ratio <= 1.05, str(proof)
    assert proof.unpredicted == []
    assert plan.timeline().ticks == 10


def test_a_tied_parameter_is_on_both_stages_and_owned_by_the_first() -> None:
    loss, params, batch = MODELS["tied"]()
    (plan,) = fp.partition.plan(loss, mesh={"stage": 2}, microbatches=4)(params, batch)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    (embedding,) = [i for i, name in enumerate(names) if "embedding" in name]
    assert [embedding in segment.params for segment in plan.program.segments] == [True, True]
    assert plan.program.owners[embedding] == 0
    shared = [i for i in range(len(names)) if all(i in s.params for s in plan.program.segments)]
    assert shared == [embedding]
    # Only the residual stream crosses.
    assert [v.shape for v in plan.program.segments[0].outputs] == [(4, 8, 32)]


def test_too_many_stages_are_refused_with_the_number_that_is_possible() -> None:
    loss = lambda w, x: ((x @ w) ** 2).mean()  # noqa: E731
    with pytest.raises(ValueError, match=r"can be cut into \d segments where few bytes cross, not into 8"):
        fp.partition.plan(loss, mesh={"stage": 8})(jax.numpy.ones((4, 4)), jax.numpy.ones((8, 4)))


def test_a_product_of_the_batch_is_not_the_stage_of_one_of_a_hidden_layer() -> None:
    """The programs of both are the same, and what they are given is not."""

    def loss(w: Any, batch: Any) -> Any:
        x, y = batch
        for i in range(3):
            x = jnp.tanh(x @ w[i])
        return jnp.mean((x - y) ** 2)

    arguments = jax.random.normal(jax.random.key(0), (3, 8, 8)), (jnp.ones((8, 8)), jnp.zeros((8, 8)))
    weights = list(arguments[0])
    (plan,) = fp.partition.plan(loss, mesh={"stage": 6}, microbatches=4)(weights, arguments[1], devices=6)
    assert [segment.equations for segment in plan.program.segments[:5]] == [1] * 5
    proof = plan.compile()
    assert proof.gradient_error is not None
    assert proof.gradient_error < 1e-12
    assert 0.95 < proof.ratio < 1.05


def test_a_number_that_a_stage_hands_over_is_not_divided_among_replicas() -> None:
    def loss(w: Any, x: Any) -> Any:
        return jnp.mean(jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, 3)[0])

    planner = fp.partition.plan(loss, mesh={"stage": 2, "data": 2}, microbatches=2)
    (plan,) = planner(jnp.eye(8), jnp.ones((8, 8)))
    assert [v.shape for v in plan.program.segments[0].outputs] == [()]
    proof = plan.compile()
    assert not proof.unpredicted, proof
