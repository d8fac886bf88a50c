"""What a notebook shows as a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar


class Pictured:
    """A notebook shows the picture that `svg_of` makes; what draws tells it here, from above."""

    svg_of: ClassVar[Callable[[Any], str | None] | None] = None

    def _repr_svg_(self) -> str | None:
        return None if Pictured.svg_of is None else Pictured.svg_of(self)
