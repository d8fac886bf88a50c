"""`python -m funcprop.cli` is the `funcprop` command."""

from funcprop.cli import main

main()
