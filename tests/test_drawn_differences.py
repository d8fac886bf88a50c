"""What differs inside of loops: against pairs of bodies made by hand, and the loops unrolled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import funcprop as fp

W, X = jnp.ones((3, 3)), jnp.ones((5, 3))
H = jnp.ones(3)


def scanned(body: Any, *given: Any, **options: Any) -> fp.Graph:
    """The graph of a scan of `body(h, x_t, *given)`, which returns the next `h` and an output."""

    def fun(h0: Any, x: Any, *given: Any) -> Any:
        return jax.lax.scan(lambda h, x_t: body(h, x_t, *given), h0, x, **options)

    names = ["W", "b", "c"][: len(given)]
    return fp.trace(lambda h0, x, p: fun(h0, x, *(p[n] for n in names)))(
        H, X, dict(zip(names, given, strict=True))
    )


def plain(h: Any, x: Any, W: Any) -> Any:
    h = fp.name(jnp.tanh(W @ h + x), "h")
    return h, jnp.sin(h)


def biased(h: Any, x: Any, W: Any, b: Any) -> Any:
    h = fp.name(jnp.tanh(W @ h + x + b), "h")
    return h, jnp.sin(h)


def arrows(edges: Any) -> set[tuple[str, str]]:
    return {(e.source, e.target) for e in edges}


def test_a_bias_in_the_body_of_a_scan() -> None:
    a, b = scanned(plain, W), scanned(biased, W, H)
    found = fp.diff(a, b)
    (add,) = found.added
    assert (add.name, add.op, [v.name for v in add.inputs]) == (
        "scan[body]/add_1",
        "add",
        ["scan[body]/add", "b"],
    )
    assert not found.removed
    assert [v.name for v in found.added_variables] == ["b", "scan[body]/add_1"]
    body = "scan[body]/"
    assert arrows(found.added_edges) == {
        (body + "add", body + "add_1"),
        ("b", body + "add_1"),
        (body + "add_1", body + "add_1"),
        (body + "add_1", body + "tanh"),
    }
    assert arrows(found.removed_edges) == {(body + "add", body + "tanh")}
    assert "+ scan[body]/add_1 = add(scan[body]/add, b)" in str(found)
    back = fp.diff(b, a)
    assert [op.name for op in back.removed] == [add.name]
    assert not back.added
    assert arrows(back.removed_edges) == arrows(found.added_edges)
    assert arrows(back.added_edges) == arrows(found.removed_edges)


@pytest.mark.parametrize("other", [scanned(plain, W), scanned(biased, W, H)])
def test_a_loop_that_is_the_same_is_one_operator(other: fp.Graph) -> None:
    same = scanned(plain, W) if len(other.inputs) == 3 else scanned(biased, W, H)
    found = fp.diff(other, same)
    assert not found
    assert [op.op for op in found.comparison.second.graph] == ["scan"]


def test_other_numbers_outputs_starts_and_lengths_are_differences() -> None:
    a = scanned(plain, W)

    def scaled(factor: float) -> fp.Graph:
        return scanned(lambda h, x, W: (factor * plain(h, x, W)[0], h), W)

    found = fp.diff(scaled(2.0), scaled(3.0))
    assert ([op.op for op in found.removed], [op.op for op in found.added]) == (["mul"], ["mul"])
    assert {op.scope for op in (*found.added, *found.removed)} == {"scan[body]"}
    # What was stacked is the value before the step.
    found = fp.diff(a, scanned(lambda h, x, W: (fp.name(jnp.tanh(W @ h + x), "h"), h), W))
    assert [op.op for op in found.removed] == ["sin"]
    assert not found.added
    assert ("h[t−1]", "scan_1") in {(s.rpartition("/")[2], t) for s, t in arrows(found.added_edges)}

    def started(value: float) -> fp.Graph:
        return fp.trace(lambda x: jax.lax.scan(lambda c, x: (c * x, None), value, x)[0])(jnp.ones(4))

    assert fp.diff(started(1.0), started(2.0))
    assert not fp.diff(started(2.0), started(2.0))
    # A loop of another length, or direction, is another loop.
    for other in (scanned(plain, W, reverse=True), scanned(plain, W, length=5, unroll=5)):
        found = fp.diff(a, other)
        assert ([op.op for op in found.removed], [op.op for op in found.added]) == (["scan"], ["scan"])
    assert fp.diff(fp.trace(lambda x: 2.0 * x)(H), fp.trace(lambda x: 3.0 * x)(H)).added


def test_condition_body_and_branches() -> None:
    def fun(x: Any, extra: bool) -> Any:
        def step(s: Any) -> Any:
            y = jnp.sin(s[1])
            return s[0] + 1, jnp.cos(y) if extra else y

        _, x = jax.lax.while_loop(lambda s: s[0] < (3 if extra else 4), step, (0, x))
        return jax.lax.cond(x[0] > 0, jnp.cos, (lambda x: jnp.exp(-x)) if extra else jnp.exp, x)

    found = fp.diff(*(fp.trace(lambda x, e=e: fun(x, e))(H) for e in (False, True)))
    assert {(op.scope, op.op) for op in found.added} == {
        ("while[bodies]/condition", "lt"),
        ("while[bodies]/body", "cos"),
        ("cond[bodies]/branch 0", "neg"),
    }
    assert [op.scope for op in found.removed] == ["while[bodies]/condition"]
    picture = fp.draw(found).picture
    titles = {b.key: b.label for b in picture.boxes}
    places = {
        (n.label, titles[n.box or ""]) for n in picture.nodes if n.role == "added" and n.kind == "operator"
    }
    assert places == {("<", "condition"), ("cos", "body"), ("−", "branch 0")}


def test_only_the_inner_loop_that_differs_is_opened() -> None:
    def fun(x: Any, extra: bool) -> Any:
        def inner(c: Any, _: Any) -> Any:
            return jnp.sin(jnp.cos(c)) if extra else jnp.sin(c), None

        def outer(c: Any, _: Any) -> Any:
            c = jax.lax.scan(inner, c, length=2)[0]
            return jax.lax.scan(lambda c, _: (jnp.exp(c), None), c, length=3)[0], None

        return jax.lax.scan(outer, x, length=4)[0]

    found = fp.diff(*(fp.trace(lambda x, e=e: fun(x, e))(H) for e in (False, True)))
    assert [op.name for op in found.added] == ["scan[body]/scan[body]/cos"]
    assert not found.removed
    assert [op.name for op in found.comparison.second.graph if op.op == "scan"] == ["scan[body]/scan_1"]
    assert [b.label for b in fp.draw(found).picture.boxes] == ["scan × 4", "scan × 2"]


# --- derivatives ------------------------------------------------------------------------------


def loss(h0: Any, x: Any, remat: bool) -> Any:
    def body(h: Any, w: Any) -> Any:
        return jnp.tanh(jnp.tanh(w @ h) * 2.0), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(body) if remat else body, h0, x)[0] ** 2)


WEIGHTS = jnp.ones((4, 3, 3))


def everything(shown: Any, roles: Any) -> Counter[Any]:
    """All operators of the opened graphs by what they are and in which loop."""
    return Counter(
        (op.op, tuple(v.type for v in op.outputs), shown.titles.get((op.scope.split("/")[0],)), roles(op))
        for op in shown.graph
    )


def is_exact(found: fp.Difference, roles: Any) -> None:
    """What is added and removed is what one graph has more of than the other, and no more than that."""
    first, second, _ = found.comparison
    before, after = everything(first, roles(first)), everything(second, roles(second))
    count = [
        Counter((op.op, tuple(v.type for v in op.outputs)) for op in ops)
        for ops in (found.added, found.removed)
    ]
    for counted, more in zip(count, (after - before, before - after), strict=True):
        expected: Counter[Any] = Counter()
        for (op, types, *_), n in more.items():
            expected[op, types] += n
        assert counted == expected


def test_a_rematerialised_loop_computes_its_forward_again() -> None:
    def graph(remat: bool) -> Any:
        return fp.backward_graph(lambda x, h: loss(h, x, remat), rules=fp.rules.autodiff)(WEIGHTS, H)

    found = fp.diff(graph(False), graph(True))
    first, second, _ = found.comparison
    assert [op.op for op in first.graph if op.op == "scan"] == []
    added = Counter(op.op for op in found.added)
    assert {second.titles[(op.scope.split("/")[0],)] for op in found.added} == {"scan × 4, backwards"}
    assert (added["dot_general"], added["tanh"]) == (1, 2)
    # Gone from the forward sweep are the derivatives of tanh, that it does not keep any more.
    assert {first.titles[(op.scope.split("/")[0],)] for op in found.removed} <= {
        "scan × 4",
        "scan × 4, backwards",
    }
    assert not Counter(op.op for op in found.removed)["dot_general"]
    is_exact(found, lambda shown: lambda op: shown.roles[op.name])


def test_gradient_and_hessian_vector_product_of_a_loop() -> None:
    def fun(x: Any, h: Any) -> Any:
        return loss(h, x, False)

    gradient: Any = fp.backward_graph(fun, rules=fp.rules.autodiff)(WEIGHTS, H)
    product: Any = fp.second_order_graph(fun, rules=fp.rules.autodiff)(WEIGHTS, H)
    found = fp.diff(gradient, product)
    counts, added = product.count(), Counter(product.classes[op.name] for op in found.added)
    assert added["tangent"] == counts["tangent"] - (product.classes["scan"] == "tangent")
    assert added["tangent of cotangent"] > 0
    assert not Counter(op.op for op in found.removed if "[body]" in op.name)["dot_general"]


def test_a_difference_in_a_loop_is_drawn_in_the_loop() -> None:
    for a, b in ((scanned(plain, W), scanned(biased, W, H)), (scanned(biased, W, H), scanned(plain, W))):
        found = fp.diff(a, b)
        picture = fp.draw(found).picture
        (box,) = picture.boxes
        assert box.label == "scan × 5"
        role = "added" if found.added else "removed"
        drawn = [(n.label, n.box) for n in picture.nodes if n.role == role and n.kind == "operator"]
        assert drawn == [("+", box.key)]
        edges = Counter(e.role for e in picture.edges)
        assert (edges["added"], edges["removed"]) == (len(found.added_edges), len(found.removed_edges))


def test_a_slice_that_is_not_read_any_more_is_drawn_in_the_loop() -> None:
    def fun(x: Any, y: Any, both: bool) -> Any:
        def step(c: Any, xy: Any) -> Any:
            return jnp.sin(c) * xy[0] + (xy[1] if both else 0.0), None

        return jax.lax.scan(step, 0.0, (x, y) if both else (x,))[0]

    ones = jnp.ones(4)
    found = fp.diff(*(fp.trace(lambda x, y, b=b: fun(x, y, b))(ones, ones) for b in (True, False)))
    picture = fp.draw(found).picture
    (box,) = picture.boxes
    gone = {n.label for n in picture.nodes if n.role == "removed" and n.box == box.key}
    assert "y[t]" in gone
    assert {e.role for e in picture.edges if e.variable == "y"} == {"removed"}


def test_arrows_that_every_repeated_block_has_lost_are_drawn_once() -> None:
    class Block(nn.Module):
        use_bias: bool

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x + nn.tanh(nn.Dense(3, use_bias=self.use_bias)(nn.tanh(x)))

    class Blocks(nn.Module):
        use_bias: bool

        @nn.compact
        def __call__(self, x: Any) -> Any:
            for i in range(4):
                x = Block(self.use_bias, name=f"block_{i}")(x)
            return x

    def graph(use_bias: bool) -> fp.Graph:
        model = Blocks(use_bias)
        params = jax.eval_shape(model.init, jax.random.key(0), X)
        return fp.trace(lambda params, x: model.apply(params, x))(params, X)

    found = fp.diff(graph(False), graph(True))
    apart, folded = (fp.draw(found, fold=fold).picture for fold in (False, True))
    lost, kept = ([e for e in p.edges if e.role == "removed"] for p in (apart, folded))
    assert (len(lost), len(kept)) == (len(found.removed_edges), len(found.removed_edges) // 4) == (4, 1)
    assert {n.label for n in folded.nodes if n.key == kept[0].target} == {"tanh"}
