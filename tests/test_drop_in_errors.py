"""Signatures are JAX's, and bad input is refused by JAX's exception class, in one good line."""

from __future__ import annotations

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import pytest
from drop_in import JAX, RULE_SETS, assert_as_jax, ours, outcome
from jax.extend.core import Primitive

import funcprop as fp

S, X = jnp.array(0.5), jnp.array([0.3, -0.2, 1.0])


# --- signatures -------------------------------------------------------------------------------


def parameters(function):
    return {name: (p.kind, p.default) for name, p in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("name", ["grad", "value_and_grad", "vjp", "jacobian"])
def test_signature(name):
    """As in the running JAX, with `rules` besides, which can only be given by its name."""
    of_ours = parameters(getattr(fp, name))
    assert of_ours.pop("rules") == (inspect.Parameter.KEYWORD_ONLY, None)
    assert of_ours == parameters(getattr(jax, name))
    assert list(of_ours) == list(parameters(getattr(jax, name)))


@pytest.mark.parametrize("name", ["grad", "value_and_grad", "vjp"])
def test_reduce_axes_where_jax_has_it(name):
    def program(t):
        options = {"reduce_axes": ()}
        if name == "vjp":
            return t.vjp(jnp.tanh, S, **options)[0]
        return getattr(t, name)(jnp.tanh, **options)(S)

    has_it = "reduce_axes" in parameters(getattr(jax, name))
    assert_as_jax(program, raises=None if has_it else TypeError)


def test_options_of_jax_by_position():
    def with_aux(x, i):
        return jnp.tanh(x) * i, "aux"

    assert_as_jax(lambda t: t.grad(with_aux, 0, True)(S, 2.0))
    assert_as_jax(lambda t: t.value_and_grad(with_aux, (0, 1), True, False, True)(S, jnp.array(2)))
    assert_as_jax(lambda t: t.jacobian(lambda x, i: (jnp.tanh(x) * i, None), 1, True)(X, 2.0))


def loss_with_a_name(params, *, scale: float = 2.0):
    """Its documentation."""
    return jnp.sum(jnp.tanh(params)) * scale


class Callable:
    def __call__(self, x):
        return jnp.tanh(x)


NAMED = {
    "function": loss_with_a_name,
    "partial": functools.partial(loss_with_a_name, scale=3.0),
    "object": Callable(),
    "function of JAX": jnp.tanh,
    "lambda": lambda x: x,
}


@pytest.mark.parametrize("fun", NAMED.values(), ids=NAMED)
def test_name_and_documentation_of_a_gradient(fun):
    def described(function):
        return function.__name__, function.__doc__, str(inspect.signature(function))

    for name in ("grad", "value_and_grad", "jacobian"):
        expected = described(getattr(jax, name)(fun))
        assert described(getattr(fp, name)(fun)) == expected


# --- bad input --------------------------------------------------------------------------------

undefined, without_values = Primitive("undefined"), Primitive("without_values")
undefined.def_impl(lambda x: x)
undefined.def_abstract_eval(lambda x: x)
without_values.def_impl(lambda x: x)


def raises_its_own(x):
    raise ZeroDivisionError("mine")


# What is asked, the exception's class, and what its message says.
ERRORS = {
    "vector result": (lambda t: t.grad(jnp.tanh)(X), TypeError, r"tanh returns float64\[3\].*scalar"),
    "no result": (lambda t: t.grad(lambda x: None)(S), TypeError, "returns None.*scalar"),
    "text as a result": (lambda t: t.grad(lambda x: "a")(S), TypeError, "'a'"),
    "complex result": (lambda t: t.grad(lambda x: x * 1j)(S), TypeError, "real-valued outputs"),
    "two results": (lambda t: t.grad(lambda x: (x, x))(S), TypeError, "scalar"),
    "integer": (lambda t: t.grad(jnp.tanh)(1), TypeError, r"argument 0 of tanh is 1 .int64.*no derivative"),
    "integers in a tree": (
        lambda t: t.grad(lambda p: p["a"])({"a": jnp.arange(3)}),
        TypeError,
        r"argument 0\['a'\].*no derivative",
    ),
    "text": (lambda t: t.grad(lambda x: 1.0)("a"), TypeError, "'a'"),
    "object": (lambda t: t.grad(lambda x: 1.0)(Callable()), TypeError, "Callable"),
    "too few arguments": (
        lambda t: t.grad(lambda x, y: x * y)(1.0),
        TypeError,
        "missing a required argument: 'y'",
    ),
    "argnums": (
        lambda t: t.grad(jnp.tanh, argnums=1)(1.0),
        TypeError,
        "argnums=1, but tanh is called with 1",
    ),
    "argnums of text": (lambda t: t.grad(jnp.tanh, argnums="x")(1.0), TypeError, "str"),
    "by keyword only": (
        lambda t: t.grad(lambda x: x)(x=1.0),
        TypeError,
        "argnums=0.*called with 0 positional",
    ),
    "unknown option": (lambda t: t.grad(jnp.tanh, argnum=0), TypeError, "argnum"),
    "no pair": (lambda t: t.grad(jnp.tanh, has_aux=True)(S), TypeError, "aux"),
    "three for a pair": (lambda t: t.grad(lambda x: (x, 1, 2), has_aux=True)(S), TypeError, "aux"),
    "not a function": (lambda t: t.grad(3)(1.0), TypeError, "3"),
    "not a function, vjp": (lambda t: t.vjp("tanh", 1.0), TypeError, "tanh"),
    "pullback of another shape": (lambda t: t.vjp(jnp.tanh, X)[1](S), ValueError, r"\(3,\)|64\[3\]"),
    "holomorphic of reals": (lambda t: t.grad(jnp.tanh, holomorphic=True)(S), TypeError, "holomorphic"),
    "jacobian of integers": (lambda t: t.jacobian(jnp.tanh)(jnp.arange(3)), TypeError, "allow_int"),
    "undefined primitive": (
        lambda t: t.grad(lambda x: undefined.bind(x * 2))(S),
        NotImplementedError,
        "^Differentiation rule for 'undefined' not implemented",
    ),
    "primitive without abstract values": (
        lambda t: t.grad(lambda x: without_values.bind(x * 2))(S),
        NotImplementedError,
        "^Differentiation rule for 'without_values' not implemented",
    ),
    "the function's own": (lambda t: t.grad(raises_its_own)(S), ZeroDivisionError, "^mine"),
    "the function's own under jit": (
        lambda t: jax.jit(t.grad(raises_its_own))(S),
        ZeroDivisionError,
        "^mine",
    ),
}


@pytest.mark.parametrize(("program", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(program, error, message):
    assert_as_jax(program, raises=error)
    for rules in RULE_SETS:
        raised = outcome(program, ours(rules))
        assert re.search(message, str(raised)), raised
        assert "\n" not in str(raised)
        assert not any("funcprop" in note for note in getattr(raised, "__notes__", ()))


OF_ARGUMENTS = ("integer", "text", "by keyword only")  # JAX's words, then ours
OF_RESULTS = ("vector result", "no result", "two results", "three for a pair")


@pytest.mark.parametrize("case", [*OF_ARGUMENTS, *OF_RESULTS])
def test_a_message_begins_with_jax_s_words_by_which_other_programs_know_it(case):
    program = ERRORS[case][0]
    words = str(outcome(program, JAX)).partition("\n")[0].partition(". ")[0].rstrip(".")
    message = str(outcome(program, ours(fp.rules.default)))
    assert message.startswith(f"{words}. ")
    assert re.search(ERRORS[case][2], message[len(words) :]), message


def test_a_primitive_without_abstract_values_beside_the_differentiated_ones():
    assert_as_jax(lambda t: t.grad(lambda x, y: jnp.tanh(x) * without_values.bind(y * 2))(S, X[0]))


# --- values that are used after their time ----------------------------------------------------


def leaked(t, way=lambda gradient: gradient):
    kept = []

    def loss(x):
        kept.append(jnp.tanh(x) * 2)  # made here
        return x * 2

    way(t.grad(loss))(S)
    return kept[0]


LINE = next(
    number
    for number, line in enumerate(inspect.getsource(inspect.getmodule(leaked)).splitlines(), start=1)
    if line.endswith("# made " + "here")
)
USES = {
    "an operation": lambda x: x + 1,
    "a function with a rule": lambda x: jax.nn.relu(x),
    "another gradient": lambda x: jax.grad(lambda y: y * x)(S),
    "another gradient with rules": lambda x: fp.grad(lambda y: jnp.tanh(y * x))(S),
    "a jitted function": lambda x: jax.jit(lambda y: y * 2)(x),
    "a closure under jit": lambda x: jax.jit(lambda: x * 2)(),
    "vmap": lambda x: jax.vmap(lambda y: y * x)(X),
}


@pytest.mark.parametrize("way", [lambda gradient: gradient, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_leaked_value_is_said(use, way):
    """The message names the value by its type, and the line of the user's function that made it."""
    assert isinstance(outcome(lambda t: use(leaked(t, way)), JAX), jax.errors.UnexpectedTracerError)
    for rules in RULE_SETS:
        value = leaked(ours(rules), way)
        with pytest.raises(jax.errors.UnexpectedTracerError) as raised:
            use(value)
        message = str(raised.value)
        assert re.search(r"float64\[\]|f64\[\]", message), message
        assert re.search(rf"test_drop_in_errors\.py:{LINE}\b", message), message


def test_a_leaked_argument_is_said():
    kept = []

    def loss(x):
        kept.append(x)
        return jnp.tanh(x)

    for rules in RULE_SETS:
        fp.grad(loss, rules=rules)(X[0])
        with pytest.raises(jax.errors.UnexpectedTracerError, match=r"float64\[\]|f64\[\]"):
            kept.pop() * 2


def test_what_is_not_differentiated_may_leave():
    def program(t):
        kept = []

        def loss(x, y):
            kept.append(jnp.tanh(y))
            kept.append(jax.lax.stop_gradient(x) * 2)
            return jnp.tanh(x)

        t.grad(loss)(S, X)
        return [value + 1 for value in kept]

    assert_as_jax(program)


# --- rules ------------------------------------------------------------------------------------

WRONG_SETS = {
    "dictionary": {"tanh": None},
    "name": "handwritten",
    "list": [],
    "rule": fp.Rule(lambda x: (x, ()), lambda r, g, n: (g,)),
    "module": fp.rules,
    "class": fp.RuleSet,
    "number": 0,
}
TAKE_RULES = {
    "grad": lambda rules: fp.grad(jnp.tanh, rules=rules)(S),
    "value_and_grad": lambda rules: fp.value_and_grad(jnp.tanh, rules=rules)(S),
    "vjp": lambda rules: fp.vjp(jnp.tanh, S, rules=rules),
    "jacobian": lambda rules: fp.jacobian(jnp.tanh, rules=rules)(S),
    "hvp": lambda rules: fp.hvp(jnp.tanh, rules=rules)(S, S),
    "with_rules": lambda rules: fp.with_rules(jnp.tanh, rules)(S),
}


@pytest.mark.parametrize("wrong", WRONG_SETS.values(), ids=WRONG_SETS)
@pytest.mark.parametrize("call", TAKE_RULES.values(), ids=TAKE_RULES)
def test_rules_of_the_wrong_type(call, wrong):
    message = rf"^rules={re.escape(repr(wrong))}.*is not a rule set; pass "
    with pytest.raises(fp.RuleError, match=message) as raised:
        call(wrong)
    assert "\n" not in str(raised.value)


def failing(*_, **__):
    raise OverflowError("out of luck")


def tangents_fail(residuals, tangents, **_):
    return failing()


FAILING = {
    "forward": fp.Rule(failing, lambda r, g, n, **_: (g,)),
    "backward": fp.Rule(lambda x, **_: (jnp.tanh(x), x), failing),
    "applies": fp.Rule(lambda x, **_: (jnp.tanh(x), x), lambda r, g, n, **_: (g,), applies=failing),
}


@pytest.mark.parametrize("way", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
@pytest.mark.parametrize("rule", FAILING.values(), ids=FAILING)
def test_a_rule_that_raises(rule, way):
    """Its own exception arrives, and says whose rule it was; the next call is as if nothing had happened."""
    rules = fp.rules.handwritten.replace({"tanh": rule})
    gradient = way(fp.grad(lambda x: jnp.exp(jnp.tanh(x * 2)), rules=rules))
    argument = X if way is jax.vmap else S
    for _ in range(2):
        with pytest.raises(OverflowError, match="out of luck") as raised:
            gradient(argument)
        said = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", ())])
        assert "rule for tanh" in said
    assert not isinstance(jnp.ones(2) * 2, jax.core.Tracer)
    assert_as_jax(lambda t: t.grad(lambda x: jnp.tanh(x) if x > 0 else x)(S))
