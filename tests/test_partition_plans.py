"""Plans of unchanged models: gradients, losses, bytes and collectives, against one device and XLA."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from partition_models import MODELS, Perceptron, classes, of_flax, of_shape

import funcprop as fp

MESHES: dict[str, dict[str, Any]] = {
    "data": {"mesh": {"data": 8}},
    "tensor": {"mesh": {"model": 4}},
    "both": {"mesh": {"data": 2, "model": 4}},
    "zero": {"mesh": {"data": 4}, "shard_parameters": True},
    "accumulation": {"mesh": {"data": 2}, "microbatches": 4},
    "pipeline": {"mesh": {"stage": 2}, "microbatches": 4},
    "pipeline_data": {"mesh": {"stage": 2, "data": 2}, "microbatches": 4, "schedule": "gpipe"},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_one_device(name: str, kind: str) -> None:
    loss, params, batch = MODELS[name]()
    make = fp.partition.plan(loss, **MESHES[kind])
    (plan,) = make(params, batch)
    value, gradient = plan.gradient(params, batch)
    true, reference = jax.jit(jax.value_and_grad(loss))(params, batch)
    assert abs(float(value) - float(true)) <= 1e-12
    largest = max(np.abs(x).max() for x in jax.tree.leaves(reference))
    for (path, x), y in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(jax.device_get(x), y, atol=1e-12 * largest, rtol=0, err_msg=str(path))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", MESHES)
def test_twenty_steps_have_the_losses_of_one_device(kind: str) -> None:
    loss, params, batch = MODELS["tied"]()
    optimizer = optax.adam(1e-2)

    @jax.jit
    def one(params: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, batch)
        changes, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, changes), state, value

    (plan,) = fp.partition.plan(loss, optimizer=optimizer, **MESHES[kind])(params, batch)
    placed, state = plan.place(params, optimizer.init(params))
    step = plan.step(optimizer)
    reference, other = params, optimizer.init(params)
    for _ in range(20):
        placed, state, value = step(placed, state, batch)
        reference, other, expected = one(reference, other)
        assert abs(float(value) - float(expected)) <= 1e-11
    assert float(expected) < 3.0
    jax.tree.map(lambda x: x.block_until_ready(), params)  # The given parameters are not overwritten.


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["data", "both", "accumulation", "pipeline_data"])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_and_collectives_are_predicted(name: str, kind: str) -> None:
    loss, params, batch = MODELS[name](32)
    (plan,) = fp.partition.plan(loss, **MESHES[kind])(params, batch)
    proof = plan.compile()
    # These are of 100 kB, where small buffers count; of megabytes it is 5 %.
    assert abs(proof.ratio - 1) <= (0.08 if name in ("mlp", "equinox") else 0.13), f"{proof}\n{plan}"
    assert proof.unpredicted == []
    assert sum(c.nbytes * c.trips for c in proof.collectives) == plan.communicated
    assert proof.gradient_error is not None
    assert proof.gradient_error <= 1e-12


def test_sums_in_a_loop_are_reduced_at_each_step() -> None:
    def loss(w: Any, x: Any) -> Any:
        carry, _ = jax.lax.scan(lambda h, x: (jnp.tanh(x + h @ w), None), jnp.zeros(x.shape[1:]), x)
        return jnp.mean(carry)

    for platform, trips in (("cpu", 5), ("tpu", 1)):
        found = fp.partition.plan(loss, mesh={"data": 2}, rules=fp.rules.autodiff)
        (plan,) = found(jnp.eye(4), jnp.ones((5, 8, 4)), on=None if platform == "cpu" else "v5e:2x2")
        assert sum(c.trips for c in plan.program.predicted_traffic if c.nbytes == 4 * 4 * 8) == trips
        if platform == "cpu":
            assert plan.compile().unpredicted == []


def test_a_collective_that_was_not_predicted_is_named() -> None:
    """XLA does not split autodiff's max-pooling by examples: it gathers them."""
    loss, params, batch = MODELS["cnn"]()
    (plan,) = fp.partition.plan(loss, rules=fp.rules.autodiff, mesh={"data": 8})(params, batch)
    proof = plan.compile()
    assert {c.kind for c in proof.unpredicted} == {"all-gather"}
    # Releases of XLA name the operator that reads what is gathered, or the one that makes it.
    assert all("Convolutions" in c.operator for c in proof.unpredicted), proof
    assert "not predicted: all-gather" in str(proof)


def test_overlapping_pools_are_split_at_all_sizes() -> None:
    def loss(w: Any, x: Any) -> Any:
        return jnp.mean(nn.max_pool(jnp.tanh(x @ w), (3, 3), (2, 2)) ** 2)

    (plan,) = fp.partition.plan(loss, mesh={"data": 8})(jnp.eye(3), jnp.ones((16, 9, 9, 3)))
    proof = plan.compile()
    assert proof.unpredicted == []
    assert proof.gradient_error is not None
    assert proof.gradient_error <= 1e-12


def test_a_convolution_takes_its_batch_in_chunks_of_which_each_device_has_a_part() -> None:
    def loss(w: Any, x: Any) -> Any:
        return jnp.mean(nn.avg_pool(jnp.tanh(_convolved(x, w[0])), (16, 16)) @ w[1])

    shapes = (3, 3, 32, 64), (64, 2), (64, 16, 16, 32)
    first, second, x = (jax.random.normal(jax.random.key(i), s) / 8 for i, s in enumerate(shapes))
    # A smaller minibatch has chunks of its own, though the whole batch's are of fewer examples.
    plans = fp.partition.plan(loss, optimizer=optax.sgd(0.1))(*jax.eval_shape(lambda: ([first, second], x)))
    assert plans.named("minibatch").flops == pytest.approx(plans.named("one device").flops, rel=0.1)
    (plan,) = fp.partition.plan(loss, mesh={"data": 8})([first, second], x)
    assert plan.problem.rules is not None
    assert fp.matches(loss, rules=plan.problem.rules)([first, second], x)
    proof = plan.compile()
    assert proof.unpredicted == []
    assert proof.gradient_error is not None
    assert proof.gradient_error <= 1e-12


def test_examples_are_followed_through_indices_and_keys() -> None:
    """`x[arange(n), i]` picks of each example its own entry; each example has a key of its own."""

    def loss(w: Any, batch: Any) -> Any:
        x, classes, keys = batch
        drawn = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (4,)))(keys)
        logits = jax.nn.log_softmax(jnp.tanh(x @ w[0]) * drawn @ w[1])
        chosen = jnp.zeros_like(logits).at[jnp.arange(len(x)), classes].set(1.0)
        return -logits[jnp.arange(len(x)), classes].mean() + jnp.mean(chosen * logits)

    x = jax.random.normal(jax.random.key(0), (16, 4))
    batch = x, jnp.arange(16) % 3, jax.random.split(jax.random.key(1), 16)
    weights = [jnp.cos(jnp.arange(16.0)).reshape(4, 4), jnp.sin(jnp.arange(12.0)).reshape(4, 3)]
    for kind in ("data", "zero", "pipeline_data"):
        (plan,) = fp.partition.plan(loss, **MESHES[kind])(weights, batch)
        assert plan.problem.batch_axes == [0, 0, 0]
        _, gradient = plan.gradient(weights, batch)
        reference = jax.grad(loss)(weights, batch)
        for x, y in zip(gradient, reference, strict=True):
            np.testing.assert_allclose(jax.device_get(x), y, atol=1e-14)


def test_a_grouped_convolution_is_split_by_examples_but_not_on_two_axes() -> None:
    """On a mesh of two axes XLA adds up the gradient of its kernel over both, and it is wrong."""

    def loss(w: Any, x: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            x, w[0], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        )
        return jnp.mean((jnp.tanh(y).mean((1, 2)) @ w[1]) ** 2)

    x = jax.random.normal(jax.random.key(0), (16, 5, 5, 4))
    weights = [jax.random.normal(jax.random.key(1), (3, 3, 1, 4)), jnp.ones((4, 8))]
    (plan,) = fp.partition.plan(loss, mesh={"data": 8})(weights, x)
    proof = plan.compile()
    assert proof.unpredicted == []
    assert proof.gradient_error is not None
    assert proof.gradient_error <= 1e-12
    with pytest.raises(ValueError, match=r"grouped convolution's kernel wrongly .* use data or model alone"):
        fp.partition.plan(loss, mesh={"data": 2, "model": 4})(weights, x)


def test_a_loss_that_draws_for_the_whole_batch_is_no_mean_over_examples() -> None:
    def loss(w: Any, batch: Any) -> Any:
        x, key = batch
        return jnp.mean(jnp.where(jax.random.bernoulli(key, 0.5, x.shape), jnp.tanh(x @ w) ** 2, 0))

    batch = jnp.arange(64.0).reshape(16, 4) / 64, jax.random.key(0)
    with pytest.raises(ValueError, match=r"draws random numbers.*give each example a key of its own"):
        fp.partition.plan(loss, mesh={"data": 2}, microbatches=2)(jnp.eye(4), batch)


def test_a_minibatch_overwrites_parameters_and_state() -> None:
    loss, params, batch = MODELS["equinox"](256)
    plan = fp.partition.plan(loss, optimizer=optax.adam(1e-3))(params, batch, devices=1).named("minibatch")
    assert plan.compile().ratio == pytest.approx(1, abs=0.05)


def test_weights_that_may_be_read_after_their_update_are_copied_first() -> None:
    loss, params, batch = of_flax(Perceptron((256, 256, 256, 8)), of_shape(64, 128), classes(64))
    (plan,) = fp.partition.plan(loss, optimizer=optax.adam(1e-3), mesh={"model": 4})(params, batch)
    compiled = plan.checked().compiled_bytes
    assert plan.predicted.total == pytest.approx(compiled, rel=0.02)


def test_zero_holds_a_third_of_what_split_arguments_hold() -> None:
    loss, params, batch = MODELS["tied"]()
    (plan,) = fp.partition.plan(loss, mesh={"data": 8}, shard_parameters=True)(params, batch)
    devices = jax.devices()
    ours = plan.problem.compiled(*plan.program.jitted(devices, plan.problem.optimizer)).memory_analysis()
    placed = plan.program.jitted(devices, None)[1]
    plain = jax.jit(jax.value_and_grad(loss), in_shardings=placed, out_shardings=(None, placed[0]))
    theirs = plain.lower(params, batch).compile().memory_analysis()
    assert ours.argument_size_in_bytes == theirs.argument_size_in_bytes
    assert ours.temp_size_in_bytes <= 0.35 * theirs.temp_size_in_bytes
    held = ours.argument_size_in_bytes + ours.output_size_in_bytes + ours.temp_size_in_bytes
    assert plan.predicted.total == pytest.approx(held, rel=0.05)


def test_the_table_has_every_kind_best_first() -> None:
    loss, params, batch = MODELS["mlp"]()
    plans = fp.partition.plan(loss, optimizer=optax.adam(1e-3), budget="32kB")(params, batch, devices=4)
    names = " ".join(plan.name for plan in plans)
    kinds = "one device", "data 4", "tensor 4", "zero 4", "pipeline", "accumulation", "minibatch", "remat"
    assert [kind for kind in kinds if kind not in names] == []
    fits = [bool(plan.fits) for plan in plans]
    assert fits == sorted(fits, reverse=True)
    assert plans[0].held <= 32_000 < plans[-1].held
    # The first is known to fit: its bytes are the compiler's.
    assert plans[0].compiled_bytes == plans[0].compile().compiled
    assert f"compiled {plans[0].held:,}, of 32,000: fits; estimated" in str(plans[0])
    assert plans[0].as_dict()["checked"]
    assert plans[-1].compiled_bytes is None
    assert "× too large" in str(plans)
    assert plans.named("minibatch").updates > 1
    assert plans.as_dict()["plans"][0]["name"] == plans[0].name


def test_plans_that_fit_by_the_estimate_alone_are_compiled_until_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss, params, batch = MODELS["mlp"]()
    compiled = []

    def checked(plan: fp.partition.PartitionPlan) -> fp.partition.PartitionPlan:
        compiled.append(plan.name)
        return dataclasses.replace(plan, compiled_bytes=10**9 if len(compiled) < 3 else 20_000)

    monkeypatch.setattr(fp.partition.PartitionPlan, "checked", checked)
    make = fp.partition.plan(loss, optimizer=optax.adam(1e-3), budget="1MB")
    plans = make(params, batch, devices=2)
    assert len(compiled) == 3
    assert (plans[0].name, plans[0].held, plans[0].fits) == (compiled[-1], 20_000, True)
    assert [plan.fits for plan in plans if plan.name in compiled[:2]] == [False, False]
    make = fp.partition.plan(loss, optimizer=optax.adam(1e-3), budget="1MB", by="estimate")
    assert all(plan.compiled_bytes is None for plan in make(params, batch, devices=2))
    assert len(compiled) == 3


def test_smaller_minibatches_make_several_updates() -> None:
    loss, params, batch = MODELS["mlp"]()
    optimizer = optax.sgd(0.1)
    plans = fp.partition.plan(loss, optimizer=optimizer)(params, batch, devices=1)
    plan = plans.named("minibatch")
    placed, state = plan.place(params, optimizer.init(params))
    placed, state, value = plan.step(optimizer)(placed, state, batch)
    expected, values = params, []
    for part in range(plan.updates):
        size = 16 // plan.updates
        own = jax.tree.map(lambda x, part=part, size=size: x[part * size : (part + 1) * size], batch)
        true, gradient = jax.jit(jax.value_and_grad(loss))(expected, own)
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, expected, gradient)
        values.append(float(true))
    assert abs(float(value) - np.mean(values)) <= 1e-12
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), placed, expected)


def weighted(params: Any, batch: Any) -> Any:
    x, mask = batch
    return jnp.sum(jnp.tanh(x @ params).mean(1) * mask) / jnp.sum(mask)


@pytest.mark.parametrize("kind", ["zero", "accumulation", "pipeline"])
def test_a_weighted_mean_needs_its_weight(kind: str) -> None:
    params, batch = jnp.ones((8, 8)) * 0.1, (jax.random.normal(jax.random.key(0), (16, 8)), jnp.arange(16.0))

    def loss(params: Any, batch: Any) -> Any:
        hidden = jnp.tanh(batch[0] @ params["a"])
        return weighted(params["b"], (hidden, batch[1]))

    params = {"a": params, "b": params + 0.1}
    with pytest.raises(
        ValueError, match=r"not the mean over examples.*it needs the weight 0\.2333 for the first"
    ):
        fp.partition.plan(loss, **MESHES[kind])(params, batch)
    weigh = lambda batch: jnp.sum(batch[1])  # noqa: E731
    (plan,) = fp.partition.plan(loss, weight=weigh, **MESHES[kind])(params, batch)
    _, gradient = plan.gradient(params, batch)
    reference = jax.grad(loss)(params, batch)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(jax.device_get(x), y, atol=1e-14), gradient, reference
    )


def _convolved(x: Any, w: Any) -> Any:
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"mesh": {"data": 3}},
        {},
        r"data=3: 16 examples cannot be divided among 3 devices; use a batch of 15 or 18",
    ),
    ({}, {"devices": 9}, r"devices=9, of which there are 8; use no more, or on='v5e:4x4'"),
    ({"mesh": {"data": 16}}, {}, r"needs 16 devices, and there are 8"),
    ({"mesh": {"expert": 2}}, {}, r"the model has no axis 'expert'; use data .*model .*stage"),
    ({"mesh": {"model": 7}}, {}, r"model=7: no axis of the parameters can be split into 7 parts"),
    (
        {"mesh": {"stage": 2}, "microbatches": 3},
        {},
        r"microbatches=3: 16 examples leave a ragged last part of 1; use",
    ),
    ({"mesh": {"stage": 8}, "schedule": "zigzag"}, {}, r"schedule='zigzag' is not known; use one of 1f1b"),
    ({"mesh": {"stage": 2, "model": 2}}, {}, r"a pipeline is combined with data, not with model"),
    ({}, {"on": "v9:1x1"}, r"on='v9:1x1' is not known; write kind:shape, as v5e:4x4"),
    ({"mesh": {"data": 0}}, {}, r"mesh\['data'\]=0 is no number of parts; pass a whole number from 1"),
    ({"microbatches": -1}, {}, r"microbatches=-1 is no number of parts"),
    ({"weight": 3}, {}, r"weight=3 is no function"),
    ({"optimizer": "adam"}, {}, r"plan: optimizer is 'adam'; pass an optax optimizer"),
    ({"by": "guess"}, {}, r"by='guess' is not known; use one of 'checked', 'estimate'"),
    ({"mesh": "data=2"}, {}, r"mesh='data=2': pass the sizes of its axes, such as \{'data': 2, 'model': 4\}"),
    ({}, {"devices": "8"}, r"devices='8': pass how many, or a list of devices as of jax.devices\(\)"),
    ({"budget": "much"}, {}, r"budget='much' is not a number of bytes"),
]


@pytest.mark.parametrize(("options", "where", "message"), BAD)
def test_bad_input_is_refused_in_a_line(options: Any, where: Any, message: str) -> None:
    loss, params, batch = MODELS["mlp"]()
    with pytest.raises((ValueError, TypeError), match=message) as error:
        fp.partition.plan(loss, **options)(params, batch, **where)
    assert "\n" not in str(error.value)


def test_a_loss_with_more_and_a_batch_of_more_than_arrays_are_refused() -> None:
    planner = fp.partition.plan(lambda w, x: (jnp.mean(x @ w), {"more": 1}), mesh={"data": 2})
    with pytest.raises(TypeError, match=r"^<lambda> returns a tuple; plan the loss alone, such as lambda"):
        planner(jnp.ones(3), jnp.ones((4, 3)))
    with pytest.raises(TypeError, match=r"^plan: batch\[1\]\['name'\]='digits' is no array; close over it"):
        planner(jnp.ones(3), jnp.ones((4, 3)), {"name": "digits"})
    infinite = lambda w, x: jnp.mean(x @ w) / 0.0  # noqa: E731
    planner = fp.partition.plan(infinite, mesh={"data": 2}, shard_parameters=True)
    with pytest.raises(ValueError, match=r"^the loss of 4 examples is inf, which does not say whether"):
        planner(jnp.ones(3), jnp.ones((4, 3)))


@pytest.mark.parametrize("kind", ["data", "accumulation", "zero", "pipeline"])
def test_a_ragged_batch_is_refused_by_a_step(kind: str) -> None:
    loss, params, (x, y) = MODELS["mlp"]()
    optimizer = optax.sgd(0.1)
    (plan,) = fp.partition.plan(loss, optimizer=optimizer, **MESHES[kind])(params, (x, y))
    step, state = plan.step(optimizer), optimizer.init(params)
    with pytest.raises(ValueError, match=r"array \[0\] of shape \(15, 16\) cannot be cut into the \d equal"):
        step(params, state, (x[:15], y[:15]))
    with pytest.raises(ValueError, match="is for batches"):
        step(params, state, x)


def test_a_batch_without_examples_is_refused_with_the_reason() -> None:
    ranked = lambda w, x: jnp.mean(jnp.sort(x @ w, axis=0) * jnp.arange(1.0, 9.0)[:, None])  # noqa: E731
    arguments = jnp.ones((4, 5)), jax.random.normal(jax.random.key(0), (8, 4))
    with pytest.raises(ValueError, match=r"no axis of the batch can be split; batch\[0\]: `sort` compares"):
        fp.partition.plan(ranked, mesh={"data": 2})(*arguments)
    with pytest.raises(ValueError, match=r"data=2: no axis of the batch can be cut into examples; print"):
        fp.partition.plan(ranked, mesh={"data": 2}, shard_parameters=True)(*arguments)
    rejected = {r.name: r.why for r in fp.partition.plan(ranked)(*arguments, devices=2).rejected}
    assert "compares places along it" in rejected["data 2"]


def test_a_pipeline_refuses_an_optimizer_that_couples_its_stages() -> None:
    loss, params, batch = MODELS["mlp"]()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    (plan,) = fp.partition.plan(loss, **MESHES["pipeline"])(params, batch)
    with pytest.raises(
        ValueError, match=r"reads gradients of several stages .*use optax\.clip, or a plan without"
    ):
        plan.step(optimizer)


def test_plans_for_devices_that_are_not_there() -> None:
    loss, params, batch = MODELS["mlp"](64)
    shapes = jax.eval_shape(lambda *args: args, params, batch)
    plans = fp.partition.plan(loss, optimizer=optax.adam(1e-3))(*shapes, on="v5e:4x4")
    assert plans[0].fits
    assert plans[0].budget == 16 * 2**30
    assert {"data": 16} in [plan.mesh for plan in plans]
    with pytest.raises(ValueError, match="is for v5e:4x4, which is not there; it can be compiled only"):
        plans[0].step(optax.adam(1e-3))
    assert any("needs values" in note for note in plans.named("zero").notes)
