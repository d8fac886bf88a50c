"""Rules belong to the machine that a program is compiled for, not to the one that traces it."""

from dataclasses import replace
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import funcprop as fp
from funcprop import _jax
from funcprop.rules.machine import CompileTarget

X = jnp.sin(jnp.arange(4 * 17 * 17 * 32.0)).reshape(4, 17, 17, 32)
DEFAULT = fp.rules.default


def pooled(x):
    return jnp.sum(nn.max_pool(nn.tanh(x), (3, 3), (2, 2)) ** 2)


def relu_pooled(x):
    return jnp.sum(nn.max_pool(nn.relu(x), (2, 2), (2, 2)) ** 3)


def averaged(x):
    return jnp.sum(jnp.tanh(nn.avg_pool(x, (2, 2), (2, 2))))


def convolved(x):
    w = jnp.cos(jnp.arange(9 * 32 * 8.0)).reshape(3, 3, 32, 8)
    return jnp.sum(
        jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")) ** 2
    )


def summed(x):
    return jnp.sum(jax.lax.cumlogsumexp(x[0, 0], axis=0) ** 2)


FUNCTIONS = [pooled, relu_pooled, averaged, convolved, summed]


def exported(gradient, *platforms):
    x = jax.ShapeDtypeStruct(X.shape, X.dtype)
    return jax.export.export(jax.jit(gradient), platforms=platforms)(x)


def scatters(program):
    return program.mlir_module().count("stablehlo.select_and_scatter")


def close(a, b):
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-10, atol=1e-10), a, b))


@pytest.mark.parametrize("loss", [pooled, relu_pooled])
def test_a_pool_that_is_exported_for_another_platform_is_autodiffs(loss):
    assert any(
        m.operator in ("reduce_window_max", "relu_max_pool") for m in fp.matches(loss)(X) if not m.reason
    )
    ours, theirs = fp.grad(loss), jax.grad(loss)
    assert scatters(exported(ours, "cpu")) == 0
    assert scatters(exported(ours, "tpu")) == scatters(exported(theirs, "tpu")) == 1
    assert scatters(exported(ours, "cuda")) == 0, "a GPU has the rule, too"
    several = exported(ours, "cpu", "tpu")
    assert scatters(several) == scatters(exported(theirs, "cpu", "tpu")) > 0
    assert "stablehlo.case" in several.mlir_module(), "one form for each platform"
    lowered = jax.jit(ours).trace(X).lower(lowering_platforms=("tpu",))
    assert "select_and_scatter" in lowered.as_text()


def test_a_program_for_several_platforms_runs_here_by_its_rule():
    again = jax.export.deserialize(exported(fp.grad(pooled), "cpu", "cuda", "tpu").serialize())
    close(again.call(X), jax.grad(pooled)(X))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("loss", FUNCTIONS)
@pytest.mark.parametrize("form", ["rule", "elsewhere"])
def test_every_derivative_is_autodiffs_in_both_forms(loss, form, monkeypatch):
    assert [m for m in fp.matches(loss)(X) if m.reason is None]
    rules = DEFAULT
    if form == "elsewhere":  # Traced as on a GPU, where these rules are to win, and run on a CPU.
        keys = [*fp.rules.handwritten, fp.layers.relu_max_pool]
        own = {k: k.rule if isinstance(k, fp.Layer) else fp.rules.handwritten[k] for k in keys}
        rules = fp.RuleSet(
            "for gpu", {k: replace(r, platforms={"gpu"}) for k, r in own.items()}, measured=True
        )
        monkeypatch.setattr(_jax, "default_platform", lambda: "gpu")
    v = jnp.cos(X)
    cases = {
        "gradient": lambda grad: jax.jit(grad)(X),
        "forward over reverse": lambda grad: jax.jit(lambda x: jax.jvp(grad, (x,), (v,)))(X),
        "reverse over reverse": lambda grad: jax.jit(jax.grad(lambda x: jnp.vdot(grad(x), v)))(X),
        "vmap": lambda grad: jax.jit(jax.vmap(grad))(jnp.stack([X, 2 * X])),
        "checkpoint": lambda grad: jax.jit(jax.grad(jax.checkpoint(lambda x: jnp.vdot(grad(x), v))))(X),
    }
    for case in cases.values():
        close(case(fp.grad(loss, rules=rules)), case(jax.grad(loss)))
    third = lambda grad: jax.jit(lambda x: jax.jvp(lambda x: jax.jvp(grad, (x,), (v,))[1], (x,), (v,))[1])(X)  # noqa: E731
    close(third(fp.grad(loss, rules=rules)), third(jax.grad(loss)))


def test_resolved_sets():
    tpu, cpu = DEFAULT.on("tpu"), DEFAULT.on("cpu")
    assert "reduce_window_max" in cpu
    assert "reduce_window_max" not in tpu
    assert DEFAULT.on("cuda") == DEFAULT.on("gpu") == DEFAULT.on("rocm")
    assert len({DEFAULT, tpu, cpu, DEFAULT.on("tpu")}) == 3
    assert repr(tpu).startswith("RuleSet 'default' on tpu (TPU v5 lite): ")
    assert repr(DEFAULT).startswith("RuleSet 'default' on cpu: ")
    assert tpu.replace({"tanh": None}).platform == "tpu", "a changed set is for the same target"
    assert fp.rules.handwritten.on("tpu").find("reduce_window_max", "tpu") is not None
    assert scatters(exported(fp.grad(pooled, rules=tpu), "cpu")) == 1, "whatever it is lowered for"
    assert scatters(exported(fp.grad(pooled, rules=cpu), "tpu")) == 0
    close(fp.grad(pooled, rules=tpu)(X), jax.grad(pooled)(X))


def test_where_the_platform_is_certain_there_is_no_choice():
    assert "by_platform" in str(jax.make_jaxpr(fp.grad(pooled))(X))
    assert "by_platform" not in str(jax.make_jaxpr(fp.grad(pooled, rules=DEFAULT.on("cpu")))(X))
    assert "by_platform" not in str(jax.make_jaxpr(fp.grad(jnp.sum))(X)), (
        "rules that win everywhere need none"
    )
    assert "by_platform" not in str(jax.make_jaxpr(fp.grad(pooled, rules=fp.rules.handwritten))(X))
    traced = []
    fp.grad(lambda x: traced.append(CompileTarget.of(None, [x])) or jnp.sum(x))(
        jax.device_put(X, jax.devices()[1])
    )
    assert (traced[0].platform, traced[0].certain) == ("cpu", True)


def test_the_first_operand_that_is_bound_to_a_device_says_which_rules_there_are(monkeypatch):
    """Whether it is an argument, or in an object that the function closes over."""
    ran = []

    def forward(x, **_):
        ran.append(x)
        return jnp.sin(x), (x,)

    sine = fp.Rule(forward, lambda saved, g, needs, **_: (g * jnp.cos(saved[0]),), platforms="cpu")
    rules = fp.RuleSet("cpu", {"sin": sine}, measured=True)
    monkeypatch.setattr(_jax, "default_platform", lambda: "tpu")
    free, held = jnp.ones(2), SimpleNamespace()

    def runs(gradient, x, w):
        ran.clear()
        held.w = w
        close(gradient(x), w * jnp.cos(x * w))
        return bool(ran)

    gradient = fp.grad(lambda x: jnp.sum(jax.lax.sin(x * held.w)), rules=rules)
    bound = jax.device_put(free, jax.devices()[0])
    assert not runs(gradient, free, free)
    assert runs(gradient, free, bound)
    assert runs(gradient, bound, free)
    assert runs(lambda x: jax.vmap(gradient)(x[None])[0], bound, free)


ERRORS = {
    "no platform": (lambda: DEFAULT.on("cude"), r"target='cude' is no platform; pass one of 'cpu'"),
    "nothing": (lambda: DEFAULT.on(3), r"target=3 is no machine; .*a topology or an fp.Machine"),
    "of a rule": (
        lambda: fp.Rule(lambda x: (x, ()), lambda r, g, n: (g,), platforms={"cpux"}),
        r"Rule: a name in platforms='cpux' is no platform; pass one of 'cpu', 'gpu', 'tpu'",
    ),
    "of a machine": (lambda: fp.Machine("metal"), r"Machine: platform='metal' is no platform"),
    "a size": (lambda: fp.Machine("cpu", cores=0), r"Machine: cores=0; sizes are at least 1"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_unknown_targets(call, message):
    with pytest.raises(fp.RuleError, match=message):
        call()


def test_cuda_and_rocm_are_gpu():
    rule = fp.Rule(lambda x: (x, ()), lambda r, g, n: (g,), platforms={"cuda", "tpu"})
    assert rule.platforms == {"gpu", "tpu"}
    assert fp.Rule(rule.forward, rule.backward, platforms="rocm").platforms == {"gpu"}
    assert rule.wins_on("gpu")
