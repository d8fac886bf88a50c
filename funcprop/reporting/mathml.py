"""The LaTeX of `fp.derive` as MathML, which browsers typeset themselves.

Only what `rules.expressions` and the rules write is read: names (`\\mathrm`, `\\mathbf`, `\\text`), Greek
letters, fractions, scripts, fences. A name stays one token, whatever characters it has; general converters
take it apart into letters, which a screen reader then spells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from funcprop.drawing.geometry import clipped

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+(?:\.\d+)?(?:e[+-]?\d+)?|[^\W\d_]+|\s+|.", re.DOTALL)

_IDENTIFIERS = {
    "alpha": "α", "beta": "β", "gamma": "γ", "epsilon": "ε", "eta": "η", "theta": "θ", "lambda": "λ",
    "mu": "μ", "sigma": "σ", "phi": "φ", "psi": "ψ", "chi": "χ", "ell": "ℓ", "infty": "∞",
    "log": "log", "exp": "exp", "max": "max", "min": "min", "tanh": "tanh", "sin": "sin", "cos": "cos",
    "det": "det",
    "varphi": "φ", "tau": "τ", "rho": "ρ", "omega": "ω", "pi": "π", "Delta": "Δ", "Sigma": "Σ", "Phi": "Φ",
}  # fmt: skip
_OPERATORS = {
    "partial": "∂", "odot": "⊙", "top": "⊤", "cdot": "·", "times": "×", "ast": "∗", "geq": "≥",
    "leftarrow": "←", "leq": "≤", "neq": "≠", "circ": "∘", "otimes": "⊗", "mid": "|", "ldots": "…",
    "dots": "…", "cdots": "⋯", "in": "∈", "prime": "′", "vee": "∨", "wedge": "∧",
}  # fmt: skip
_FENCES = {"lVert": "‖", "rVert": "‖"}
_SPACES = {",": "0.17em", " ": "0.25em", "!": None}
_LONGEST = 20

# Characters that LaTeX writes by a command.
_CHARACTERS = {"backslash": "\\", "sim": "~", "wedge": "^"}


class MathError(ValueError):
    """A formula has something that this converter does not know."""


def mathml(latex: str, text: str) -> str:
    """A formula as one `<math>` element; `text` is the same for those who cannot see it.

    Raises:
        MathError: a command that `fp.derive` does not write, or braces that do not match.
    """
    formula = _Formula(latex)
    content = formula.row(None)
    return f'<math alttext="{escape(text)}">{content}</math>'


class _Formula:
    """Reads a formula from left to right."""

    def __init__(self, latex: str) -> None:
        self.latex = latex
        self.tokens = list(_TOKEN.findall(latex))
        self.at = 0

    def peek(self) -> str | None:
        """The next token that is no white space."""
        while self.at < len(self.tokens) and self.tokens[self.at].isspace():
            self.at += 1
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self) -> str:
        """The next token, which there must be."""
        token = self.peek()
        if token is None:
            raise MathError(f"the formula {self.latex!r} ends in the middle.")
        self.at += 1
        return token

    def row(self, end: str | None) -> str:
        """Everything up to the token `end`, or to the end of the formula."""
        return "".join(self.items(end))

    def items(self, end: str | None) -> Iterator[str]:
        """The elements of a row."""
        while (token := self.peek()) != end:
            if token is None:
                raise MathError(f"the formula {self.latex!r} has no {end!r} where one is needed.")
            yield self.scripted()
        if end is not None:
            self.take()

    def scripted(self) -> str:
        """An element with its subscript, superscript and primes."""
        base = self.element()
        below: str | None = None
        above: list[str] = []
        while (token := self.peek()) in ("_", "^", "'"):
            self.take()
            if token == "'":
                # The character is raised by itself.
                base = f'<mrow>{base}<mo lspace="0" rspace="0">′</mo></mrow>'
            elif token == "^":
                above.append(self.argument())
            else:
                below = self.argument()
        upper = above[0] if len(above) == 1 else f"<mrow>{''.join(above)}</mrow>"
        if below is not None:
            return f"<msubsup>{base}{below}{upper}</msubsup>" if above else f"<msub>{base}{below}</msub>"
        return f"<msup>{base}{upper}</msup>" if above else base

    def argument(self) -> str:
        """A group in braces, or one element."""
        if self.peek() != "{":
            return self.element()
        self.take()
        items = list(self.items("}"))
        return items[0] if len(items) == 1 else f"<mrow>{''.join(items)}</mrow>"

    def element(self) -> str:
        """One element without scripts."""
        token = self.take()
        if token == "{":
            self.at -= 1
            return self.argument()
        if token.startswith("\\"):
            return self.command(token[1:])
        if token[0].isdigit():
            return f"<mn>{token}</mn>"
        if token[0].isalpha():
            return f"<mi>{token}</mi>"
        if token in "}&":
            raise MathError(f"the formula {self.latex!r} has {token!r} where it means nothing.")
        return f"<mo>{'−' if token == '-' else escape(token)}</mo>"

    def command(self, name: str) -> str:
        """Translate a command."""
        if name == "sqrt":
            return f"<msqrt>{self.argument()}</msqrt>"
        if name == "frac":
            return f"<mfrac>{self.argument()}{self.argument()}</mfrac>"
        if name == "left":
            opening = escape(self.take())
            content = self.row("\\right")
            closing = escape(self.take())
            return f"<mrow><mo>{opening}</mo>{content}<mo>{closing}</mo></mrow>"
        if name == "mathbf":
            return f'<mi mathvariant="normal" class="bold">{escape(self.words())}</mi>'
        if name == "mathrm":
            return f'<mi mathvariant="normal">{escape(self.words())}</mi>'
        if name in ("text", "texttt"):
            return f"<mtext>{escape(self.words())}</mtext>"
        if name == "sum":
            return "<mo>∑</mo>"
        if name in _SPACES:
            width = _SPACES[name]
            return "" if width is None else f'<mspace width="{width}"/>'
        if name in _IDENTIFIERS:
            return f"<mi>{_IDENTIFIERS[name]}</mi>"
        if name in _OPERATORS:
            return f"<mo>{_OPERATORS[name]}</mo>"
        if name in _FENCES:
            return f'<mo stretchy="false">{_FENCES[name]}</mo>'
        raise MathError(f"the formula {self.latex!r} has the command \\{name}, which is not known.")

    def words(self) -> str:
        """The text in braces, as it is, its escaped characters without their backslash."""
        if self.take() != "{":
            raise MathError(f"the formula {self.latex!r} has a name without braces.")
        found: list[str] = []
        while self.at < len(self.tokens) and (token := self.tokens[self.at]) != "}":
            self.at += 1
            if token[:1] != "\\":
                found.append(token)
            elif not token[1:].isalpha():
                found.append(token[1:])
            elif token[1:] in _CHARACTERS:
                # The space that ends a command is no part of the name.
                found.append(_CHARACTERS[token[1:]])
                self.tokens[self.at] = self.tokens[self.at].removeprefix(" ")
            else:
                raise MathError(f"the formula {self.latex!r} has the command {token} inside of a name.")
        self.take()
        return _shortened("".join(found))


def _shortened(name: str) -> str:
    """The end of a long path of scopes; `alttext` has all of it."""
    if len(name) <= _LONGEST:
        return name
    return clipped("…/" + "/".join(name.split("/")[-2:]) if name.count("/") > 1 else name, 2 * _LONGEST)
