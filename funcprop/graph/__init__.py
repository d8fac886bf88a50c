"""A function as a graph of named variables and operators."""
