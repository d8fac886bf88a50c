"""The subcommands, collected."""

import typer

from funcprop.cli.backward import backward
from funcprop.cli.compare import compare
from funcprop.cli.curvature import curvature
from funcprop.cli.derive import derive
from funcprop.cli.draw import draw
from funcprop.cli.forward import forward
from funcprop.cli.memory import memory
from funcprop.cli.partition import partition
from funcprop.cli.rematerialize import rematerialize
from funcprop.cli.report import report
from funcprop.cli.second import second
from funcprop.cli.train import train
from funcprop.cli.tune import tune

HELP = """Backpropagation, opened up: see both sweeps of any JAX function.

TARGET is `module:function` or `path/to/file.py:function`, whose arguments `example()` of the same module
returns: a tuple, a dict of keyword arguments, or (args, kwargs). For `train` it is `module:setup`, a function
without arguments that returns an `fp.training.Setup`; `report` uses a `setup()` beside the function.
`chapter` is built in.
"""

# Plain help: boxes and colours are for terminals, and the help is often piped.
app = typer.Typer(
    help=HELP,
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    *(report, forward, backward, derive, draw),
    *(memory, rematerialize, partition, second, curvature, compare, tune, train),
)
for command in COMMANDS:
    app.command()(command)
