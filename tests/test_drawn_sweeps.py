"""Both sweeps and second derivatives as graphs, and the difference of two graphs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import funcprop as fp
from funcprop.cli.target import chapter_example
from funcprop.drawing.relabelling import clean_scope

HANDWRITTEN = fp.rules.handwritten


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.max_pool(nn.relu(nn.Conv(3, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(2)(x.reshape((x.shape[0], -1)))


def cnn_loss(params: Any, x: Any) -> Any:
    return jnp.sum(CNN().apply(params, x) ** 2)


def cnn_example() -> tuple[Any, ...]:
    x = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    return jax.eval_shape(CNN().init, jax.random.key(0), x), x


def mlp(p: Any, x: Any) -> Any:
    h = jnp.tanh(x @ p["W1"])
    return jnp.sum(jnp.tanh(h @ p["W2"]) @ p["W3"])


def loop(p: Any, x: Any) -> Any:
    def step(c: Any, w: Any) -> Any:
        c = fp.name(jnp.tanh(c @ w), "c")
        return c, c.sum()

    c, sums = jax.lax.scan(step, x, p)
    return jnp.sum(c) + jnp.sum(sums)


WEIGHTS = {f"W{i}": jnp.ones((4, 4)) for i in (1, 2, 3)}
BIASES = {f"b{i}": jnp.ones(4) for i in (1, 2, 3)}
X = jnp.ones((5, 4))
POLICY = jax.checkpoint_policies.save_only_these_names("z")


def checkpointed(w: Any, x: Any) -> Any:
    f = jax.checkpoint(lambda w, x: jnp.sin(fp.name(jnp.sin(x @ w), "z")), policy=POLICY)
    return jnp.sum(f(w, f(w, x)))


MODELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "chapter": (fp.models.chapter, chapter_example()),
    "cnn": (cnn_loss, cnn_example()),
    "mlp": (mlp, (WEIGHTS, X)),
    "loop": (loop, (jnp.ones((3, 4, 4)), X)),
    "checkpointed": (checkpointed, (WEIGHTS["W1"], X)),
    "several": (lambda w, x: (w * x, jnp.argmax(w), jnp.sin(w)), (X, X)),
}


def held(fun: Any, args: tuple[Any, ...]) -> list[Any]:
    """What `jax.vjp`'s pullback holds with respect to the first argument."""
    first, *rest = args
    return jax.tree.leaves(jax.eval_shape(lambda a, *r: jax.vjp(lambda a: fun(a, *r), a)[1], first, *rest))


@pytest.mark.parametrize("rules", [fp.rules.default.on("cpu"), HANDWRITTEN, fp.rules.autodiff])
@pytest.mark.parametrize("model", MODELS)
def test_residuals_are_what_the_pullback_holds(model: str, rules: fp.RuleSet) -> None:
    fun, args = MODELS[model]
    graph = fp.backward_graph(fun, rules=rules)(*args)
    oracle = held(fp.with_rules(fun, rules), args)
    assert [(v.shape, v.dtype) for v in graph.residuals] == [(x.shape, x.dtype) for x in oracle]
    total = sum(x.size * x.dtype.itemsize for x in oracle)
    assert graph.residual_bytes == total
    # The arrows that cross over are these bytes, at any depth.
    for depth in (None, 0):
        edges = fp.draw(graph, depth=depth).picture.edges
        assert sum(e.nbytes or 0 for e in edges if e.kind == "residual") == total
    assert set(graph.sweeps) == {op.name for op in graph.operators}


def test_the_chapters_cotangents_have_their_names() -> None:
    graph = fp.backward_graph(fp.models.chapter, rules=HANDWRITTEN)(*chapter_example())
    names = [v.name for v in graph.variables if v.name.startswith("∂")]
    assert set(names) == {f"∂J/∂{v}" for v in ("J", "L", "s", "o", "h", "z", "W1", "W2")}
    assert {v.name for v in graph.residuals} == {"W1", "W2", "x", "h", "o", "y", "λ"}
    assert [v.name for v in graph.outputs] == ["J", "∂J/∂W1", "∂J/∂W2"]
    sweeps = Counter(graph.sweeps.values())
    assert len(sweeps) == 2
    picture = fp.draw(graph, depth=0).picture
    assert {"linear", "φ", "l", "l2_penalty"} == {n.label for n in picture.nodes if n.kind == "scope"}
    assert {box.label for box in picture.boxes} == {"forward", "backward"}
    assert picture.legend == ("forward", "backward", "saved")
    assert sum(n.role == "saved" for n in picture.nodes) + sum(
        e.kind == "residual" and not e.target.startswith("r:") for e in picture.edges
    ) == len({v.name for v in graph.residuals})


def test_residuals_are_what_our_own_tape_holds() -> None:
    """`fp.backprop` saves for every rule apart; the values are the same, each once."""
    args = chapter_example()
    graph = fp.backward_graph(fp.models.chapter, rules=HANDWRITTEN)(*args)
    propagation = fp.backprop(fp.models.chapter, rules=HANDWRITTEN)(*args)
    saved = jax.tree.leaves([s.residuals for s in propagation.tape.saved.values()])
    held_values = {(x.shape, x.tobytes()) for x in saved}
    drawn = {v.name: propagation.values[v.name] for v in graph.residuals}
    assert held_values == {(x.shape, x.tobytes()) for x in drawn.values()}
    assert sum(len(content) for _, content in held_values) == sum(x.nbytes for x in drawn.values())


@pytest.mark.parametrize("rules", [fp.rules.default.on("cpu"), HANDWRITTEN])
def test_residuals_flow_from_left_to_right(rules: fp.RuleSet) -> None:
    graph = fp.backward_graph(fp.models.chapter, rules=rules)(*chapter_example())
    drawing = fp.draw(graph, depth=0, engine="graphviz-pure", wrap=False)
    kinds = [edge.kind for edge in drawing.picture.edges]
    routes = [r for r, kind in zip(drawing.layout.edges, kinds, strict=True) if kind == "residual"]
    assert routes
    assert all(route.points[0][0] < route.points[-1][0] for route in routes)


def test_the_graph_computes_value_and_gradient() -> None:
    """Evaluated operator by operator, it gives what `jax.value_and_grad` gives."""
    p, x, y, λ = chapter_example()
    graph = fp.backward_graph(fp.models.chapter, rules=HANDWRITTEN)(p, x, y, λ)
    values = {"W1": p["W1"], "W2": p["W2"], "x": x, "y": y, "λ": λ, "∂J/∂J": jnp.ones(())}
    for op in graph.operators:
        operands = [v.value if v.kind == "literal" else values[v.name] for v in op.inputs]
        results = jax.core.eval_jaxpr(op.jaxpr, (), *operands)
        values.update(zip((v.name for v in op.outputs), results, strict=True))
    value, gradient = jax.value_and_grad(fp.models.chapter)(p, x, y, λ)
    for name, expected in (("J", value), ("∂J/∂W1", gradient["W1"]), ("∂J/∂W2", gradient["W2"])):
        assert jnp.allclose(values[name], expected, rtol=1e-12)


def test_what_cannot_be_differentiated_is_an_error() -> None:
    with pytest.raises(TypeError, match="argnums=1 names argument 1, but"):
        fp.backward_graph(jnp.sin, 1)(1.0)
    with pytest.raises(TypeError, match="no array with a derivative"):
        fp.backward_graph(lambda n, x: n * x)(jnp.arange(2), 1.0)
    with pytest.raises(TypeError, match="second derivatives need one real scalar"):
        fp.second_order_graph(jnp.sin)(X)
    with pytest.raises(ValueError, match="order='reverse' is not known"):
        fp.second_order_graph(jnp.sin, order="reverse")  # type: ignore[arg-type]


# --- second order -----------------------------------------------------------------------------

ORDERS = ("forward-over-reverse", "reverse-over-reverse")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("model", ["chapter", "cnn", "mlp", "loop"])
def test_every_operator_is_classified(model: str, order: str) -> None:
    fun, args = MODELS[model]
    graph: Any = fp.second_order_graph(fun, order=order)(*args)
    assert set(graph.classes) >= {op.name for op in graph.operators}
    assert sum(graph.count().values()) == len(graph.classes)
    present = {c for c, count in graph.count().items() if count}
    assert len(present) == 4
    picture = fp.draw(graph, fold=False).picture
    assert {n.role for n in picture.nodes if n.kind == "operator"} == present
    assert picture.legend == tuple(graph.count())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layers", [2, 3, 5])
def test_matrix_products_of_the_hessian_vector_product(layers: int, order: str) -> None:
    """The chapter's law, 8N − 5; by class: 2N − 1 … for a network of N layers."""

    def network(weights: Any, x: Any) -> Any:
        for w in weights:
            x = jnp.tanh(x @ w)
        return jnp.sum(x**2)

    graph: Any = fp.second_order_graph(network, order=order)([jnp.ones((4, 4))] * layers, X)
    products = Counter(graph.classes[op.name] for op in graph if op.op == "dot_general")
    assert sum(products.values()) == 8 * layers - 5
    assert products == {
        "primal": layers,
        "tangent": 2 * layers - 1,
        "cotangent": layers - 1,
        "tangent of cotangent": 4 * layers - 3,
    }


def test_classes_agree_with_the_transformations_that_wrote_the_operators() -> None:
    """JAX marks what it transposed; without recomputation that is what depends on the seed."""

    def f(p: Any, x: Any) -> Any:
        with jax.named_scope("f"):
            return mlp(p, x)

    graph: Any = fp.second_order_graph(f)(WEIGHTS, X)
    for op in graph.operators:
        stack = str(op.equation.source_info.name_stack)
        transposed = "transpose" in stack
        assert transposed == graph.classes[op.name].endswith("cotangent"), (op.name, stack)
        assert clean_scope(stack) == op.scope


def test_the_hessian_vector_product_has_its_names() -> None:
    graph: Any = fp.second_order_graph(fp.models.chapter)(*chapter_example())
    assert [v.name for v in graph.inputs] == ["W1", "W2", "x", "y", "λ", "v/W1", "v/W2", "∂J/∂J"]
    assert [v.name for v in graph.outputs] == ["∇²J v/W1", "∇²J v/W2"]
    assert [v.shape for v in graph.outputs] == [(3, 4), (2, 3)]


# --- differences ------------------------------------------------------------------------------


def biased(p: Any, x: Any) -> Any:
    h = jnp.tanh(x @ p["W1"] + p["b1"])
    return jnp.sum(jnp.tanh(h @ p["W2"] + p["b2"]) @ p["W3"] + p["b3"])


def test_a_bias_in_every_layer() -> None:
    a, b = fp.trace(mlp)(WEIGHTS, X), fp.trace(biased)({**WEIGHTS, **BIASES}, X)
    found = fp.diff(a, b)
    assert Counter(op.op for op in found.added) == {"add": 3, "broadcast_in_dim": 3}
    assert not found.removed
    assert [v.name for v in found.added_variables if v.kind == "input"] == ["b1", "b2", "b3"]
    # b → spread → · → + → · → what read the product, which is an arrow of its own into the +.
    assert len(found.added_edges) == 3 * 6
    assert [(e.source, e.target) for e in found.removed_edges] == [
        ("dot_general", "tanh"),
        ("dot_general_1", "tanh_1"),
        ("dot_general_2", "reduce_sum"),
    ]
    back = fp.diff(b, a)
    assert [op.name for op in back.removed] == [op.name for op in found.added]
    assert back.removed_edges == found.added_edges
    assert back.added_edges == found.removed_edges


def test_the_chapters_bias_is_one_arrow() -> None:
    args = chapter_example()
    params = {**args[0], "b": jnp.ones(3)}
    found = fp.diff(fp.trace(fp.models.chapter)(*args), fp.trace(fp.models.chapter)(params, *args[1:]))
    assert str(found).splitlines()[1:] == ["+ input b: float64[3]", "+ b → linear  float64[3]"]


def test_no_difference() -> None:
    graph = fp.trace(mlp)(WEIGHTS, X)
    found = fp.diff(graph, fp.trace(mlp)(WEIGHTS, X))
    assert not found
    assert str(found).endswith("no difference")
    wider = fp.diff(graph, fp.trace(mlp)(WEIGHTS, jnp.ones((6, 4))))
    # All but the last, whose result is a scalar.
    assert [op.name for op in wider.added] == [op.name for op in wider.removed]
    assert len(wider.added) == len(graph) - 1
    with pytest.raises(TypeError, match="b=3 is not a graph"):
        fp.diff(graph, 3)  # type: ignore[arg-type]


def test_a_gradient_is_part_of_its_hessian_vector_product() -> None:
    gradient = fp.trace(jax.grad(mlp))(WEIGHTS, X)
    product = fp.trace(lambda p, v, x: jax.jvp(lambda p: jax.grad(mlp)(p, x), (p,), (v,)))(
        WEIGHTS, WEIGHTS, X
    )
    found = fp.diff(gradient, product)
    assert not found.removed
    assert not found.removed_edges
    assert len(found.added) == len(product) - len(gradient)


def test_gradient_and_hessian_vector_product_by_class() -> None:
    gradient: Any = fp.backward_graph(mlp)(WEIGHTS, X)
    product: Any = fp.second_order_graph(mlp)(WEIGHTS, X)
    found = fp.diff(gradient, product)
    counts, added = product.count(), Counter(product.classes[op.name] for op in found.added)
    assert added["tangent"] == counts["tangent"]
    assert added["tangent of cotangent"] == counts["tangent of cotangent"]
    # JAX computes the derivative of tanh, 1 − h², once more for the tangents; nothing that is worth anything.
    others = [op.op for op in found.added if "tangent" not in product.classes[op.name].split()]
    assert set(others) <= {"sub", "mul", "one_minus_square"}
    assert len(others) <= 4
    # Gone are the value, with its last product, and the last product of every weight's gradient.
    assert Counter(op.op for op in found.removed)["dot_general"] == 1 + 3


def test_rematerialisation_adds_what_is_computed_again() -> None:
    plain = fp.backward_graph(mlp)(WEIGHTS, X)
    again = fp.backward_graph(jax.checkpoint(mlp))(WEIGHTS, X)
    found = fp.diff(plain, again)
    assert {op.scope for op in found.added} == {"rematted_computation"}
    assert Counter(op.op for op in found.added)["dot_general"] == 2
    # Gone from the forward sweep is the derivative of tanh, 1 − h².
    assert {op.op for op in found.removed} <= {"sub", "one_minus_square"}
    assert len(found.removed) == 2
    assert {plain.sweeps[op.name] for op in found.removed} == {"forward"}
    assert again.residual_bytes < plain.residual_bytes


def test_a_difference_is_drawn_in_two_colours() -> None:
    a, b = fp.trace(biased)({**WEIGHTS, **BIASES}, X), fp.trace(mlp)(WEIGHTS, X)
    found = fp.diff(a, b)
    picture = fp.draw(found).picture
    roles = Counter(n.role for n in picture.nodes if n.kind == "operator")
    assert roles == {"": len(b), "removed": len(found.removed)}
    edges = Counter(e.role for e in picture.edges)
    assert edges["added"] == len(found.added_edges)
    assert edges["removed"] == len(found.removed_edges)
    assert "removed" in fp.draw(found).svg()
