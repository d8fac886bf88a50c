"""Schedules against an integer program, against all paths, and against the closed form of equal layers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from funcprop.memory.remat.schedule import CutChain, Segment, cheapest, frontier, in_chunks


def layers(sizes, flops, width):
    """A chain of layers, each of which holds its input and something of its own when it is kept.

    Value `i` is the input of layer `i`; the chain's own input is given.
    """
    count = len(sizes)
    live = tuple(1 << (i - 1) if 0 < i < count else 0 for i in range(count + 1))
    segments = []
    for i, j in itertools.combinations(range(count + 1), 2):
        inside = sum(1 << (m - 1) for m in range(i + 1, j))
        transient = sum(sizes[i:j]) + width * (j - i - 1)
        # The result of the last layer of a segment is not needed in it.
        segments.append(Segment(i, j, True, live[i], 0, sum(flops[i : j - 1]), transient))
        if j == i + 1:
            segments.append(Segment(i, j, False, live[i] | inside, sizes[i], 0, 0))
    return CutChain(live, (width,) * max(count - 1, 0), tuple(segments))


def all_paths(chain, start=0):
    if start == len(chain.live) - 1:
        yield ()
    for s in chain.segments:
        if s.start == start:
            yield from ((s, *rest) for rest in all_paths(chain, s.stop))


def by_integer_program(chain, budget):
    """The fewest FLOPs: a path of segments `x`, and `y` for every value that one of them holds."""
    nodes, values, edges = len(chain.live), len(chain.sizes), chain.segments
    flow = np.zeros((nodes, len(edges) + values))
    for k, s in enumerate(edges):
        flow[s.start, k] += 1
        flow[s.stop, k] -= 1
    ends = np.zeros(nodes)
    ends[0], ends[-1] = 1, -1
    holds = []
    for (k, s), v in itertools.product(enumerate(edges), range(values)):
        if s.held >> v & 1:
            row = np.zeros(len(edges) + values)
            row[k], row[len(edges) + v] = 1, -1
            holds.append(row)
    weights = np.array([*(s.extra for s in edges), *chain.sizes], float)
    limits = [LinearConstraint(flow, ends, ends), LinearConstraint(weights[None], 0, budget)]
    if holds:
        limits.append(LinearConstraint(np.array(holds), -np.inf, 0))
    cost = np.array([*(s.flops for s in edges), *([0] * values)], float)
    found = milp(cost, constraints=limits, integrality=np.ones(len(cost)), bounds=Bounds(0, 1))
    return round(found.fun) if found.success else None


@settings(max_examples=25)
@given(st.data())
def test_fewest_flops_as_the_integer_program(data):
    count = data.draw(st.integers(2, 9))
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    flops = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    chain = layers(sizes, flops, data.draw(st.integers(1, 4)))
    budget = data.draw(st.integers(0, 20))
    found = cheapest(chain, budget)
    assert found.nbytes <= budget
    assert found.flops == by_integer_program(chain, budget)
    assert found == chain.schedule(found.segments)


@settings(max_examples=15)
@given(st.data())
def test_frontier_and_peak_as_of_all_paths(data):
    count = data.draw(st.integers(2, 5))
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    flops = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    chain = layers(sizes, flops, 2)
    paths = [chain.schedule(p) for p in all_paths(chain)]
    expected = {
        (p.nbytes, p.flops)
        for p in paths
        if not any(
            q.nbytes <= p.nbytes and q.flops <= p.flops and (q.nbytes, q.flops) != (p.nbytes, p.flops)
            for q in paths
        )
    }
    assert {(s.nbytes, s.flops) for s in frontier(chain)} == expected
    peak = data.draw(st.sampled_from(sorted({p.peak for p in paths})))
    found = cheapest(chain, np.inf, peak)
    assert found.peak <= peak
    assert found.flops == min(p.flops for p in paths if p.peak <= peak)


@pytest.mark.parametrize("chunks", [1, 2, 4, 8, 16])
def test_equal_layers_in_equal_chunks(chunks):
    found = in_chunks(layers([0] * 16, [1] * 16, 1), chunks)
    assert [s.stop - s.start for s in found.segments] == [16 // chunks] * chunks
    # Inputs of all chunks but the first, and the values inside of one.
    assert found.peak == chunks - 1 + 16 // chunks - 1


def test_a_peak_is_reached_by_the_square_root():
    chain = layers([1] * 16, [1] * 16, 1)
    lowest = min(peak for peak in range(40) if cheapest(chain, np.inf, peak) is not None)
    # A layer needs two units while it is differentiated: its input and its own.
    assert lowest <= min(k - 1 + 2 * -(-16 // k) for k in range(1, 17))
    assert cheapest(chain, np.inf, lowest).flops <= 16


def test_what_cannot_be_recomputed_is_kept():
    chain = layers([3] * 4, [1] * 4, 1)
    fixed = [s for s in chain.segments if not (s.recomputed and s.start <= 1 < s.stop)]
    found = cheapest(CutChain(chain.live, chain.sizes, tuple(fixed)), 5)
    assert [s.start for s in found.segments if not s.recomputed] == [1]
    assert cheapest(CutChain(chain.live, chain.sizes, tuple(fixed)), 4) is None
