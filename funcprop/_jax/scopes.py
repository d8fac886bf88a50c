"""Where an equation stands: its named scopes, the user's line, and what it was traced under."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex


def scope(eqn: jex.JaxprEqn) -> str:
    """The named scopes around an equation, outermost first, joined by `/`."""
    return str(eqn.source_info.name_stack)


def scopes_of(eqn: jex.JaxprEqn, outside: Any = None) -> Any:
    """The named scopes of an equation as JAX keeps them, inside of the scopes `outside`."""
    own = eqn.source_info.name_stack
    return own if outside is None else outside + own


def placed(eqn: jex.JaxprEqn, invars: Sequence[Any], outvars: Sequence[jex.Var], stack: Any) -> jex.JaxprEqn:
    """The equation of other operands and results, in other named scopes."""
    where = eqn.source_info.replace(name_stack=stack)
    return eqn.replace(invars=list(invars), outvars=list(outvars), source_info=where)


def in_place_of(like: jex.JaxprEqn, eqn: jex.JaxprEqn, invars: Sequence[Any]) -> jex.JaxprEqn:
    """An equation with the results, scopes, source line and context of the one that it replaces."""
    return eqn.replace(
        invars=list(invars), outvars=list(like.outvars), source_info=like.source_info, ctx=like.ctx
    )


def context(eqn: jex.JaxprEqn) -> Any:
    """The mesh, the placement and the modes under which an equation was traced: comparable."""
    return eqn.ctx


def without_scope(eqn: jex.JaxprEqn) -> jex.JaxprEqn:
    """The equation outside of all named scopes."""
    return placed(eqn, eqn.invars, eqn.outvars, type(scopes_of(eqn))())


@contextlib.contextmanager
def context_of(eqn: jex.JaxprEqn) -> Iterator[None]:
    """Trace under an equation's own scopes, mesh and compute placement."""
    names = scope(eqn)
    with contextlib.ExitStack() as stack:
        stack.enter_context(eqn.ctx.manager)
        if names:
            stack.enter_context(jax.named_scope(names))
        yield
