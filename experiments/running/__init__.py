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


def folder(smoke: bool) -> Path:
    """Where results go: `results`, or `results/smoke`, so that a trial leaves those of the full run alone."""
    found = RESULTS / "smoke" if smoke else RESULTS
    found.mkdir(parents=True, exist_ok=True)
    return found


def write(name: str, smoke: bool, content: Any, draw: Callable[[Path], None], **options: Any) -> None:
    """Write `NAME.json` into the folder, with the options of `json.dumps`, and let `draw` make `NAME.png`."""
    where = folder(smoke)
    (where / f"{name}.json").write_text(json.dumps(content, indent=2, **options))
    draw(where / f"{name}.png")
