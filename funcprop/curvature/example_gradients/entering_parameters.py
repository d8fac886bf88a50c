"""A model of one example, taken apart: where its parameters enter, and what is known of each gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from funcprop import _jax
from funcprop.curvature.example_gradients.gradient_forms import AtHand, Factors, GradientForm, OuterProducts
from funcprop.curvature.example_gradients.joint_layers import JointLayer, JointLayout, joint_layers
from funcprop.curvature.example_gradients.matrix_layout import MatrixLayout
from funcprop.curvature.example_gradients.mixed_examples import types_of
from funcprop.curvature.example_gradients.outer_products import OuterForm, outer_form
from funcprop.curvature.example_gradients.row_tables import Rows
from funcprop.curvature.example_gradients.shared_leaves import Several
from funcprop.curvature.example_gradients.tapped_model import Numbered, run
from funcprop.curvature.example_gradients.taps import Tap, TapPlan, find
from funcprop.operators.parameters import single_at_least
from funcprop.program.program import Program
from funcprop.rules.primitives import convolution
from funcprop.rules.rule_set import RuleSet
from funcprop.rules.running import with_rules
from funcprop.rules.sets import default

Model = Callable[[Any, Any], Any]

_CONV = "conv_general_dilated"
_CONV_IN_LOOPS = convolution.rule(convolution.plan_in_loops)


@dataclass(frozen=True, eq=False)
class Study:
    """The plan of a model of one example, which takes parameters (the types of whose leaves are `leaves`)."""

    model: Program
    plan: TapPlan
    taps: list[Tap]
    leaves: Sequence[Any]
    rules: RuleSet | None
    layers: Sequence[JointLayer] = ()

    @classmethod
    def of(cls, model: Program, params: Any, rules: RuleSet | None, joint: bool = False) -> Study:
        """Take a traced model apart; with `joint`, a bias is a row of the matrix that it belongs to."""
        leaves = jax.tree.leaves(types_of(params))
        first = len(model.constants)
        plan, taps = find(model.jaxpr, range(first, first + len(leaves)))
        return cls(model, plan, taps, leaves, rules, joint_layers(plan, taps) if joint else ())

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The leaves of each block of the curvature."""
        biases = {layer.weight: layer.bias for layer in self.layers}
        alone = [i for i in range(len(self.leaves)) if i not in biases.values()]
        return tuple((i, biases[i]) if i in biases else (i,) for i in alone)

    @property
    def output(self) -> Any:
        """The type of one example's output."""
        return self.model.results

    def bytes_of_example(self, columns: int) -> int:
        """Count the bytes of one example's stacked cotangents without a gradient's; of a fallback, all."""
        return sum(
            tap.perturbation.size * tap.perturbation.dtype.itemsize * (columns - (tap.reason is None))
            for tap in self.taps
        )

    def forward(self, leaves: Sequence[Any], x: Any, size: int) -> tuple[Any, Callable[[Any], Any], Numbered]:
        """A batch's outputs, the pullback of their cotangents to the taps, and the taps' other operands."""

        def one(x: Any, deltas: Numbered) -> tuple[Any, Numbered]:
            given = [*self.model.constants, *leaves, *jax.tree.leaves(x)]
            results, activations = run(self.plan, self.taps, given, deltas)
            return jax.tree.unflatten(jax.tree.structure(self.output), results), activations

        # In a body, functions of several equations are recognised for what they compute.
        batched = with_rules(jax.jit(jax.vmap(one)), self.rules or _rules())
        zeros = [jnp.zeros((size, *t.perturbation.shape), t.dtype) for t in self.taps]
        return jax.vjp(lambda deltas: batched(x, deltas), dict(enumerate(zeros)), has_aux=True)

    def forms(self, activations: Numbered, cotangents: Numbered, size: int, limit: int) -> list[GradientForm]:
        """Make the form of the gradients in each leaf; cotangents are `[c, n, …]` for each tap."""
        columns = next(iter(cotangents.values())).shape[0] if cotangents else 1
        forms: list[GradientForm] = []
        for i, leaf in enumerate(self.leaves):
            mine = [n for n, tap in enumerate(self.taps) if tap.view.leaf == i]
            found = [form_of(self.taps[n], leaf, activations.get(n), cotangents[n], limit) for n in mine]
            if not found:
                zero = jnp.zeros((columns, size, *leaf.shape), single_at_least(leaf.dtype))
                found = [AtHand(jnp.broadcast_to(zero[:1, :1], zero.shape), limit)]
            whole = len(found) == 1 and (not mine or self._covers(self.taps[mine[0]], leaf))
            alike, why = (False, "") if whole else self._alike(i)
            forms.append(found[0] if whole else Several(found, leaf, size, limit, alike, why))
        for layer in self.layers:
            product = forms[layer.weight]
            assert isinstance(product, OuterProducts)
            forms[layer.weight] = replace(product, form=product.form.with_row(layer.constant))
        return forms

    def kept(self, leaves: Sequence[Any], x: Any, size: int) -> list[tuple[str, str]]:
        """Describe the Kronecker factors of each leaf, expanded and reduced; from types alone."""
        found: list[tuple[str, str]] = []

        def forms(leaves: Sequence[Any], x: Any) -> int:
            output, pull, activations = self.forward(leaves, x, size)
            (cotangents,) = pull(jax.tree.map(jnp.zeros_like, output))
            stacked = {n: g[None] for n, g in cotangents.items()}
            found.extend((f.kept(False), f.kept(True)) for f in self.forms(activations, stacked, size, 1))
            return 0

        jax.eval_shape(forms, leaves, x)
        return found

    def _alike(self, i: int) -> tuple[bool, str]:
        """Whether all places where a leaf enters are outer products with the same blocks, or why not."""
        layouts = set()
        for tap in (tap for tap in self.taps if tap.view.leaf == i):
            if tap.reason is not None:
                return False, tap.reason
            form, name = outer_form(tap), f"`{tap.eqn.primitive.name}`"
            if form is None or form.activations is None:
                return False, f"its use in {name} is no outer product"
            if not self._covers(tap, self.leaves[i]):
                return False, f"{name} uses a part of it"
            layouts.add(self._layout_of(form, tap, self.leaves[i]))
        return len(layouts) == 1, "its uses have it in different orientations"

    @staticmethod
    def _layout_of(form: OuterForm, tap: Tap, leaf: Any) -> MatrixLayout:
        blocks, _, outputs = jax.eval_shape(form.cotangents, tap.perturbation).shape
        return MatrixLayout.of(form.to_leaf, (blocks, leaf.size // (blocks * outputs), outputs), leaf.shape)

    @staticmethod
    def _covers(tap: Tap, leaf: Any) -> bool:
        """Whether a tap's operand has all entries of the leaf."""
        layers = math.prod(loop.length for loop in tap.loops if loop.slices)
        return tap.eqn is None or layers * tap.eqn.invars[tap.operand].aval.size >= leaf.size

    def layout(self, group: tuple[int, ...], factors: Factors) -> MatrixLayout | JointLayout:
        """How the entries of a block's leaves lie in `[k, i, o]` of its factors."""
        weight = self._layout_alone(group[0], factors)
        if len(group) == 1:
            return weight
        bias = self.leaves[group[1]]
        (tap,) = (tap for tap in self.taps if tap.view.leaf == group[1])
        form = outer_form(tap)
        assert form is not None
        (layers, _, columns), of_bias = weight.matrix, form.to_leaf
        blocks = jax.eval_shape(form.cotangents, tap.perturbation).shape[0]
        to_leaf = lambda w: of_bias(w.reshape(blocks, 1, -1))  # noqa: E731
        return JointLayout(weight, MatrixLayout.of(to_leaf, (layers, 1, columns), bias.shape))

    def product_layout(self, i: int) -> MatrixLayout | None:
        """How the entries of a leaf lie in `[k, i, o]`, if it enters one product alone, as a whole."""
        mine = [tap for tap in self.taps if tap.view.leaf == i]
        form = outer_form(mine[0]) if len(mine) == 1 and self._covers(mine[0], self.leaves[i]) else None
        alone = form is not None and form.activations is not None
        return self._layout_of(form, mine[0], self.leaves[i]) if form is not None and alone else None

    def _layout_alone(self, i: int, factors: Factors) -> MatrixLayout:
        leaf = self.leaves[i]
        mine = [tap for tap in self.taps if tap.view.leaf == i]
        # A block of several uses is kept whole if it is small, and then `A` is a number.
        if len(mine) > 1 and factors.activations.size > 1:
            form = outer_form(mine[0])
            assert form is not None
            return self._layout_of(form, mine[0], leaf)
        if (product := self.product_layout(i)) is not None:
            return product
        if len(mine) == 1 and self._covers(mine[0], leaf):
            rows = factors.activations.shape[-1]
            if _takes_rows(mine[0]):
                table = mine[0].eqn.invars[0].aval.shape
                to_leaf = mine[0].view.to_leaf
                shape = (1, rows, leaf.size // rows)
                return MatrixLayout.of(lambda w: to_leaf(w.reshape(table)), shape, leaf.shape)
        return MatrixLayout(leaf.shape, (leaf.size,), (0,), (1, 1, leaf.size))


def _rules() -> RuleSet:
    """The default rules; the sweeps run in a loop over parts of the batch."""
    if default.find(_CONV, jax.default_backend()) is None:
        return default
    return default.replace({_CONV: _CONV_IN_LOOPS})


def form_of(tap: Tap, leaf: Any, activation: Any, g: Any, limit: int) -> GradientForm:
    """Make the form of the gradients at one tap: activations are `[n, …]`, cotangents `[c, n, …]`.

    Where a model computes in fewer bits than its parameters have, gradients and all that is made of them have
    the parameters' precision, and at least float32: squares of half precision vanish or overflow.
    """
    g = g if tap.scale == 1 else g * tap.scale
    dtype = single_at_least(leaf.dtype, g.dtype)
    if (form := outer_form(tap)) is not None:
        g = g.astype(dtype)
        if form.activations is not None:
            return OuterProducts(form, activation.astype(dtype), g, limit)
        folded = jax.vmap(jax.vmap(form.cotangents))(g)  # c n k t o
        w = jax.vmap(jax.vmap(form.to_leaf))(folded.sum(3)[:, :, :, None])
        one_block = folded.shape[2] == 1 and form.positions > 1
        return AtHand(w, limit, folded[:, :, 0] if one_block else None)
    if _takes_rows(tap):
        return _rows(tap, activation, g.astype(dtype), limit)
    w = jax.vmap(jax.vmap(_gradient(tap)), in_axes=(None, 0))(activation, g)
    return AtHand(w.astype(dtype), limit)


def route(tap: Tap) -> tuple[str, str]:
    """How a tap is taken, and why, for the audit."""
    if tap.reason is not None:
        return "gradient", tap.reason
    name = tap.eqn.primitive.name
    form = outer_form(tap)
    loops = "".join(", stacked by a loop" if loop.slices else ", used in a loop" for loop in tap.loops)
    if form is not None and form.activations is None:
        return "sum", f"`{name}`{loops}"
    if form is not None:
        return "outer product", f"`{name}`{loops}"
    if _takes_rows(tap):
        return "rows", f"`{name}`{loops}"
    return "contraction", f"`{name}`{loops}"


def _gradient(tap: Tap) -> Callable[[Any, Any], Any]:
    """From one example's other operand and cotangent to its gradient, by transposing the operator."""

    def one(activation: Any, g: Any) -> Any:
        if tap.eqn is None:
            return g
        operand = tap.eqn.invars[tap.operand].aval

        def operator(w: Any) -> Any:
            operands = [activation, w] if tap.operand else [w, activation]
            return _jax.one_equation(tap.eqn)(*operands[: len(tap.eqn.invars)])[0]

        return jax.linear_transpose(operator, jax.ShapeDtypeStruct(operand.shape, operand.dtype))(g)[0]

    fold: Callable[[Any, Any], Any] = one
    for loop in reversed(tap.loops):
        fold = _over_loop(fold, loop.slices)
    return lambda activation, g: tap.view.to_leaf(fold(activation, g))


def _over_loop(fun: Callable[[Any, Any], Any], slices: bool) -> Callable[[Any, Any], Any]:
    mapped = jax.vmap(fun)
    return mapped if slices else lambda a, g: mapped(a, g).sum(0)


# --- tables -----------------------------------------------------------------------------------


def _takes_rows(tap: Tap) -> bool:
    """Whether a tap is a gather of whole rows."""
    if tap.eqn is None or tap.eqn.primitive.name != "gather" or not tap.view.distinct:
        return False
    numbers, table = tap.eqn.params["dimension_numbers"], tap.eqn.invars[0].aval
    axes = len(tap.shape) - len(table.shape) + 1
    return (
        tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and not numbers.operand_batching_dims
        and tuple(tap.eqn.params["slice_sizes"]) == (1, *table.shape[1:])
        and tuple(numbers.offset_dims) == tuple(range(axes, len(tap.shape)))
        and not any(loop.slices for loop in tap.loops)
    )


def _rows(tap: Tap, indices: Any, g: Any, limit: int) -> Rows:
    table = tap.eqn.invars[0].aval
    ids = indices.reshape(indices.shape[0], -1)
    g = g.reshape(*g.shape[:2], ids.shape[1], -1)
    inside = (ids >= 0) & (ids < table.shape[0])
    if tap.eqn.params["mode"] == GatherScatterMode.CLIP:
        ids = jnp.clip(ids, 0, table.shape[0] - 1)
    elif tap.eqn.params["mode"] == GatherScatterMode.FILL_OR_DROP:
        ids, g = jnp.where(inside, ids, 0), jnp.where(inside[None, :, :, None], g, 0)
    return Rows(ids, g, table.shape[0], lambda w: tap.view.to_leaf(w.reshape(table.shape)), limit)
