"""Breaking an equation that is wider than the page: before `=`, then before `+` and `−` of its sums."""

from __future__ import annotations

from collections.abc import Iterator

from funcprop.equations.verification import Line


def broken(line: Line, width: int) -> list[str]:
    """The rows of one equation, each no wider than `width` if that can be; later rows are indented."""
    whole = line.text()
    if len(whole) <= width:
        return [whole]
    rows: list[str] = []
    indent = " " * (len(line.left) + len(line.sign) - 1 if len(line.left) < width // 2 else 4)
    for form in line.forms:
        found = list(summands(form.text(), width - len(indent) - 3))
        rows.append(f"{indent} = {found[0]}")
        rows += [f"{indent}   {row}" for row in found[1:]]
    rows[0] = f"{line.left} {line.sign} {rows[0][len(indent) + 3 :]}"
    return rows


def summands(text: str, width: int) -> Iterator[str]:
    """Cut a sum into rows before signs, if that can be outside of all parentheses."""
    while len(text) > width:
        cut = _cut(text, width)
        if cut is None:
            break
        yield text[:cut].rstrip()
        text = text[cut:]
    yield text


def _cut(text: str, width: int) -> int | None:
    """The last place to break at within `width`, in as few parentheses as there are."""
    depth, found = 0, {}
    for i, character in enumerate(text[:width]):
        depth += (character == "(") - (character == ")")
        if i and text[i - 1] == " " and character in "+−⊙":
            found[depth] = i
    shallow = [depth for depth, i in found.items() if i > width // 3]
    return found[min(shallow)] if shallow else max(found.values(), default=None)


def broken_title(title: str, width: int) -> list[str]:
    """The rows of a title, cut after commas."""
    rows = [""]
    for part in title.replace(", ", ",\n").split("\n"):
        row = f"{rows[-1]} {part}".strip()
        if rows[-1] and len(row) > width:
            rows.append(part)
        else:
            rows[-1] = row
    return rows
