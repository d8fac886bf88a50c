"""`python -m funcprop` is the command `funcprop`."""

from funcprop.cli import main

main()
