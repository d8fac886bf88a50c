"""The same gradient from fewer bytes: against what `jax.vjp` holds, brute force, and XLA's own counts."""

import itertools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_jax import assert_same
from compiling import compiled
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import ZOO
from zoo.entry import normal

import funcprop as fp
from funcprop import _jax
from funcprop.memory import BudgetError, remat_plan, rematerialize
from funcprop.program import flops


def held(fun, *args):
    """Bytes that `jax.vjp` holds: what it computes, and what is given to it."""
    leaves, tree = jax.tree.flatten(args)
    smooth = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def saved(*values):
        def of_smooth(*chosen):
            every = list(values)
            for i, value in zip(smooth, chosen, strict=True):
                every[i] = value
            return fun(*jax.tree.unflatten(tree, every))

        return jax.tree.leaves(jax.vjp(of_smooth, *(values[i] for i in smooth))[1])

    jaxpr = _jax.open_jaxpr(jax.make_jaxpr(saved)(*leaves))
    given = {*jaxpr.invars, *jaxpr.constvars}
    sizes = [
        (v in given, v.aval.size * v.aval.dtype.itemsize)
        for v in jaxpr.outvars
        if not isinstance(v, _jax.Literal)
    ]
    return sum(n for is_given, n in sizes if not is_given), sum(n for is_given, n in sizes if is_given)


def gradient_flops(fun, *args):
    """FLOPs of value and gradient, without what nobody needs."""
    jaxpr = _jax.open_jaxpr(jax.make_jaxpr(jax.value_and_grad(fun))(*args))
    needed, _ = _jax.without_unread_inputs(jaxpr, [False] * len(jaxpr.invars))
    return flops.of_jaxpr(needed)


# --- random programs ----------------------------------------------------------------------------

OPERATIONS = (jnp.sin, jnp.tanh, jnp.add, jnp.multiply, jnp.matmul, jnp.exp)


@st.composite
def programs(draw):
    """A random DAG on 3 × 3 matrices, as a list of operations on earlier values; the last is the result."""
    steps = []
    for i in range(draw(st.integers(3, 5))):
        operation = draw(st.sampled_from(OPERATIONS))
        count = 1 if operation in (jnp.sin, jnp.tanh, jnp.exp) else 2
        # Value 0 is the argument, and every step reads the one before it, so that none is superfluous.
        operands = [i, *(draw(st.integers(0, i)) for _ in range(count - 1))]
        steps.append((operation, operands))
    return steps


def evaluated(steps, x):
    values = [x]
    for operation, operands in steps:
        values.append(operation(*(values[k] for k in operands)))
    return values[-1].sum()


def in_segments(steps, cuts, recomputed):
    """The program with some of its segments under `jax.checkpoint`."""

    def fun(x):
        values = [x]
        for (start, stop), again in zip(itertools.pairwise(cuts), recomputed, strict=True):
            read = sorted({k for _, operands in steps[start:stop] for k in operands if k <= start})

            def segment(*inputs, start=start, stop=stop, read=read):
                known = dict(zip(read, inputs, strict=True))
                for i, (operation, operands) in enumerate(steps[start:stop], start + 1):
                    known[i] = operation(*(known[k] for k in operands))
                return [known[i] for i in range(start + 1, stop + 1)]

            run = jax.checkpoint(segment) if again else segment
            values += run(*(values[k] for k in read))
        return values[-1].sum()

    return fun


def brute_force(steps, x, budget):
    """The fewest FLOPs of a gradient that fits, of all choices of cut points and of segments to recompute."""
    best = None
    for count in range(len(steps)):
        for cuts in itertools.combinations(range(1, len(steps)), count):
            for recomputed in itertools.product((False, True), repeat=count + 1):
                fun = in_segments(steps, (0, *cuts, len(steps)), recomputed)
                if held(fun, x)[0] <= budget:
                    cost = gradient_flops(fun, x)
                    best = cost if best is None else min(best, cost)
    return best


@settings(max_examples=6)
@given(programs(), st.floats(0, 1))
def test_random_programs(steps, share):
    x = normal(0, 3, 3, scale=0.3)

    def fun(x):
        return evaluated(steps, x)

    plan = remat_plan(fun, share)(x)
    lean = rematerialize(fun, share)
    computed, given = held(lean, x)
    assert plan.plain_residual_bytes == held(fun, x)[0]
    assert (plan.residual_bytes, plan.argument_bytes) == (computed, given)
    assert computed <= share * plan.plain_residual_bytes
    extra = gradient_flops(lean, x) - gradient_flops(fun, x)
    assert plan.extra_flops == extra
    assert extra <= brute_force(steps, x, plan.budget) - gradient_flops(fun, x)
    assert_same(jax.grad(lean)(x), jax.grad(fun)(x))


# --- models -------------------------------------------------------------------------------------

MODELS = (
    *("linen_transformer_dropout", "linen_remat_scan_over_layers", "equinox_lstm_attention"),
    *("nnx_cnn_batch_norm", "scan_in_cond_in_scan", "while_loop_beside_scan", "switch_in_map_in_remat"),
    *("custom_derivatives_in_control_flow", "shard_map_data_parallel", "layers_under_vmap_and_scan"),
)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MODELS)
def test_unchanged_models(name):
    fun, args = ZOO[name].build()
    plan = remat_plan(fun, 0.3)(*args)
    assert plan.residual_bytes <= 0.3 * plan.plain_residual_bytes
    assert sum(v.nbytes for v in plan.saved) == plan.residual_bytes
    assert sum(op.flops for op in plan.recomputed) == plan.extra_flops
    both = compiled(lambda *args: (jax.grad(fun)(*args), jax.grad(rematerialize(fun, 0.3))(*args)))(*args)
    assert_same(both[1], both[0])


def test_rules_before_and_after():
    fun, args = ZOO["linen_lstm"].build()
    rules = fp.rules.handwritten
    with_rules = fp.with_rules(fun, rules)
    before, after = rematerialize(with_rules, 0.3), fp.with_rules(rematerialize(fun, 0.3), rules)
    plain, rules_only = held(fun, *args)[0], held(with_rules, *args)[0]
    assert held(before, *args)[0] <= 0.3 * rules_only
    assert held(after, *args)[0] <= 0.3 * plain
    results = compiled(lambda *args: [jax.grad(f)(*args) for f in (fun, before, after)])(*args)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_an_nnx_model_keeps_what_changes_in_it():
    def build():
        return nnx.Sequential(
            nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
            nnx.BatchNorm(4, rngs=nnx.Rngs(1)),
            nnx.Linear(4, 1, rngs=nnx.Rngs(2)),
        )

    def loss(model, x):
        return jnp.mean(jnp.tanh(model(x)) ** 2)

    x, models = normal(0, 5, 3).astype("float32"), (build(), build())
    plan = remat_plan(loss, 0.4)(models[0], x)
    assert plan.residual_bytes <= 0.4 * plan.plain_residual_bytes
    grads = [
        nnx.jit(nnx.grad(f))(model, x)
        for f, model in zip((loss, rematerialize(loss, 0.4)), models, strict=True)
    ]
    for states in (grads, [nnx.state(model) for model in models]):
        leaves = [jax.tree.leaves(s) for s in states]
        for a, e in zip(*leaves, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)  # nnx keeps statistics in float32
    assert float(models[1].layers[1].mean[...][0]) != 0


def test_an_equinox_model_with_its_own_transformation():
    model = eqx.nn.MLP(3, 1, 8, 3, key=jax.random.key(0), dtype=float)
    x = normal(0, 5, 3)

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    lean = rematerialize(loss, 0.3)
    actual, expected = (eqx.filter_grad(f)(model, x) for f in (lean, loss))
    assert_same(jax.tree.leaves(actual), jax.tree.leaves(expected))


# --- transformations and structure --------------------------------------------------------------


def mlp(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


WS, X = [normal(i, 4, 4, scale=0.5) for i in range(6)], normal(9, 5, 4)


TRANSFORMED = {
    "value": lambda f: f(WS, X),
    "jit": lambda f: jax.jit(f)(WS, X),
    "jvp": lambda f: jax.jvp(lambda x: f(WS, x), (X,), (X,)),
    "vjp": lambda f: jax.vjp(f, WS, X)[1](1.0),
    "vmap of grad": lambda f: jax.vmap(lambda x: jax.grad(f, 1)(WS, x))(X[:, None]),
    "grad of vmap": lambda f: jax.grad(lambda ws: jax.vmap(f, (None, 0))(ws, X[:, None]).sum())(WS),
    "hessian": lambda f: jax.jit(jax.hessian(lambda w: f([w, *WS[1:]], X)))(WS[0]),
    "fp.hvp": lambda f: jax.jit(fp.hvp(f))(WS, WS, X),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_it_is_an_ordinary_function(name):
    assert_same(TRANSFORMED[name](rematerialize(mlp, 0.3)), TRANSFORMED[name](mlp))


def test_keyword_arguments_and_static_ones():
    def fun(x, *, power, mode):
        return jnp.sum(jnp.sin(x) ** power) if mode == "sin" else jnp.sum(x)

    lean = rematerialize(fun, 0)
    assert held(lambda x: lean(x, power=3, mode="sin"), X) == (0, X.nbytes)
    assert_same(jax.grad(lean)(X, power=3, mode="sin"), jax.grad(fun)(X, power=3, mode="sin"))


def test_a_loop_saves_what_the_budget_allows_of_every_step():
    length = 7

    def fun(ws, x):
        def layer(x, w):
            hidden = fp.name(jnp.sin(x @ w), "hidden")
            return x + jnp.sin(hidden @ w), None

        return jnp.sum(jax.lax.scan(layer, x, ws)[0])

    ws, x = normal(0, length, 4, 4), normal(1, 3, 4)
    unit = length * x.nbytes
    # The input of every step has to be held; then one more value of the step; then all four.
    for units, flop_share in ((1, (0.2, 1.0)), (2, (0.01, 0.6)), (4, (0, 0))):
        plan = remat_plan(fun, units * unit)(ws, x)
        assert plan.residual_bytes == units * unit
        low, high = flop_share
        assert low * plan.forward_flops <= plan.extra_flops <= high * plan.forward_flops
        lean = rematerialize(fun, units * unit)
        assert held(lean, ws, x)[0] == units * unit
        assert_same(compiled(jax.grad(lean))(ws, x), compiled(jax.grad(fun))(ws, x))
        assert all(v.shape[0] == length for v in plan.saved if v.shape)
    # Less than an input for every step: the loop as a whole is run again.
    plan = remat_plan(fun, unit - 1)(ws, x)
    assert plan.residual_bytes <= x.nbytes


def test_a_long_loop_is_run_again_in_chunks():
    x, inputs = normal(0, 3, 4), normal(1, 64, 3, 4)

    def fun(w, inputs, x):
        def step(h, x):
            h = jnp.tanh(h @ w + x)
            return h, h[0, 0]

        last, firsts = jax.lax.scan(step, x, inputs, reverse=True)
        return jnp.sum(last) + jnp.sum(firsts)

    args = WS[0], inputs, x
    plan = remat_plan(fun, 0.2)(*args)
    # A carry for each of eight chunks; the products and sums of every step, once more.
    assert plan.residual_bytes == 8 * x.nbytes
    assert plan.residual_bytes == held(rematerialize(fun, 0.2), *args)[0]
    assert plan.peak_bytes <= plan.residual_bytes + plan.plain_residual_bytes // 8
    assert 0.9 * plan.forward_flops < plan.extra_flops <= plan.forward_flops
    assert sum(op.flops for op in plan.recomputed) == plan.extra_flops
    assert [v.name for v in plan.saved] == ["scan: carries of its chunks"]
    lean, rules = rematerialize(fun, 0.2), fp.rules.handwritten
    results = compiled(
        lambda *args: [jax.grad(f, (0, 1, 2))(*args) for f in (fun, lean, fp.with_rules(lean, rules))]
    )
    expected, *others = results(*args)
    for actual in others:
        assert_same(actual, expected)
    # 61 steps have no equal chunks, so the loop is run again as a whole.
    prime = remat_plan(fun, 0.2)(WS[0], inputs[:61], x)
    assert prime.residual_bytes < x.nbytes


def test_what_nobody_differentiates_is_not_held():
    def fun(x):
        peak = jax.lax.stop_gradient(jnp.max(jnp.exp(x)))
        return jnp.sum(jnp.sin(x) / peak)

    plan = remat_plan(fun, 1.0)(X)
    assert plan.plain_residual_bytes == held(fun, X)[0]
    assert plan.extra_flops == 0


def test_arguments_count_if_asked():
    plain = remat_plan(mlp, 1.0)(WS, X)
    assert plain.argument_bytes == sum(w.nbytes for w in WS) + X.nbytes
    counted = remat_plan(mlp, 0.7, count_arguments=True)(WS, X)
    whole = plain.plain_residual_bytes + plain.plain_argument_bytes
    assert counted.residual_bytes + counted.argument_bytes <= 0.7 * whole
    leaves = jax.tree.leaves(
        jax.eval_shape(lambda *args: jax.vjp(rematerialize(mlp, 0.7, count_arguments=True), *args)[1], WS, X)
    )
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) <= 0.7 * whole


# --- the plan -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    return remat_plan(mlp, 0.3)(WS, X)


def test_the_report_and_its_json(plan):
    text = str(plan)
    content = json.loads(plan.json())
    for number in (plan.residual_bytes, plan.plain_residual_bytes, plan.budget, plan.extra_flops):
        assert f"{number:,}" in text
    assert content["residual_bytes"] == plan.residual_bytes
    assert [v["name"] for v in content["saved"]] == [v.name for v in plan.saved]
    assert {op["op"] for op in content["recomputed"]} >= {"dot_general", "tanh"}


def test_shapes_are_enough(plan):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (WS, X))
    assert remat_plan(mlp, 0.3)(*shapes).json() == plan.json()


def test_a_plan_for_a_platform_that_is_not_here():
    here, there = (remat_plan(mlp, 0.3, target=target)(WS, X) for target in (None, "tpu"))
    assert there.compiler_options == {}
    assert there.advice is None
    assert "nothing was compiled: this process has no tpu" in there.reason
    assert (there.residual_bytes, there.extra_flops) == (here.residual_bytes, here.extra_flops)
    with pytest.raises(fp.RuleError, match="target='tpy' is no platform"):
        remat_plan(mlp, 0.3, target="tpy")


def test_a_policy_for_checkpoint(plan):
    lean = jax.checkpoint(mlp, policy=plan.policy)
    assert held(lean, WS, X)[0] == plan.policy_residual_bytes <= plan.budget
    assert_same(jax.grad(lean)(WS, X), jax.grad(mlp)(WS, X))
    # With room for them, the products are saved: they are the dearest to run again for their bytes.
    products = remat_plan(mlp, 6 * X.nbytes)(WS, X)
    assert products.policy_residual_bytes == 6 * X.nbytes
    assert {kind[0] for kind in products.policy.kinds} >= {"dot_general"}


def test_a_peak_is_kept(plan):
    limited = remat_plan(mlp, 1.0, peak=0.45)(WS, X)
    assert limited.peak_bytes <= 0.45 * plan.plain_residual_bytes
    assert limited.residual_bytes <= limited.peak_bytes
    assert limited.extra_flops > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "give a budget or a peak"),
        ({"budget": 0.5, "chunks": 2}, ValueError, "and not both"),
        ({"budget": True}, TypeError, "budget=True is not a number"),
        ({"budget": -1}, ValueError, "budget=-1 is negative"),
        (
            {"budget": float("nan")},
            ValueError,
            "budget=nan is not a number: an int is bytes, a float a share",
        ),
        ({"budget": 1e6}, ValueError, "pass the int 1000000"),
        ({"peak": 2.5}, ValueError, r"peak=2.5: a float is a share"),
        ({"chunks": 0}, ValueError, "chunks=0 is not a number of pieces"),
        ({"chunks": 10_000}, ValueError, "chunks=10000: mlp has no more than"),
        ({"budget": 100, "count_arguments": True}, BudgetError, "do not count the arguments"),
        ({"budget": 1.0, "peak": 1}, BudgetError, "smallest peak, besides its arguments, is"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        remat_plan(mlp, **options)(WS, X)


def test_an_impossible_budget_says_what_is_possible():
    fun, args = ZOO["references"].build()
    with pytest.raises(BudgetError, match="smallest number of bytes held between the sweeps") as caught:
        remat_plan(fun, 0)(*args)
    smallest = caught.value.smallest
    assert remat_plan(fun, smallest)(*args).residual_bytes == smallest == held(fun, *args)[0]
