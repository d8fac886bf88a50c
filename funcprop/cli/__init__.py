"""The `funcprop` command: both sweeps of any function from the terminal, one subcommand a file."""

import io
import sys


def main() -> None:
    """Run the command; without the packages that it needs, say how to get them and exit with 1."""
    try:
        import rich
        import typer
    except ModuleNotFoundError as error:
        sys.exit(f"funcprop: the command needs {error.name!r}; pip install 'funcprop[cli]'")
    del rich, typer
    from funcprop.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        # `∂` must not be an error on a terminal that cannot show it.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()
