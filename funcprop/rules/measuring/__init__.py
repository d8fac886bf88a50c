"""Which rules win on this machine, by measuring each operator of a function."""
