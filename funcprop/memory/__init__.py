"""What a program holds in memory: predicted from its jaxpr, measured on the compiled program."""
