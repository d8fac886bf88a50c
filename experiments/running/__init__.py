"""What every experiment does alike: read the command line, and write what was found."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def command_line(description: str | None, smoke: str) -> argparse.ArgumentParser:
    """The options of an experiment: `--smoke`, which runs it in seconds; `smoke` says what that leaves."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help=smoke)
    return parser


def write(name: str, content: Any, draw: Callable[[Path], None], **options: Any) -> None:
    """Write `results/NAME.json`, with the options of `json.dumps`, and let `draw` make `results/NAME.png`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2, **options))
    draw(RESULTS / f"{name}.png")
